"""Tuning a prediction on the concept's own pictures: at most 12 optimisation steps.

(paper: "up to 12 optimization steps"; what is optimised and how is not known. Ours: AdamW on the
predicted v*, A and B themselves, with the pre-training objective.)
"""

import warnings
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import objective

MAX_STEPS = 12


@dataclass
class TuneConfig:
    """Values are ours, not the paper's.

    `batch_size` noise levels per step, spread evenly over the timesteps. `token_learning_rate` is
    in units of a word's typical embedding entry. `prompts` are drawn in turn.
    """

    num_steps: int = 12
    batch_size: int = 8
    token_learning_rate: float = 0.02
    offset_learning_rate: float = 4e-3
    prompts: tuple[str, ...] = ("a picture of S*",)


@dataclass
class TuneResult:
    """The tuned prediction, one dict of losses per step, and whether it had to stop early."""

    prediction: EncoderPrediction
    losses: list[dict[str, float]]
    stopped_early: bool


def tune(
    backbone, prompt_encoder, prediction, images, dte, config=None, bank=None,
    seed=0, callback=None, progress=True,
):  # fmt: skip
    """Fine-tune a prediction (batch 1) on pictures (n, 3, H, W) of the concept in [-1, 1].

    dte: DTEConfig. config: TuneConfig. bank: negatives, see `objective`. callback: called after
    each step with a dict of step, loss, diffusion, contrastive, norm, v_star and offsets (detached
    copies, as the losses found them). The same seed gives the same result on the same machine.
    If the loss or a gradient stops being finite, tuning ends with a warning and returns the last
    state whose loss was finite.

    Raises ValueError when num_steps is not within 0 to 12. Returns a TuneResult.
    """
    config = config or TuneConfig()
    if not 0 <= config.num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps must be 0 to {MAX_STEPS}, not {config.num_steps}.")
    v_star, *matrices = _leaves(prediction)
    keys = list(prediction.offsets)

    def rebuild(tensors):
        v, *m = tensors
        return EncoderPrediction(v, {k: (m[2 * i], m[2 * i + 1]) for i, k in enumerate(keys)})

    unit = prompt_encoder.table.embeddings.square().mean().sqrt().item()
    optimizer = torch.optim.AdamW(
        [
            {"params": [v_star], "lr": config.token_learning_rate * unit},
            {"params": matrices, "lr": config.offset_learning_rate},
        ],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    leaves = [v_star, *matrices]
    good = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator().manual_seed(seed)
    latents = backbone.encode_images(images).float()  # (n, C, h, w)
    B, T = config.batch_size, len(backbone.alphas_cumprod)

    losses, stopped_early = [], False
    for step in tqdm(range(config.num_steps), desc="tuning", disable=not progress):
        which = [(step * B + i) % len(latents) for i in range(B)]
        prompts = [config.prompts[(step * B + i) % len(config.prompts)] for i in range(B)]
        # One timestep in each of B equal bins: far less variance than B independent ones.
        t = ((torch.arange(B) + torch.rand(B, generator=generator)) / B * T).long()
        noise = torch.randn((B, *latents.shape[1:]), generator=generator).to(latents)
        optimizer.zero_grad()
        with objective(
            backbone, prompt_encoder, rebuild(leaves), prompts, latents[which], noise,
            t.to(latents.device), dte, bank=bank,
        ) as terms:  # fmt: skip
            terms["loss"].backward()
        finite = terms["loss"].isfinite()
        if finite:
            good = [leaf.detach().clone() for leaf in leaves]
        if not finite or not all(leaf.grad.isfinite().all() for leaf in leaves):
            stopped_early = True
            break
        losses.append({name: value.item() for name, value in terms.items()})
        optimizer.step()
        if callback is not None:
            state = rebuild(good)
            callback({"step": step, **losses[-1], "v_star": state.v_star, "offsets": state.offsets})

    final = [leaf.detach() for leaf in leaves]
    if stopped_early or not all(leaf.isfinite().all() for leaf in final):
        stopped_early, final = True, good
        warnings.warn(
            f"Tuning stopped at step {len(losses)}: the loss was no longer finite. "
            "The last good state is kept.",
            stacklevel=2,
        )
    return TuneResult(rebuild(final), losses, stopped_early)


def _leaves(prediction):
    """v*, A_0, B_0, A_1, B_1, ... as free fp32 parameters."""
    tensors = [prediction.v_star, *(m for pair in prediction.offsets.values() for m in pair)]
    return [t.detach().float().clone().requires_grad_() for t in tensors]
