"""Sampling: what the UNet is given at each step, and the loop over the steps.

With a `prediction_interval` the encoder looks again during sampling: v* and the offsets are
predicted from the concept's pictures and the *current* noisy latent at its timestep, as in the
paper, whose features change with t. What tuning added to the static prediction is added to each
new one. ("ours")
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.concept import Concept
from dte_lab.contrastive import prompt_embedding
from dte_lab.dual_path import DualPath, alpha_at
from dte_lab.encoder import EncoderPrediction, Predictor, mean_prediction, trained_encoder
from dte_lab.features import ImageFeatures
from dte_lab.lora import Offsets
from dte_lab.tokens import PromptEncoder


class StepPredictor:
    """Predictions of a concept from the noisy latents of sampling steps.

    Raises DTEError when the concept does not hold the pictures that it was made from, and when
    there is no encoder that looks at latents.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Predictor,
        prompt_encoder: PromptEncoder,
        concept: Concept,
    ) -> None:
        if concept.pictures is None:
            raise DTEError(
                "The concept holds no pictures to predict from during sampling: personalize with a "
                "prediction_interval, and they stay in it; or generate with prediction_interval=0."
            )
        self.backbone = backbone
        self.encoder = trained_encoder(encoder, "A prediction_interval")
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
        self.clip = self.encoder.image_features(backbone, pictures)  # n rows

    @torch.no_grad()
    def __call__(
        self, latents: Float[Tensor, "batch channels height width"], timestep: int
    ) -> EncoderPrediction:
        """A prediction for each of the latents, which are all at one timestep."""
        B, n = len(latents), len(self.clip.patches)
        clip = ImageFeatures(*(torch.cat([f] * B) for f in self.clip))  # B * n rows
        t = torch.full((B * n,), timestep, device=latents.device)
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


class StepInputs(NamedTuple):
    """What the UNet is given at one step; under guidance, rows are [unconditional, conditional]."""

    prompt_embeds: Float[Tensor, "rows tokens dim"]
    hard: Float[Tensor, "rows tokens dim"]
    offsets: Offsets  # of 1 or all rows
    alpha: float


class Conditioning:
    """What the UNet is given for a batch of b prompts: called once per step, it changes nothing.

    timesteps: the sampler's S, of num_timesteps. guided: whether there is an unconditional half,
    with the negative prompt. predict: (latents, timestep) -> EncoderPrediction, as StepPredictor;
    for every `prediction_interval` steps of the concept's config.
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        concept: Concept,
        prompts: Sequence[str],
        timesteps: Int[Tensor, " steps"],
        num_timesteps: int,
        negative_prompt: str = "",
        guided: bool = True,
        predict: Callable[[Tensor, int], EncoderPrediction] | None = None,
    ) -> None:
        self.prompt_encoder, self.concept, self.prompts = prompt_encoder, concept, prompts
        self.timesteps, self.num_timesteps = timesteps, num_timesteps
        self.guided, self.predict = guided, predict
        negative = prompt_encoder.plain([negative_prompt])
        self.negative = negative.expand(len(prompts), -1, -1)  # (b, L, d)

    def __call__(
        self,
        step: int,
        latents: Float[Tensor, "batch channels height width"],
        last: StepInputs | None = None,
    ) -> StepInputs:
        """The inputs of the step that starts from `latents`; last: those of the step before.

        A new prediction must see the vanilla UNet: leave the dual path before, or clear it.
        """
        config, timestep = self.concept.config, int(self.timesteps[step])
        alpha = alpha_at(config.alpha_blend, timestep, self.num_timesteps)
        if config.prediction_interval and step % config.prediction_interval == 0:
            return self._encode(self.predict(latents, timestep), alpha)
        if last is not None:
            return last._replace(alpha=alpha)
        v_star = self.concept.v_star.to(self.negative.device)
        return self._encode(EncoderPrediction(v_star, self.concept.offsets), alpha)

    def _encode(self, prediction: EncoderPrediction, alpha: float) -> StepInputs:
        soft = self.prompt_encoder(self.prompts, prediction.v_star)  # (b, L, d)
        hard = self.prompt_encoder.hard(self.prompts, prediction.v_star)
        offsets = {key: (a.to(soft), b.to(soft)) for key, (a, b) in prediction.offsets.items()}
        if not self.guided:
            return StepInputs(soft, hard, offsets, alpha)
        return StepInputs(
            torch.cat([self.negative, soft]),
            torch.cat([self.negative, hard]),
            {key: self._both_halves(a, b) for key, (a, b) in offsets.items()},
            alpha,
        )

    def _both_halves(
        self, a: Float[Tensor, "_ d_in rank"], b: Float[Tensor, "_ rank d_out"]
    ) -> tuple[Float[Tensor, "_ d_in rank"], Float[Tensor, "_ rank d_out"]]:
        """A and B (1 or b, ...) for the doubled batch (1 or 2b, ...)."""
        n = len(self.prompts)
        a = a if len(a) == 1 else torch.cat([a, a])
        if not self.concept.config.unconditional_offsets:
            return a, torch.cat([torch.zeros_like(b).expand(n, -1, -1), b.expand(n, -1, -1)])
        return a, b if len(b) == 1 else torch.cat([b, b])


def guided_sampling(
    path: DualPath,
    condition: Conditioning,
    scheduler: Any,
    noise: Float[Tensor, "batch channels height width"],
    guidance_scale: float,
    after_step: Callable[[], object] = lambda: None,
) -> Float[Tensor, "batch channels height width"]:
    """Latents of pictures from standard normal noise, with classifier-free guidance.

    (Ho and Salimans 2022, as diffusers' StableDiffusionPipeline has it.)
    path: of the UNet that is sampled. scheduler: one of diffusers', with its timesteps set; they
    are those of `condition`.
    """
    x, inputs = noise * scheduler.init_noise_sigma, None
    for step, t in enumerate(scheduler.timesteps):
        path.clear()  # a new prediction comes from features of the vanilla UNet
        inputs = condition(step, x, inputs)
        path.update(inputs.offsets, inputs.hard, inputs.alpha)
        both = scheduler.scale_model_input(torch.cat([x, x]) if condition.guided else x, t)
        output = path.unet(both, t, inputs.prompt_embeds).sample  # (b or 2b, C, h, w)
        if condition.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(output, t, x).prev_sample
        after_step()
    return x
