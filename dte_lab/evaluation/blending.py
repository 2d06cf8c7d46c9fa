"""Experiment 2: soft path, hard path and their blend, side by side on the same tuned concepts.

    python -m dte_lab.evaluation.blending --out results/blending.json [--concepts N]

Every concept is tuned once, as the encoder was trained; only sampling differs between settings.
Along (soft, attention) alpha_blend goes from 0, the hard path alone, to 1, the soft path alone; the
others are drawn at two of these values. At both ends the granularities are one and the same UNet,
so the hard offsets have their ends once.

The file holds the settings, the versions, `means` with bootstrap intervals over concepts, and
`rows`, one per concept and setting: means over prompts and seeds. Rows without settings are true
renderings, the scale of `identity_scaled`. A run that was cut off goes on where it stopped.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.common.command import run_command
from dte_lab.common.images import to_pil
from dte_lab.common.resume import as_json, check_settings
from dte_lab.common.stats import interval
from dte_lab.evaluation.edits import Edit, Item, edits, items
from dte_lab.evaluation.measures import Measures
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.records import versions, write_document
from dte_lab.evaluation.trials import Sampling, draw_concept, true_pictures
from dte_lab.pipeline import DTEPipeline


class Blend(NamedTuple):
    """How a concept's pictures blend the paths; all None for a true rendering."""

    offsets_on: str | None
    granularity: str | None
    alpha_blend: float | None


BLENDS = [
    *(Blend("soft", "attention", alpha) for alpha in (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1)),
    *(Blend("soft", "block", alpha) for alpha in (0.5, 0.7)),
    *(Blend("hard", "attention", alpha) for alpha in (0, 0.5, 0.7, 1)),
    *(Blend("hard", "block", alpha) for alpha in (0.5, 0.7)),
]
ASKED_SCENES = ("beach", "night", "snow", "red", "forest")
MEASURED = ("identity", "identity_margin", "clip_i_small", "scene", "clip_t_small", "diversity")


def blending(
    out: Path,
    pipe: DTEPipeline,
    count: int = 30,
    num_steps: int = 12,
    scenes: tuple[str, ...] = ASKED_SCENES,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Draw and measure BLENDS on `count` val concepts; write `out` and return its content.

    num_steps and seed: of tuning. sampling: with at least 2 seeds.
    Raises DTEError when `out` holds a run with other settings.
    """
    out, sampling = Path(out), sampling or Sampling()
    settings = {
        "split": "val", "concepts": count, "scenes": scenes, "num_steps": num_steps, "seed": seed,
        **asdict(sampling), "settings": BLENDS, **Methods(pipe).settings(),
    }  # fmt: skip
    rows = []
    if out.is_file():
        before = json.loads(out.read_text())
        check_settings(out, before["settings"], settings)
        rows = before["rows"]
    done = {row["concept"] for row in rows}
    judges, chosen = Measures(pipe.backbone), items(count, "val")
    for item in tqdm(chosen, desc="blending", disable=not progress):
        if item.name in done:
            continue
        asked = [edit for edit in edits(item, scenes) if not edit.is_style]
        rows += concept_rows(pipe, judges, item, asked, num_steps, seed, sampling)
        head = {"settings": as_json(settings), "versions": versions()}
        document = head | {"machine": platform.machine(), "means": means(rows), "rows": rows}
        write_document(out, document, ("rows",))
    return json.loads(out.read_text())


def concept_rows(
    pipe: DTEPipeline,
    judges: Measures,
    item: Item,
    asked: Sequence[Edit],
    num_steps: int,
    seed: int,
    sampling: Sampling,
) -> list[dict]:
    """Rows of the true rendering and of BLENDS on one tuning of the item's picture."""

    def row(blend: Blend, drawn: Float[Tensor, "edits seeds 3 height width"]) -> dict:
        values = judges.pictures(drawn, item, asked)  # one dict per edit
        measures = {name: sum(v[name] for v in values) / len(values) for name in MEASURED}
        measures = {name: float(f"{value:.5g}") for name, value in measures.items()}
        return {"concept": item.name, "group": item.group} | blend._asdict() | measures

    rows = [row(Blend(None, None, None), true_pictures(item, asked, sampling.seeds))]
    concept = pipe.personalize(to_pil(item.picture()), num_steps, seed, progress=False)
    for blend in BLENDS:
        config = replace(concept.config, **blend._asdict())
        drawn = draw_concept(pipe, replace(concept, config=config), asked, sampling)
        rows.append(row(blend, drawn))
    word = concept.nearest_words[0][0]
    return [row | {"hard_word": word} for row in rows]


def by_setting(rows: Sequence[dict]) -> dict[Blend, dict[str, np.ndarray]]:
    """{Blend: {measure: one value per concept, in one order}}.

    Adds `identity_scaled`: the margin of identity over other concepts, in units of the mean margin
    of true renderings. 0: no more like this concept than like any other; 1: as a true rendering.
    """
    table, true = {}, []
    for row in rows:
        blend = Blend(*(row[name] for name in Blend._fields))
        if blend.offsets_on is None:
            true.append(row["identity_margin"])
        else:
            table.setdefault(blend, []).append([row[name] for name in MEASURED])
    for blend, lines in table.items():
        values = dict(zip(MEASURED, np.array(lines).T, strict=True))
        scaled = values["identity_margin"] / np.mean(true)
        table[blend] = values | {"identity_scaled": scaled}
    return table


def means(rows: Sequence[dict]) -> list[dict]:
    """One dict per Blend: {mean, low, high, n} of each measure, intervals over concepts."""
    return [
        blend._asdict() | {measure: interval(of_measure) for measure, of_measure in values.items()}
        for blend, values in by_setting(rows).items()
    ]


def main(
    out: Annotated[Path, typer.Option("--out", help="The JSON file.")],
    concepts: Annotated[int, typer.Option(min=2, max=60, help="How many of val.")] = 30,
    backbone: str = "small",
    device: str = "cpu",
) -> None:
    """Experiment 2: soft path, hard path and their blend; goes on where it stopped."""
    document = blending(out, DTEPipeline.from_pretrained(backbone, device=device), concepts)
    for line in document["means"]:
        values = {name: line[name] for name in ("identity_scaled", "scene")}
        shown = (
            f"{k} {v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for k, v in values.items()
        )
        typer.echo(
            f"{line['offsets_on']:<7}{line['granularity']:<10}{line['alpha_blend']:<5}"
            + "   ".join(shown)
        )


if __name__ == "__main__":
    from dte_lab.common.quiet import quiet_libraries

    quiet_libraries()
    run_command(lambda: typer.run(main))
