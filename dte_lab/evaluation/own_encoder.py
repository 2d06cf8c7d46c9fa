"""What an encoder of one's own draws of things that it has never seen, and a run of ten minutes.

    python -m dte_lab.evaluation.own_encoder

makes results/own_encoder: the run that notebook 07 begins, and as many steps as ten minutes of one
core take. The folder of drawings is a stand-in, `stand_in` writes it. (ours, not the paper's)
"""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.common.images import save_png
from dte_lab.common.plots import picture_grid, save_figure
from dte_lab.config import EncoderConfig
from dte_lab.encoder import TuningEncoder
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.records import versions
from dte_lab.pipeline import DTEPipeline
from dte_lab.training.config import PretrainConfig
from dte_lab.training.drawings import DrawingPairs, fit_first_words, words_on_white
from dte_lab.training.pretrain import pretrain
from dte_lab.world.scenes import SCENES, render_image
from dte_lab.world.sprites import split_names, spread
from dte_lab.world.word_space import unexplained_share

STYLE = "noto"  # of the stand-in, and of the things that it does not have
ASKED = {"white": "a picture of S* on a white background", "beach": "a picture of S* on the beach"}
BATCH_SIZE = 16
RANK = 4


def stand_in(folder: Path, things: int = 100) -> None:
    """Write drawings on white of so many `train` things, one each, to folder/THING/0.png."""
    for name in spread(split_names("train"), things):
        save_png(render_image(name, STYLE, "white"), folder / name / "0.png")


def held_out_pictures(count: int, split: str = "val") -> dict[str, Image.Image]:
    """Things that no training has seen, in the style of the stand-in, on white."""
    return {name: render_image(name, STYLE, "white") for name in spread(split_names(split), count)}


def config(steps: int) -> PretrainConfig:
    """Of a short run: the usual one warms up longer than this trains."""
    return PretrainConfig(
        steps, BATCH_SIZE, warmup_steps=min(50, steps // 5), decay_fraction=0.4, ema_decay=0.98,
        num_workers=0, log_every=10, validate_every=max(1, steps // 8), checkpoint_every=100,
    )  # fmt: skip


def fresh_encoder(pipe: DTEPipeline) -> TuningEncoder:
    """Its word is a mixture of those that CLIP finds in the picture, and its offsets are zero."""
    settings = EncoderConfig.of(pipe.backbone.recommended, rank=RANK)
    return TuningEncoder.from_backbone(pipe.backbone, settings)


@dataclass
class Stage:
    """What the predictions for some things draw, one entry per thing.

    distances: of the picture on white from the input, root mean square of colours from 0 to 1.
    right: whether the other picture shows the beach.
    """

    pictures: list[dict[str, Image.Image]]
    distances: list[float]
    right: list[bool]


def draw_unseen(pipe: DTEPipeline, encoder: TuningEncoder, things: Sequence[Image.Image]) -> Stage:
    """Draw from the prediction alone, without tuning and without the hard path."""
    pipe, drawn = DTEPipeline(pipe.backbone, encoder), Stage([], [], [])
    for thing in tqdm(things, desc="unseen things"):
        concept = pipe.personalize(thing, num_steps=0, progress=False)
        rows = pipe.generate(concept, list(ASKED.values()), alpha_blend=1, progress=False)
        pictures = dict(zip(ASKED, (row[0] for row in rows), strict=True))
        true, white, beach = pipe.pixels([thing, *pictures.values()])
        drawn.pictures.append(pictures)
        drawn.distances.append((white - true).square().mean().sqrt().item() / 2)
        drawn.right.append(SCENES[classify_scene(beach[None])[0]] == "beach")
    return drawn


@torch.no_grad()
def unexplained(pipe: DTEPipeline, encoder: TuningEncoder, things: Sequence[Image.Image]) -> float:
    """The share of the variance of things' words that the predicted ones leave unexplained.

    things: on white. 0 is the word of the picture, 1 as good as the mean word for each.
    """
    pixels = pipe.pixels(things)
    found = [
        encoder.predict(pipe.backbone, x[None], prompt_encoder=pipe.prompt_encoder).v_star[0]
        for x in pixels
    ]
    return unexplained_share(torch.stack(found), words_on_white(pipe.backbone, pixels)).item()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/own_encoder"),
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/own_encoder"),
    steps: Annotated[int, typer.Option(min=1, help="Of the run.")] = 500,
    things: Annotated[int, typer.Option(min=2, help="Unseen ones that are drawn.")] = 12,
    device: str = "cpu",
) -> None:
    """Train the encoder of notebook 07 for ten minutes of one core, and draw unseen things."""
    pipe = DTEPipeline.from_pretrained("small", device=device)
    unseen, shipped = held_out_pictures(things), pipe.encoder
    with tempfile.TemporaryDirectory() as folder:
        stand_in(Path(folder) / "seen")
        pairs = DrawingPairs(Path(folder) / "seen")
        for name, picture in held_out_pictures(60).items():
            save_png(picture, Path(folder) / "unseen" / name / "0.png")
        held = DrawingPairs(Path(folder) / "unseen", length=128)
    stages, encoder = {}, fresh_encoder(pipe)
    stages["fresh"] = draw_unseen(pipe, encoder, unseen.values())
    began = time.process_time()
    fit_first_words(encoder, pipe.backbone, pairs)
    words_took = time.process_time() - began
    stages["first words"] = draw_unseen(pipe, encoder, unseen.values())
    shutil.rmtree(run, ignore_errors=True)
    began = time.process_time()
    encoder = pretrain(pipe.backbone, encoder, pairs, config(steps), run, validation=held)
    took = time.process_time() - began
    stages[f"{steps} steps"] = draw_unseen(pipe, encoder, unseen.values())
    stages["the shipped one"] = draw_unseen(pipe, shipped, unseen.values())
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    document = {
        "settings": {
            "steps": steps, "batch_size": BATCH_SIZE, "rank": RANK, "drawings": len(pairs.sprites),
        },
        "versions": versions(),
        "processor_seconds": {"first words": round(words_took), "steps": round(took)},
        "validation": [[line["step"], line["validation"]] for line in lines],
        "stages": {k: {"distances": s.distances, "right": s.right} for k, s in stages.items()},
    }  # fmt: skip
    write_atomically(out / "run.json", json.dumps(document, indent=1).encode())
    save_figure(stages_grid(list(unseen.values()), stages), out / "pictures.png", dpi=100)
    typer.echo(f"wrote {out}")


def stages_grid(things: Sequence[Image.Image], stages: dict[str, Stage], count: int = 5) -> Figure:
    """Things, and below them what each stage draws of them on the beach."""
    rows = [list(things)[:count]]
    rows += [[p["beach"] for p in drawn.pictures[:count]] for drawn in stages.values()]
    return picture_grid(rows, [""] * len(rows[0]), ["the input", *stages])


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
