"""What is compared, written as NAME[@KEY=VALUE...][:STEPS[,STEPS...]].

dte:0,12                        the tuning encoder, predicted only and after 12 steps
dte@alpha_blend=1:12            a variant: any field of MethodConfig or TuneConfig
dte@rank=1:12                   the prediction cut to a lower rank before tuning (SVD)
dte@encoder=small/none:12       another encoder, by name or folder; this one had no regulariser
ti:12,500   lora:12   lora-prior:12   e4t:12       baselines; fields of BaselineConfig
oracle, other                   the true rendering, and that of another concept: the scale
"""

import copy
import json
import re
import time
import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from dte_lab.backbone import backbone_folder
from dte_lab.baselines import BaselineConfig, dreambooth_lora, e4t, load_e4t, textual_inversion
from dte_lab.common.images import to_pil
from dte_lab.concept import Concept
from dte_lab.config import REGULARISERS, MethodConfig
from dte_lab.contrastive import prompt_embedding
from dte_lab.dual_path import GRANULARITIES, OFFSETS_ON
from dte_lab.encoder import load_encoder
from dte_lab.lora import truncate
from dte_lab.pipeline import DTEPipeline
from dte_lab.tuning import TuneConfig

BASELINES = {
    "ti": textual_inversion,
    "lora": dreambooth_lora,
    "lora-prior": partial(dreambooth_lora, prior=True),
    "e4t": e4t,
}
ANCHORS = ("oracle", "other")
STEPS = "0,1,2,4,8,12,25,50,100,500"
ALPHAS = (0, 0.25, 0.5, 0.7, 0.85, 1)
TABLE = ["dte:0,12", "ti:12", "lora:12", "lora-prior:12", "e4t:12"]
EXPERIMENTS = {
    "table": TABLE,
    "long": [
        *TABLE,
        "dte@num_steps=50:25,50",
        "ti@batch_size=4:500",
        "lora@batch_size=8@lora_learning_rate=0.003:120",
    ],
    "quick": ["dte:0,2", "ti:2", "lora:2", "lora-prior:2", "e4t:2"],
    "steps": [
        *(f"{name}:{STEPS}" for name in ("dte", "ti", "lora", "lora-prior", "e4t")),
        "dte@offset_learning_rate=0.002:12,25,50,100",  # the shipped rate was chosen at 12 steps
    ],
    "blend": [
        f"dte@alpha_blend={alpha}@offsets_on={offsets_on}@granularity={granularity}:12"
        for offsets_on in OFFSETS_ON
        for granularity in GRANULARITIES
        for alpha in ALPHAS
    ],
    "rank": [f"dte@rank={rank}:0,12" for rank in (1, 2, 4, 8, 16)],  # those the encoder has
    "regulariser": [f"dte@regulariser={kind}:0,12" for kind in REGULARISERS],
}


@dataclass(frozen=True)
class Method:
    """A parsed specification; `label` is it without the steps."""

    label: str
    name: str
    options: dict
    steps: tuple[int, ...]


def parse(spec: str) -> Method:
    """Raises ValueError for an unknown name, an unknown option and missing or wrong steps."""
    label, colon, tail = spec.rpartition(":")
    if not re.fullmatch(r"\d+(,\d+)*", tail) or not colon:
        label, tail = spec, ""
    name, *options = label.split("@")
    steps = tuple(sorted({int(n) for n in tail.split(",")})) if tail else ()
    known = {
        "dte": {f.name for c in (MethodConfig, TuneConfig) for f in fields(c)} | {"encoder", "rank"}
    }
    known |= {baseline: {f.name for f in fields(BaselineConfig)} for baseline in BASELINES}
    known["e4t"].add("encoder")
    known |= {anchor: set() for anchor in ANCHORS}
    if name not in known:
        raise ValueError(f"Unknown method {name!r}: use one of {', '.join(known)}.")
    if bool(steps) == (name in ANCHORS):
        raise ValueError(
            f"{spec!r}: write steps as in dte:0,12; {' and '.join(ANCHORS)} take none."
        )
    pairs = dict(option.partition("=")[::2] for option in options)
    if wrong := [key for key, value in pairs.items() if key not in known[name] or not value]:
        raise ValueError(f"{spec!r}: {name} has no option {wrong[0]!r}, or it lacks its value.")
    return Method(label, name, {key: _value(text) for key, text in pairs.items()}, steps)


def _value(text: str):
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


class LowRank:
    """An encoder whose predictions are cut to a lower rank; all else is the encoder's."""

    def __init__(self, encoder, rank):
        self.encoder, self.rank = encoder, rank

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, *arguments):
        return self._cut(self.encoder(*arguments))

    def predict(self, *arguments):
        return self._cut(self.encoder.predict(*arguments))

    def _cut(self, prediction):
        return replace(prediction, offsets=truncate(prediction.offsets, self.rank))


