"""What the encoder sees: CLIP image features and features of the UNet's encoder half.

As in E4T, which the paper follows, the denoiser's features come from the *current noisy latent* at
the current timestep, with the empty prompt. Both towers are frozen and run without gradients.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class ImageFeatures(NamedTuple):
    """CLIP features of a batch of pictures."""

    patches: torch.Tensor  # (B, width, g, g) last hidden state on the patch grid
    embeds: torch.Tensor  # (B, projection) unit vectors in the image-text space


@torch.no_grad()
def image_features(backbone, images):
    """CLIP features of pictures (B, 3, H, W) in [-1, 1]; see `ImageFeatures`."""
    output = backbone.image_encoder(backbone.clip_pixels(images))
    patches = output.last_hidden_state[:, 1:]  # (B, g*g, width), without the class token
    g = round(patches.shape[1] ** 0.5)
    patches = patches.transpose(1, 2).unflatten(2, (g, g))  # (B, width, g, g)
    return ImageFeatures(patches.float(), F.normalize(output.image_embeds.float(), dim=-1))


@torch.no_grad()
def unet_features(backbone, noisy_latents, timesteps, empty_prompt, grid=8):
    """Features of the UNet's down and mid blocks, each map brought to one grid and scale.

    noisy_latents: (B, C, h, w). timesteps: (B,). empty_prompt: (1, L, d), the encoded "".
    Returns (B, sum of the maps' channels, grid, grid); `unet_feature_dim` counts the channels.
    Every map is normalised over itself (mean 0, variance 1), because their scales differ by orders
    of magnitude. ("ours": the paper does not say how the maps are pooled; E4T takes their means.)
    """
    unet = backbone.unet
    noisy_latents = noisy_latents.to(backbone.dtype)
    text = empty_prompt.to(backbone.dtype).expand(len(noisy_latents), -1, -1)
    temb = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))  # (B, 4 * channels)

    hidden = unet.conv_in(noisy_latents)
    maps = [hidden]
    for block in unet.down_blocks:
        cross = {"encoder_hidden_states": text} if _has_cross_attention(block) else {}
        hidden, residuals = block(hidden, temb, **cross)
        maps.extend(residuals)
    cross = {"encoder_hidden_states": text} if _has_cross_attention(unet.mid_block) else {}
    maps.append(unet.mid_block(hidden, temb, **cross))

    maps = [F.group_norm(m.float(), 1) for m in maps]
    return torch.cat([_to_grid(m, grid) for m in maps], dim=1)


def unet_feature_dim(unet):
    """Number of channels that `unet_features` returns, counted from the configuration."""
    widths, layers = unet.config.block_out_channels, unet.config.layers_per_block
    total = widths[0] + widths[-1]  # conv_in and mid block
    for i, width in enumerate(widths):
        total += width * (layers + (i < len(widths) - 1))  # one per layer, one per downsampler
    return total


def _has_cross_attention(block):
    return getattr(block, "has_cross_attention", False)


def _to_grid(x, grid):
    """(B, C, h, w) -> (B, C, grid, grid): averaged down, or repeated up."""
    if x.shape[-1] >= grid:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, (grid, grid), mode="nearest")
