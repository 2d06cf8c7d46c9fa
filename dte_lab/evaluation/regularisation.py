"""Experiment 1: v* tuned with the contrastive term and without, on the same pictures and seeds.

    python -m dte_lab.evaluation.regularisation --out results/regularisation.json [--concepts N]

Every val concept is tuned from one prediction once per regulariser. With both --contrastive-run and
--none-run, folders that `dte pretrain` wrote, it is also tuned from the encoders that were trained
with and without the term, each with its own regulariser ("own" start).

The file holds the settings, the versions, `means` and `differences` (contrastive minus none, paired
by concept) with bootstrap intervals, `scale` (what the word similarity is for words taken at
random, and for the words that the judge itself would choose) and `rows`, one per concept, start,
regulariser and number of steps. `sweep` has the settings of SWEEP on a few watched pictures. The
safetensors file beside it holds paths of v* (`read_paths`): of the watched pictures, in tuning for
LONG steps and in pre-training. A run that was cut off goes on; paths can be added to it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.common.images import to_pil
from dte_lab.common.resume import as_json, check_settings
from dte_lab.common.stats import interval
from dte_lab.concept import Concept
from dte_lab.config import MethodConfig
from dte_lab.encoder import load_encoder
from dte_lab.evaluation.edits import Item, items
from dte_lab.evaluation.judges import SentenceJudge
from dte_lab.evaluation.measures import diffusion_loss
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.records import fingerprint, versions, write_document
from dte_lab.evaluation.v_star_paths import VStarPath, VStarPaths, pretraining_paths
from dte_lab.pipeline import DTEPipeline
from dte_lab.setting import picture_prompts
from dte_lab.tuning import TuneConfig
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import SAMPLE_CONCEPTS

COMPARED = ("contrastive", "none")
TUNED_MEASURES = {
    "word_similarity": "mean cosine, by all-MiniLM-L6-v2, of the concept's name to the words",
    "nearest_cosine": "cosine of v* to its nearest word",
    "norm": "norm of v*, in mean norms of a word",
    "words_kept": "share of the nearest words that were so before tuning",
    "diffusion": "diffusion loss on noise that is the same for all",
}
NUM_WORDS = 5
LONG = 100
SWEEP = {
    "num_positives": (1, 5, 20), "temperature": (0.05, 0.1, 0.5),
    "contrastive_weight": (0, 0.01, 0.1, 1),
}  # fmt: skip


class Experiment:
    """What every measurement needs: the pipelines, the judge's view of all words, the tuning."""

    def __init__(
        self,
        pipes: dict[str, DTEPipeline],
        judge: SentenceJudge,
        tuning: TuneConfig,
        seed: int,
    ) -> None:
        """pipes: by start; that of "own none" has the encoder trained without regulariser."""
        self.pipes, self.judge, self.tuning, self.seed = pipes, judge, tuning, seed
        self.table = next(iter(pipes.values())).prompt_encoder.table
        words = self.table.words
        parts = [judge.embed(words[i : i + 256]) for i in range(0, len(words), 256)]
        self.judged = torch.cat(parts)  # (n, 384)

    def tune(
        self,
        pipe: DTEPipeline,
        picture: Image.Image,
        method: MethodConfig,
        num_steps: int,
        callback: Callable[[dict], None] | None = None,
    ) -> Concept:
        """A concept of the picture, with this experiment's seed."""
        return pipe.personalize(
            picture, num_steps, self.seed, callback, progress=False, config=self.tuning,
            method=method,
        )  # fmt: skip

    def measure(
        self,
        pipe: DTEPipeline,
        picture: Image.Image,
        name: str,
        concept: Concept,
        before: Sequence[str] | None = None,
    ) -> dict:
        """TUNED_MEASURES and the nearest words of a concept; before: its words before tuning."""
        cosines, rows = self.table.nearest_rows(concept.v_star, NUM_WORDS)
        words = [self.table.words[i] for i in rows[0].tolist()]
        similar = self.judged[rows[0].cpu()] @ self.judge.embed([name])[0]
        pixels = pipe.pixels([picture])
        prompts = picture_prompts(pipe.backbone, pixels)  # what tuning says of the picture
        values = {
            "word_similarity": similar.mean().item(),
            "nearest_cosine": cosines[0, 0].item(),
            "norm": concept.v_star.norm().item() / self.table.mean_norm,
            "words_kept": len(set(words) & set(before or words)) / len(words),
            "diffusion": diffusion_loss(pipe, concept, pixels, prompts),
        }
        return {key: float(f"{value:.5g}") for key, value in values.items()} | {"words": words}

    def concept_rows(self, item: Item) -> list[dict]:
        """Rows of one concept: each start before tuning, and after it with each regulariser."""
        [picture], rows = to_pil(item.picture()), []
        for start, pipe in self.pipes.items():
            names = {"concept": item.name, "group": item.group, "start": start.split()[0]}
            predicted = self.tune(pipe, picture, pipe.encoder.method, 0)
            before = self.measure(pipe, picture, item.name, predicted)
            for kind in (k for k in COMPARED if start in ("shipped", f"own {k}")):
                method = replace(pipe.encoder.method, regulariser=kind)
                tuned = self.tune(pipe, picture, method, self.tuning.num_steps)
                after = self.measure(pipe, picture, item.name, tuned, before["words"])
                for steps, values in ((0, before), (self.tuning.num_steps, after)):
                    rows.append(names | {"regulariser": kind, "steps": steps} | values)
        return rows

    def sweep_rows(self, name: str, picture: Image.Image) -> list[dict]:
        """Rows of SWEEP; where the weight is 0 nothing else matters, and there is one row."""
        pipe, rows = self.pipes["shipped"], []
        for values in product(*SWEEP.values()):
            setting = dict(zip(SWEEP, values, strict=True))
            if not setting["contrastive_weight"] and any(setting[k] != SWEEP[k][0] for k in SWEEP):
                continue
            method = replace(pipe.encoder.method, regulariser="contrastive", **setting)
            tuned = self.tune(pipe, picture, method, self.tuning.num_steps)
            rows.append({"concept": name} | setting | self.measure(pipe, picture, name, tuned))
        return rows

    def tuning_paths(self, name: str, picture: Image.Image, num_steps: int) -> VStarPaths:
        """ "tuning.REGULARISER.NAME", from the shipped encoder's start."""
        pipe, paths = self.pipes["shipped"], {}
        for kind in COMPARED:
            seen: list[Tensor] = []

            def callback(state: dict, seen: list[Tensor] = seen) -> None:
                seen.append(state["v_star"])

            method = replace(pipe.encoder.method, regulariser=kind)
            tuned = self.tune(pipe, picture, method, num_steps, callback)
            v_star = torch.cat([*seen, tuned.v_star])  # (num_steps + 1, d)
            steps = [s for s in range(len(v_star)) if s <= 12 or s % 4 == 0]
            paths[f"tuning.{kind}.{name}"] = VStarPath(steps, v_star[steps])
        return paths


