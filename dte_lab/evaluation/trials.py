"""A trial: what a method makes of one item, and the rows that the judges make of that."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab.concept import Concept
from dte_lab.evaluation.edits import Edit, Item, truth
from dte_lab.evaluation.measures import Measures, prompts_of
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.records import Row
from dte_lab.evaluation.specifications import Specification
from dte_lab.hardware.device import PeakMemory
from dte_lab.pipeline import DTEPipeline
from dte_lab.recommended import SMALL_WORLD


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; seeds: 0 to `seeds` - 1, one picture of each edit with each."""

    seeds: int = 2
    num_inference_steps: int = 15
    guidance_scale: float = SMALL_WORLD.guidance_scale


@dataclass
class Trial:
    """A method's pictures of an item's edits after a number of steps, in [-1, 1].

    concept: None for an anchor. extra_memory_mb: the peak while the concept was learned.
    """

    steps: int
    pictures: Float[Tensor, "edits seeds 3 height width"]
    concept: Concept | None = None
    seconds_per_picture: float | None = None
    extra_memory_mb: float | None = None


def true_pictures(
    item: Item, edits: Sequence[Edit], seeds: int
) -> Float[Tensor, "edits seeds 3 height width"]:
    """True renderings of an item's edits.

    Seed 0 made the reference of `measures`: a fair truth is drawn with others.
    """
    return torch.stack(
        [torch.stack([truth(item, edit, 100 + s) for s in range(seeds)]) for edit in edits]
    )


def anchor_trial(
    spec: Specification, item: Item, chosen: Sequence[Item], edits: Sequence[Edit], seeds: int
) -> Trial:
    """The truth as if a method had drawn it; for "other" that of the next of the `chosen`."""
    if spec.name == "other":
        item = replace(item, name=chosen[(chosen.index(item) + 1) % len(chosen)].name)
    return Trial(0, true_pictures(item, edits, seeds))


def trials(
    methods: Methods,
    spec: Specification,
    item: Item,
    edits: Sequence[Edit],
    sampling: Sampling,
    seed: int,
) -> Iterator[Trial]:
    """Learn the item's picture once, and draw its edits after each number of steps.

    seed: of the method's optimisation.
    """
    pipe = methods.pipe_of(spec)  # its encoder predicts again at every `prediction_interval`
    memory = PeakMemory(pipe.backbone.device)
    concepts = methods.concepts(spec, item.picture(), seed, item.mask())
    peak = memory.read()
    for steps, concept in concepts.items():
        start = time.perf_counter()
        drawn = draw_concept(pipe, concept, edits, sampling)
        each = (time.perf_counter() - start) / drawn.shape[:2].numel()
        yield Trial(steps, drawn, concept, each, peak)


def draw_concept(
    pipe: DTEPipeline, concept: Concept, edits: Sequence[Edit], sampling: Sampling
) -> Float[Tensor, "edits seeds 3 height width"]:
    """A concept's edits, drawn, in [-1, 1]: as PNG would keep them, in 8 bits."""
    drawn = pipe.generate(
        concept,
        prompts_of(concept, edits),
        range(sampling.seeds),
        guidance_scale=sampling.guidance_scale,
        num_inference_steps=sampling.num_inference_steps,
        batch_size=len(edits) * sampling.seeds,
        progress=False,
    )
    pictures = pipe.pixels([picture for row in drawn for picture in row])
    return pictures.unflatten(0, (len(edits), sampling.seeds))


def rows_of(
    judges: Measures,
    label: str,
    item: Item,
    edits: Sequence[Edit],
    trial: Trial,
    losses: dict[str, float] | None = None,
) -> list[Row]:
    """One row per edit of a trial of the method with this label. losses: LOSSES where measured."""
    concept, words, seconds, of_words = trial.concept, [], None, {}
    if concept is not None:
        words, seconds = [word for word, _ in concept.nearest_words], concept.seconds
        of_words = judges.words(item.name, words, concept.v_star)
    return [
        Row(
            method=label, steps=trial.steps, concept=item.name, group=item.group,
            input_style=item.style, input_scene=item.scene, edit=edit.name, is_style=edit.is_style,
            nearest_words=" ".join(words), seconds=seconds,
            seconds_per_picture=trial.seconds_per_picture, extra_memory_mb=trial.extra_memory_mb,
            **values, **of_words, **(losses or {}),
        )
        for edit, values in zip(edits, judges.pictures(trial.pictures, item, edits), strict=True)
    ]  # fmt: skip
