"""Where no encoder has been trained: v* starts as the nearest word, the offsets at zero.

Takes the encoder's place in `DTEPipeline`. No encoder for Stable Diffusion 1.5 has ever been
released, so this is how it begins there. ("ours, not the paper's", which always has an encoder)

What an encoder predicts at once must then be learned by tuning. Twelve steps move little; plan for
some hundred, as LoRA training on one picture without an encoder does (500 in diffusers' example of
DreamBooth with LoRA).
"""

import torch

from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.encoder import EncoderPrediction, word_clip_embeddings
from dte_lab.features import image_features
from dte_lab.lora import projection_shapes
from dte_lab.tokens import PromptEncoder


class ZeroShotStart:
    """The word that CLIP finds in the pictures, and offsets with A random and B = 0."""

    def __init__(self, backbone, settings=None, method=None):
        self.settings, self.method = settings or EncoderConfig(), method or MethodConfig()
        width = backbone.text_encoder.config.hidden_size
        self.bank = torch.zeros(0, width, device=backbone.device)  # no concepts to keep away from
        self.bank_concepts = torch.zeros(0, dtype=torch.long, device=backbone.device)
        self.word_clip = None  # (n, p), computed when first needed: 32,607 short texts

    def eval(self):
        return self

    def to(self, device):
        self.bank, self.bank_concepts = self.bank.to(device), self.bank_concepts.to(device)
        return self

    @torch.no_grad()
    def predict(self, backbone, images, seed=0, prompt_encoder=None):
        """Pictures (B, 3, H, W) of *one* concept in [-1, 1] -> EncoderPrediction of batch size 1.

        The word is the one whose text "a picture of a WORD" is most similar to the pictures on
        average. A has entries of variance 1/Din, from `seed`; with B = 0 the UNet is unchanged.
        Raises ValueError when the text encoder has no projection to CLIP space.
        """
        table = (prompt_encoder or PromptEncoder(backbone)).table
        if self.word_clip is None:
            self.word_clip = word_clip_embeddings(backbone, table)
        embeds = image_features(backbone, images).embeds  # (B, p)
        best = (embeds @ self.word_clip.to(embeds.device).T).mean(dim=0).argmax()
        v_star = table.embeddings[best][None]  # (1, d)

        generator, rank, offsets = torch.Generator().manual_seed(seed), self.settings.rank, {}
        for key, (d_in, d_out) in projection_shapes(backbone.unet).items():
            a = torch.randn(1, d_in, rank, generator=generator) * d_in**-0.5
            offsets[key] = a.to(v_star), v_star.new_zeros(1, rank, d_out)
        return EncoderPrediction(v_star, offsets, v_star)
