"""Low-rank offsets on attention projections, and the dual path that blends them with the prior.

Every attention branch runs twice and the two results are blended:

    out = alpha_blend * attention(x; W + A B, soft text with v*)
        + (1 - alpha_blend) * attention(x; W, hard text with v_h)

(paper, section on the dual path; `offsets_on="soft"`). The paper's text can also be read as
giving the offsets to the hard path: `offsets_on="hard"`; and as running every UNet *block* twice:
`granularity="block"` sends [soft, hard] through a block as one batch and blends what comes out.
The offsets are one pair of matrices *per sample*, so they live on the attention processor;
`functional_call` would give silently wrong gradients under gradient checkpointing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Num
from torch import Tensor, nn

from dte_lab.common.errors import DTEError
from dte_lab.lora import (
    PROJECTIONS,
    Offsets,
    attention_layers,
    check_offsets,
    low_rank_product,
    projection_layer,
    projection_shapes,
)

OFFSETS_ON = ("soft", "hard")
GRANULARITIES = ("attention", "block")

# What diffusers' attention can do besides and Stable Diffusion's does not; each is off by default.
UNSUPPORTED = (
    "norm_cross", "norm_q", "norm_k", "group_norm", "spatial_norm", "residual_connection",
    "added_kv_proj_dim",
)  # fmt: skip


def alpha_at(
    alpha_blend: float | tuple[float, float],
    timesteps: int | Num[Tensor, " batch"],
    num_timesteps: int,
) -> int | float | Float[Tensor, " batch"]:
    """The blend at one timestep or several, of num_timesteps.

    alpha_blend: a constant; or a pair, the values at t = num_timesteps (where sampling starts) and
    at t = 0 (the picture), with a line between them. ("ours": the paper names one coefficient)
    """
    if not isinstance(alpha_blend, tuple):
        return alpha_blend
    first, last = alpha_blend
    return last + (first - last) * timesteps / num_timesteps


class DualPathProcessor:
    """Attention processor of one layer; see the module's docstring for what it computes.

    offsets: {projection: (A (B, Din, r), B (B, r, Dout))}, B may be 1 for the whole batch.
    hard_hidden_states: (B, L, d) text of the hard path; None runs the soft path alone.
    alpha_blend: a number or (B, 1, 1).
    """

    def __init__(
        self,
        offsets: Offsets,
        hard_hidden_states: Float[Tensor, "batch length dim"] | None = None,
        alpha_blend: int | float | Float[Tensor, "batch 1 1"] = 1.0,
        offsets_on: str = "soft",
    ) -> None:
        self.offsets = offsets
        self.hard = hard_hidden_states
        self.alpha = alpha_blend
        self.offsets_on = offsets_on

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch length dim"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens channels_out"]:
        if attention_mask is not None:
            raise ValueError("The dual path does not support attention masks.")
        x, soft_text = hidden_states, encoder_hidden_states  # (B, T, C), (B, L, d) or None
        is_cross = soft_text is not None
        to_out = attn.to_out[0]

        text = soft_text if is_cross else x
        q = attn.to_q(x)  # (B, T, H*hs), shared by both paths
        k, v = attn.to_k(text), attn.to_v(text)  # (B, S, H*hs)

        soft_offset, hard_offset = self._offset, _no_offset
        if self.offsets_on == "hard":
            soft_offset, hard_offset = hard_offset, soft_offset

        out = _attend(
            q + soft_offset("to_q", x),
            k + soft_offset("to_k", text),
            v + soft_offset("to_v", text),
            attn.heads,
        )
        extra = soft_offset("to_out", out)  # (B, T, C), what the offset adds after the projection

        if self.hard is not None:
            text = self.hard.to(x) if is_cross else x
            if is_cross:
                k, v = attn.to_k(text), attn.to_v(text)
            hard = _attend(
                q + hard_offset("to_q", x),
                k + hard_offset("to_k", text),
                v + hard_offset("to_v", text),
                attn.heads,
            )
            # The projection is affine and the coefficients sum to 1: blend first, project once.
            out = self.alpha * out + (1 - self.alpha) * hard
            extra = self.alpha * extra + (1 - self.alpha) * hard_offset("to_out", hard)

        out = to_out(out) + extra
        return attn.to_out[1](out)  # dropout

    def _offset(
        self, projection: str, x: Float[Tensor, "batch tokens d_in"]
    ) -> Float[Tensor, "batch tokens d_out"] | int:
        """x A B, per sample; 0 where there are no offsets."""
        if projection not in self.offsets:
            return 0
        return low_rank_product(x, *self.offsets[projection])


class BlockPathProcessor(DualPathProcessor):
    """Attention on a batch [soft, hard] of twice the size, with offsets on one of the halves."""

    def __init__(self, offsets: Offsets, offsets_on: str = "soft") -> None:
        super().__init__(offsets)
        self.half = OFFSETS_ON.index(offsets_on)

    def _offset(
        self, projection: str, x: Float[Tensor, "twice tokens d_in"]
    ) -> Float[Tensor, "twice tokens d_out"] | int:
        """x A B on the half that has offsets, 0 on the other."""
        delta = super()._offset(projection, x.chunk(2)[self.half])
        if not isinstance(delta, torch.Tensor):
            return delta
        zero = torch.zeros_like(delta)
        return torch.cat([zero, delta] if self.half else [delta, zero])


def _no_offset(projection: str, x: Tensor) -> int:
    return 0


def _attend(
    q: Float[Tensor, "batch tokens inner"],
    k: Float[Tensor, "batch length inner"],
    v: Float[Tensor, "batch length inner"],
    heads: int,
) -> Float[Tensor, "batch tokens inner"]:
    """Scaled dot-product attention; `inner` is the width of all heads."""
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))  # (B, H, T, hs)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, H*hs)


class DualPath:
    """The paths of one UNet, which may change between two of its calls; made by `dual_path`."""

    def __init__(self, unet: UNet2DConditionModel, offsets_on: str, granularity: str) -> None:
        self.unet, self.layers = unet, attention_layers(unet)
        for name, attn in self.layers.items():
            check_attention(name, attn)
        self.shapes = projection_shapes(unet)
        self.offsets_on, self.granularity = offsets_on, granularity
        self.before = {name: attn.processor for name, attn in self.layers.items()}
        self.blocks = []
        if granularity == "block":  # without cross-attention both paths of a block are the same
            blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
            self.blocks = [b for b in blocks if getattr(b, "has_cross_attention", False)]

    def update(
        self,
        offsets: Offsets,
        hard_hidden_states: Float[Tensor, "batch length dim"] | None = None,
        alpha_blend: int | float | Float[Tensor, " batch"] = 1.0,
    ) -> None:
        """Set offsets, hard text and blend of the next calls; see `dual_path`, also for errors."""
        constant = not isinstance(alpha_blend, torch.Tensor)
        if constant and alpha_blend == 1:
            hard_hidden_states = None
        elif hard_hidden_states is None:
            raise DTEError(f"alpha_blend is {alpha_blend}, so the hard path needs its text.")
        check_offsets(offsets, self.shapes)
        if not constant:
            alpha_blend = alpha_blend.to(hard_hidden_states).reshape(-1, 1, 1)
        self.hard, self.alpha = hard_hidden_states, alpha_blend
        for name, attn in self.layers.items():
            own = {p: offsets[f"{name}.{p}"] for p in PROJECTIONS if f"{name}.{p}" in offsets}
            if self.hard is not None and self.granularity == "block":
                processor = BlockPathProcessor(own, self.offsets_on)
            else:
                processor = DualPathProcessor(own, self.hard, self.alpha, self.offsets_on)
            attn.set_processor(processor)

    def clear(self) -> None:
        """The vanilla UNet, until the next update."""
        self.hard = None
        for name, attn in self.layers.items():
            attn.set_processor(self.before[name])

    def double(
        self, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before a block of the UNet: its inputs (B, ...) become [soft, hard] (2B, ...).

        A forward pre-hook, for granularity "block": the first half of the batch reads the text that
        came in, the second the hard text (B, L, d). None leaves the inputs as they are.
        """
        if self.hard is None:
            return None
        text = kwargs["encoder_hidden_states"]  # (B, L, d)
        both = {key: _twice(value) for key, value in kwargs.items()}
        both["encoder_hidden_states"] = torch.cat([text, self.hard.to(text).expand_as(text)])
        return tuple(_twice(value) for value in args), both

    def blend(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """After a block: blend the halves of each tensor (2B, C, h, w) that it returns."""
        if self.hard is None:
            return None
        if not isinstance(output, torch.Tensor):
            return tuple(self.blend(block, args, part) for part in output)
        alpha = self.alpha[..., None] if isinstance(self.alpha, torch.Tensor) else self.alpha
        soft, hard = output.chunk(2)
        return alpha * soft + (1 - alpha) * hard


def _twice(value: Any) -> Any:
    """(B, ...) -> (2B, ...), also within a tuple; what is no tensor stays."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value])
    return tuple(_twice(v) for v in value) if type(value) is tuple else value


def check_attention(name: str, attn: Attention) -> None:
    """Raise DTEError where `DualPathProcessor` would compute something else than the layer does."""
    if any(hasattr(projection_layer(attn, p), "base_layer") for p in PROJECTIONS):
        raise DTEError("The UNet carries a PEFT LoRA: unload it before using the dual path.")
    found = [key for key in UNSUPPORTED if getattr(attn, key, None) not in (None, False)]
    if attn.rescale_output_factor != 1:
        found.append("rescale_output_factor")
    if found:
        raise DTEError(f"The dual path does not support attention with {', '.join(found)}: {name}.")


@contextmanager
def dual_path(
    unet: UNet2DConditionModel,
    offsets: Offsets,
    hard_hidden_states: Float[Tensor, "batch length dim"] | None = None,
    alpha_blend: int | float | Float[Tensor, " samples"] = 1.0,
    offsets_on: str = "soft",
    granularity: str = "attention",
) -> Iterator[DualPath]:
    """Run the UNet with offsets, and blended with the hard path, inside a `with` block.

    offsets: {"layer.projection": (A (B, Din, r), B (B, r, Dout))}, B = 1 serves any batch.
    hard_hidden_states: needed unless alpha_blend is 1, where only the soft path runs.
    alpha_blend: see `alpha_at`.
    Yields a `DualPath`, whose `update` changes these three. The previous processors come back when
    the block is left, also by an exception. With gradient checkpointing `backward` must run inside
    the block and before any update, since it computes the forward pass anew.

    Raises DTEError for an unknown offsets_on or granularity, unknown or misshapen offsets,
    missing hard states, and a UNet with a PEFT LoRA or attention of another kind.
    """
    for name, value, known in [
        ("offsets_on", offsets_on, OFFSETS_ON),
        ("granularity", granularity, GRANULARITIES),
    ]:
        if value not in known:
            raise DTEError(f"Unknown {name} {value!r}: use one of {known}.")
    path = DualPath(unet, offsets_on, granularity)
    hooks = [b.register_forward_pre_hook(path.double, with_kwargs=True) for b in path.blocks]
    hooks += [b.register_forward_hook(path.blend) for b in path.blocks]
    try:
        path.update(offsets, hard_hidden_states, alpha_blend)
        yield path
    finally:
        for hook in hooks:
            hook.remove()
        path.clear()
