"""Every switch of the method as one setting of the explorer, and what two settings differ in.

A setting is plain numbers and words, so that it fits a small file; it is checked by the same
classes that the pipeline uses. `idle` says which switches change nothing beside the others, and
why: one who turns them would look for an effect in vain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from dte_lab.common.errors import DTEError
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.config import REGULARISERS, MethodConfig
from dte_lab.dual_path import GRANULARITIES, OFFSETS_ON
from dte_lab.evaluation.methods import idle_with
from dte_lab.evaluation.specifications import METHOD_OPTIONS, Specification
from dte_lab.pipeline import DTEPipeline
from dte_lab.prompts import check_drawing
from dte_lab.recommended import OPTIMIZERS
from dte_lab.tuning import TRAINABLE, TuneConfig

OWN = "own"  # the backbone's own encoder
DRAWN_PARTS = ("both", "word", "weights")
MOST_STEPS = 500
RATES = ("token_learning_rate", "offset_learning_rate", "encoder_learning_rate")


class Switch(NamedTuple):
    """One switch: the field of `ExplorerSetting`, its name for people, and the values it may take.

    choices: the values; None for a number from `low` to `high`, whole where `low` is.
    """

    field: str
    label: str
    choices: tuple = ()
    low: float = 0
    high: float = 1


SWITCHES = {
    "Prediction": (
        Switch("encoder", "encoder", (OWN, "small/none")),
        Switch("rank", "rank, cut to", (0, 1, 2, 4, 8)),
        Switch("part", "what draws", DRAWN_PARTS),
    ),
    "Tuning": (
        Switch("steps", "steps", low=0, high=MOST_STEPS),
        Switch("optimizer", "optimizer of the weights", OPTIMIZERS),
        Switch("token_learning_rate", "rate of the word", low=0.0, high=10.0),
        Switch("offset_learning_rate", "rate of the weights", low=0.0, high=1.0),
        Switch("batch_size", "noise levels per step", low=1, high=64),
        Switch("trainable", "what is tuned", TRAINABLE),
        Switch("encoder_learning_rate", "rate of the encoder", low=0.0, high=1.0),
        Switch("seed", "seed of the noise", low=0, high=10**6),
    ),
    "The word's regulariser (in tuning)": (
        Switch("regulariser", "regulariser", REGULARISERS),
        Switch("num_positives", "N, near words", low=1, high=200),
        Switch("temperature", "temperature", low=0.001, high=10.0),
        Switch("contrastive_weight", "contrastive weight", low=0.0, high=100.0),
        Switch("norm_weight", "weight of the length", low=0.0, high=100.0),
        Switch("norm_free", "length that is free", low=0.0, high=10.0),
        Switch("regulariser_weight", "weight of another kind", low=0.0, high=100.0),
    ),
    "Blending": (
        Switch("alpha_start", "alpha at the first step", low=0.0, high=1.0),
        Switch("alpha_end", "alpha at the last step", low=0.0, high=1.0),
        Switch("offsets_on", "weights on the path", OFFSETS_ON),
        Switch("granularity", "blended after each", GRANULARITIES),
    ),
    "Drawing": (
        Switch("guidance_scale", "guidance", low=0.0, high=100.0),
        Switch("num_inference_steps", "sampling steps", low=1, high=1000),
        Switch("prediction_interval", "predict anew every", low=0, high=1000),
        Switch("unconditional_offsets", "weights in both halves", (True, False)),
    ),
}
SWITCH_OF = {switch.field: switch for group in SWITCHES.values() for switch in group}
OF_DRAWING = ("part", "guidance_scale", "num_inference_steps", "prediction_interval",
              "unconditional_offsets", "steps")  # fmt: skip


@dataclass(frozen=True)
class ExplorerSetting:
    """A value for each switch; fields as in `MethodConfig` and `TuneConfig` where they have one.

    encoder: "own", or a name as `load_encoder` takes it. rank: 0 for uncut. part: of DRAWN_PARTS.
    alpha_start, alpha_end: the `alpha_blend`, constant where they are equal.
    Raises DTEError for a value that means nothing.
    """

    encoder: str = OWN
    rank: int = 0
    part: str = "both"
    steps: int = TuneConfig.num_steps
    seed: int = 0
    trainable: str = TuneConfig.trainable
    batch_size: int = TuneConfig.batch_size
    optimizer: str = TuneConfig.optimizer
    token_learning_rate: float = TuneConfig.token_learning_rate
    offset_learning_rate: float = TuneConfig.offset_learning_rate
    encoder_learning_rate: float = TuneConfig.encoder_learning_rate
    regulariser: str = MethodConfig.regulariser
    num_positives: int = MethodConfig.num_positives
    temperature: float = MethodConfig.temperature
    contrastive_weight: float = MethodConfig.contrastive_weight
    norm_weight: float = MethodConfig.norm_weight
    norm_free: float = MethodConfig.norm_free
    regulariser_weight: float = MethodConfig.regulariser_weight
    alpha_start: float = MethodConfig.alpha_blend
    alpha_end: float = MethodConfig.alpha_blend
    offsets_on: str = MethodConfig.offsets_on
    granularity: str = MethodConfig.granularity
    guidance_scale: float = 1.5
    num_inference_steps: int = 15
    prediction_interval: int = MethodConfig.prediction_interval
    unconditional_offsets: bool = MethodConfig.unconditional_offsets

    def __post_init__(self) -> None:
        check_one_of("encoder", self.encoder, SWITCH_OF["encoder"].choices)
        check_one_of("part", self.part, DRAWN_PARTS)
        for name in ("steps", "rank", "seed"):
            check_whole(name, getattr(self, name), 0, MOST_STEPS if name == "steps" else None)
        _ = self.method, self.tuning
        check_drawing(["S*"], [0], self.guidance_scale, self.num_inference_steps)
        if self.part != "both" and self.prediction_interval:
            raise DTEError("Predicting anew makes word and weights: draw with both of them.")
        if self.rank and (self.trainable != "predictions" or self.prediction_interval):
            raise DTEError("A cut rank goes with tuning the predictions, and none made anew.")

    @classmethod
    def of(cls, pipe: DTEPipeline, **changes: Any) -> Self:
        """What the pipeline does where nothing is asked for, with changes."""
        method, recommended = pipe.encoder.method, pipe.backbone.recommended
        alpha = method.alpha_blend
        start, end = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        tuning = TuneConfig.of(recommended)
        values = {name: getattr(method, name) for name in METHOD_OPTIONS if name != "alpha_blend"}
        values |= {name: getattr(tuning, name) for name in ("batch_size", "optimizer", *RATES)}
        values |= {"alpha_start": start, "alpha_end": end, "steps": pipe.recommended_steps}
        values |= {"guidance_scale": recommended.guidance_scale}
        return cls(**values | changes)

    @classmethod
    def read(cls, values: object) -> Self:
        """From what `asdict` made. Raises DTEError for anything else, and beyond the knobs."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise DTEError(f"A setting has the {len(names)} switches {', '.join(sorted(names))}.")
        setting = cls(**values)
        for switch in SWITCH_OF.values():
            if not switch.choices:
                check_number(switch.field, values[switch.field], switch.low, switch.high)
        return setting

    @property
    def method(self) -> MethodConfig:
        values = {name: getattr(self, name) for name in METHOD_OPTIONS if name != "alpha_blend"}
        alpha = self.alpha_start
        return MethodConfig(
            alpha_blend=alpha if alpha == self.alpha_end else (alpha, self.alpha_end), **values
        )

    @property
    def tuning(self) -> TuneConfig:
        names = ("trainable", "batch_size", "optimizer", *RATES)
        values = {name: getattr(self, name) for name in names}
        return TuneConfig(num_steps=self.steps, **values)

    @property
    def learning(self) -> tuple:
        """What tuning depends on, but for the number of steps."""
        return tuple(value for name, value in asdict(self).items() if name not in OF_DRAWING)

    def idle(self, pipe: DTEPipeline) -> dict[str, str]:
        """{switch that changes nothing here: why}; pipe: with this setting's encoder."""
        given = tuple(asdict(self)) + ("alpha_blend",)
        spec = Specification(
            "dte", "dte", (self.steps,), None, self.rank or None, self.part,
            asdict(self.method), self.tuning, given=given,
        )  # fmt: skip
        found = idle_with(pipe.encoder, spec, self.guidance_scale > 1)
        if not self.steps and self.part == "word":
            why = "the word alone is drawn, and nothing is tuned"
            found |= dict.fromkeys(("rank", "offsets_on", "unconditional_offsets"), why)
        if self.trainable != "predictions" or self.prediction_interval:
            found["rank"] = "a cut goes with tuned predictions alone, none of them made anew"
        return {name: why for name, why in found.items() if name in SWITCH_OF}


