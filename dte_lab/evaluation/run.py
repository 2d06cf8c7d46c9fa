"""`dte evaluate`: every method on every concept, one table of measures per run.

A run's folder holds measures.csv (one row per method, steps, concept and edit; what belongs to a
concept stands in each of its rows), run.json (settings, versions, and at the end the summary) and
pictures/ (of the first concepts: edits from left to right, seeds from top to bottom). A run that
was cut off goes on where it stopped, and one that is finished can be given more methods.
"""

import csv
import hashlib
import io
import json
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from dte_lab import __version__
from dte_lab.baselines import BaselineConfig
from dte_lab.common.files import write_atomically
from dte_lab.common.images import to_pil
from dte_lab.evaluation.edits import SCENE_EDITS, Item, edits, items, truth
from dte_lab.evaluation.measures import (
    LOSSES,
    PICTURE_MEASURES,
    TIMES,
    WORD_MEASURES,
    Measures,
    losses,
    prompts_of,
)
from dte_lab.evaluation.methods import ANCHORS, Method, Methods, parse
from dte_lab.evaluation.report import summarise
from dte_lab.hardware.device import PeakMemory
from dte_lab.pipeline import DTEPipeline
from dte_lab.sampling import GUIDANCE_SCALE
from dte_lab.tuning import TuneConfig

KEYS = ["method", "steps", "concept", "group", "input_style", "input_scene", "edit", "is_style"]
CONCEPT_MEASURES = [*WORD_MEASURES, *LOSSES, "nearest_words", *TIMES]
COLUMNS = [*KEYS, *PICTURE_MEASURES, *CONCEPT_MEASURES]
SHOWN = 6  # concepts whose pictures are kept


