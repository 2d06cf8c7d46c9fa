"""Three guided expeditions, one for each question that the paper leaves open.

An expedition is a row of stops; a stop puts the explorer's knobs somewhere and says what to look
for. What comes of it is computed when the reader runs it.
"""

from dataclasses import replace
from typing import NamedTuple

from dte_lab.panels.explorer_runs import KNOWN_THINGS, Question, Subject
from dte_lab.panels.explorer_settings import ExplorerSetting
from dte_lab.world.sprites import UNSEEN_STYLE

ON_WHITE = "a picture of S* on a white background"
TWO_SCENES = ("a picture of S* on the beach", "a picture of S* at night")


class Stop(NamedTuple):
    """Where an expedition halts: a title, what to look for, and where the knobs stand.

    a, b: what differs from the method as it is.
    """

    title: str
    look: str
    question: Question
    a: dict[str, object]
    b: dict[str, object]

    def settings(self, usual: ExplorerSetting) -> tuple[ExplorerSetting, ExplorerSetting]:
        return replace(usual, **self.a), replace(usual, **self.b)


class Expedition(NamedTuple):
    """A question of the paper, and stops on the way to an answer in this small world."""

    title: str
    question: str
    stops: tuple[Stop, ...]


def temperature_pair(usual: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Two settings as dictionaries that test the temperature alone, low in A and high in B."""
    strong = usual | {"regulariser": "contrastive", "contrastive_weight": 1.0}
    return strong | {"temperature": 0.03}, strong | {"temperature": 1.0}


def _breadth() -> Expedition:
    look = (
        "A is the prediction alone, B has twelve steps. How much must tuning add, "
        "compared with the other stops?"
    )
    places = {
        "a thing it was trained on": Subject(KNOWN_THINGS[0], "fluent"),
        "a thing never seen": Subject("bus", "fluent"),
        "never seen, in a style never seen": Subject("strawberry", UNSEEN_STYLE),
    }
    stops = tuple(
        Stop(title, look, Question(subject, TWO_SCENES), {"steps": 0}, {"steps": 12})
        for title, subject in places.items()
    )
    return Expedition(
        "Breadth",
        "How does the encoder do on what its training was too narrow for, and would broader "
        "training help?",
        stops,
    )


def _steps() -> Expedition:
    def stop(name: str, style: str, few: int, many: int, look: str) -> Stop:
        question = Question(Subject(name, style), TWO_SCENES)
        return Stop(f"{name}: {few} or {many}", look, question, {"steps": few}, {"steps": many})

    return Expedition(
        "Steps",
        "What is the least number of tuning steps that satisfies, and does it depend on the thing?",
        (
            stop("bus", "fluent", 4, 12, "Which details come after the fourth step?"),
            stop("key", "noto", 4, 12, "A thing with few details: is the fourth step enough?"),
            stop("bus", "fluent", 12, 25, "Does the picture still gain, and does the scene hold?"),
        ),
    )


def _regularisation() -> Expedition:
    question = Question(Subject("octopus", "twemoji"), TWO_SCENES)
    strong = {"contrastive_weight": 1.0}
    return Expedition(
        "Regularisation",
        "Does the contrastive term keep more of the model's knowledge than another way of holding "
        "the word?",
        (
            Stop(
                "contrastive or nothing",
                "A holds the word as the paper does, a hundred times as strongly as usual; B does "
                "not hold it. Compare the nearest words and the word's length.",
                question, strong, strong | {"regulariser": "none"},
            ),
            Stop(
                "few near words or many, warm or cold",
                "N and the temperature say to how many words the word is drawn, and how firmly. "
                "Do they reach the picture?",
                question, strong | {"num_positives": 1, "temperature": 0.03},
                strong | {"num_positives": 50, "temperature": 1.0},
            ),
            Stop(
                "contrastive or a Gaussian of all words",
                "The Gaussian only asks that the word be somewhere where words are. (It is ours.)",
                question, strong, strong | {"regulariser": "gaussian", "regulariser_weight": 1.0},
            ),
        ),
    )  # fmt: skip


def expeditions() -> tuple[Expedition, ...]:
    """One for each open question of the paper."""
    return _breadth(), _steps(), _regularisation()
