"""`dte evaluate`: every method on every concept, one table of measures per run.

A run's folder holds measures.csv (one `Row` per method, steps, concept and edit), run.json
(settings, versions, and at the end the summary) and pictures/ (of the first concepts: edits from
left to right, seeds from top to bottom). A run that was cut off goes on where it stopped, and one
that is finished can be given more methods and more steps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from dte_lab.baselines import BaselineConfig
from dte_lab.common.errors import DTEError
from dte_lab.common.files import prepare_folder, write_atomically
from dte_lab.common.images import save_png, to_pil
from dte_lab.common.processes import in_processes
from dte_lab.common.resume import as_json, check_settings
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.evaluation.edits import SCENE_EDITS, Item, edits, items
from dte_lab.evaluation.measures import Measures, concept_losses
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.records import Row, read_run, to_csv, versions
from dte_lab.evaluation.report import summarise
from dte_lab.evaluation.specifications import ANCHORS, Specification, parse, split_steps
from dte_lab.evaluation.trials import Sampling, Trial, anchor_trial, rows_of, trials
from dte_lab.pipeline import DTEPipeline
from dte_lab.tuning import TuneConfig
from dte_lab.world.scenes import SCENES

KEPT = 6  # concepts whose pictures are kept


@dataclass(frozen=True)
class EvaluationConfig(Sampling):
    """What is asked of every method, and how its pictures are drawn.

    concepts: how many of the split. seed: of every method's optimisation. with_losses: measure the
    diffusion LOSSES, too. Raises DTEError for fewer than 2 seeds, which have no diversity, or than
    2 concepts, of which each is held against another, and for values that mean nothing.
    """

    split: str = "test"
    concepts: int = 60
    scenes: tuple[str, ...] = SCENE_EDITS
    seed: int = 0
    with_losses: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "concepts"):
            check_whole(name, getattr(self, name), 2)
        check_whole("seed", self.seed)
        check_whole("num_inference_steps", self.num_inference_steps, 1, 1000)
        check_number("guidance_scale", self.guidance_scale, 0, 100)
        for scene in self.scenes:
            check_one_of("scenes", scene, SCENES)


@dataclass(frozen=True)
class Job:
    """A method on the i-th of the chosen concepts."""

    i: int
    spec: Specification


def measure_methods(
    out_dir: Path,
    pipe: DTEPipeline,
    specs: Sequence[str],
    config: EvaluationConfig | None = None,
    progress: bool = True,
    processes: int = 1,
    load: Callable[[], DTEPipeline] | None = None,
) -> list[dict]:
    """Measure methods, given as in specifications.py, and write the run's folder.

    The anchors "oracle" and "other" are always measured. processes: so many share the concepts and
    the cores; each makes its `pipe` by `load()`, a function that can be pickled.
    Returns the summary of `report.summarise`.
    Raises DTEError for a wrong specification, and when out_dir holds a run with other settings or
    with methods that are not among these.
    """
    config, methods = config or EvaluationConfig(), Methods(pipe)
    parsed = check_run(specs, config, processes)
    for spec in parsed:
        methods.check(spec, guided=config.guidance_scale > 1)
    if processes > 1 and load is None:
        raise DTEError("Several processes need `load`, with which each makes its own pipe.")
    prepare_folder(out_dir)
    chosen = items(config.concepts, config.split)
    settings = {
        "methods": [spec.text for spec in parsed], **asdict(config), **methods.settings(),
        "tuning": TuneConfig(), "baselines": BaselineConfig(),
    }  # fmt: skip
    rows = begin(out_dir, settings)

    worker = Worker(load, out_dir, chosen, config)
    if processes == 1:
        worker.methods = methods
    jobs = to_do(chosen, parsed, rows)
    total = len(chosen) * len(parsed)
    bar = tqdm(initial=total - len(jobs), total=total, desc="evaluate", disable=not progress)
    for new in in_processes(worker, jobs, processes, chunk=len(parsed)):
        rows += new
        write_atomically(out_dir / "measures.csv", to_csv(rows))
        bar.set_postfix_str(f"{new[0].concept}, {new[0].method}")
        bar.update()
    bar.close()
    names, labels = [item.name for item in chosen], [spec.label for spec in parsed]
    rows.sort(key=lambda r: (names.index(r.concept), labels.index(r.method), r.steps))
    write_atomically(out_dir / "measures.csv", to_csv(rows))
    summary = summarise(rows)
    write_run(out_dir, settings, summary)
    return summary


def check_run(
    specs: Sequence[str], config: EvaluationConfig, processes: int = 1
) -> list[Specification]:
    """What `measure_methods` is asked for. Raises DTEError as it does, without a pipe."""
    check_whole("processes", processes, 1)
    items(config.concepts, config.split)
    return parse_all(specs)


def parse_all(specs: Sequence[str]) -> list[Specification]:
    """Different methods, the anchors last. Raises DTEError for one that is given twice."""
    texts = dict.fromkeys([*(s for s in specs if s not in ANCHORS), *ANCHORS])
    parsed = [parse(text) for text in texts]
    labels = [spec.label for spec in parsed]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise DTEError(f"{twice[0]} is given twice: write its steps together, as in ti:12,500.")
    return parsed


def to_do(
    chosen: Sequence[Item], parsed: Sequence[Specification], rows: Sequence[Row]
) -> list[Job]:
    """What the rows lack: each method on each concept, with the steps that are not there yet."""
    done = {(row.method, row.steps, row.concept) for row in rows}
    jobs = []
    for i, item in enumerate(chosen):
        for spec in parsed:
            left = [s for s in spec.steps or (0,) if (spec.label, s, item.name) not in done]
            if left:
                jobs.append(Job(i, replace(spec, steps=tuple(left) if spec.steps else ())))
    return jobs


class Worker:
    """Does one job: measures a method on one of the chosen concepts."""

    def __init__(
        self,
        load: Callable[[], DTEPipeline] | None,
        out_dir: Path,
        chosen: Sequence[Item],
        config: EvaluationConfig,
    ) -> None:
        self.load, self.out_dir, self.chosen, self.config = load, out_dir, chosen, config

    @cached_property
    def methods(self) -> Methods:
        return Methods(self.load())

    @cached_property
    def judges(self) -> Measures:
        return Measures(self.methods.pipe.backbone)

    def __call__(self, job: Job) -> list[Row]:
        item, spec, config, rows = self.chosen[job.i], job.spec, self.config, []
        asked = edits(item, config.scenes)
        if spec.is_anchor:
            made = [anchor_trial(spec, item, self.chosen, asked, config.seeds)]
        else:
            made = trials(self.methods, spec, item, asked, config, config.seed)
        for trial in made:
            losses = None
            if config.with_losses and trial.concept is not None:
                losses = concept_losses(self.methods.pipe, trial.concept, item, asked)
            rows += rows_of(self.judges, spec.label, item, asked, trial, losses)
            if job.i < KEPT:
                keep(self.out_dir, item, spec.label, trial)
        return rows


def begin(out_dir: Path, settings: dict) -> list[Row]:
    """The rows of an earlier call with the same settings, or none; writes the settings.

    Methods, steps and the weights of their encoders may have been added since. Raises DTEError
    when the folder holds a run with other settings.
    """
    rows = []
    if (out_dir / "run.json").exists():
        document, rows = read_run(out_dir)
        before = document["settings"]
        old, new = (dict(map(split_steps, s["methods"])) for s in (before, settings))
        if all(label in new and set(steps) <= set(new[label]) for label, steps in old.items()):
            before["methods"] = settings["methods"]
        if isinstance(before.get("weights"), dict):
            before["weights"] = settings["weights"] | before["weights"]
        check_settings(out_dir, before, settings)
    write_run(out_dir, settings)
    return rows


def write_run(out_dir: Path, settings: dict, summary: list[dict] | None = None) -> None:
    """run.json; with a summary once the run is finished."""
    document = {"settings": as_json(settings), "versions": versions()}
    if summary is not None:
        document["summary"] = summary
    write_atomically(out_dir / "run.json", json.dumps(document, indent=1).encode())


def keep(out_dir: Path, item: Item, label: str, trial: Trial) -> None:
    """pictures/CONCEPT/METHOD_STEPS.png, and the input beside it."""
    columns, seeds = trial.pictures.shape[:2]
    folder = out_dir / "pictures" / item.name.replace(" ", "-")
    save_png(to_pil(item.picture())[0], folder / "input.png")
    name = f"{label}_{trial.steps}".replace("/", "-")
    pictures = to_pil(trial.pictures.transpose(0, 1).flatten(0, 1))  # seed by seed
    save_png(make_image_grid(pictures, rows=seeds, cols=columns), folder / f"{name}.png")