def evaluate(
    out_dir, pipe: DTEPipeline, specs, count=60, seeds=2, scenes=SCENE_EDITS, split="test",
    num_inference_steps=15, guidance_scale=GUIDANCE_SCALE, seed=0, with_losses=False, progress=True,
    processes=1, load=None,
):  # fmt: skip
    """Measure methods, given as in methods.py, and write the run's folder.

    count: concepts. seeds: pictures per edit. seed: of every method's optimisation. with_losses:
    measure the diffusion LOSSES, too. The anchors "oracle" and "other" are always measured.
    processes: so many share the concepts and the cores; each makes its `pipe` by `load()`, a
    function that can be pickled.
    Returns the summary of `report.summarise`.
    Raises ValueError for a wrong specification, for processes without `load`, and when out_dir
    holds a run with other settings or with methods that are not among these.
    """
    out_dir, methods = Path(out_dir), Methods(pipe)
    specs = list(dict.fromkeys([*(s for s in specs if s not in ANCHORS), *ANCHORS]))
    parsed = [parse(spec) for spec in specs]
    for method in parsed:
        methods.check(method)
    labels = [method.label for method in parsed]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(
            f"{twice.pop()} is given twice: write its steps together, as in ti:12,500."
        )
    if seeds < 2:
        raise ValueError("Diversity needs at least 2 seeds.")
    if processes > 1 and load is None:
        raise ValueError("Several processes need `load`, with which each makes its own pipe.")
    settings = {
        "methods": specs, "split": split, "concepts": count, "scenes": list(scenes),
        "seeds": seeds, "seed": seed, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "with_losses": with_losses,
        "backbone": pipe.backbone.name,
        "weights": fingerprint(pipe.backbone.unet, pipe.backbone.text_encoder, pipe.encoder),
        "encoder": asdict(pipe.encoder.settings),
        "method": asdict(pipe.encoder.method), "tuning": asdict(TuneConfig()),
        "baselines": asdict(BaselineConfig()),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    rows = resume(out_dir, settings)
    done = {(row["method"], row["concept"]) for row in rows}

    chosen = items(count, split)
    worker = Worker(load, out_dir, chosen, settings)
    if processes == 1:
        worker.methods = methods
    jobs = [
        (i, method)
        for i, item in enumerate(chosen)
        for method in parsed
        if (method.label, item.name) not in done
    ]
    total = len(chosen) * len(parsed)
    bar = tqdm(initial=total - len(jobs), total=total, desc="evaluate", disable=not progress)
    for new in in_processes(worker, jobs, processes, chunk=len(parsed)):
        rows += new
        write_atomically(out_dir / "measures.csv", to_csv(rows))
        bar.set_postfix_str(f"{new[0]['concept']}, {new[0]['method']}")
        bar.update()
    bar.close()
    names = [item.name for item in chosen]
    rows.sort(key=lambda row: (names.index(row["concept"]), labels.index(row["method"])))
    write_atomically(out_dir / "measures.csv", to_csv(rows))
    summary = summarise(rows)
    document = {"settings": settings, "versions": versions(), "summary": summary}
    write_atomically(out_dir / "run.json", json.dumps(document, indent=1).encode())
    return summary


class Worker:
    """Measures a method on one of the chosen concepts: (i, Method) -> rows."""

    def __init__(
        self, load: Callable[[], DTEPipeline], out_dir: Path, chosen: list[Item], settings
    ):
        self.load, self.out_dir, self.chosen, self.settings = load, out_dir, chosen, settings

    @cached_property
    def methods(self) -> Methods:
        return Methods(self.load())

    @cached_property
    def judges(self) -> Measures:
        return Measures(self.methods.pipe.backbone)

    def __call__(self, job: tuple[int, Method]) -> list[dict]:
        (i, method), pipe, rows, s = job, self.methods.pipe, [], self.settings
        item = self.chosen[i]
        wanted = edits(item, s["scenes"])
        sampling = range(s["seeds"]), s["num_inference_steps"], s["guidance_scale"]
        for concept, info, drawn in draw(
            self.methods, method, item, self.chosen, wanted, sampling, s["seed"]
        ):
            if concept is not None and s["with_losses"]:
                info = info | losses(pipe, concept, item, wanted)
            rows += measured(self.judges, method, item, wanted, info, drawn)
            if i < SHOWN:
                keep(self.out_dir, item, method, info, drawn)
        return rows


def in_processes(work: Callable, jobs: list, processes: int, chunk: int) -> Iterator:
    """map(work, jobs), shared out to processes in chunks, in the order of the jobs."""
    if processes == 1:
        yield from map(work, jobs)
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (work, threads)) as pool:
        yield from pool.map(_work, jobs, chunksize=chunk)


def _begin(work: Callable, threads: int) -> None:
    global _worker
    _worker = work
    torch.set_num_threads(threads)


def _work(job):
    return _worker(job)


def draw(methods, method: Method, item: Item, chosen, wanted, sampling, seed):
    """Yield (concept, its info, its edits drawn (E, S, 3, 64, 64)) per number of steps.

    An anchor has no concept.
    """
    if method.name in ANCHORS:
        shown = item
        if method.name == "other":
            name = chosen[(chosen.index(item) + 1) % len(chosen)].name
            shown = Item(name, item.style, item.scene)
        # Seed 0 made the reference of `measures`: a fair truth is drawn with others.
        pictures = [torch.stack([truth(shown, e, 100 + s) for s in sampling[0]]) for e in wanted]
        yield None, {"num_steps": 0}, torch.stack(pictures)
        return
    pipe = methods.pipe_of(method)  # its encoder predicts again at every `prediction_interval`
    memory = PeakMemory(pipe.backbone.device)
    concepts = methods.concepts(method, item.picture(), seed)
    peak = memory.read()
    for concept in concepts.values():
        start = time.perf_counter()
        drawn = draw_concept(pipe, concept, wanted, sampling)
        each = (time.perf_counter() - start) / drawn.shape[:2].numel()
        info = {"seconds_per_picture": each, "extra_memory_mb": peak}
        yield concept, concept.info | info, drawn


