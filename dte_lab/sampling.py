"""What the UNet is given at each sampling step: prompts with v*, offsets, hard prompts, blend.

With a `prediction_interval` the encoder looks again during sampling: v* and the offsets are
predicted from the concept's pictures and the *current* noisy latent at its timestep, as in the
paper, whose features change with t. What tuning added to the static prediction is added to each
new one. ("ours")
"""

import torch

from dte_lab.common.errors import DTEError
from dte_lab.contrastive import prompt_embedding
from dte_lab.dual_path import alpha_at
from dte_lab.encoder import EncoderPrediction, mean_prediction, trained_encoder
from dte_lab.features import ImageFeatures

# Ours, chosen on val concepts for the small backbone: at 3 the colours saturate, and those of the
# thing leak into the scene. Stable Diffusion 1.5 is mostly used with 7.5.
GUIDANCE_SCALE = 1.5


class Refresher:
    """Predictions of a concept from the noisy latents of sampling steps.

    Raises DTEError when the concept does not hold the pictures it was made from.
    """

    def __init__(self, backbone, encoder, prompt_encoder, concept):
        if concept.pictures is None:
            raise DTEError(
                "The concept holds no pictures to predict from during sampling: "
                "personalize it again, or use prediction_interval=0."
            )
        self.backbone = backbone
        encoder = self.encoder = trained_encoder(encoder, "A prediction_interval")
        self.table, self.config = prompt_encoder.table, concept.config
        self.prompt = prompt_encoder.plain([encoder.settings.feature_prompt])
        pictures = concept.pictures.to(backbone.device).float() / 127.5 - 1  # (n, 3, H, W)
        static = encoder.predict(backbone, pictures, concept.info["seed"], prompt_encoder)
        device = static.v_star.device
        self.tuned_v_star = concept.v_star.to(device) - static.v_star  # (1, d)
        self.tuned_offsets = {
            key: (a.to(device) - static.offsets[key][0], b.to(device) - static.offsets[key][1])
            for key, (a, b) in concept.offsets.items()
        }
        self.clip = encoder.image_features(backbone, pictures)  # n rows

    @torch.no_grad()
    def __call__(self, latents, timestep):
        """latents (B, C, h, w) at one timestep -> EncoderPrediction with batch size B."""
        B, n = len(latents), len(self.clip.patches)
        clip = ImageFeatures(*(torch.cat([f] * B) for f in self.clip))  # B * n rows
        t = torch.full((B * n,), int(timestep), device=latents.device)
        latents = latents.repeat_interleave(n, dim=0)
        unet = self.encoder.unet_features(self.backbone, latents, t, self.prompt)
        new = mean_prediction(self.encoder(clip, unet, t), n)
        v_star = new.v_star + self.tuned_v_star
        offsets = {
            key: (new.offsets[key][0] + a, new.offsets[key][1] + b)
            for key, (a, b) in self.tuned_offsets.items()
        }
        v_star = prompt_embedding(v_star, self.table, self.config)
        return EncoderPrediction(v_star, offsets)


class Conditioning:
    """Leads one batch of prompts through the steps of a stock sampling pipeline.

    concept: Concept, with the settings in its config. prompts: b strings. timesteps: the sampler's,
    (S,), of num_timesteps. refresher: predicts anew at every `prediction_interval` of the config.
    Attributes that a call sets: `soft` (b, L, d), and `prompt_embeds`, under guidance
    [negative, soft] (2b, L, d).
    """

    def __init__(
        self, prompt_encoder, concept, prompts, timesteps, num_timesteps, negative_prompt="",
        guided=True, refresher=None,
    ):  # fmt: skip
        self.prompt_encoder, self.config, self.prompts = prompt_encoder, concept.config, prompts
        self.timesteps, self.num_timesteps = timesteps, num_timesteps
        self.guided, self.refresher = guided, refresher
        self.interval = concept.config.prediction_interval
        negative = prompt_encoder.plain([negative_prompt])
        self.negative = negative.expand(len(prompts), -1, -1)  # (b, L, d)
        device = negative.device
        self._encode(EncoderPrediction(concept.v_star.to(device), concept.offsets))

    def __call__(self, path, step, latents):
        """Set a `DualPath` for a step that starts from latents (b, C, h, w)."""
        timestep = int(self.timesteps[step])
        if self.interval and step % self.interval == 0:
            path.clear()  # the features are those of the vanilla UNet
            self._encode(self.refresher(latents, timestep))
        alpha = alpha_at(self.config.alpha_blend, timestep, self.num_timesteps)
        path.update(self.offsets, self.hard, alpha)

    def _encode(self, prediction):
        self.soft = self.prompt_encoder(self.prompts, prediction.v_star)
        self.hard = self.prompt_encoder.hard(self.prompts, prediction.v_star)
        self.prompt_embeds = self.soft
        self.offsets = {
            key: (a.to(self.soft), b.to(self.soft)) for key, (a, b) in prediction.offsets.items()
        }
        if self.guided:  # the UNet sees [unconditional, conditional]
            self.prompt_embeds = torch.cat([self.negative, self.soft])
            self.hard = torch.cat([self.negative, self.hard])
            self.offsets = {key: self._both_halves(*ab) for key, ab in self.offsets.items()}

    def _both_halves(self, a, b):
        """A and B (1 or b, ...) for the doubled batch (1 or 2b, ...)."""
        n = len(self.prompts)
        a = a if len(a) == 1 else torch.cat([a, a])
        if not self.config.unconditional_offsets:
            return a, torch.cat([torch.zeros_like(b).expand(n, -1, -1), b.expand(n, -1, -1)])
        return a, b if len(b) == 1 else torch.cat([b, b])
