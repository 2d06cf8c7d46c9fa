"""Encoders that differ in one thing, pre-trained with one budget: what does each thing bring?

python -m dte_lab.evaluation.encoders --runs DIR --out results/encoders [--only rank ...]

Trains each of VARIANTS into DIR/NAME (a run that was cut off goes on), then measures all of them
on held-out concepts in one run of the harness, as `dte evaluate` does.
"""

import argparse
from pathlib import Path

from dte_lab.encoder import DTEConfig, TuningEncoder
from dte_lab.evaluation.edits import SCENE_EDITS
from dte_lab.evaluation.run import evaluate
from dte_lab.evaluation_cli import report
from dte_lab.pipeline import DTEPipeline
from dte_lab.pretrain import PretrainConfig, pretrain
from dte_lab.training_cli import SAMPLE_CONCEPTS
from dte_lab.world.pairs import ConceptPairs
from dte_lab.world.scenes import render_image

# The paper's next check 3, open question 1, and what its contrastive term is compared with. Of each
# group the base variant is a member: rank 4, all concepts, contrastive.
VARIANTS = {
    "rank": {f"rank-{r}": {"rank": r} for r in (1, 2, 8, 16)},
    "concepts": {f"concepts-{n}": {"concepts": n} for n in (50, 100, 200, 400)},
    "regulariser": {f"regulariser-{r}": {"regulariser": r} for r in ("none", "l2", "nearest")},
}


def train(backbone, runs: Path, name: str, steps: int, concepts=None, **options) -> Path:
    """Folder of a finished encoder; concepts: how many to train on, None for all of them."""
    encoder = TuningEncoder.from_backbone(backbone, DTEConfig(**options))
    config = PretrainConfig(steps=steps, checkpoint_every=200)
    watched = [render_image(concept, "fluent", "white") for concept in SAMPLE_CONCEPTS]
    pretrain(
        backbone, encoder, ConceptPairs(count=concepts), config, out_dir=runs / name,
        watched_images=watched,
    )  # fmt: skip
    return runs / name / "encoder"


def main(runs: Path, out: Path, only: list[str], steps: int, concepts: int) -> None:
    pipe = DTEPipeline.from_pretrained("small")
    variants = {"base": {}}
    for group in only:
        variants |= VARIANTS[group]
    specs = []
    for name, options in variants.items():
        folder = train(pipe.backbone, runs, name, steps, **options)
        specs.append(f"dte@encoder={folder}:0,12")
    # Every second scene is enough to compare encoders by.
    evaluate(out, pipe, specs, count=concepts, scenes=SCENE_EDITS[::2])
    report(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--concepts", type=int, default=30, help="held-out test concepts")
    arguments = parser.parse_args()
    main(**vars(arguments))
