"""Every choice about the method that the paper leaves open, in one place.

`EncoderConfig` is what an encoder's weights were trained with, and stays with them. `MethodConfig`
is what each run may choose: how v* is regularised, how paths are blended, how pictures are sampled.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from dte_lab.common.errors import DTEError
from dte_lab.common.files import told_of
from dte_lab.common.settings import check_number, check_one_of, check_whole
from dte_lab.dual_path import GRANULARITIES, OFFSETS_ON
from dte_lab.recommended import Recommended

Settings = TypeVar("Settings")
REGULARISERS = ("contrastive", "none", "norm", "l2", "nearest", "hinge", "gaussian")  # of v*


@dataclass
class EncoderConfig:
    """What the encoder's weights were trained with; all values are ours, not the paper's.

    Features: `clip_layer` whose patches are read (-1 the last); `unet_layers` (names as in
    features.py, None for all) and the prompt they see, `feature_prompt`.
    Architecture: `rank` from 1, or "full" for whole matrices; `width` of tokens and queries;
    `grid` of the fused feature map; `fusion_depth` residual conv blocks; `trunk_depth`
    cross-attention blocks; `num_heads`; `patch_channels` numbers of each CLIP patch that v* reads
    directly; `negative_bank_size` recent embeddings of training concepts.
    Scales: `token_scale` (residual of v* in units of a word's typical entry; E4T uses about 0.1 of
    a norm), `offset_scale` (of B). Zero-shot guess: `zero_shot_words` best words at
    `zero_shot_temperature`.
    Static prediction: mean over the predictions at `feature_timesteps`, as fractions of T.

    Raises DTEError for a value that makes no encoder.
    """

    clip_layer: int = -1
    unet_layers: tuple[str, ...] | None = None
    feature_prompt: str = ""
    rank: int | str = 4
    width: int = 160
    grid: int = 8
    fusion_depth: int = 2
    trunk_depth: int = 2
    num_heads: int = 4
    patch_channels: int = 32
    negative_bank_size: int = 256
    token_scale: float = 0.3
    offset_scale: float = 0.1
    zero_shot_words: int = 32
    zero_shot_temperature: float = 0.1
    feature_timesteps: tuple[float, ...] = (0.2, 0.4, 0.6)

    def __post_init__(self) -> None:
        for name in ("feature_timesteps", "unet_layers"):  # JSON knows lists only
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        if self.rank != "full":
            check_whole("rank", self.rank, 1, instead='"full"')
        for name in ("grid", "num_heads", "patch_channels", "zero_shot_words"):
            check_whole(name, getattr(self, name), 1)
        check_whole("width", self.width, 8)
        for name in ("fusion_depth", "trunk_depth", "negative_bank_size"):
            check_whole(name, getattr(self, name), 0)
        if self.width % 8 or self.width % self.num_heads:  # group norm, attention
            raise DTEError(
                f"width {self.width} must be a multiple of 8 and of num_heads, {self.num_heads}."
            )
        for name in ("token_scale", "offset_scale", "zero_shot_temperature"):
            check_number(name, getattr(self, name), above=0)
        check_whole("clip_layer", self.clip_layer)
        if not isinstance(self.feature_prompt, str):
            raise DTEError(f"feature_prompt is a text, not {self.feature_prompt!r}.")
        if not isinstance(self.feature_timesteps, tuple) or not self.feature_timesteps:
            raise DTEError(
                f"feature_timesteps are one or more numbers from 0 to 1, "
                f"not {self.feature_timesteps!r}."
            )
        for value in self.feature_timesteps:
            check_number("feature_timesteps", value, 0, 1)
        layers = self.unet_layers
        if layers is not None and not (
            isinstance(layers, tuple) and layers and all(isinstance(x, str) for x in layers)
        ):
            raise DTEError(f"unet_layers are names of layers, or None, not {layers!r}.")

    @classmethod
    def of(cls, recommended: Recommended, **changes: Any) -> Self:
        """The settings of a fresh encoder for a backbone that recommends this, with changes."""
        names = ("zero_shot_words", "zero_shot_temperature")
        return cls(**{name: getattr(recommended, name) for name in names} | changes)


@dataclass
class MethodConfig:
    """What each run may choose; all values are ours, not the paper's.

    Dual path: `alpha_blend` in [0, 1], or a pair (at the start of sampling, at its end);
    `offsets_on`, the path that gets the offsets, "soft" as in the paper's figure or "hard" as its
    text can be read; and `granularity`, see dual_path.py.
    Regulariser of v*: `regulariser`, one of contrastive.py's; `num_positives` N(v*) and
    `temperature` tau; `contrastive_weight` and `norm_weight` of the paper's two terms,
    `norm_free`, how long v* may be for nothing, in units of a word's norm (0 as the paper's term
    reads, 1 as what it is there for), `regulariser_weight` of any other.
    Sampling: `prediction_interval` steps between two predictions of v* and the offsets from the
    current noisy latent, 1 as in the paper; 0 for the static prediction alone. With
    `unconditional_offsets` both halves of classifier-free guidance run with the offsets, as with
    any LoRA; without, the unconditional half keeps the vanilla weights.

    Raises DTEError for a value that means nothing.
    """

    alpha_blend: float | tuple[float, float] = 0.7
    offsets_on: str = "soft"
    granularity: str = "attention"
    regulariser: str = "contrastive"
    num_positives: int = 5
    temperature: float = 0.1
    contrastive_weight: float = 0.01
    norm_weight: float = 0.01
    norm_free: float = 1.0
    regulariser_weight: float = 0.01
    prediction_interval: int = 0
    unconditional_offsets: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha_blend, list):  # JSON knows lists only
            self.alpha_blend = tuple(self.alpha_blend)
        pair = self.alpha_blend if isinstance(self.alpha_blend, tuple) else (self.alpha_blend,) * 2
        if len(pair) != 2:
            raise DTEError(f"alpha_blend is a number or a pair, not {self.alpha_blend!r}.")
        for value in pair:
            check_number("alpha_blend", value, 0, 1)
        check_one_of("offsets_on", self.offsets_on, OFFSETS_ON)
        check_one_of("granularity", self.granularity, GRANULARITIES)
        check_one_of("regulariser", self.regulariser, REGULARISERS)
        check_whole("num_positives", self.num_positives, 1)
        check_number("temperature", self.temperature, above=0)
        for name in ("contrastive_weight", "norm_weight", "norm_free", "regulariser_weight"):
            check_number(name, getattr(self, name), 0)
        check_whole("prediction_interval", self.prediction_interval, 0)
        if not isinstance(self.unconditional_offsets, bool):
            raise DTEError(
                f"unconditional_offsets is true or false, not {self.unconditional_offsets!r}."
            )


def settings_of(folder: Path, config: dict[str, Any], name: str, kind: type[Settings]) -> Settings:
    """A group of the settings in a folder's config.json, such as its EncoderConfig.

    Raises DTEError, which names the file, for settings that there are not, or of no meaning.
    """
    given = config.get(name)
    with told_of(f"{folder / 'config.json'}: {name}"):
        try:
            return kind(**({} if given is None else given))
        except TypeError as error:
            raise DTEError(error) from error


def single_path(method: MethodConfig) -> MethodConfig:
    """The settings under which a concept is an ordinary embedding with ordinary offsets."""
    return replace(
        method, alpha_blend=1.0, offsets_on="soft", granularity="attention", regulariser="none",
        prediction_interval=0, unconditional_offsets=True,
    )  # fmt: skip
