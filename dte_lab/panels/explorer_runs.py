"""What the explorer computes, apart from its widgets: a picture under two settings.

Tuning at a constant rate passes through the results of all smaller numbers of steps, so each
run's states are kept: fewer steps, and all that matters in drawing alone, cost no tuning again.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
from dte_lab.panels.explorer_measures import Measurer
from dte_lab.panels.explorer_settings import OWN, ExplorerSetting
from dte_lab.pipeline import DTEPipeline
from dte_lab.prompts import check_drawing
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import UNSEEN_STYLE, concepts, unseen_names, unseen_things

KEPT_RUNS = 4  # of tuning, with their states
MOST_DRAWN = 16  # pictures of a setting
COST = 4  # of a step of tuning, in steps of sampling
KNOWN_THINGS = ("cat", "rocket", "banana")  # of the training


class Stopped(Exception):
    """The user has stopped the run."""


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
        self.measurer = Measurer(pipe)
        self.kept: OrderedDict[tuple, Trajectory] = OrderedDict()

    def pipe_of(self, setting: ExplorerSetting) -> DTEPipeline:
        """The pipeline with the setting's encoder. Raises DTEError where there is none."""
        name = None if setting.encoder == OWN else setting.encoder
        return self.methods.pipe_of(Specification(f"encoder {setting.encoder}", "dte", (), name))

    def idle(self, setting: ExplorerSetting) -> dict[str, str]:
        return setting.idle(self.pipe_of(setting))

    def compare(
        self,
        question: Question,
        settings: Sequence[ExplorerSetting],
        tick: Callable[[float], object] = lambda done: None,
    ) -> list[Outcome | DTEError]:
        """Each setting's outcome, or what was wrong with it: the others are answered all the same.

        tick: called with the fraction that is done; may raise `Stopped`, which ends it.
        Raises DTEError for a wrong question, and what `tick` raises.
        """
        question.check()
        steps = {}  # those that learn alike learn once
        for setting in settings:
            key = setting.learning
            steps[key] = max(steps.get(key, 0), setting.steps)
        drawings = -(-len(question.prompts) * len(question.seeds) // 8)
        total = COST * sum(steps.values())
        total += sum(drawings * setting.num_inference_steps for setting in settings)
        done, answers = 0, []

        def advance(cost: int) -> None:
            nonlocal done
            done += cost
            tick(min(1.0, done / max(1, total)))

        for setting in settings:
            try:
                answers.append(self._answer(question, setting, steps[setting.learning], advance))
            except DTEError as error:
                answers.append(error)
        return answers

    def _answer(
        self,
        question: Question,
        setting: ExplorerSetting,
        steps: int,
        advance: Callable[[int], None],
    ) -> Outcome:
        pipe = self.pipe_of(setting)
        concept = self.learn(question.subject, setting, steps, advance)
        words = concept.info["words_before"], concept.info["words_after"]
        start = time.perf_counter()
        pictures = pipe.generate(
            self.methods.part_of(concept, None if setting.part == "both" else setting.part),
            list(question.prompts), list(question.seeds), setting.guidance_scale,
            setting.num_inference_steps, progress=False, callback=lambda: advance(1),
        )  # fmt: skip
        drawing_seconds = time.perf_counter() - start
        measures = self.measurer(question.subject, question.prompts, pictures)
        measures["word_length"] = concept.v_star.norm().item() / pipe.prompt_encoder.table.mean_norm
        return Outcome(
            setting, pictures, *words, measures, concept.seconds, drawing_seconds,
            setting.idle(pipe),
        )  # fmt: skip

    def learn(
        self,
        subject: Subject,
        setting: ExplorerSetting,
        steps: int | None = None,
        advance: Callable[[int], None] = lambda cost: None,
    ) -> Concept:
        """The concept after the setting's steps; tuned for `steps` where nothing is kept yet."""
        steps = max(setting.steps, steps or 0)
        key = subject, setting.learning
        known = self.kept.get(key)
        if known is None or len(known.states) <= setting.steps:
            known = self.kept[key] = self._tune(subject, setting, steps, advance)
        else:
            advance(0)
        self.kept.move_to_end(key)
        while len(self.kept) > KEPT_RUNS:
            self.kept.popitem(last=False)
        pipe, method = self.pipe_of(setting), setting.method
        concept = at_step(pipe, known.concept, method, setting.steps, *known.states[setting.steps])
        pixels = to_bytes(pipe.pixels([subject.picture.image]))
        return replace(
            concept, config=method, pictures=pixels if method.prediction_interval else None
        )

    def _tune(
        self, subject: Subject, setting: ExplorerSetting, steps: int, advance: Callable[[int], None]
    ) -> Trajectory:
        pipe, start = self.pipe_of(setting), time.perf_counter()
        prediction = self._predict(subject, setting)
        states = [(prediction.v_star, prediction.offsets, time.perf_counter() - start)]

        def callback(state: dict) -> None:  # its v* and offsets are those before the step
            states[-1] = state["v_star"], state["offsets"], states[-1][-1]
            states.append((*states[-1][:2], time.perf_counter() - start))
            advance(COST)

        concept = pipe.personalize(
            [subject.picture], steps, setting.seed, callback, progress=False, config=setting.tuning,
            method=setting.method, prediction=prediction,
        )  # fmt: skip
        states[-1] = concept.v_star, concept.offsets, states[-1][-1]
        states += states[-1:] * (steps + 1 - len(states))  # what stopped early stays as it was
        return Trajectory(concept, states)

    def _predict(self, subject: Subject, setting: ExplorerSetting) -> EncoderPrediction:
        """The encoder's prediction, cut to the setting's rank."""
        pipe, rank = self.pipe_of(setting), setting.rank
        known = pipe.encoder.settings.rank
        if known != "full" and rank > known:
            raise DTEError(f"A prediction of rank {known} can be cut to rank 1 to {known}.")
        pixels = pipe.pixels([subject.picture.image])
        return predicted(pipe, pixels, setting.seed, rank or None)
