"""The training objective, shared by pre-training and tuning.

    L = ||target - UNet(x_t, t, prompt with v*; W + A B)||^2
        + contrastive_weight * L_contrastive + norm_weight * L_norm

The target is the noise or the velocity, as the backbone predicts. (paper: diffusion loss plus
contrastive regularisation plus L2; the weights are not known.)
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from dte_lab.backbone import add_noise, signal_variance
from dte_lab.contrastive import contrastive_loss, norm_loss
from dte_lab.dual_path import dual_path


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
    "S*". latents, noise: (B, C, h, w). timesteps: (B,). config: DTEConfig. concepts: (B,) ids that
    tell which samples of the batch are negatives of each other. bank: more negatives, as
    (embeddings (M, d), their concept ids (M,), -1 for empty rows).
    Yields {"loss", "diffusion", "contrastive", "norm"}, scalars.

    >>> with objective(...) as losses:
    ...     losses["loss"].backward()
    """
    v_star = prediction.v_star
    soft = prompt_encoder(prompts, v_star)  # (B, L, d)
    hard = prompt_encoder.hard(prompts, v_star) if config.alpha_blend != 1 else None
    noisy = add_noise(backbone, latents, noise, timesteps).to(backbone.dtype)
    target = diffusion_target(backbone, latents, noise, timesteps)
    with dual_path(backbone.unet, prediction.offsets, hard, config.alpha_blend, config.pairing):
        output = backbone.unet(noisy, timesteps, soft.to(backbone.dtype)).sample
        losses = {
            "diffusion": F.mse_loss(output.float(), target.float()),
            "contrastive": _contrastive(prompt_encoder.table, v_star, concepts, bank, config),
            "norm": norm_loss(v_star, prompt_encoder.table.mean_norm),
        }
        losses["loss"] = (
            losses["diffusion"]
            + config.contrastive_weight * losses["contrastive"]
            + config.norm_weight * losses["norm"]
        )
        yield losses


def _contrastive(table, v_star, concepts, bank, config):
    """Positives from the table; negatives from the batch (with gradient) and the bank."""
    rows = table.nearest_rows(v_star, config.num_positives)[1]
    positives = table.embeddings.to(v_star.device)[rows]  # (B, N, d)
    own = v_star.new_full((len(v_star),), -2, dtype=torch.long) if concepts is None else concepts
    negatives, ids = [v_star], [own]
    if bank is not None:
        negatives.append(bank[0])
        ids.append(bank[1])
    ids = torch.cat(ids)  # (B + M,)
    mask = (ids != own[:, None]) & (ids != -1)  # (B, B + M)
    return contrastive_loss(v_star, positives, torch.cat(negatives), mask, config.temperature)
