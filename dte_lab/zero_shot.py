"""Where no encoder has been trained: v* starts as the nearest words, the offsets at zero.

Takes the encoder's place in `DTEPipeline` (`encoder.Predictor`). No encoder for Stable Diffusion
1.5 has ever been released, so this is how it begins there. ("ours, not the paper's", which always
has an encoder)

What an encoder predicts at once must then be learned by tuning. Plan for 25 to 50 steps. One of
them moves the offsets as far as about ten steps of diffusers' example of DreamBooth with LoRA, so
some hundred are thousands of those; in the small world they cost the prompt and the variety.

A mixture of words is as good as the best word for the picture itself, and better for the thing in
other scenes (small world, 24 things of val, v* alone: loss lower by 0.031 +- 0.015).
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab.backbone import Backbone
from dte_lab.clip_words import mix_words, similarity_of_pictures, word_clip_embeddings
from dte_lab.common.random import stream
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.features import image_features
from dte_lab.lora import projection_shapes
from dte_lab.prediction import EncoderPrediction
from dte_lab.tokens import PromptEncoder, TokenTable


class ZeroShotStart:
    """A mixture of the words that CLIP finds in the pictures, and offsets with A random and B = 0.

    What looks at noisy latents or tunes weights (`prediction_interval`, `trainable`) needs a
    trained encoder and says so; all else works as with one.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: EncoderConfig | None = None,
        method: MethodConfig | None = None,
    ) -> None:
        self.settings = settings or EncoderConfig.of(backbone.recommended)
        self.method = method or MethodConfig()
        width = backbone.text_encoder.config.hidden_size
        self.bank = torch.zeros(0, width, device=backbone.device)  # no concepts to keep away from
        self.bank_concepts = torch.zeros(0, dtype=torch.long, device=backbone.device)
        self.word_clip = None  # (n, p), computed when first needed: many short texts

    def eval(self) -> Self:
        return self

    def to(self, device: torch.device | str) -> Self:
        self.bank, self.bank_concepts = self.bank.to(device), self.bank_concepts.to(device)
        return self

    @torch.no_grad()
    def predict(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        seed: int = 0,
        prompt_encoder: PromptEncoder | None = None,
    ) -> EncoderPrediction:
        """Prediction (batch 1) from pictures of *one* concept in [-1, 1].

        v* is the mixture of the `zero_shot_words` that are most like the pictures, on average, at
        `zero_shot_temperature`; class_word is the best of them. A has entries of variance 1/Din,
        from `seed`; with B = 0 the UNet is unchanged.
        Raises DTEError when the text encoder has no projection to CLIP space.
        """
        table = (prompt_encoder or PromptEncoder(backbone)).table
        similarity = self.similarity(backbone, images, table)[None]  # (1, n)
        count, temperature = self.settings.zero_shot_words, self.settings.zero_shot_temperature
        v_star = mix_words(similarity, table.embeddings, count, temperature)  # (1, d)
        generator, rank, offsets = stream(seed, "zero-shot offsets"), self.settings.rank, {}
        for key, (d_in, d_out) in projection_shapes(backbone.unet).items():
            a = torch.randn(1, d_in, rank, generator=generator) * d_in**-0.5
            offsets[key] = a.to(v_star), v_star.new_zeros(1, rank, d_out)
        return EncoderPrediction(v_star, offsets, table.embeddings[similarity.argmax(dim=-1)])

    @torch.no_grad()
    def class_row(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        table: TokenTable,
    ) -> int:
        """Row of the word whose "a picture of a WORD" is most like the pictures, on average."""
        return int(self.similarity(backbone, images, table).argmax())

    @torch.no_grad()
    def similarity(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        table: TokenTable,
    ) -> Float[Tensor, " words"]:
        """Mean CLIP cosine of the pictures to "a picture of a WORD" for each word of the table."""
        if self.word_clip is None:
            self.word_clip = word_clip_embeddings(backbone, table)
        return similarity_of_pictures(image_features(backbone, images).embeds, self.word_clip)
