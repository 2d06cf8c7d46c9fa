"""What is predicted of a concept, and what predicts it."""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dte_lab.backbone import Backbone
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.lora import Offsets
from dte_lab.tokens import PromptEncoder, TokenTable


@dataclass
class EncoderPrediction:
    """v* and offsets {"layer.projection": (A (B, Din, r), B (B, r, Dout))} of B pictures.

    class_word: the embedding of the word that CLIP finds first in the picture.
    """

    v_star: Float[Tensor, "batch dim"]
    offsets: Offsets
    class_word: Float[Tensor, "batch dim"] | None = None


class Predictor(Protocol):
    """Where a concept starts: a TuningEncoder or, without a trained one, a ZeroShotStart.

    Whatever looks at noisy latents or at weights asks `trained_encoder` first.
    """

    settings: EncoderConfig
    method: MethodConfig
    bank: Float[Tensor, "rows dim"]
    bank_concepts: Int[Tensor, " rows"]

    def predict(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        seed: int = 0,
        prompt_encoder: PromptEncoder | None = None,
    ) -> EncoderPrediction:
        """v* and offsets (batch 1) of pictures of *one* concept in [-1, 1]."""

    def class_row(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        table: TokenTable,
    ) -> int:
        """Row of the table with the word that CLIP finds in pictures of one concept."""

    def eval(self) -> Self: ...

    def to(self, device: torch.device | str) -> Self: ...


def mean_prediction(prediction: EncoderPrediction, n: int) -> EncoderPrediction:
    """Mean over each n neighbouring rows of an EncoderPrediction: batch B * n -> B.

    Of different class words the mean, which is then no word itself.
    """

    def mean(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, n)).mean(dim=1)

    offsets = {key: (mean(a), mean(b)) for key, (a, b) in prediction.offsets.items()}
    return EncoderPrediction(mean(prediction.v_star), offsets, mean(prediction.class_word))
