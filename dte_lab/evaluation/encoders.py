"""Encoders that differ in one thing, pre-trained with one budget: what does each thing bring?

python -m dte_lab.evaluation.encoders --runs DIR --out results/encoders [--only rank]

Trains each of VARIANTS into DIR/NAME (a run that was cut off goes on), then measures all of them
on held-out concepts in one run of the harness, as `dte evaluate` does.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.backbone import load_backbone
from dte_lab.encoder import DTEConfig, TuningEncoder
from dte_lab.evaluation.edits import SCENE_EDITS
from dte_lab.evaluation.run import evaluate
from dte_lab.evaluation_cli import report
from dte_lab.pipeline import DTEPipeline
from dte_lab.pretrain import PretrainConfig, pretrain
from dte_lab.training_cli import SAMPLE_CONCEPTS, Precision, checked_precision
from dte_lab.world.first_words import fit_token_head
from dte_lab.world.pairs import ConceptPairs
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import split_names

# The paper's next check 3, open question 1, and what its contrastive term is compared with. Of each
# group the base variant is a member: rank 4, all concepts, contrastive.
VARIANTS = {
    "rank": {f"rank-{r}": {"rank": r} for r in (1, 2, 8, 16)},
    "concepts": {f"concepts-{n}": {"concepts": n} for n in (50, 100, 200, 400)},
    "regulariser": {f"regulariser-{r}": {"regulariser": r} for r in ("none", "l2", "nearest")},
}


def train(
    backbone, runs: Path, name: str, steps: int, mixed_precision: str, concepts=None, **options
) -> Path:
    """Folder of a finished encoder; concepts: how many to train on, None for all of them."""
    encoder = TuningEncoder.from_backbone(backbone, DTEConfig(**options))
    pairs = ConceptPairs(count=concepts)
    seen = [name for name in pairs.names if name in split_names("train")]
    config = PretrainConfig(steps=steps, checkpoint_every=200, mixed_precision=mixed_precision)
    watched = [render_image(concept, "fluent", "white") for concept in SAMPLE_CONCEPTS]
    pretrain(
        backbone, encoder, pairs, config, out_dir=runs / name,
        watched_images=watched, start=partial(fit_token_head, backbone=backbone, names=seen),
    )  # fmt: skip
    return runs / name / "encoder"


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the trained encoders.")],
    out: Annotated[Path, typer.Option(help="Folder of the run of the harness.")],
    only: Annotated[list[str], typer.Option(help="Groups of VARIANTS; repeatable.")] = tuple(
        VARIANTS
    ),
    steps: Annotated[int, typer.Option(min=1, help="Of pre-training.")] = 800,
    concepts: Annotated[int, typer.Option(min=2, help="How many held-out concepts.")] = 30,
    mixed_precision: Precision = "no",
) -> None:
    """Train and compare the encoders."""
    variants = {"base": {}}
    for group in only:
        if group not in VARIANTS:
            raise ValueError(f"--only {group}: choose from {', '.join(VARIANTS)}.")
        variants |= VARIANTS[group]
    pipe = DTEPipeline.from_pretrained("small")
    backbone = pipe.backbone
    if mixed_precision != "no":
        backbone = load_backbone("small", dtype=checked_precision(mixed_precision))
    specs = []
    for name, options in variants.items():
        folder = train(backbone, runs, name, steps, mixed_precision, **options)
        specs.append(f"dte@encoder={folder}:0,12")
    # Every second scene is enough to compare encoders by.
    evaluate(out, pipe, specs, count=concepts, scenes=SCENE_EDITS[::2])
    report(out)


if __name__ == "__main__":
    typer.run(main)