def draw_concept(pipe, concept, wanted, sampling) -> torch.Tensor:
    """A concept's edits, drawn: (E, S, 3, 64, 64). sampling: (seeds, steps, guidance scale)."""
    seeds, num_inference_steps, guidance_scale = sampling
    drawn = pipe.generate(
        concept, prompts_of(concept, wanted), seeds, guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps, batch_size=len(wanted) * len(seeds),
        progress=False,
    )  # fmt: skip
    pictures = pipe.pixels([picture for row in drawn for picture in row])
    return pictures.unflatten(0, (len(wanted), len(seeds)))


def measured(judges, method: Method, item: Item, wanted, info, drawn) -> list[dict]:
    """One row per edit."""
    words = [word for word, _ in info.get("words_after", [])]
    own = {
        **judges.words(item.name, words), "nearest_words": " ".join(words),
        **{key: info.get(key) for key in (*TIMES, *LOSSES)},
    }  # fmt: skip
    rows = []
    for edit, values in zip(wanted, judges.pictures(drawn, item, wanted), strict=True):
        row = {
            "method": method.label, "steps": info["num_steps"], "concept": item.name,
            "group": item.group, "input_style": item.style, "input_scene": item.scene,
            "edit": edit.name, "is_style": int(edit.is_style), **values, **own,
        }  # fmt: skip
        rows.append({column: _text(row.get(column)) for column in COLUMNS})
    return rows


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def to_csv(rows) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def resume(out_dir: Path, settings) -> list[dict]:
    """The rows of an earlier call with the same settings, or none; writes the settings first.

    Methods may have been added since. Raises ValueError when the folder holds a run with other
    settings.
    """
    path = out_dir / "run.json"
    if path.is_file():
        before = json.loads(path.read_text())["settings"]
        if set(before["methods"]) <= set(settings["methods"]):
            before["methods"] = settings["methods"]
        check_settings(out_dir, before, settings)
    document = {"settings": settings, "versions": versions()}
    write_atomically(path, json.dumps(document, indent=1).encode())
    table = out_dir / "measures.csv"
    return read_csv(table) if table.is_file() else []


def check_settings(path: Path, before: dict, now: dict) -> None:
    """Raises ValueError when the run at `path` was begun with other settings."""
    if changed := [key for key in now if now[key] != before.get(key)]:
        raise ValueError(
            f"{path} holds a run with other settings ({', '.join(changed)}): "
            f"use another {'folder' if path.is_dir() else 'file'}."
        )


def write_document(path: Path, document: dict, lists: tuple[str, ...]) -> None:
    """JSON in which each row of the named lists, which come last, has one line."""
    head = {key: value for key, value in document.items() if key not in lists}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    for key in lists:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in document[key])
        text += f',\n "{key}": [\n{lines}\n ]'
    write_atomically(path, (text + "\n}\n").encode())


def versions() -> dict:
    packages = ("torch", "diffusers", "transformers", "numpy")
    names = {"dte_lab": __version__, "python": platform.python_version()}
    return names | {name: version(name) for name in packages} | {"date": time.strftime("%Y-%m-%d")}


def fingerprint(*modules) -> str:
    """Changes when any weight of the modules does: the first 16 digits of a SHA-256."""
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def keep(out_dir: Path, item: Item, method: Method, info, drawn) -> None:
    """pictures/CONCEPT/METHOD_STEPS.png, and the input beside it."""
    E, S = drawn.shape[:2]
    folder = out_dir / "pictures" / item.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    to_pil(item.picture())[0].save(folder / "input.png")
    name = f"{method.label}_{info['num_steps']}".replace("/", "-")
    grid = make_image_grid(to_pil(drawn.transpose(0, 1).flatten(0, 1)), rows=S, cols=E)
    grid.save(folder / f"{name}.png")
