"""What the explorer computes, apart from its widgets: a picture under two settings.

Tuning passes through the results of all smaller numbers of steps (see `TuneConfig`), so each
run's states are kept: fewer steps, and all that matters in drawing alone, cost no tuning again. A
setting that has answered the same question is not asked again. The rest runs in two lanes.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.images import Picture, read_pictures, to_bytes
from dte_lab.common.origin import pictures_digest
from dte_lab.concept import Concept
from dte_lab.encoder import EncoderPrediction
from dte_lab.evaluation.methods import Methods, at_step, predicted
from dte_lab.evaluation.specifications import Specification
from dte_lab.panels.explorer_lanes import Progress, lanes_for, side_by_side, twin
from dte_lab.panels.explorer_measures import measured
from dte_lab.panels.explorer_settings import OWN, ExplorerSetting
from dte_lab.pipeline import DTEPipeline
from dte_lab.prompts import check_drawing
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import UNSEEN_STYLE, concepts, unseen_names, unseen_things

KEPT_RUNS = 4  # of tuning, with their states
KEPT_ANSWERS = 8
MOST_DRAWN = 16  # pictures of a setting
COST = 4  # of a step of tuning, in steps of sampling
KNOWN_THINGS = ("cat", "rocket", "banana")  # of the training


@dataclass(frozen=True)
class Subject:
    """A picture to learn; of the small world where a style is known, else the user's own."""

    name: str
    style: str | None = None
    own: Picture | None = field(default=None, compare=False)
    digest: str = ""

    @classmethod
    def of_upload(cls, source: object) -> "Subject":
        """From an upload, or any picture. Raises DTEError for what is none, or several."""
        pictures = read_pictures(source)
        if len(pictures) != 1:
            raise DTEError(f"The explorer learns from one picture, not {len(pictures)}.")
        return cls("your picture", None, pictures[0], pictures_digest([pictures[0].image]))

    @property
    def picture(self) -> Picture:
        """Raises DTEError for a picture of somebody else's history, which is not in its file."""
        if self.style is not None:
            return Picture(render_image(self.name, self.style, "white"))
        if self.own is None:
            raise DTEError("The picture of this run is not in the history's file: upload it.")
        return self.own

    @property
    def label(self) -> str:
        if self.style is None:
            return self.name
        known = concepts()[self.name].split in ("train", "extra")
        return f"{self.name}, {self.style}{' (trained on)' if known else ''}"


def subjects() -> list[Subject]:
    """Thirty things that no training has seen, three it has, three in a style it has not."""
    unseen = [Subject(name, style) for name, style in unseen_things()]
    known = [Subject(name, "fluent") for name in KNOWN_THINGS]
    strange = [Subject(s.name, UNSEEN_STYLE) for s in unseen if s.name in unseen_names()][:3]
    return [*unseen, *known, *strange]


@dataclass(frozen=True)
class Question:
    """What both settings are asked: a picture, prompts with "S*", and a seed for each drawing."""

    subject: Subject
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)

    def check(self) -> None:
        """Raises DTEError for what means nothing, and for too many pictures."""
        check_drawing(self.prompts, self.seeds)
        if len(self.prompts) * len(self.seeds) > MOST_DRAWN:
            raise DTEError(f"Ask for at most {MOST_DRAWN} pictures: fewer prompts or seeds.")


@dataclass
class Outcome:
    """What one setting made of a question.

    pictures: a row per prompt, one per seed. words: (word, cosine) nearest to v*, before tuning and
    after. measures: {name: number}. seconds: of predicting and tuning, as measured when it was
    done; `drawing_seconds` of all its pictures. idle: see `ExplorerSetting.idle`.
    """

    setting: ExplorerSetting
    pictures: list[list[Image.Image]]
    words_before: list
    words_after: list
    measures: dict[str, float]
    seconds: float
    drawing_seconds: float
    idle: dict[str, str] = field(default_factory=dict)


@dataclass
class Trajectory:
    """A run of tuning: its states by the number of steps taken, and what `personalize` says."""

    concept: Concept
    states: list[tuple[torch.Tensor, dict, float]]  # v*, offsets, seconds since the start


