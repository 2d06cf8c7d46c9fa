"""What is compared, written as NAME[@OPTION=VALUE...][:STEPS[,STEPS...]].

dte:0,12                        the tuning encoder, predicted only and after 12 steps
dte@alpha_blend=1:12            a variant: any field of MethodConfig, or of TuneConfig but its steps
dte@prediction_interval=5:12    v* and the offsets predicted anew at every 5th step of sampling
dte@offsets_on=hard:12          the offsets on the hard path, as the paper's text can be read
dte@rank=1:12                   the prediction cut to a lower rank before tuning (SVD)
dte@part=word:12                what v* alone draws; part=weights: the offsets, with "thing" as v*
dte@masked=true:12              told where the thing is in its picture, as by --mask
dte@encoder=small/none:12       another encoder, by name or folder; this one had no regulariser
dte@encoder=zero-shot:12        no encoder: from the words that CLIP finds, see zero_shot.py
ti:12,500   lora:12   lora-prior:12   e4t:12       baselines, with the fields of BaselineConfig that
                                they read; e4t takes encoder=, too
oracle, other                   the true rendering, and that of another concept: the scale

A row of a table must show what its label says: an option that would change nothing is refused, when
it is read (`parse`) or when its encoder is known (`idle_options`).
"""

import json
import re
from dataclasses import dataclass, field, fields, replace

from dte_lab.baselines import BaselineConfig
from dte_lab.common.errors import DTEError
from dte_lab.common.settings import check_one_of, check_whole
from dte_lab.config import REGULARISERS, MethodConfig
from dte_lab.dual_path import GRANULARITIES, OFFSETS_ON
from dte_lab.tuning import TuneConfig

METHOD_OPTIONS = tuple(f.name for f in fields(MethodConfig))
TUNE_OPTIONS = tuple(f.name for f in fields(TuneConfig) if f.name != "num_steps")
BASELINE_OPTIONS = {  # the fields of BaselineConfig that each baseline reads
    "ti": ("batch_size", "token_learning_rate"),
    "lora": ("batch_size", "optimizer", "lora_learning_rate"),
    "lora-prior": ("batch_size", "optimizer", "lora_learning_rate", "prior_pictures"),
    "e4t": ("batch_size", "optimizer", "token_learning_rate", "multiplicative_learning_rate"),
}
ANCHORS = ("oracle", "other")
PARTS = ("word", "weights")
ZERO_SHOT = "zero-shot"  # in an encoder's place
OPTIONS = {
    "dte": ("encoder", "rank", "part", "masked", *METHOD_OPTIONS, *TUNE_OPTIONS),
    **BASELINE_OPTIONS,
    "e4t": ("encoder", *BASELINE_OPTIONS["e4t"]),
    **dict.fromkeys(ANCHORS, ()),
}

