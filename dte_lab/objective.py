"""The training objective, shared by pre-training and tuning.

    L = ||target - UNet(x_t, t, prompt with v*; W + A B)||^2
        + contrastive_weight * L_contrastive + norm_weight * L_norm

or, with another `regulariser`, its terms instead of the second line (contrastive.py).
The target is the noise or the velocity, as the backbone predicts. (paper: diffusion loss plus
contrastive regularisation plus L2; the weights are not known.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dte_lab.backbone import Backbone, add_noise, signal_variance
from dte_lab.common.errors import DTEError
from dte_lab.config import MethodConfig
from dte_lab.contrastive import Bank, prompt_embedding, regularise
from dte_lab.dual_path import alpha_at, dual_path
from dte_lab.encoder import EncoderPrediction
from dte_lab.tokens import PromptEncoder, PromptTokens


@dataclass
class Batch:
    """What the loss of one step is computed from, B samples.

    prompts: B strings with "S*", or what `tokenize` returns for them. concepts: ids that tell which
    samples of the batch are negatives of each other; None where all are of one concept. weights:
    from 0 to 1, how much of each latent pixel is the thing; None where all of it counts.
    """

    latents: Float[Tensor, "batch channels height width"]
    noise: Float[Tensor, "batch channels height width"]
    timesteps: Int[Tensor, " batch"]
    prompts: Sequence[str] | PromptTokens
    concepts: Int[Tensor, " batch"] | None = None
    weights: Float[Tensor, "batch 1 height width"] | None = None


def diffusion_target(
    backbone: Backbone,
    latents: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    timesteps: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """What the UNet should predict at x_t, noise or velocity.

    Raises DTEError for a backbone that predicts something else.
    """
    if backbone.prediction_type == "epsilon":
        return noise
    if backbone.prediction_type == "v_prediction":
        alpha = signal_variance(backbone, latents, timesteps)  # (B, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    raise DTEError(f"Prediction type {backbone.prediction_type!r} is not supported.")


def weighted_error(
    output: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    weights: Float[Tensor, "batch 1 height width"] | None,
) -> Float[Tensor, ""]:
    """Squared error, its weighted mean over all pixels. (weights: ours, not the paper's)"""
    if weights is None:
        return F.mse_loss(output, target)
    return (weights * (output - target).square()).mean() / weights.mean()


def unlike_prompts(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The prompts that differ, and which of them each one is."""
    place = {}
    rows = [place.setdefault(prompt, len(place)) for prompt in prompts]
    return list(place), rows


@contextmanager
def objective(
    backbone: Backbone,
    prompt_encoder: PromptEncoder,
    prediction: EncoderPrediction,
    batch: Batch,
    method: MethodConfig,
    bank: Bank | None = None,
) -> Iterator[dict[str, Float[Tensor, ""]]]:
    """The loss and its terms, inside the dual path: call `backward` within the `with` block.

    prediction: one per sample of the batch, or one (batch 1) for all. bank: more negatives, see
    `regularise`.
    Yields scalars: "loss", "diffusion", and the regulariser's terms ("contrastive" and "norm").

    >>> with objective(...) as losses:
    ...     losses["loss"].backward()
    """
    t = batch.timesteps
    v_star = prompt_embedding(prediction.v_star, prompt_encoder.table, method)
    prompts, hard, rows = batch.prompts, None, slice(None)
    if len(v_star) == 1 and not isinstance(prompts, PromptTokens):  # what is alike is encoded once
        prompts, rows = unlike_prompts(prompts)
    tokens = prompts if isinstance(prompts, PromptTokens) else prompt_encoder.tokenize(prompts)
    soft = prompt_encoder.encode(tokens, v_star)[rows]  # (B, L, d)
    if method.alpha_blend != 1:
        hard = prompt_encoder.encode(tokens, prompt_encoder.nearest_hard(v_star))[rows]
    alpha = alpha_at(method.alpha_blend, t, len(backbone.alphas_cumprod))
    noisy = add_noise(backbone, batch.latents, batch.noise, t).to(backbone.dtype)
    target = diffusion_target(backbone, batch.latents, batch.noise, t)
    with dual_path(
        backbone.unet, prediction.offsets, hard, alpha, method.offsets_on, method.granularity
    ):
        output = backbone.unet(noisy, t, soft.to(backbone.dtype)).sample
        losses = {"diffusion": weighted_error(output.float(), target.float(), batch.weights)}
        total = losses["diffusion"]
        terms = regularise(
            prediction.v_star, prompt_encoder.table, method, batch.concepts, bank,
            prediction.class_word,
        )  # fmt: skip
        for name, (weight, value) in terms.items():
            losses[name] = value
            total = total + weight * value
        yield losses | {"loss": total}
