"""Concepts by specification, on one backbone: the tuning encoder, its variants, the baselines."""

import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from dte_lab.backbone import Backbone, backbone_folder
from dte_lab.baselines import dreambooth_lora, e4t, textual_inversion
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil
from dte_lab.concept import Concept
from dte_lab.config import MethodConfig
from dte_lab.contrastive import prompt_embedding
from dte_lab.e4t import load_e4t
from dte_lab.encoder import (
    EncoderPrediction,
    Predictor,
    TuningEncoder,
    load_encoder,
    trained_encoder,
)
from dte_lab.evaluation.records import fingerprint
from dte_lab.evaluation.specifications import (
    ZERO_SHOT,
    Specification,
    idle_options,
    methods_of,
    parse,
)
from dte_lab.lora import Offsets, projection_shapes, truncate
from dte_lab.pipeline import DTEPipeline
from dte_lab.zero_shot import ZeroShotStart

SAYS_NOTHING = "thing"
BASELINES = {
    "ti": textual_inversion,
    "lora": dreambooth_lora,
    "lora-prior": partial(dreambooth_lora, prior=True),
    "e4t": e4t,
}


def idle_with(encoder: TuningEncoder, spec: Specification, guided: bool = True) -> dict[str, str]:
    """`idle_options` with an encoder."""
    has_bank = bool((encoder.bank_concepts >= 0).any())
    return idle_options(spec, encoder.method, has_bank, guided)


def predicted(
    pipe: DTEPipeline, pixels: Float[Tensor, "pictures 3 height width"], seed: int,
    rank: int | None = None,
) -> EncoderPrediction:  # fmt: skip
    """The encoder's prediction, its offsets cut to a rank where one is given."""
    found = pipe.encoder.predict(pipe.backbone, pixels, seed, pipe.prompt_encoder)
    return found if rank is None else replace(found, offsets=truncate(found.offsets, rank))


def at_step(
    pipe: DTEPipeline, concept: Concept, method: MethodConfig, steps: int,
    v_star: Float[Tensor, "1 dim"], offsets: Offsets, seconds: float,
) -> Concept:  # fmt: skip
    """What a run of tuning that led to `concept` had after some steps: v* as it was optimised."""
    v_star = prompt_embedding(v_star, pipe.prompt_encoder.table, method)
    words = pipe.nearest_words(v_star)
    info = concept.info | {"num_steps": steps, "seconds": seconds, "words_after": words}
    return replace(concept, v_star=v_star, offsets=offsets, info=info)


