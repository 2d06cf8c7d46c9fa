"""Encoders that differ in one thing, pre-trained with one budget: what does each thing bring?

    python -m dte_lab.evaluation.encoders --runs DIR --out results/encoders.json [--device cuda]

Trains each of VARIANTS into DIR/NAME, unless it lies there, and gathers their errors on things that
no training saw: the diffusion loss of 256 pairs of val concepts, the same for all.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.backbone import load_backbone
from dte_lab.config import DTEConfig
from dte_lab.dual_path import projection_shapes
from dte_lab.evaluation.run import versions, write_document
from dte_lab.hypernetwork import count_parameters
from dte_lab.world import train_encoder

# The paper's next check 3, open question 1, and what its contrastive term is compared with. `base`
# is a member of each group: rank 4, all 702 concepts, contrastive.
VARIANTS = {
    "base": {},
    **{f"rank-{r}": {"rank": r} for r in (1, 2, 8, 16, "full")},
    **{f"concepts-{n}": {"concepts": n} for n in (50, 100, 200, 400)},
    **{f"regulariser-{r}": {"regulariser": r} for r in ("none", "l2", "nearest")},
}


def variant(run: Path, name: str, shapes: dict) -> dict:
    """What is known of a finished run; `unseen`: [steps, error] pairs."""
    options = VARIANTS[name]
    dte = DTEConfig(**{k: v for k, v in options.items() if k != "concepts"})
    sizes = count_parameters(shapes, dte.rank, dte.width, dte.num_heads, dte.trunk_depth)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    unseen = {x["step"]: round(x["unseen_diffusion"], 5) for x in log if "unseen_diffusion" in x}
    return {
        "name": name, **options, "hypernetwork": sizes["hypernetwork"],
        "offsets": sizes["offsets"], "steps": log[-1]["step"], "minutes": log[-1]["minutes"],
        "unseen": sorted(unseen.items()),
    }  # fmt: skip


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the trained encoders.")],
    out: Annotated[Path, typer.Option(help="The results' file.")] = Path("results/encoders.json"),
    steps: Annotated[int, typer.Option(min=1, help="Of pre-training.")] = 680,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 128,
    device: str = "cpu",
) -> None:
    """Train and compare the encoders."""
    for name, options in VARIANTS.items():
        if not (runs / name / "encoder" / "config.json").is_file():
            train_encoder.main(
                runs / name, steps=steps, batch_size=batch_size, device=device, **options
            )
    shapes = projection_shapes(load_backbone("small").unet)
    config = json.loads((runs / "base" / "config.json").read_text())
    settings = {key: config[key] for key in ("batch_size", "learning_rate", "seed")}
    found = [variant(runs / name, name, shapes) for name in VARIANTS]
    document = {"settings": {**settings, "pairs": train_encoder.UNSEEN}, "versions": versions()}
    write_document(out, document | {"variants": found}, ("variants",))
    for row in found:
        typer.echo(f"{row['name']:22}" + "  ".join(f"{s}: {e:.4f}" for s, e in row["unseen"]))


if __name__ == "__main__":
    from dte_lab.cli import quiet_libraries

    quiet_libraries()
    typer.run(main)
