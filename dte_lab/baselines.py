"""What people use instead, on the same base model, the same pictures and the same seeds.

    textual_inversion   a word embedding, optimised (Gal et al. 2022, arXiv 2208.01618)
    dreambooth_lora     "S* cat" with a rare S*: LoRA, optimised; with or without prior preservation
                        (Ruiz et al. 2022, arXiv 2208.12242; Hu et al. 2021, arXiv 2106.09685)
    e4t                 an encoder of v* with multiplicative offsets that all concepts share, then
                        tuning of both (Gal et al. 2023, arXiv 2302.12228)

Each takes a DTEPipeline and the pictures, and returns {number of steps: Concept}: concepts of the
single path, which `pipe.generate` draws like any other. All start from the word that CLIP finds in
the picture, so that nothing is known to them that the tuning encoder does not know.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.common.random import stream
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.concept import Concept
from dte_lab.config import MethodConfig, single_path
from dte_lab.e4t import E4TEncoder
from dte_lab.encoder import EncoderPrediction
from dte_lab.lora import Offsets, projection_shapes
from dte_lab.objective import Batch, objective
from dte_lab.pipeline import DTEPipeline
from dte_lab.recommended import OPTIMIZERS
from dte_lab.setting import picture_prompts
from dte_lab.tuning import Parameters, draw_batch

PROMPT = f"a picture of {placeholder_token}"


@dataclass
class BaselineConfig:
    """Values are ours; the learning rates were the best of a few on val, at 12 steps.

    `token_learning_rate` is in units of a word's typical embedding entry. `batch_size` noise levels
    per step, as in our own tuning. Prior preservation draws `prior_pictures` of the class with the
    base model and adds as many noise levels of them. `optimizer` as in TuneConfig, of the weights.
    """

    batch_size: int = 8
    optimizer: str = "adamw"
    token_learning_rate: float = 0.1
    lora_learning_rate: float = 8e-3
    multiplicative_learning_rate: float = 6e-3
    prior_pictures: int = 8

    def __post_init__(self) -> None:
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("batch_size", "prior_pictures"):
            check_whole(name, getattr(self, name), 1)
        for name in ("token", "lora", "multiplicative"):
            name += "_learning_rate"
            check_number(name, getattr(self, name), 0)


@dataclass
class BaselineRun:
    """One run of a baseline on pictures (n, 3, H, W); it began when this was made."""

    pipe: DTEPipeline
    pixels: Float[Tensor, "pictures 3 height width"]
    steps: Iterable[int]  # a Concept after each of these, 0 included
    seed: int
    config: BaselineConfig
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return time.perf_counter() - self.began


def textual_inversion(
    pipe: DTEPipeline,
    pixels: Float[Tensor, "pictures 3 height width"],
    steps: Iterable[int],
    seed: int = 0,
    config: BaselineConfig | None = None,
) -> dict[int, Concept]:
    """Optimise v* alone, from the embedding of the class word."""
    run = BaselineRun(pipe, pixels, steps, seed, config or BaselineConfig())
    v_star = class_word(pipe, pixels)[1].clone().requires_grad_()
    unit = pipe.prompt_encoder.table.typical_entry
    groups = [{"params": [v_star], "lr": run.config.token_learning_rate * unit}]
    return _fit(run, Parameters(lambda: EncoderPrediction(v_star, {}), groups))


def dreambooth_lora(
    pipe: DTEPipeline,
    pixels: Float[Tensor, "pictures 3 height width"],
    steps: Iterable[int],
    seed: int = 0,
    config: BaselineConfig | None = None,
    prior: bool = False,
) -> dict[int, Concept]:
    """Optimise a LoRA of the encoder's rank, with the prompt "S* word" and a fixed rare S*.

    The rare word of the original is a random vector of a word's length: no vocabulary is sure to
    have a word without a meaning. ("ours") `prior`: with prior preservation, of weight 1.
    """
    run = BaselineRun(pipe, pixels, steps, seed, config or BaselineConfig())
    word, embedding = class_word(pipe, pixels)
    rare = torch.randn(embedding.shape, generator=stream(seed, "rare word")).to(embedding)
    rare = rare * pipe.prompt_encoder.table.mean_norm / rare.norm()
    shapes, rank = projection_shapes(pipe.backbone.unet), pipe.encoder.settings.rank
    offsets = {
        key: tuple(m.to(rare.device).requires_grad_() for m in pair)
        for key, pair in initial_lora(shapes, rank, stream(seed, "LoRA")).items()
    }
    matrices = [m for pair in offsets.values() for m in pair]
    muon = run.config.optimizer == "muon"
    groups = [{"params": matrices, "lr": run.config.lora_learning_rate, "muon": muon}]
    trained = Parameters(lambda: EncoderPrediction(rare, offsets), groups)
    kept = embedding if prior else None
    return _fit(run, trained, phrase=f"{placeholder_token} {word}", prior=kept)


def e4t(
    pipe: DTEPipeline,
    pixels: Float[Tensor, "pictures 3 height width"],
    steps: Iterable[int],
    seed: int = 0,
    config: BaselineConfig | None = None,
) -> dict[int, Concept]:
    """Predict v* with an E4TEncoder, then tune v* and the multiplicative offsets, with L2 to the
    class word. The original tunes the encoder's weights in place of v* itself.

    Raises DTEError where the pipeline has no E4TEncoder.
    """
    run = BaselineRun(pipe, pixels, steps, seed, config or BaselineConfig())
    encoder, unit = pipe.encoder, pipe.prompt_encoder.table.typical_entry
    if not isinstance(encoder, E4TEncoder):
        raise DTEError("E4T needs a trained E4TEncoder: load one with load_e4t.")
    predicted = encoder.predict(pipe.backbone, pixels, seed, pipe.prompt_encoder)
    v_star = predicted.v_star.clone().requires_grad_()
    deltas = [d.detach().clone().requires_grad_() for d in encoder.hypernetwork.deltas]
    groups = [
        {"params": [v_star], "lr": run.config.token_learning_rate * unit},
        {
            "params": deltas,
            "lr": run.config.multiplicative_learning_rate,
            "muon": run.config.optimizer == "muon",
        },
    ]

    def predict() -> EncoderPrediction:
        offsets = encoder.hypernetwork.offsets(deltas)
        return EncoderPrediction(v_star, offsets, predicted.class_word)

    return _fit(run, Parameters(predict, groups), regulariser="l2")


def class_word(
    pipe: DTEPipeline, pixels: Float[Tensor, "pictures 3 height width"]
) -> tuple[str, Float[Tensor, "1 dim"]]:
    """The usable word that CLIP finds in pictures of one concept, and its embedding."""
    table = pipe.prompt_encoder.table
    row = pipe.encoder.class_row(pipe.backbone, pixels, table)
    return table.words[row], table.embeddings[row : row + 1]


def initial_lora(
    shapes: dict[str, tuple[int, int]], rank: int | str, generator: torch.Generator
) -> Offsets:
    """PEFT's start: A (1, Din, r) uniform within +-1/sqrt(Din), B (1, r, Dout) zero.

    Rank "full" is the largest that makes a difference, the smaller of the two widths.
    """
    offsets = {}
    for key, (d_in, d_out) in shapes.items():
        r = min(d_in, d_out) if rank == "full" else rank
        a = (2 * torch.rand(1, d_in, r, generator=generator) - 1) * d_in**-0.5
        offsets[key] = a, torch.zeros(1, r, d_out)
    return offsets


def _fit(
    run: BaselineRun,
    trained: Parameters,
    phrase: str = placeholder_token,
    prior: Float[Tensor, "1 dim"] | None = None,
    regulariser: str = "none",
) -> dict[int, Concept]:
    """AdamW on the diffusion loss; a Concept after each number of steps.

    phrase: what stands for the concept in prompts. prior: the class word whose pictures are to stay
    as the base model draws them.
    """
    pipe, config, backbone = run.pipe, run.config, run.pipe.backbone
    steps = sorted(set(run.steps))
    method = replace(single_path(pipe.encoder.method), regulariser=regulariser)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    optimizer = trained.optimizer()
    generator = stream(run.seed, "tuning")
    latents = backbone.encode_images(run.pixels).float()  # (n, C, h, w)
    kept = prior_latents(run, prior, method) if prior is not None and steps[-1] > 0 else None
    prompts = picture_prompts(backbone, run.pixels, phrase)

    concepts, losses = {}, []
    for step in range(steps[-1] + 1):
        state = trained.predict()
        if step in steps:
            info = {"num_steps": step, "seed": run.seed, "phrase": phrase, "losses": list(losses)}
            learned = state.v_star.requires_grad
            info["words_after"] = pipe.nearest_words(state.v_star) if learned else []
            info["seconds"] = run.seconds()
            concepts[step] = _concept(state, backbone.name, method, info)
        if step == steps[-1]:
            break
        batch = draw_batch(
            backbone, latents, prompts, step, config.batch_size, generator, matched=True
        )
        if kept is not None:
            more = draw_batch(backbone, kept, (PROMPT,), step, config.batch_size, generator)
            batch, state = _both(batch, more), _with_prior(state, prior, config.batch_size)
        optimizer.zero_grad()
        with objective(backbone, pipe.prompt_encoder, state, batch, method) as terms:
            terms["loss"].backward()
        if not terms["loss"].isfinite():
            raise DTEError(
                f"The loss of a baseline is not finite at step {step}: lower its learning rate."
            )
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})
    return concepts


def prior_latents(
    run: BaselineRun, word: Float[Tensor, "1 dim"], method: MethodConfig
) -> Float[Tensor, "pictures channels height width"]:
    """Latents of pictures of the class word (1, d), drawn by the base model alone."""
    n, backbone = run.config.prior_pictures, run.pipe.backbone
    seeds = torch.randint(2**31, (n,), generator=stream(run.seed, "prior pictures")).tolist()
    base = Concept(word, {}, backbone.name, method)
    [drawn] = run.pipe.generate(
        base, PROMPT, seeds, num_inference_steps=20, batch_size=n, progress=False
    )
    return backbone.encode_images(run.pipe.pixels(drawn)).float()


def _both(one: Batch, two: Batch) -> Batch:
    latents, noise, timesteps = (
        torch.cat([getattr(one, name), getattr(two, name)])
        for name in ("latents", "noise", "timesteps")
    )
    return Batch(latents, noise, timesteps, [*one.prompts, *two.prompts])


def _with_prior(
    state: EncoderPrediction, word: Float[Tensor, "1 dim"], n: int
) -> EncoderPrediction:
    """`state` for n samples, then the class word for n; all with its offsets."""
    v_star = torch.cat([state.v_star.expand(n, -1), word.expand(n, -1)])
    return replace(state, v_star=v_star)


def _concept(state: EncoderPrediction, backbone: str, method: MethodConfig, info: dict) -> Concept:
    """A Concept that further steps do not change."""
    offsets = {k: (a.detach().clone(), b.detach().clone()) for k, (a, b) in state.offsets.items()}
    return Concept(state.v_star.detach().clone(), offsets, backbone, method, info)
