"""Encoders that differ in one thing, pre-trained with one budget: what does each thing bring?

    python -m dte_lab.evaluation.encoders --runs DIR --wide CACHE --out results/encoders.json

Trains each of RECIPES, or of those that are named, into DIR/NAME unless it lies there, further
seeds into DIR/NAME-seed1 and so on. Gathers their errors on things that no training saw: the
diffusion loss on pairs of val concepts, the same for all.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dte_lab.backbone import load_backbone
from dte_lab.common.command import run_command
from dte_lab.common.resume import LOG
from dte_lab.common.stats import interval
from dte_lab.config import EncoderConfig
from dte_lab.evaluation.records import Row, versions, write_document
from dte_lab.evaluation.report import per_concept
from dte_lab.evaluation.specifications import ANCHORS
from dte_lab.hypernetwork import count_parameters
from dte_lab.lora import projection_shapes
from dte_lab.training import small_world as train_encoder
from dte_lab.world.wide import load

# The paper's next check 3, open question 1, and what its contrastive term is compared with. `base`
# is a member of each group: rank 4, all drawings, contrastive. Those that differ in more than what
# v* is made of learn its word anew; the others begin with the base's.
RECIPES = {
    "base": {},
    **{f"rank-{r}": {"rank": r} for r in (1, 2, 8, 16, "full")},
    **{f"drawings-{n}": {"count": n} for n in (150, 700, 2000, 6000)},
    **{f"regulariser-{r}": {"regulariser": r} for r in ("none", "l2", "nearest")},
}


def folder(runs: Path, name: str, seed: int) -> Path:
    return runs / (f"{name}-seed{seed}" if seed else name)


def variant(run: Path, name: str, seed: int, shapes: dict[str, tuple[int, int]]) -> dict:
    """What is known of a finished run. `unseen`: [steps, error] pairs; `by_concept`: the errors at
    the end, one per val concept in their order."""
    options = RECIPES[name]
    known = EncoderConfig.__dataclass_fields__
    settings = EncoderConfig(**{k: v for k, v in options.items() if k in known})
    sizes = count_parameters(
        shapes, settings.rank, settings.width, settings.num_heads, settings.trunk_depth
    )
    log = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    unseen = {x["step"]: round(x["unseen_diffusion"], 5) for x in log if "unseen_diffusion" in x}
    by_concept = json.loads((run / train_encoder.BY_CONCEPT).read_text())
    return {
        "name": name, **options, "seed": seed, "hypernetwork": sizes["hypernetwork"],
        "offsets": sizes["offsets"], "steps": log[-1]["step"], "minutes": log[-1]["minutes"],
        "unseen": sorted(unseen.items()),
        "by_concept": [round(error, 5) for error in by_concept.values()],
    }  # fmt: skip


def compare_runs(runs: Iterable[tuple[str, Sequence[float]]]) -> dict[str, dict]:
    """{name: {by_seed, mean, minus_base}} from every run's (name, one number per concept).

    The mean over the seeds and its difference to that of `base` have intervals over the concepts.
    """
    by_name = defaultdict(list)
    for name, values in runs:
        by_name[name].append(values)
    means = {name: np.mean(seeds, axis=0) for name, seeds in by_name.items()}  # (n,)
    return {
        name: {
            "by_seed": [round(float(np.mean(values)), 5) for values in by_name[name]],
            "mean": interval(mean),
            "minus_base": interval(mean - means["base"]),
        }
        for name, mean in means.items()
    }


def compare_pictures(rows: Iterable[Row], measure: str = "fidelity") -> dict[int, dict[str, dict]]:
    """{steps of tuning: what `compare_runs` says of a measure} from the rows of `dte evaluate`.

    Its methods are dte@encoder=DIR/NAME/encoder, with NAME as `folder` writes it.
    """
    runs = defaultdict(list)
    for (method, steps), of_method in per_concept(rows).items():
        if method not in ANCHORS:
            name = Path(method.partition("encoder=")[2]).parent.name.partition("-seed")[0]
            values = [of_method[concept][measure] for concept in sorted(of_method)]
            runs[steps].append((name, values))
    return {steps: compare_runs(of_steps) for steps, of_steps in runs.items()}


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the trained encoders.")],
    out: Annotated[Path, typer.Option(help="The results' file.")] = Path("results/encoders.json"),
    variants: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(RECIPES),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 1,
    wide: Annotated[Path | None, typer.Option(help="What `dte world build --wide` wrote.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of pre-training.")] = 400,
    word_steps: Annotated[int, typer.Option(min=1, help="Of the word, before.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 32,
    device: str = "cpu",
    mixed_precision: str = "no",
) -> None:
    """Train and compare the encoders."""
    drawings = None if wide is None else load(wide)
    names = dict.fromkeys(["base", *variants.split(",")])
    if unknown := names.keys() - RECIPES.keys():
        raise typer.BadParameter(f"no variant {unknown.pop()!r}: take of {', '.join(RECIPES)}.")
    chosen = [(name, seed) for name in names for seed in range(seeds)]
    for name, seed in chosen:
        run = folder(runs, name, seed)
        if not (run / train_encoder.BY_CONCEPT).is_file():
            own_word = name == "base" or "count" in RECIPES[name]
            word = None if own_word else folder(runs, "base", seed) / train_encoder.WORD
            train_encoder.main(
                run, wide=drawings, steps=steps, word_steps=word_steps, word=word,
                batch_size=batch_size, seed=seed, device=device,
                mixed_precision=mixed_precision, **RECIPES[name],
            )  # fmt: skip
    shapes = projection_shapes(load_backbone("small").unet)
    config = json.loads((runs / "base" / "config.json").read_text())
    settings = {key: config[key] for key in ("batch_size", "learning_rate")}
    settings |= {"pairs": train_encoder.UNSEEN, "pairs_each": train_encoder.UNSEEN_EACH}
    rows = [variant(folder(runs, name, seed), name, seed, shapes) for name, seed in chosen]
    summary = compare_runs((row["name"], row["by_concept"]) for row in rows)
    document = {"settings": settings, "versions": versions(), "summary": summary, "variants": rows}
    write_document(out, document, ("variants",))
    for name, found in summary.items():
        r = found["minus_base"]
        typer.echo(
            f"{name:22}{found['mean']['mean']:.4f}"
            f"  minus base {r['mean']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}], n = {r['n']}"
        )


if __name__ == "__main__":
    from dte_lab.common.quiet import quiet_libraries

    quiet_libraries()
    run_command(lambda: typer.run(main))