class Methods:
    """Concepts by specification, on one backbone; encoders are loaded once."""

    def __init__(self, pipe: DTEPipeline):
        self.pipe = pipe
        self.pipes = {}

    def experiment(self, name: str) -> list[str]:
        """Specifications of one of EXPERIMENTS that can be run here.

        Leaves out E4T, with a warning, where no trained one lies in the backbone's folder, and
        ranks that the encoder does not have. Raises ValueError for an unknown name.
        """
        if name not in EXPERIMENTS:
            raise ValueError(f"Unknown experiment {name!r}: use one of {', '.join(EXPERIMENTS)}.")
        specs, rank = [], self.pipe.encoder.settings.rank
        for spec in EXPERIMENTS[name]:
            method = parse(spec)
            if method.name == "e4t" and not (_e4t(self.pipe.backbone) / "config.json").is_file():
                warnings.warn(
                    f"E4T is left out: there is no trained one in {_e4t(self.pipe.backbone)}.",
                    stacklevel=2,
                )
            elif method.options.get("rank", 0) <= rank:
                specs.append(spec)
        return specs

    def check(self, method: Method) -> None:
        """Raises ValueError for a method whose encoder is missing, or options that cannot be."""
        if method.name in ANCHORS:
            return
        encoder = self.pipe_of(method).encoder
        given = {key: v for key, v in method.options.items() if key != "encoder"}
        if method.name != "dte":
            BaselineConfig(**given)
            return
        self._settings(method, encoder)
        rank = given.get("rank")
        known = encoder.settings.rank
        if rank is not None and not (isinstance(rank, int) and 1 <= rank <= known):
            raise ValueError(
                f"{method.label}: a prediction of rank {known} can be cut to rank 1 to "
                f"{known}; train an encoder for more."
            )

    def concepts(self, method: Method, pixels, seed: int) -> dict[int, Concept]:
        """{steps: Concept} from pictures (n, 3, H, W) in [-1, 1]."""
        pipe = self.pipe_of(method)
        if method.name != "dte":
            config = {key: v for key, v in method.options.items() if key != "encoder"}
            fit = BASELINES[method.name]
            return fit(pipe, pixels, method.steps, seed, BaselineConfig(**config))
        return self._tuned(pipe, method, pixels, seed)

    def _tuned(self, pipe, method, pixels, seed):
        own, config = self._settings(method, pipe.encoder)
        start, states = time.perf_counter(), {}

        def callback(state):  # its v* and offsets are those before the step
            if state["step"] in method.steps:
                seconds = time.perf_counter() - start
                states[state["step"]] = state["v_star"], state["offsets"], seconds

        last = pipe.personalize(
            to_pil(pixels),
            method.steps[-1],
            seed,
            callback,
            progress=False,
            config=config,
            method=own,
        )
        concepts = dict.fromkeys(method.steps, last)  # what stopped early stays as it was
        for steps, (v_star, offsets, seconds) in states.items():
            v_star = prompt_embedding(v_star, pipe.prompt_encoder.table, own)
            words = pipe.nearest_words(v_star)
            info = last.info | {"num_steps": steps, "seconds": seconds, "words_after": words}
            concepts[steps] = replace(last, v_star=v_star, offsets=offsets, info=info)
        return concepts

    def _settings(self, method, encoder):
        """MethodConfig and TuneConfig of a variant of the tuning encoder."""
        given = {k: v for k, v in method.options.items() if k not in ("encoder", "rank")}
        tuning = {key: given.pop(key) for key in list(given) if key in _names(TuneConfig)}
        return replace(encoder.method, **given), TuneConfig(**tuning)

    def pipe_of(self, method: Method) -> DTEPipeline:
        """The pipeline with the encoder of a method that is no anchor."""
        path, rank = method.options.get("encoder"), method.options.get("rank")
        backbone, pipe = self.pipe.backbone, self.pipe
        if method.name == "e4t" or path is not None:
            path = path or str(_e4t(backbone))
            if (method.name, path) not in self.pipes:
                load = load_e4t if method.name == "e4t" else load_encoder
                self.pipes[method.name, path] = DTEPipeline(backbone, load(path, backbone))
            pipe = self.pipes[method.name, path]
        if rank is not None:
            pipe = copy.copy(pipe)
            pipe.encoder = LowRank(pipe.encoder, rank)
        return pipe


def _names(config):
    return {field.name for field in fields(config)}


def _e4t(backbone) -> Path:
    """Where the trained E4T encoder of a backbone lies."""
    return backbone_folder(backbone.name) / "e4t"
