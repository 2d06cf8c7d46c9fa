"""Tuning a prediction on the concept's own pictures: 12 optimisation steps, or any other number.

(paper: "up to 12 optimization steps"; what is optimised and how is not known. Ours: AdamW on the
predicted v*, A and B themselves, or on the weights that predict them, with the pre-training
objective.)
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from dte_lab.common.errors import DTEError
from dte_lab.encoder import EncoderPrediction, mean_prediction, trained_encoder
from dte_lab.lora import is_whole
from dte_lab.objective import Batch, objective

TUNABLE = ("predictions", "heads", "encoder")


@dataclass
class TuneConfig:
    """Values are ours, not the paper's.

    `what` is tuned: the predictions themselves, the encoder's two heads, or the whole encoder.
    `batch_size` noise levels per step, spread evenly over the timesteps. `token_learning_rate` is
    in units of a word's typical embedding entry, `encoder_learning_rate` is that of heads and
    encoder. `prompts` are drawn in turn.
    """

    num_steps: int = 12
    what: str = "predictions"
    batch_size: int = 8
    token_learning_rate: float = 0.1
    offset_learning_rate: float = 6e-3
    encoder_learning_rate: float = 1e-3
    prompts: tuple[str, ...] = ("a picture of S*",)

    def __post_init__(self):
        if self.what not in TUNABLE:
            raise DTEError(f"Cannot tune {self.what!r}: use one of {', '.join(TUNABLE)}.")
        if self.num_steps < 0:
            raise DTEError(f"num_steps must be 0 or more, not {self.num_steps}.")


@dataclass
class TuneResult:
    """The tuned prediction, one dict of losses per step, and whether it had to stop early."""

    prediction: EncoderPrediction
    losses: list[dict[str, float]]
    stopped_early: bool


def tune(
    backbone, prompt_encoder, prediction, images, method, config=None, bank=None,
    seed=0, callback=None, progress=True, encoder=None,
):  # fmt: skip
    """Fine-tune a prediction (batch 1) on pictures (n, 3, H, W) of the concept in [-1, 1].

    method: MethodConfig. config: TuneConfig. bank: negatives, see `regularise`. callback: called
    after each step with a dict of step, the losses, v_star and offsets (detached copies, as the
    losses found them). encoder: the TuningEncoder that predicted, from the same pictures and seed,
    where more than the predictions is tuned; it stays as it is, a copy is tuned. Its static
    features are computed once. The same seed gives the same result on the same machine.
    If the loss or a gradient stops being finite, tuning ends with a warning and returns the last
    state whose loss was finite.

    Raises DTEError when heads or encoder shall be tuned and there is no encoder. Returns a
    TuneResult.
    """
    config = config or TuneConfig()
    if config.num_steps == 0:
        return TuneResult(_copy(prediction), [], False)
    if config.what == "predictions":
        unit = prompt_encoder.table.typical_entry
        predict, groups = _free_prediction(prediction, config, unit)
    elif encoder is not None:
        encoder = trained_encoder(encoder, f"Tuning the {config.what}")
        features = encoder.static_features(backbone, images, seed, prompt_encoder)
        predict, groups = _free_weights(encoder, features, config)
    else:
        raise ValueError(f"Tuning the {config.what} needs the encoder.")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    leaves = [leaf for group in groups for leaf in group["params"]]
    good = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator().manual_seed(seed)
    latents = backbone.encode_images(images).float()  # (n, C, h, w)
    B, T = config.batch_size, len(backbone.alphas_cumprod)
    scale = 1024 if backbone.dtype == torch.float16 else 1  # small gradients would vanish in fp16

    losses, stopped_early = [], False
    for step in tqdm(range(config.num_steps), desc="tuning", disable=not progress):
        prompts = [config.prompts[(step * B + i) % len(config.prompts)] for i in range(B)]
        sample = noise_levels(latents, step, B, T, generator)
        optimizer.zero_grad()
        state = predict()
        batch = Batch(*sample, prompts)
        with objective(backbone, prompt_encoder, state, batch, method, bank) as terms:
            (scale * terms["loss"]).backward()
        state = _copy(state)  # before the step changes it
        finite = terms["loss"].isfinite()
        if finite:
            good = [leaf.detach().clone() for leaf in leaves]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        torch._foreach_div_(gradients, scale)
        if not finite or not all(grad.isfinite().all() for grad in gradients):
            stopped_early = True
            break
        losses.append({name: value.item() for name, value in terms.items()})
        optimizer.step()
        if callback is not None:
            callback({"step": step, **losses[-1], "v_star": state.v_star, "offsets": state.offsets})

    if stopped_early or not all(leaf.isfinite().all() for leaf in leaves):
        stopped_early = True
        with torch.no_grad():
            for leaf, value in zip(leaves, good, strict=True):
                leaf.copy_(value)
        warnings.warn(
            f"Tuning stopped at step {len(losses)}: the loss was no longer finite. "
            "The last good state is kept.",
            stacklevel=2,
        )
    with torch.no_grad():
        return TuneResult(_copy(predict()), losses, stopped_early)


def noise_levels(latents, step, B, T, generator):
    """What a step of tuning sees of latents (n, C, h, w): B of them in turn, noise, timesteps (B,).

    One timestep lies in each of B equal bins of T: far less variance than B independent ones.
    """
    which = [(step * B + i) % len(latents) for i in range(B)]
    t = ((torch.arange(B) + torch.rand(B, generator=generator)) / B * T).long()
    noise = torch.randn((B, *latents.shape[1:]), generator=generator)
    return latents[which], noise.to(latents), t.to(latents.device)


def _free_prediction(prediction, config, unit):
    """v*, A and B as free fp32 parameters: (function that gives them, parameter groups).

    Where A is a whole matrix, B is the identity and stays so.
    """
    free = _copy(prediction)
    pairs = free.offsets.values()
    matrices = [m for a, b in pairs for m in ((a,) if is_whole(b) else (a, b))]
    for leaf in (free.v_star, *matrices):
        leaf.requires_grad_()
    return lambda: free, [
        {"params": [free.v_star], "lr": config.token_learning_rate * unit},
        {"params": matrices, "lr": config.offset_learning_rate},
    ]


def _free_weights(encoder, features, config):
    """The weights of a copy of the encoder: (function that predicts, parameter groups)."""
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    parts = [encoder.token_head, encoder.hypernetwork]
    if config.what == "encoder":
        parts.append(encoder.fusion)
    weights = [weight for part in parts for weight in part.parameters()]
    return lambda: mean_prediction(encoder(*features), len(features[-1])), [
        {"params": weights, "lr": config.encoder_learning_rate}
    ]


def _copy(prediction):
    """An EncoderPrediction of its own, in fp32 and detached."""

    def copied(x):
        return None if x is None else x.detach().float().clone()

    offsets = {key: (copied(a), copied(b)) for key, (a, b) in prediction.offsets.items()}
    return EncoderPrediction(copied(prediction.v_star), offsets, copied(prediction.class_word))
