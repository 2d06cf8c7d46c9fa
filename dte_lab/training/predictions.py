"""How the predicted word moves during pre-training: v* of a few fixed pictures, step by step."""

import json

import numpy as np
import torch

from dte_lab.encoder import mean_prediction
from dte_lab.features import ImageFeatures


class Predictions:
    """A file with one line of JSON per step: {"step": s, "v_star": [one embedding per picture]}.

    They are what `TuningEncoder.predict` gives. The backbone is frozen, so the pictures' features
    are computed once, and a line costs one pass through the encoder.
    """

    def __init__(self, path, backbone, encoder, images, prompt_encoder):
        """images: (B, 3, H, W) in [-1, 1], each of another concept."""
        self.path = path
        features = [
            encoder.static_features(backbone, image[None], prompt_encoder=prompt_encoder)
            for image in images
        ]
        clip, unet, timesteps = zip(*features, strict=True)
        clip = ImageFeatures(*(torch.cat(part) for part in zip(*clip, strict=True)))
        self.features = clip, torch.cat(unet), torch.cat(timesteps)
        self.rows = len(timesteps[0])  # per picture

    @torch.no_grad()
    def write(self, encoder, step):
        """Append the predictions of the encoder as it is now; step 0 begins the file anew."""
        was_training = encoder.training
        v_star = mean_prediction(encoder.eval()(*self.features), self.rows).v_star  # (B, d)
        encoder.train(was_training)
        line = {"step": step, "v_star": v_star.double().cpu().numpy().round(6).tolist()}
        with open(self.path, "w" if step == 0 else "a") as file:
            file.write(json.dumps(line) + "\n")


def read_predictions(path):
    """Steps (n,) and v* (n, B, d) of a file that `Predictions` wrote, as arrays."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    return steps, np.array([line["v_star"] for line in lines], dtype=np.float32)
