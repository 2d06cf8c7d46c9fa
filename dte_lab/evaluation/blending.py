"""Experiment 2: soft path, hard path and their blend, side by side on the same tuned concepts.

    python -m dte_lab.evaluation.blending --out results/blending.json [--concepts N]

Every concept is tuned once, as the encoder was trained; only sampling differs between settings.
Along (figure, attention) alpha_blend goes from 0, the hard path alone, to 1, the soft path alone;
the others are drawn at two of these values. At both ends the granularities are one and the same
UNet, so the text offsets_on has its ends once.

The file holds the settings, the versions, `means` with bootstrap intervals over concepts, and
`rows`, one per concept and setting: means over prompts and seeds. Rows without settings are true
renderings, the scale of `identity_scaled`. A run that was cut off goes on where it stopped.
"""

import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm.auto import tqdm

from dte_lab.common.images import to_pil
from dte_lab.common.stats import interval
from dte_lab.evaluation.edits import Edit, Item, edits, items
from dte_lab.evaluation.measures import Measures
from dte_lab.evaluation.methods import parse
from dte_lab.evaluation.run import (
    check_settings,
    draw,
    draw_concept,
    fingerprint,
    versions,
    write_document,
)
from dte_lab.pipeline import DTEPipeline
from dte_lab.sampling import GUIDANCE_SCALE

SETTINGS = [  # (offsets_on, granularity, alpha_blend)
    *(("soft", "attention", alpha) for alpha in (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1)),
    *(("soft", "block", alpha) for alpha in (0.5, 0.7)),
    *(("hard", "attention", alpha) for alpha in (0, 0.5, 0.7, 1)),
    *(("hard", "block", alpha) for alpha in (0.5, 0.7)),
]
SETTING = ("offsets_on", "granularity", "alpha_blend")
SCENES = ("beach", "night", "snow", "red", "forest")
MEASURED = ("identity", "identity_margin", "clip_i_small", "scene", "clip_t_small", "diversity")


def blending(
    out: Path, pipe: DTEPipeline, count: int = 30, num_steps: int = 12, seeds: int = 2,
    scenes: tuple[str, ...] = SCENES, num_inference_steps: int = 15,
    guidance_scale: float = GUIDANCE_SCALE, seed: int = 0, progress: bool = True,
) -> dict:  # fmt: skip
    """Draw and measure SETTINGS on `count` val concepts; write `out` and return its content.

    num_steps and seed: of tuning. seeds: pictures per prompt, at least 2.
    Raises ValueError when `out` holds a run with other settings.
    """
    settings = {
        "split": "val", "concepts": count, "scenes": list(scenes), "seeds": seeds,
        "num_steps": num_steps, "seed": seed, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "settings": SETTINGS,
        "backbone": pipe.backbone.name, "encoder": asdict(pipe.encoder.settings),
        "method": asdict(pipe.encoder.method),
        "weights": fingerprint(pipe.backbone.unet, pipe.backbone.text_encoder, pipe.encoder),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    rows = _earlier_rows(Path(out), settings)
    done = {row["concept"] for row in rows}
    judges, chosen = Measures(pipe.backbone), items(count, "val")
    sampling = (range(seeds), num_inference_steps, guidance_scale)
    for item in tqdm(chosen, desc="blending", disable=not progress):
        if item.name in done:
            continue
        asked = [edit for edit in edits(item, scenes) if not edit.is_style]
        rows += concept_rows(pipe, judges, item, asked, num_steps, seed, sampling)
        head = {"settings": settings, "versions": versions(), "machine": platform.machine()}
        write_document(Path(out), head | {"means": means(rows), "rows": rows}, ("rows",))
    return json.loads(Path(out).read_text())


def concept_rows(
    pipe: DTEPipeline, judges, item: Item, asked: list[Edit], num_steps: int, seed: int, sampling
) -> list[dict]:
    """Rows of the true rendering and of SETTINGS on one tuning of the item's picture."""

    def row(setting, drawn) -> dict:
        values = judges.pictures(drawn, item, asked)  # one dict per edit
        measures = {name: sum(v[name] for v in values) / len(values) for name in MEASURED}
        measures = {name: float(f"{value:.5g}") for name, value in measures.items()}
        names = {"concept": item.name, "group": item.group}
        return names | dict(zip(SETTING, setting, strict=True)) | measures

    [(_, _, true)] = draw(None, parse("oracle"), item, [item], asked, sampling, seed)
    rows = [row((None, None, None), true)]
    concept = pipe.personalize(to_pil(item.picture()), num_steps, seed, progress=False)
    for setting in SETTINGS:
        config = replace(concept.config, **dict(zip(SETTING, setting, strict=True)))
        rows.append(
            row(setting, draw_concept(pipe, replace(concept, config=config), asked, sampling))
        )
    word = concept.nearest_words[0][0]
    return [row | {"hard_word": word} for row in rows]


def by_setting(rows: list[dict]) -> dict[tuple, dict[str, np.ndarray]]:
    """{(offsets_on, granularity, alpha_blend): {measure: one value per concept, in one order}}.

    Adds `identity_scaled`: the margin of identity over other concepts, in units of the mean margin
    of true renderings. 0: no more like this concept than like any other; 1: as a true rendering.
    """
    true = [row["identity_margin"] for row in rows if row["offsets_on"] is None]
    table = {}
    for setting in dict.fromkeys(tuple(row[key] for key in SETTING) for row in rows):
        if setting[0] is not None:
            of_setting = [row for row in rows if tuple(row[key] for key in SETTING) == setting]
            values = {name: np.array([row[name] for row in of_setting]) for name in MEASURED}
            scaled = values["identity_margin"] / np.mean(true)
            table[setting] = values | {"identity_scaled": scaled}
    return table


def means(rows: list[dict]) -> list[dict]:
    """One dict per setting: {mean, low, high, n} of each measure, intervals over concepts."""
    return [
        dict(zip(SETTING, setting, strict=True)) | {k: interval(v) for k, v in values.items()}
        for setting, values in by_setting(rows).items()
    ]


def _earlier_rows(out: Path, settings) -> list[dict]:
    """The rows of an earlier call with the same settings, or none."""
    if not out.is_file():
        return []
    before = json.loads(out.read_text())
    check_settings(out, before["settings"], settings)
    return before["rows"]


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
    typer.run(main)
