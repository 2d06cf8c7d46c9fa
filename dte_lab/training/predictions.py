"""How the predicted word moves during pre-training: v* of a few fixed pictures, step by step."""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab.common.resume import append_line
from dte_lab.encoder import TuningEncoder, mean_prediction
from dte_lab.features import ImageFeatures
from dte_lab.pipeline import DTEPipeline


class Predictions:
    """A file with one line of JSON per step: {"step": s, "v_star": [one embedding per picture]}.

    They are what `TuningEncoder.predict` gives. The backbone is frozen, so the pictures' features
    are computed once, and a line costs one pass through the encoder.
    """

    def __init__(
        self, path: Path, pipe: DTEPipeline, images: Float[Tensor, "batch 3 pixels pixels"]
    ) -> None:
        """images: in [-1, 1], each of another concept."""
        self.path = path
        features = [
            pipe.encoder.static_features(
                pipe.backbone, image[None], prompt_encoder=pipe.prompt_encoder
            )
            for image in images
        ]
        clip, unet, timesteps = zip(*features, strict=True)
        clip = ImageFeatures(*(torch.cat(part) for part in zip(*clip, strict=True)))
        self.features = clip, torch.cat(unet), torch.cat(timesteps)
        self.rows = len(timesteps[0])  # per picture

    @torch.no_grad()
    def write(self, encoder: TuningEncoder, step: int) -> None:
        """Append the predictions of the encoder as it is now; step 0 begins the file anew."""
        v_star = mean_prediction(encoder(*self.features), self.rows).v_star  # (B, d)
        if step == 0:
            self.path.unlink(missing_ok=True)
        append_line(
            self.path, {"step": step, "v_star": v_star.double().cpu().numpy().round(6).tolist()}
        )


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and v* (n, B, d) of a file that `Predictions` wrote, as arrays."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    return steps, np.array([line["v_star"] for line in lines], dtype=np.float32)