ADAMW = "optimizer=adamw@offset_learning_rate=0.006@constant_steps=50"  # a rate that stays
STEP_GRID = "0,1,2,4,8,12,25,50,100,500"
EXPERIMENTS = {  # the rates of all methods: the best of "rates" on val
    "table": [
        "dte:0,12",
        "dte@part=word:0",
        "dte@part=weights:0",
        'dte@prompts=["a picture of S*"]:12',
        "ti@token_learning_rate=0.2:12",
        "lora:12",
        "lora@optimizer=muon@lora_learning_rate=0.03:12",
        "lora-prior:12",
        "e4t@token_learning_rate=0.05:12",
    ],
    "long": [
        "dte:0,12,25,50",
        "ti@batch_size=4:500",
        "lora@lora_learning_rate=0.006:120",
        "lora-prior@lora_learning_rate=0.006:120",
        "e4t@token_learning_rate=0.05:12,50",
    ],
    "rates": [  # one step of a factor of two around each that is used; chosen on val
        "dte:12,50",
        *(f"dte@token_learning_rate={rate}:12,50" for rate in (0.05, 0.2)),
        *(f"dte@offset_learning_rate={rate}:12,50" for rate in (0.03, 0.12)),
        *(f"ti@token_learning_rate={rate}:12" for rate in (0.05, 0.1, 0.2)),
        *(f"ti@batch_size=4@token_learning_rate={rate}:500" for rate in (0.05, 0.1)),
        *(f"lora@lora_learning_rate={rate}:12" for rate in (0.008, 0.016, 0.032)),
        *(f"lora@lora_learning_rate={rate}:120" for rate in (0.0015, 0.003, 0.006)),
        *(f"lora-prior@lora_learning_rate={rate}:12" for rate in (0.008, 0.016, 0.032)),
        *(f"lora-prior@lora_learning_rate={rate}:120" for rate in (0.0015, 0.003, 0.006)),
        *(f"e4t@multiplicative_learning_rate={rate}:12,50" for rate in (0.003, 0.006, 0.012)),
        *(f"e4t@token_learning_rate={rate}:12,50" for rate in (0.05, 0.2)),
    ],
    "optimizer": [  # what moves the matrices: Muon or AdamW, each at its best rate; on val
        "dte:12,50",
        "dte@constant_steps=50:12,50",
        f"dte@{ADAMW}:12,50",
        "dte@encoder=zero-shot:12,25",
        f"dte@encoder=zero-shot@{ADAMW}:12,25",
        "lora:12",
        "lora@optimizer=muon@lora_learning_rate=0.03:12",
        "e4t@token_learning_rate=0.05:12",
        "e4t@token_learning_rate=0.05@optimizer=muon@multiplicative_learning_rate=0.015:12",
    ],
    "quick": ["dte:0,2", "ti:2", "lora:2", "lora-prior:2", "e4t:2"],
    "steps": [
        *(f"{name}:{STEP_GRID}" for name in ("dte", "ti", "lora", "lora-prior", "e4t")),
        "dte@offset_learning_rate=0.02:12,25,50,100",  # the shipped rate was chosen at 12 steps
    ],
    "blend": [
        f"dte@alpha_blend={alpha}@offsets_on={offsets_on}@granularity={granularity}:12"
        for offsets_on in OFFSETS_ON
        for granularity in GRANULARITIES
        for alpha in (0.25, 0.5, 0.7, 0.85)
    ]
    # At both ends the granularities are one and the same UNet.
    + [f"dte@alpha_blend={alpha}@offsets_on={path}:12" for path in OFFSETS_ON for alpha in (0, 1)],
    "rank": [f"dte@rank={rank}:0,12" for rank in (1, 2, 4, 8, 16)],  # those the encoder has
    "regulariser": [f"dte@regulariser={kind}:0,12" for kind in REGULARISERS],
}