def regularisation(
    out: Path,
    pipe: DTEPipeline,
    count: int = 60,
    watched: int = 4,
    runs: Mapping[str, Path] | None = None,
    long: int = LONG,
    tuning: TuneConfig | None = None,
    judge: SentenceJudge | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Run experiment 1 on `count` val concepts; write `out` and return its content.

    watched: of SAMPLE_CONCEPTS, for the sweep and the paths. runs: {regulariser: folder} of
    pre-training. judge: with `embed`, by default the SentenceJudge.
    Raises DTEError when `out` holds a run with other settings.
    """
    runs, tuning, pipes = runs or {}, tuning or TuneConfig(), {"shipped": pipe}
    for kind, run in runs.items() if len(runs) == len(COMPARED) else ():
        encoder = load_encoder(run / "encoder", pipe.backbone)
        pipes[f"own {kind}"] = DTEPipeline(pipe.backbone, encoder)
    settings = {
        "split": "val", "concepts": count, "watched": SAMPLE_CONCEPTS[:watched],
        "encoders": {start: fingerprint(p.encoder) for start, p in pipes.items()},
        "tuning": tuning, "long": long, "seed": seed, "sweep": SWEEP, **Methods(pipe).settings(),
    }  # fmt: skip
    document, vectors = _earlier(out, settings)
    experiment = Experiment(pipes, judge or SentenceJudge(), tuning, seed)
    chosen = items(count, "val")

    def write() -> None:
        document.update(summary(document["rows"]), scale=scale(experiment, chosen))
        write_atomically(out.with_suffix(".safetensors"), save(vectors))
        write_document(out, document, ("rows", "sweep"))

    def keep(paths: VStarPaths) -> None:
        for key, path in paths.items():
            vectors[f"{key}.steps"] = torch.tensor(path.steps)
            vectors[f"{key}.v_star"] = path.v_star.half().cpu().contiguous()

    keep(pretraining_paths(runs))
    if document["rows"]:
        write()
    done = {row["concept"] for row in document["rows"]}
    for item in tqdm(chosen, desc="concepts", disable=not progress):
        if item.name not in done:
            document["rows"] += experiment.concept_rows(item)
            write()
    done = {row["concept"] for row in document["sweep"]}
    for name in tqdm(SAMPLE_CONCEPTS[:watched], desc="watched", disable=not progress):
        if name not in done:
            picture = render_image(name, "fluent", "white")
            keep(experiment.tuning_paths(name, picture, long))
            document["sweep"] += experiment.sweep_rows(name, picture)
            write()
    return document


def values(
    rows: Sequence[dict], measure: str, start: str, regulariser: str, after: bool
) -> Float[np.ndarray, " concepts"]:
    """One value per concept, in the order of the rows; after: tuning, else before it."""
    wanted, keys = (start, regulariser, after), ("start", "regulariser")
    of = [row for row in rows if (*(row[k] for k in keys), row["steps"] > 0) == wanted]
    return np.array([row[measure] for row in of])


def summary(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """`means` and `differences`: lists of dicts with {mean, low, high, n} of each measure."""
    means, differences = [], []
    for start in dict.fromkeys(row["start"] for row in rows):
        for after in (False, True):
            cells = {
                k: {m: values(rows, m, start, k, after) for m in TUNED_MEASURES} for k in COMPARED
            }
            for kind, cell in cells.items():
                if len(cell["norm"]):
                    names = {"start": start, "regulariser": kind, "after": after}
                    means.append(names | {m: interval(v) for m, v in cell.items()})
            if all(len(cell["norm"]) for cell in cells.values()):
                ours, none = cells.values()
                paired = {m: interval(ours[m] - none[m]) for m in TUNED_MEASURES}
                differences.append({"start": start, "after": after} | paired)
    return {"means": means, "differences": differences}


def scale(experiment: Experiment, chosen: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Word similarity of a name to all words, and to those that the judge finds most alike."""
    similarity = experiment.judge.embed([i.name for i in chosen]) @ experiment.judged.T  # (m, n)
    best = similarity.topk(min(NUM_WORDS, similarity.shape[1])).values
    return {"random": interval(similarity.mean(1)), "best": interval(best.mean(1))}


def _earlier(out: Path, settings: dict) -> tuple[dict, dict[str, Tensor]]:
    """The document and vectors of an earlier call with the same settings, or empty ones."""
    if not out.is_file():
        return {"settings": as_json(settings), "versions": versions(), "rows": [], "sweep": []}, {}
    document = json.loads(out.read_text())
    check_settings(out, document["settings"], settings)
    return document, load_file(out.with_suffix(".safetensors"))


RunFolder = Annotated[
    Path | None, typer.Option(help="OUT of a `dte pretrain` with that regulariser.")
]


def main(
    out: Annotated[Path, typer.Option("--out", help="The JSON file.")],
    concepts: Annotated[int, typer.Option(min=2, max=60, help="How many of val.")] = 60,
    watched: Annotated[int, typer.Option(min=1, max=4, help="For sweep and paths.")] = 4,
    contrastive_run: RunFolder = None,
    none_run: RunFolder = None,
    backbone: str = "small",
    device: str = "cpu",
) -> None:
    """Experiment 1: v* tuned with the contrastive term and without; goes on where it stopped."""
    pipe = DTEPipeline.from_pretrained(backbone, device=device)
    runs = {"contrastive": contrastive_run, "none": none_run}
    runs = {kind: run for kind, run in runs.items() if run}
    document = regularisation(out, pipe, concepts, watched, runs)
    for line in document["differences"]:
        when = "after" if line["after"] else "before"
        typer.echo(f"contrastive minus none, {line['start']} start, {when} tuning")
        for name, v in ((name, line[name]) for name in TUNED_MEASURES):
            typer.echo(f"  {name:16} {v['mean']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]")


if __name__ == "__main__":
    from dte_lab.common.quiet import quiet_libraries

    quiet_libraries()
    run_command(lambda: typer.run(main))
