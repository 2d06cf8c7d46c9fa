"""The encoder of E4T, which `baselines.e4t` tunes: v* and multiplicative offsets of the weights.

(Gal et al. 2023, "Encoder-based domain tuning for fast personalization", arXiv 2302.12228.)
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from dte_lab.backbone import Backbone
from dte_lab.config import EncoderConfig, MethodConfig, single_path
from dte_lab.encoder import TuningEncoder
from dte_lab.lora import Offsets, attention_layers, projection_layer
from dte_lab.tokens import TokenTable


class MultiplicativeOffsets(nn.Module):
    """W' = W * (1 + D) with one full matrix D per projection, the same for all pictures.

    In the form of the other offsets: A is W * D and B the identity. The original composes D of
    a few linear maps; here D itself is the parameter, which can be all that they can be. ("ours")
    """

    def __init__(self, projections: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.keys = sorted(projections)
        self.deltas = nn.ParameterList(torch.zeros(*projections[key]) for key in self.keys)
        self.weights = None  # the backbone's own, see `attach`

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Take the weights W (Din, Dout) of the projections from the UNet."""
        layers, self.weights = attention_layers(unet), []
        for key in self.keys:
            name, projection = key.rsplit(".", 1)
            linear = projection_layer(layers[name], projection)
            self.weights.append(linear.weight.detach().float().T)

    def offsets(self, deltas: Iterable[Float[Tensor, "_ _"]]) -> Offsets:
        """{key: (W * D (1, Din, Dout), identity (1, Dout, Dout))}"""
        return {
            key: ((w.to(d) * d)[None], torch.eye(w.shape[1], dtype=d.dtype, device=d.device)[None])
            for key, w, d in zip(self.keys, self.weights, deltas, strict=True)
        }

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Offsets:
        """The same offsets for each of the batch's pictures."""
        offsets = self.offsets(self.deltas).items()
        return {k: tuple(m.expand(len(tokens), -1, -1) for m in ab) for k, ab in offsets}


class E4TEncoder(TuningEncoder):
    """The tuning encoder's features, fusion and token head, with E4T's kind of weight offsets.

    `pretrain` trains it as it trains any encoder; see `e4t_config` for its settings.
    """

    @register_to_config
    def __init__(
        self, projections: dict, clip_dim: int, embed_dim: int, unet_dim: int, token_dim: int,
        num_words: int, settings: dict | None = None, method: dict | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            projections, clip_dim, embed_dim, unet_dim, token_dim, num_words, settings, method
        )
        self.hypernetwork = MultiplicativeOffsets(projections)

    def bind(self, backbone: Backbone, table: TokenTable) -> None:
        super().bind(backbone, table)
        self.hypernetwork.attach(backbone.unet)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        settings: EncoderConfig | None = None,
        method: MethodConfig | None = None,
        table: TokenTable | None = None,
        seed: int = 0,
    ) -> Self:
        return super().from_backbone(backbone, settings, method or e4t_config(), table, seed)


def e4t_config() -> MethodConfig:
    """L2 to the class word, one path."""
    return replace(single_path(MethodConfig()), regulariser="l2")


def load_e4t(path: str | Path, backbone: Backbone) -> E4TEncoder:
    """Load an E4TEncoder that `pretrain` wrote for this backbone.

    Raises DTEError when there is none, or when it belongs to another backbone.
    """
    return E4TEncoder.from_pretrained(path, backbone)
