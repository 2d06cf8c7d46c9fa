"""The summary over the steps: least steps, their intervals, and the loss beside the quality."""

import json

import pytest
import torch

from dte_lab import DTEPipeline
from dte_lab.common.images import to_pil
from dte_lab.evaluation import steps
from dte_lab.evaluation.measures import LOSSES, PICTURE_MEASURES, diffusion_loss
from dte_lab.evaluation.records import Row
from dte_lab.evaluation.steps import steps_needed, summarise_steps


def rows(margins, losses):
    """margins: {(method, steps): one identity margin per concept}; the true ones have 0.5."""
    names = ("cat", "dog", "tram", "bus")
    table = []
    for (method, n), values in (margins | {("oracle", 0): (0.5,) * 4}).items():
        for name, margin in zip(names, values, strict=True):
            group = "animals" if name in ("cat", "dog") else "things"
            measures = dict.fromkeys(PICTURE_MEASURES, 0.5) | {"scene": 1}
            measures |= dict.fromkeys(LOSSES, losses.get(n, 1))
            measures |= {"identity_margin": margin, "seconds": n + 1}
            for is_style in (False, True):
                table.append(
                    Row(method, n, name, group, "noto", "white", "x", is_style, **measures)
                )
    return table


MARGINS = {
    ("dte", 0): (0.1,) * 4, ("dte", 4): (0.4, 0.4, 0.1, 0.1), ("dte", 12): (0.4,) * 4,
    ("dte", 50): (0.2,) * 4,
    ("ti", 0): (0.0,) * 4, ("ti", 4): (0.0,) * 4, ("ti", 12): (0.1,) * 4, ("ti", 50): (0.1,) * 4,
}  # fmt: skip
FALLING = {0: 0.9, 4: 0.7, 12: 0.5, 50: 0.3}


def test_steps_needed():
    curve = {0: 0.1, 4: 0.8, 8: 0.5, 12: 0.8, 25: 0.9}
    assert steps_needed(curve, 0.7) == 4
    assert steps_needed(curve, 0.7, patience=1) == 12
    assert steps_needed(curve, 0.85) == 25
    assert steps_needed(curve, 0.95) is None


def test_least_steps_by_group():
    least = summarise_steps(rows(MARGINS, FALLING))["least"]
    assert set(least) == {"all", "animals", "things"}
    assert least["animals"]["methods"]["dte"] == {"steps": 4, "low": 4, "high": 4}
    assert least["things"]["methods"]["dte"] == {"steps": 12, "low": 12, "high": 12}
    assert least["all"]["methods"]["dte"]["steps"] == 12
    low, high = (least["all"]["methods"]["dte"][k] for k in ("low", "high"))
    assert (low, high) == (4, 12), "some resamples hold animals alone"
    assert least["things"]["methods"]["ti"]["steps"] is None
    assert least["all"]["n"] == 4 and least["animals"]["n"] == 2
    best = 2 * 0.8 / 1.8  # harmonic mean of identity 0.4 / 0.5 and scene 1
    assert least["all"]["level"] == pytest.approx(steps.SHARE * best)


def test_where_nothing_has_fidelity_nothing_satisfies():
    nothing = {key: (0.0,) * 4 for key in MARGINS}
    least = summarise_steps(rows(nothing, FALLING))["least"]
    assert least["all"]["methods"]["dte"] == {"steps": None, "low": None, "high": None}


def test_the_guide_correlates_loss_and_quality_over_the_steps():
    summary = summarise_steps(rows(MARGINS, FALLING))
    guide = summary["guide"]["ti"]
    assert guide["all"]["loss"]["fidelity"]["mean"] == pytest.approx(-0.8944, abs=1e-3)
    assert guide["early"]["steps"] == [0, 4, 12] and "late" not in guide
    assert "scene" not in guide["all"]["loss"], "a constant has no correlation"
    (first, *_) = summary["points"]
    assert first["loss"] == 0.9 and first["seconds"] == 1
    (point, *_) = summary["curves"]["dte"]["fidelity"]
    assert point["steps"] == 0 and point["n"] == 4
    json.dumps(summary)


def test_diffusion_loss_has_fixed_noise_and_sees_the_concept(
    tiny_backbone, tiny_encoder, tiny_pixels
):
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)
    before = pipe.personalize(to_pil(tiny_pixels[:1]), 0, progress=False)
    after = pipe.personalize(to_pil(tiny_pixels[:1]), 30, progress=False)
    prompts = ["a picture of S*"]
    given = [diffusion_loss(pipe, c, tiny_pixels[:1], prompts) for c in (before, before, after)]
    assert given[0] == given[1] > given[2]
    torch.manual_seed(5)  # the global seed has no part in it
    assert diffusion_loss(pipe, before, tiny_pixels[:1], prompts) == given[0]
    assert diffusion_loss(pipe, before, tiny_pixels[:1], prompts, seed=2) != given[0]
