"""The training objective, shared by pre-training and tuning.

    L = ||target - UNet(x_t, t, prompt with v*; W + A B)||^2
        + contrastive_weight * L_contrastive + norm_weight * L_norm

or, with another `regulariser`, its terms instead of the second line (contrastive.py).
The target is the noise or the velocity, as the backbone predicts. (paper: diffusion loss plus
contrastive regularisation plus L2; the weights are not known.)
"""

from contextlib import contextmanager

import torch.nn.functional as F

from dte_lab.backbone import add_noise, signal_variance
from dte_lab.contrastive import prompt_embedding, regularise
from dte_lab.dual_path import alpha_at, dual_path


def diffusion_target(backbone, latents, noise, timesteps):
    """What the UNet should predict at x_t: noise or velocity, (B, C, h, w)."""
    if backbone.prediction_type == "epsilon":
        return noise
    if backbone.prediction_type == "v_prediction":
        alpha = signal_variance(backbone, latents, timesteps)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    raise ValueError(f"Prediction type {backbone.prediction_type!r} is not supported.")


@contextmanager
def objective(
    backbone, prompt_encoder, prediction, prompts, latents, noise, timesteps, config,
    concepts=None, bank=None,
):  # fmt: skip
    """The loss and its terms, inside the dual path: call `backward` within the `with` block.

    prediction: v_star (B, d) and offsets, or one (batch 1) for all samples. prompts: B strings with
    "S*", or their tokens. latents, noise: (B, C, h, w). timesteps: (B,). config: MethodConfig.
    concepts: (B,) ids that tell which samples of the batch are negatives of each other. bank: more
    negatives, see `regularise`.
    Yields scalars: "loss", "diffusion", and the regulariser's terms ("contrastive" and "norm").

    >>> with objective(...) as losses:
    ...     losses["loss"].backward()
    """
    v_star = prompt_embedding(prediction.v_star, prompt_encoder.table, config)
    soft = prompt_encoder(prompts, v_star)  # (B, L, d)
    hard = prompt_encoder.hard(prompts, v_star) if config.alpha_blend != 1 else None
    alpha = alpha_at(config.alpha_blend, timesteps, len(backbone.alphas_cumprod))
    noisy = add_noise(backbone, latents, noise, timesteps).to(backbone.dtype)
    target = diffusion_target(backbone, latents, noise, timesteps)
    with dual_path(
        backbone.unet, prediction.offsets, hard, alpha, config.offsets_on, config.granularity
    ):
        output = backbone.unet(noisy, timesteps, soft.to(backbone.dtype)).sample
        losses = {"diffusion": F.mse_loss(output.float(), target.float())}
        total = losses["diffusion"]
        terms = regularise(
            prediction.v_star, prompt_encoder.table, config, concepts, bank, prediction.class_word
        )
        for name, (weight, value) in terms.items():
            losses[name] = value
            total = total + weight * value
        yield losses | {"loss": total}