class Explorer:
    """Answers questions under settings, on one pipeline."""

    def __init__(self, pipe: DTEPipeline) -> None:
        self.pipe, self.methods = pipe, Methods(pipe)
        self.kept: OrderedDict[tuple, Trajectory] = OrderedDict()
        self.answered: OrderedDict[tuple, Outcome] = OrderedDict()
        self.twins: dict[tuple[str, int], DTEPipeline] = {}

    def pipe_of(self, setting: ExplorerSetting, lane: int = 0) -> DTEPipeline:
        """The pipeline with the setting's encoder. Raises DTEError where there is none."""
        name = None if setting.encoder == OWN else setting.encoder
        pipe = self.methods.pipe_of(Specification(f"encoder {setting.encoder}", "dte", (), name))
        if lane == 0:
            return pipe
        key = setting.encoder, lane
        if key not in self.twins:
            self.twins[key] = twin(pipe)
        return self.twins[key]

    def idle(self, setting: ExplorerSetting) -> dict[str, str]:
        return setting.idle(self.pipe_of(setting))

    def compare(
        self,
        question: Question,
        settings: Sequence[ExplorerSetting],
        tick: Callable[[float], object] = lambda done: None,
    ) -> list[Outcome | DTEError]:
        """Each setting's outcome, or what was wrong with it: the others are answered all the same.

        tick: called with the fraction that is done, by one lane at a time; may raise `Stopped`,
        which ends it. Raises DTEError for a wrong question, and what `tick` raises.
        """
        question.check()
        lanes, subject = lanes_for(self.pipe), question.subject
        answers = {setting: self.answered.get((question, setting)) for setting in settings}
        new = [setting for setting, known in answers.items() if known is None]
        for setting in new:  # while the modules rest of which a twin may be made
            with suppress(DTEError):  # it comes again below, as the setting's answer
                self.pipe_of(setting, lanes - 1)
        learners = self._learners(subject, new)
        drawings = -(-len(question.prompts) * len(question.seeds) // 8)
        costs = [COST * setting.steps for setting in learners]
        costs += [drawings * setting.num_inference_steps for setting in new]
        progress = Progress(sum(costs), tick)

        def learn(setting: ExplorerSetting, lane: int) -> None:
            self.learn(subject, setting, lane, progress)

        def answer(setting: ExplorerSetting, lane: int) -> Outcome:
            return self._answer(question, setting, lane, progress)

        side_by_side(learn, learners, lanes, progress)
        answers |= zip(new, side_by_side(answer, new, lanes, progress), strict=True)
        for setting, answer in answers.items():
            if isinstance(answer, Outcome):
                remember(self.answered, (question, setting), answer, KEPT_ANSWERS)
        progress(progress.total - progress.done)  # what was known took no time
        return [answers[setting] for setting in settings]

    def _learners(
        self, subject: Subject, settings: Sequence[ExplorerSetting]
    ) -> list[ExplorerSetting]:
        """Of the settings that learn alike the one of most steps, where no run is kept of it."""
        longest = {}
        for setting in sorted(settings, key=lambda setting: setting.steps):
            longest[setting.learning] = setting
        return [setting for setting in longest.values() if not self._kept(subject, setting)]

    def _kept(self, subject: Subject, setting: ExplorerSetting) -> Trajectory | None:
        known = self.kept.get((subject, setting.learning))
        return known if known and len(known.states) > setting.steps else None

    def learn(
        self,
        subject: Subject,
        setting: ExplorerSetting,
        lane: int = 0,
        progress: Callable[[int], object] = lambda cost: None,
    ) -> Concept:
        """The concept after the setting's steps; tuned where no run is kept of it."""
        pipe, method = self.pipe_of(setting, lane), setting.method
        known = self._kept(subject, setting) or self._tune(pipe, subject, setting, progress)
        remember(self.kept, (subject, setting.learning), known, KEPT_RUNS)
        concept = at_step(pipe, known.concept, method, setting.steps, *known.states[setting.steps])
        pixels = to_bytes(pipe.pixels([subject.picture.image]))
        return replace(
            concept, config=method, pictures=pixels if method.prediction_interval else None
        )

    def _answer(
        self,
        question: Question,
        setting: ExplorerSetting,
        lane: int,
        progress: Callable[[int], object],
    ) -> Outcome:
        pipe, subject = self.pipe_of(setting, lane), question.subject
        concept = self.learn(subject, setting, lane, progress)
        words = concept.info["words_before"], concept.info["words_after"]
        start = time.perf_counter()
        pictures = pipe.generate(
            Methods(pipe).part_of(concept, None if setting.part == "both" else setting.part),
            list(question.prompts), list(question.seeds), setting.guidance_scale,
            setting.num_inference_steps, progress=False, callback=lambda: progress(1),
        )  # fmt: skip
        drawing_seconds = time.perf_counter() - start
        measures = measured(pipe, subject, question.prompts, pictures)
        measures["word_length"] = concept.v_star.norm().item() / pipe.prompt_encoder.table.mean_norm
        return Outcome(
            setting, pictures, *words, measures, concept.seconds, drawing_seconds,
            setting.idle(pipe),
        )  # fmt: skip

    def _tune(
        self,
        pipe: DTEPipeline,
        subject: Subject,
        setting: ExplorerSetting,
        progress: Callable[[int], object],
    ) -> Trajectory:
        start, steps = time.perf_counter(), setting.steps
        prediction = predicted_with(pipe, subject, setting)
        states = [(prediction.v_star, prediction.offsets, time.perf_counter() - start)]

        def callback(state: dict) -> None:  # its v* and offsets are those before the step
            states[-1] = state["v_star"], state["offsets"], states[-1][-1]
            states.append((*states[-1][:2], time.perf_counter() - start))
            progress(COST)

        concept = pipe.personalize(
            [subject.picture], steps, setting.seed, callback, progress=False, config=setting.tuning,
            method=setting.method, prediction=prediction,
        )  # fmt: skip
        states[-1] = concept.v_star, concept.offsets, states[-1][-1]
        states += states[-1:] * (steps + 1 - len(states))  # what stopped early stays as it was
        return Trajectory(concept, states)


def predicted_with(
    pipe: DTEPipeline, subject: Subject, setting: ExplorerSetting
) -> EncoderPrediction:
    """The encoder's prediction, cut to the setting's rank. Raises DTEError for more than it has."""
    known, rank = pipe.encoder.settings.rank, setting.rank
    if known != "full" and rank > known:
        raise DTEError(f"A prediction of rank {known} can be cut to rank 1 to {known}.")
    pixels = pipe.pixels([subject.picture.image])
    return predicted(pipe, pixels, setting.seed, rank or None)


def remember(store: OrderedDict, key: object, value: object, most: int) -> None:
    """Put the newest last, and forget the oldest."""
    store.pop(key, None)
    store[key] = value
    while len(store) > most:
        store.popitem(last=False)