class Methods:
    """Concepts by specification, on one backbone; encoders are loaded once."""

    def __init__(self, pipe: DTEPipeline) -> None:
        self.pipe = pipe
        self.others: dict[str, DTEPipeline] = {}  # by what the encoder is called, loaded when asked

    def experiment(self, name: str) -> list[str]:
        """Specifications of one of EXPERIMENTS that can be run here.

        Leaves out, with a warning, what needs an encoder that is not there or a rank that the
        encoder does not have. Raises DTEError for an unknown name.
        """
        specs = []
        for text in methods_of(name):
            try:
                self.check(parse(text))
            except DTEError as error:
                warnings.warn(f"{text} is left out: {error}", stacklevel=2)
            else:
                specs.append(text)
        return specs

    def check(self, spec: Specification, guided: bool = True) -> None:
        """Raise DTEError for a method that cannot run here, or whose label would claim too much.

        guided: whether pictures will be drawn with classifier-free guidance.
        """
        if spec.is_anchor:
            return
        encoder = self.pipe_of(spec).encoder
        idle = idle_with(encoder, spec, guided)
        if idle:
            option, why = next(iter(idle.items()))
            raise DTEError(f"{spec.label}: {option} changes nothing, since {why}.")
        interval = spec.method_of(encoder.method).prediction_interval
        if spec.name == "dte" and (spec.tuning.trainable != "predictions" or interval):
            trained_encoder(encoder, spec.label)
        if spec.rank is not None:
            self._check_rank(spec, encoder)

    def _check_rank(self, spec: Specification, encoder: TuningEncoder) -> None:
        known, method = encoder.settings.rank, spec.method_of(encoder.method)
        if known == "full":  # the shorter side of a matrix is its rank
            known = min(min(shape) for shape in projection_shapes(self.pipe.backbone.unet).values())
        if spec.rank > known:
            raise DTEError(
                f"{spec.label}: a prediction of rank {known} can be cut to rank 1 to {known}; "
                "train an encoder for more."
            )
        if spec.tuning.trainable != "predictions" or method.prediction_interval or spec.masked:
            raise DTEError(
                f"{spec.label}: rank cuts the one prediction of the picture as it is, so it goes "
                "with trainable=predictions and prediction_interval=0, without masked, only."
            )

    def concepts(
        self, spec: Specification, pixels: Float[Tensor, "pictures 3 height width"], seed: int,
        mask: Image | None = None,
    ) -> dict[int, Concept]:  # fmt: skip
        """{steps: Concept} from pictures in [-1, 1], for a method that is no anchor.

        mask: where the thing is in the one picture, for a method that is told.
        """
        pipe = self.pipe_of(spec)
        if spec.name != "dte":
            return BASELINES[spec.name](pipe, pixels, spec.steps, seed, spec.baseline)
        start, states = time.perf_counter(), {}

        def callback(state: dict) -> None:  # its v* and offsets are those before the step
            if state["step"] in spec.steps:
                seconds = time.perf_counter() - start
                states[state["step"]] = state["v_star"], state["offsets"], seconds

        method, prediction = spec.method_of(pipe.encoder.method), None
        if spec.rank is not None:
            prediction = predicted(pipe, pixels, seed, spec.rank)
        last = pipe.personalize(
            to_pil(pixels), spec.steps[-1], seed, callback, progress=False, config=spec.tuning,
            method=method, prediction=prediction, mask=mask if spec.masked else None,
        )  # fmt: skip
        concepts = dict.fromkeys(spec.steps, last)  # what stopped early stays as it was
        for steps, (v_star, offsets, seconds) in states.items():
            concepts[steps] = at_step(pipe, last, method, steps, v_star, offsets, seconds)
        return {steps: self.part_of(concept, spec.part) for steps, concept in concepts.items()}

    def part_of(self, concept: Concept, part: str | None) -> Concept:
        """Of PARTS, what alone is drawn; None for the whole concept."""
        if part == "word":
            return concept.word_alone()
        if part == "weights":
            return concept.weights_alone(self.pipe.prompt_encoder.word(SAYS_NOTHING))
        return concept

    def pipe_of(self, spec: Specification) -> DTEPipeline:
        """The pipeline with the encoder of a method that is no anchor.

        Raises DTEError when there is no such encoder.
        """
        if spec.encoder is None and spec.name != "e4t":
            return self.pipe
        backbone = self.pipe.backbone
        path = spec.encoder or str(_e4t(backbone))
        key = path if spec.name == "dte" else " ".join(filter(None, (spec.name, spec.encoder)))
        if key not in self.others:
            try:
                self.others[key] = DTEPipeline(backbone, start_of(spec.name, path, backbone))
            except ValueError as error:
                raise DTEError(f"{spec.label}: {error}") from error
        return self.others[key]

    def settings(self) -> dict[str, object]:
        """What of the backbone and the encoders the numbers depend on, weights as fingerprints."""
        backbone, encoder = self.pipe.backbone, self.pipe.encoder
        own = {"backbone": fingerprint(*backbone.modules), "encoder": fingerprint(encoder)}
        trained = {name: pipe for name, pipe in self.others.items() if pipe.has_trained_encoder}
        others = {name: fingerprint(pipe.encoder) for name, pipe in trained.items()}
        return {
            "backbone": backbone.name, "weights": own | others,
            "encoder": asdict(encoder.settings), "method": asdict(encoder.method),
        }  # fmt: skip


def start_of(name: str, path: str, backbone: Backbone) -> Predictor:
    """What a method starts from: an encoder by name or folder, or none."""
    if name == "e4t":
        return load_e4t(path, backbone)
    return ZeroShotStart(backbone) if path == ZERO_SHOT else load_encoder(path, backbone)


def _e4t(backbone: Backbone) -> Path:
    """Where the trained E4T encoder of a backbone lies."""
    return backbone_folder(backbone.name) / "e4t"
