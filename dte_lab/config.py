"""Every choice about the method that the paper leaves open, in one place."""

from dataclasses import dataclass

from dte_lab.contrastive import REGULARISERS
from dte_lab.dual_path import GRANULARITIES, PAIRINGS


@dataclass
class DTEConfig:
    """Everything the paper leaves open about the method; all values are ours, not the paper's.

    Features: `clip_layer` whose patches are read (-1 the last); `unet_layers` (names as in
    features.py, None for all) and the prompt they see, `feature_prompt`.
    Architecture: `rank` 1 to 16, or "full" for whole matrices; `width` of tokens and queries;
    `grid` of the fused feature map; `fusion_depth` residual conv blocks; `trunk_depth`
    cross-attention blocks; `num_heads`; `patch_channels` numbers of each CLIP patch that v* reads
    directly.
    Scales: `token_scale` (residual of v* in units of a word's typical entry; E4T uses about 0.1 of
    a norm), `offset_scale` (of B). Zero-shot guess: `zero_shot_words` best words at
    `zero_shot_temperature`.
    Dual path: `alpha_blend` in [0, 1], or a pair (at the start of sampling, at its end); `pairing`
    and `granularity`, see dual_path.py.
    Regulariser of v*: `regulariser`, one of contrastive.py's; `num_positives` N(v*) and
    `temperature` tau; `negative_bank_size` recent embeddings of training concepts;
    `contrastive_weight` and `norm_weight` of the paper's two terms, `regulariser_weight` of any
    other.
    Static prediction: mean over the predictions at `feature_timesteps`, as fractions of T.
    Sampling: `refresh`, how often v* and the offsets are predicted anew from the current noisy
    latent: "every step", every so many steps (an int), or "once" (the static prediction). With
    `unconditional_offsets` both halves of classifier-free guidance run with the offsets, as with
    any LoRA; without, the unconditional half keeps the vanilla weights.
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
    token_scale: float = 0.3
    offset_scale: float = 0.1
    zero_shot_words: int = 32
    zero_shot_temperature: float = 0.1
    alpha_blend: float | tuple[float, float] = 0.7
    pairing: str = "figure"
    granularity: str = "attention"
    regulariser: str = "contrastive"
    num_positives: int = 5
    temperature: float = 0.1
    contrastive_weight: float = 0.01
    norm_weight: float = 0.01
    regulariser_weight: float = 0.01
    negative_bank_size: int = 256
    feature_timesteps: tuple[float, ...] = (0.2, 0.4, 0.6)
    refresh: str | int = "once"
    unconditional_offsets: bool = True

    def __post_init__(self):
        for name in ("feature_timesteps", "unet_layers", "alpha_blend"):  # JSON knows lists only
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        for name, known in [
            ("regulariser", REGULARISERS),
            ("pairing", PAIRINGS),
            ("granularity", GRANULARITIES),
        ]:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Unknown {name} {getattr(self, name)!r}: use one of {', '.join(known)}."
                )
        refresh_interval(self.refresh)  # complain about a wrong value


def refresh_interval(refresh):
    """Sampling steps between two predictions: 1, 2, ... or None for "once".

    Raises ValueError for anything else than "every step", "once" and a positive int.
    """
    if refresh == "once":
        return None
    if refresh == "every step":
        return 1
    if type(refresh) is int and refresh > 0:
        return refresh
    raise ValueError(f"refresh {refresh!r}: use 'every step', 'once' or a number of steps from 1.")