def methods_of(experiment: str) -> list[str]:
    """The specifications of one of EXPERIMENTS. Raises DTEError for an unknown name."""
    if experiment not in EXPERIMENTS:
        raise DTEError(f"Unknown experiment {experiment!r}: use one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[experiment]


@dataclass(frozen=True)
class Specification:
    """A method to compare; `label` is its specification without the steps.

    encoder: name or folder, None for the pipeline's own (of e4t: the backbone's). rank: to which
    the prediction is cut. part: of PARTS, what alone is drawn. masked: whether it is told where in
    its picture the thing is. method: what differs from the
    encoder's MethodConfig. given: the names of all options.
    """

    label: str
    name: str
    steps: tuple[int, ...] = ()
    encoder: str | None = None
    rank: int | None = None
    part: str | None = None
    method: dict[str, object] = field(default_factory=dict)
    tuning: TuneConfig = field(default_factory=TuneConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    given: tuple[str, ...] = ()
    masked: bool = False

    @property
    def text(self) -> str:
        """What `parse` reads as this."""
        return f"{self.label}:{','.join(map(str, self.steps))}" if self.steps else self.label

    @property
    def is_anchor(self) -> bool:
        return self.name in ANCHORS

    def method_of(self, encoder_method: MethodConfig) -> MethodConfig:
        """The MethodConfig with an encoder of this one."""
        return replace(encoder_method, **self.method)


def parse(spec: str) -> Specification:
    """Read a specification.

    Raises DTEError for an unknown name or option, a value that the option cannot have, an option
    that is given twice or changes nothing, and missing or wrong steps.
    """
    label, steps = split_steps(spec)
    name, *texts = label.split("@")
    if name not in OPTIONS:
        raise DTEError(f"Unknown method {name!r}: use one of {', '.join(OPTIONS)}.")
    if bool(steps) == (name in ANCHORS):
        raise DTEError(f"{spec!r}: write steps as in dte:0,12; {' and '.join(ANCHORS)} take none.")
    values: dict[str, object] = {}
    for text in texts:
        option, _, value = text.partition("=")
        if option == "num_steps":
            raise DTEError(f"{spec!r}: write the steps at the end, as in dte:12,50.")
        if option not in OPTIONS[name]:
            takes = ", ".join(OPTIONS[name]) or "none"
            raise DTEError(f"{spec!r}: {name} has no option {option!r}; it takes {takes}.")
        if not value or option in values:
            raise DTEError(f"{spec!r}: write {option}=VALUE, once.")
        values[option] = value if option == "encoder" else _value(value)
    method = {key: v for key, v in values.items() if key in METHOD_OPTIONS}
    own = ("encoder", "rank", "part", "masked", *method)
    others = {key: v for key, v in values.items() if key not in own}
    try:
        MethodConfig(**method)
        tuning = TuneConfig(**(others if name == "dte" else {}))
        baseline = BaselineConfig(**({} if name == "dte" else others))
        if "rank" in values:
            check_whole("rank", values["rank"], 1)
        if "part" in values:
            check_one_of("part", values["part"], PARTS)
        if values.get("masked", True) is not True:
            raise DTEError(f"masked is true or left out, not {values['masked']!r}.")
    except (ValueError, TypeError) as error:
        raise DTEError(f"{spec!r}: {error}") from error
    return Specification(
        label, name, steps, values.get("encoder"), values.get("rank"), values.get("part"),
        method, tuning, baseline, tuple(values), "masked" in values,
    )  # fmt: skip


def split_steps(spec: str) -> tuple[str, tuple[int, ...]]:
    """'dte@rank=1:12,0' -> ('dte@rank=1', (0, 12)), the label and the numbers of steps."""
    label, colon, tail = spec.rpartition(":")
    if not colon or not re.fullmatch(r"\d+(,\d+)*", tail):
        return spec, ()
    return label, tuple(sorted({int(n) for n in tail.split(",")}))


def _value(text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def idle_options(
    spec: Specification, encoder_method: MethodConfig, has_bank: bool, guided: bool = True
) -> dict[str, str]:
    """{option that would change nothing: why} of a method with an encoder of `encoder_method`.

    has_bank: whether the encoder knows embeddings of other concepts. guided: whether pictures are
    drawn with classifier-free guidance.
    """
    if spec.name != "dte":
        untuned = not any(spec.steps)
        return {o: NO_STEPS for o in spec.given if untuned and o != "encoder"}
    method = spec.method_of(encoder_method)
    idle = _idle_in_tuning(spec, encoder_method, method, has_bank)
    if method.alpha_blend in (0, 1, (0, 0), (1, 1)):
        idle["granularity"] = "at both ends of alpha_blend all granularities are the same"
    if not guided:
        idle["unconditional_offsets"] = "there is no unconditional half without guidance"
    return {option: why for option, why in idle.items() if option in spec.given}


NO_STEPS = "nothing is tuned in 0 steps"


def _idle_in_tuning(
    spec: Specification, before: MethodConfig, method: MethodConfig, has_bank: bool
) -> dict[str, str]:
    kind, idle = method.regulariser, {}
    works_with = {  # option: the regularisers that read it
        "num_positives": ("contrastive", "hinge"),
        "temperature": ("contrastive",),
        "contrastive_weight": ("contrastive",),
        "norm_weight": ("contrastive", "hinge", "norm"),
        "norm_free": ("contrastive", "hinge", "norm"),
        "regulariser_weight": ("l2", "nearest", "hinge", "gaussian"),
    }
    for option, kinds in works_with.items():
        if kind not in kinds:
            idle[option] = f"regulariser={kind} does not read it"
        elif kind == "contrastive" and not option.startswith("norm") and not has_bank:
            idle[option] = "the encoder knows no other concepts to keep away from"
    weight = method.contrastive_weight if kind == "contrastive" else method.regulariser_weight
    for option in ("num_positives", "temperature"):
        if not weight:
            idle.setdefault(option, "the term has no weight")
    if not method.norm_weight:
        idle.setdefault("norm_free", "the term has no weight")
    of_predictions = ("token_learning_rate", "offset_learning_rate", "optimizer")
    freely = spec.tuning.trainable == "predictions"
    for option in ("encoder_learning_rate",) if freely else of_predictions:
        idle[option] = f"trainable={spec.tuning.trainable} does not read it"
    if max(spec.steps, default=0) <= min(spec.tuning.constant_steps, TuneConfig.constant_steps):
        idle["constant_steps"] = "the rates fall after the last of the steps"
    if not any(spec.steps):
        idle |= dict.fromkeys((*TUNE_OPTIONS, *works_with), NO_STEPS)
        if "nearest" not in (before.regulariser, kind):  # which changes the prompt at once
            idle["regulariser"] = NO_STEPS
    return idle
