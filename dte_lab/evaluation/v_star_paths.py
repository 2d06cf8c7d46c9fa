"""Where v* went while it was tuned, and while its encoder was trained: paths on the word map."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from dte_lab.training.predictions import read_predictions
from dte_lab.world.sprites import SAMPLE_CONCEPTS

MOST_POINTS = 40  # of a path in pre-training


class VStarPath(NamedTuple):
    """Where v* went: after each of `steps`, one row of v_star."""

    steps: list[int]
    v_star: Float[Tensor, "steps dim"]


VStarPaths = dict[str, VStarPath]  # by "PHASE.REGULARISER.NAME"


def pretraining_paths(runs: Mapping[str, Path]) -> VStarPaths:
    """ "pretraining.REGULARISER.NAME" of runs by regulariser."""
    paths = {}
    for kind, run in runs.items():
        steps, v_star = read_predictions(run / "predictions.jsonl")  # (n,), (n, B, d)
        chosen = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
        for i, name in enumerate(SAMPLE_CONCEPTS):
            path = VStarPath(steps[chosen].tolist(), torch.from_numpy(v_star[chosen, i]))
            paths[f"pretraining.{kind}.{name}"] = path
    return paths


def read_paths(file: Path) -> VStarPaths:
    """The paths in `out` with the suffix .safetensors."""
    vectors = load_file(file)
    keys = [key.removesuffix(".steps") for key in vectors if key.endswith(".steps")]
    return {
        key: VStarPath(vectors[f"{key}.steps"].tolist(), vectors[f"{key}.v_star"].float())
        for key in keys
    }
