"""What the encoder sees: CLIP image features and features of the UNet's encoder half.

As in E4T, which the paper follows, the denoiser's features come from the *current noisy latent* at
the current timestep, by default with the empty prompt. Both towers are frozen and run without
gradients. Which layers are read is a choice (EncoderConfig), since the paper does not say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float, Int
from torch import Tensor, nn

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError


class ImageFeatures(NamedTuple):
    """CLIP features of a batch of pictures."""

    patches: Float[Tensor, "batch clip p p"]  # hidden state on the patch grid
    embeds: Float[Tensor, "batch embed"]  # unit vectors in the image-text space


@torch.no_grad()
def image_features(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"], layer: int = -1
) -> ImageFeatures:
    """CLIP features of pictures in [-1, 1].

    layer: which hidden state the patches come from: -1 the last, -2 the one before, ...
    """
    with backbone.loaded(backbone.image_encoder) as tower:
        output = tower(backbone.clip_pixels(images), output_hidden_states=True)
    patches = output.hidden_states[layer][:, 1:]  # (B, g*g, width), without the class token
    g = round(patches.shape[1] ** 0.5)
    patches = patches.transpose(1, 2).unflatten(2, (g, g))  # (B, width, g, g)
    return ImageFeatures(patches.float(), F.normalize(output.image_embeds.float(), dim=-1))


@torch.no_grad()
def unet_features(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "batch channels height width"],
    timesteps: Int[Tensor, " batch"],
    prompt: Float[Tensor, "1 length dim"],
    grid: int = 8,
    layers: Sequence[str] | None = None,
) -> Float[Tensor, "batch features {grid} {grid}"]:
    """Features of the UNet's down and mid blocks, each map brought to one grid and scale.

    prompt: one, encoded. layers: some of `unet_layers(unet)`, None for all; what lies behind the
    last of them is not computed. `unet_feature_dim` counts the channels of all maps.
    Every map is normalised over itself (mean 0, variance 1), because their scales differ by orders
    of magnitude. ("ours": the paper does not say how the maps are pooled; E4T takes their means.)

    Raises DTEError for an unknown layer.
    """
    unet = backbone.unet
    wanted = list(_channels(unet, layers))
    noisy_latents = noisy_latents.to(backbone.dtype)
    text = prompt.to(backbone.dtype).expand(len(noisy_latents), -1, -1)
    temb = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))  # (B, 4 * channels)

    hidden, maps = noisy_latents, []
    for name in unet_layers(unet):
        layer = unet.get_submodule(name)
        if name == "conv_in":
            hidden = layer(hidden)
            found = [hidden]
        else:
            cross = getattr(layer, "has_cross_attention", False)
            found = layer(hidden, temb, **({"encoder_hidden_states": text} if cross else {}))
            hidden, found = found if isinstance(found, tuple) else (found, [found])
        if name in wanted:
            maps += [_to_grid(F.group_norm(m.float(), 1), grid) for m in found]
        if name == wanted[-1]:
            return torch.cat(maps, dim=1)


def unet_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of the encoder half's layers, in order: conv_in, down_blocks.0, ..., mid_block."""
    return ["conv_in", *(f"down_blocks.{i}" for i in range(len(unet.down_blocks))), "mid_block"]


def unet_feature_dim(unet: UNet2DConditionModel, layers: Sequence[str] | None = None) -> int:
    """Number of channels that `unet_features` returns, counted from the configuration."""
    return sum(_channels(unet, layers).values())


def _channels(unet: UNet2DConditionModel, layers: Sequence[str] | None) -> dict[str, int]:
    """{layer: channels of its maps} of the chosen layers, in the UNet's order."""
    widths, per_block = unet.config.block_out_channels, unet.config.layers_per_block
    channels = {"conv_in": widths[0]}
    for i, width in enumerate(widths):  # one map per layer, one per downsampler
        channels[f"down_blocks.{i}"] = width * (per_block + (i < len(widths) - 1))
    channels["mid_block"] = widths[-1]
    if layers is None:
        return channels
    if not layers or not set(layers) <= set(channels):
        raise DTEError(f"UNet layers {list(layers)}: choose some of {', '.join(channels)}.")
    return {name: count for name, count in channels.items() if name in layers}


def _to_grid(
    x: Float[Tensor, "batch channels h w"], grid: int
) -> Float[Tensor, "batch channels {grid} {grid}"]:
    """Maps of the UNet, averaged down or repeated up."""
    if x.shape[-1] >= grid:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, (grid, grid), mode="nearest")


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch width g g"]) -> Float[Tensor, "batch width g g"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def to_grid(
    x: Float[Tensor, "batch width p p"], grid: int
) -> Float[Tensor, "batch width {grid} {grid}"]:
    """CLIP's patches on another grid, interpolated."""
    if x.shape[-1] == grid:
        return x
    return F.interpolate(x, (grid, grid), mode="bilinear", antialias=True)


class FeatureFusion(nn.Module):
    """CLIP and UNet features on one grid, mixed by convolutions: one token for each place."""

    def __init__(
        self, clip_dim: int, embed_dim: int, unet_dim: int, width: int, grid: int, depth: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.clip_norm = nn.GroupNorm(1, clip_dim)
        self.clip_in = nn.Conv2d(clip_dim, width, 1)
        self.unet_in = nn.Conv2d(unet_dim, width, 1)
        self.embed_in = nn.Linear(embed_dim, width)
        self.time = nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, width))
        self.blocks = nn.Sequential(*[ResBlock(width) for _ in range(depth)])
        self.position = nn.Parameter(0.02 * torch.randn(grid**2, width))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        image_features: ImageFeatures,
        unet_features: Float[Tensor, "batch features grid grid"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch tokens width"]:
        patches, embeds = image_features
        # contiguous: torch 2.13 crashes in GroupNorm's backward on a channels-last leaf on CPU.
        clip = self.clip_in(self.clip_norm(patches.contiguous()))  # (B, width, p, p)
        clip = to_grid(clip, self.grid)  # (B, width, grid, grid)
        unet = self.unet_in(unet_features)  # (B, width, grid, grid)
        # embeds are unit vectors: bring their entries to variance 1 before the projection.
        whole = self.embed_in(embeds * embeds.shape[-1] ** 0.5) + self.time(timesteps)  # (B, width)
        x = self.blocks(clip + unet + whole[:, :, None, None])  # (B, width, grid, grid)
        x = x.flatten(2).transpose(1, 2)  # (B, grid^2, width)
        return self.norm(x + self.position)