def in_words(name: str, value: object) -> str:
    """A value of a switch, as a person would say it."""
    named = {
        ("encoder", OWN): "the model's own", ("encoder", "small/none"): "trained unregularised",
        ("rank", 0): "uncut", ("prediction_interval", 0): "never",
        ("part", "both"): "word and weights", ("part", "word"): "the word alone",
        ("part", "weights"): "the weights alone",
    }  # fmt: skip
    if isinstance(value, bool):
        return "yes" if value else "no"
    return named.get((name, value)) or (f"{value:g}" if isinstance(value, float) else str(value))


def differences(a: ExplorerSetting, b: ExplorerSetting) -> list[tuple[str, object, object]]:
    """(switch, value in A, value in B) of all that differ, in the order of SWITCHES."""
    values = ((name, getattr(a, name), getattr(b, name)) for name in SWITCH_OF)
    return [(name, x, y) for name, x, y in values if x != y]


def change_in_words(a: ExplorerSetting, b: ExplorerSetting, idle: Sequence[str] = ()) -> str:
    """What changed from A to B, in one sentence; idle: what changes nothing in either."""
    found = differences(a, b)
    if not found:
        return "A and B are the same setting."
    said = [
        f"{SWITCH_OF[name].label} {in_words(name, y)} in place of {in_words(name, x)}"
        + (" (which changes nothing here)" if name in idle else "")
        for name, x, y in found
    ]
    return f"B differs from A in {len(found)} of {len(SWITCH_OF)} switches: {'; '.join(said)}."
