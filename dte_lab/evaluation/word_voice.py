"""How much a drawing depends on v*: what changes when it is zero, or another word.

    python -m dte_lab.evaluation.word_voice --out results/word_voice.json [--concepts N]

Each concept is predicted from one picture, without tuning, and drawn along the soft path with its
own v*, with zeros in its place, and with the word of the dictionary that is least like it. A change
is the root mean square of what differs between two drawings with the same prompt and seed, in
[-1, 1]. A word that says nothing has a share near 0: zeros draw what it draws. Ours.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.common.images import to_pil
from dte_lab.common.stats import bracketed, interval
from dte_lab.concept import Concept
from dte_lab.evaluation.edits import Edit, edits, items
from dte_lab.evaluation.records import versions
from dte_lab.evaluation.trials import Sampling, draw_concept
from dte_lab.pipeline import DTEPipeline

ASKED_IN = ("beach", "night", "red")


def word_voice(
    pipe: DTEPipeline, count: int = 60, split: str = "test", sampling: Sampling | None = None
) -> dict[str, dict[str, float]]:
    """{mean, low, high, n}, over concepts, of what `of_concept` gives."""
    sampling, found = sampling or Sampling(), {}
    for item in tqdm(items(count, split), desc="word_voice"):
        asked = [edit for edit in edits(item, ASKED_IN) if not edit.is_style]
        concept = pipe.personalize(to_pil(item.picture()), 0, progress=False)
        for name, value in of_concept(pipe, concept, asked, sampling).items():
            found.setdefault(name, []).append(value)
    return {name: interval(values) for name, values in found.items()}


def of_concept(
    pipe: DTEPipeline, concept: Concept, asked: Sequence[Edit], sampling: Sampling
) -> dict[str, float]:
    """`norm` of v* in units of a word's; the changes `zeroed` and `other_word`; `share`, the first
    over the second."""
    table, v = pipe.prompt_encoder.table, concept.v_star
    soft = replace(concept, config=replace(concept.config, alpha_blend=1.0))

    def drawn_with(v_star: Float[Tensor, "1 dim"]) -> Float[Tensor, "edits seeds 3 h w"]:
        return draw_concept(pipe, replace(soft, v_star=v_star), asked, sampling)

    own, other = drawn_with(v), table.embeddings[table.cosines(v).argmin(-1)]
    zeroed, other_word = (
        (drawn_with(x) - own).square().mean().sqrt().item() for x in (torch.zeros_like(v), other)
    )
    norm = v.norm().item() / table.mean_norm
    return {
        "norm": norm, "zeroed": zeroed, "other_word": other_word, "share": zeroed / other_word,
    }  # fmt: skip


def main(
    out: Annotated[Path, typer.Option("--out", help="The JSON file.")],
    concepts: Annotated[int, typer.Option(min=2, max=60, help="How many of test.")] = 60,
    backbone: str = "small",
    device: str = "cpu",
) -> None:
    """What a drawing loses with its word, and with another in its place."""
    sampling = Sampling()
    found = word_voice(
        DTEPipeline.from_pretrained(backbone, device=device), concepts, "test", sampling
    )
    settings = {"split": "test", "concepts": concepts, "scenes": ASKED_IN, **asdict(sampling)}
    document = {"settings": settings, "versions": versions(), **found}
    write_atomically(out, json.dumps(document, indent=1).encode())
    for name, value in found.items():
        typer.echo(f"{name:<12}{bracketed(value)}")


if __name__ == "__main__":
    from dte_lab.common.quiet import quiet_libraries

    quiet_libraries()
    run_command(lambda: typer.run(main))
