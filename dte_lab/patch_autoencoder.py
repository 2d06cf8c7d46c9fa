"""The autoencoder of the small backbone: 64x64x3 pixels <-> 4x4x96 latents.

A linear path (8x8 patches times a PCA basis) makes it good from the first second, a small
convolutional path adds what a linear map cannot. Both make 24 numbers of each patch; the four
patches of a cell of 16x16 pixels are stacked into the channels of one latent, so that the denoiser
has one position for each cell that the caption tells of (see world/painter.py). The interface is
that of diffusers' AutoencoderKL, so a stock StableDiffusionPipeline takes it.
"""

from typing import NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn


class Latents(NamedTuple):
    """What `encode` returns: the encoder is deterministic, so sample and mode are the same."""

    value: Float[Tensor, "batch channels height width"]  # (B, 96, 4, 4)

    def sample(
        self, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        return self.value

    def mode(self) -> Float[Tensor, "batch channels height width"]:
        return self.value


class EncoderOutput(NamedTuple):
    latent_dist: Latents


class DecoderOutput(NamedTuple):
    sample: Float[Tensor, "batch 3 height width"]  # in about [-1, 1]


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), second convolution starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(h)))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Linear patch path plus convolutional residual path, in both directions."""

    @register_to_config
    def __init__(
        self,
        patch_channels: int = 24,
        cell: int = 2,  # patches on each side of a latent
        width: int = 192,
        fine_width: int = 64,
        scaling_factor: float = 1.0,
        # Only its length is read, by diffusers: pixels per latent = 2 ** (length - 1) = 16.
        block_out_channels: tuple[int, ...] = (64, 64, 192, 192, 192),
    ) -> None:
        super().__init__()
        patch = 3 * 8 * 8
        self.linear_encode = nn.Conv2d(patch, patch_channels, 1)
        self.linear_decode = nn.Conv2d(patch_channels, patch, 1)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),  # (B, 48, 16, 16)
            nn.Conv2d(48, fine_width, 3, padding=1),
            ResidualBlock(fine_width),
            nn.Conv2d(fine_width, width, 3, stride=2, padding=1),  # (B, width, 8, 8)
            ResidualBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            _zero(nn.Conv2d(width, patch_channels, 1)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(patch_channels, width, 3, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.Conv2d(width, 4 * fine_width, 3, padding=1),
            nn.PixelShuffle(2),  # (B, fine_width, 16, 16)
            ResidualBlock(fine_width),
            ResidualBlock(fine_width),
            nn.GroupNorm(8, fine_width),
            nn.SiLU(),
            nn.Conv2d(fine_width, 16 * 16, 3, padding=1),
            nn.PixelShuffle(4),  # (B, 16, 64, 64)
            nn.SiLU(),
            _zero(nn.Conv2d(16, 3, 3, padding=1)),
        )

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], return_dict: bool = True
    ) -> EncoderOutput | tuple[Latents]:
        """Pictures in [-1, 1], 64 pixels wide -> latents (B, 96, 4, 4), not yet scaled."""
        z = self.linear_encode(nn.functional.pixel_unshuffle(x, 8)) + self.encoder(x)
        z = nn.functional.pixel_unshuffle(z, self.config.cell)
        return EncoderOutput(Latents(z)) if return_dict else (Latents(z),)

    def decode(
        self,
        z: Float[Tensor, "batch channels height width"],
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Float[Tensor, "batch 3 pixels pixels"]]:
        """Latents (B, 96, 4, 4) -> (B, 3, 64, 64)."""
        z = nn.functional.pixel_shuffle(z, self.config.cell)  # (B, 24, 8, 8)
        x = nn.functional.pixel_shuffle(self.linear_decode(z), 8) + self.decoder(z)
        return DecoderOutput(x) if return_dict else (x,)

    @torch.no_grad()
    def initialise_from_pca(self, x: Float[Tensor, "pictures 3 height width"]) -> None:
        """Set the linear path to PCA of the 8x8 patches of x.

        Components are divided by the square root of their standard deviation: half way between
        keeping pixel distances and whitening, so the denoiser sees coarse content first without
        losing the fine one in noise.
        """
        patches = nn.functional.pixel_unshuffle(x, 8).permute(0, 2, 3, 1).flatten(0, 2)  # (N, 192)
        mean = patches.mean(0)
        _, s, v = torch.linalg.svd(patches - mean, full_matrices=False)
        k = self.config.patch_channels
        basis, std = v[:k], s[:k] / len(patches) ** 0.5  # (k, 192), (k)
        scale = std.rsqrt()[:, None]  # z = basis (x - mean) / sqrt(std)
        self.linear_encode.weight.copy_((basis * scale)[..., None, None])
        self.linear_encode.bias.copy_(-(basis * scale) @ mean)
        self.linear_decode.weight.copy_((basis / scale).T[..., None, None])
        self.linear_decode.bias.copy_(mean)
