"""Answers to the exercises of 01_features."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from dte_lab.backbone import add_noise
from dte_lab.features import FeatureFusion, ImageFeatures, _to_grid


def package_noisy_latent(x0, noise, t, alphas_cumprod):
    return add_noise(SimpleNamespace(alphas_cumprod=alphas_cumprod), x0, noise, t)


def package_map_to_grid(x, grid):
    """As `unet_features` treats each map."""
    return _to_grid(F.group_norm(x.float(), 1), grid)


class NoTime(nn.Module):
    def forward(self, timesteps):
        return 0


@torch.no_grad()
def package_fuse(patches, unet, whole, w_clip, w_unet, w_whole):
    """The module without what comes before and after the sum."""
    d, grid = len(w_clip), patches.shape[-1]
    fusion = FeatureFusion(
        w_clip.shape[1], w_whole.shape[1], w_unet.shape[1], width=8, grid=grid, depth=0
    )
    fusion.clip_norm, fusion.norm = nn.Identity(), nn.Identity()
    fusion.position = nn.Parameter(torch.zeros(grid**2, d))
    for name, weight in (("clip_in", w_clip), ("unet_in", w_unet)):
        conv = nn.Conv2d(weight.shape[1], d, 1, bias=False)
        conv.weight.copy_(weight[..., None, None])
        setattr(fusion, name, conv)
    fusion.embed_in = nn.Linear(w_whole.shape[1], d, bias=False)
    fusion.embed_in.weight.copy_(w_whole)
    fusion.time = NoTime()
    unit = whole / whole.shape[-1] ** 0.5  # the module takes unit vectors
    return fusion(ImageFeatures(patches, unit), unet, torch.zeros(len(unet), dtype=torch.long))


def shaped(v):
    return v[:, None, None, None]


def normalised(x, dims):
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True, correction=0)


def pool(x, grid):
    return F.adaptive_avg_pool2d(x, grid)


def conv(x, weight):
    return F.conv2d(x, weight[..., None, None])


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def summed(p, u, v, wp, wu, wv):
    return conv(p, wp) + conv(u, wu) + (v @ wv.T)[:, :, None, None]


def loop_fuse(p, u, v, wp, wu, wv):
    B, _, g, _ = p.shape
    out = torch.zeros(B, g * g, len(wp))
    for y in range(g):
        for x in range(g):
            out[:, y * g + x] = p[:, :, y, x] @ wp.T + u[:, :, y, x] @ wu.T + v @ wv.T
    return out


OWN = {
    "noisy_latent": package_noisy_latent,
    "map_to_grid": package_map_to_grid,
    "fuse": package_fuse,
}
OTHER_RIGHT = {
    "noisy_latent": lambda x, n, t, a: torch.stack(
        [a[k] ** 0.5 * x[i] + (1 - a[k]) ** 0.5 * n[i] for i, k in enumerate(t)]
    ),
    "map_to_grid": lambda x, grid: F.avg_pool2d(normalised(x, (1, 2, 3)), x.shape[-1] // grid),
    "fuse": loop_fuse,
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "noisy_latent": [
        ("swapped", lambda x, n, t, a: shaped(a[t]).sqrt() * n + shaped(1 - a[t]).sqrt() * x),
        ("square roots", lambda x, n, t, a: shaped(a[t]) * x + shaped(1 - a[t]) * n),
        ("whole difference", lambda x, n, t, a: torch.lerp(n, x, shaped(a[t]).sqrt())),
        ("shrink", lambda x, n, t, a: x + shaped(1 - a[t]).sqrt() * n),
        ("in full", lambda x, n, t, a: shaped(a[t]).sqrt() * x + n),
        ("last axis", lambda x, n, t, a: a[t].sqrt() * x + (1 - a[t]).sqrt() * n),
        ("its own t", lambda x, n, t, a: a[t[0]].sqrt() * x + (1 - a[t[0]]).sqrt() * n),
        ("RuntimeError", lambda x, n, t, a: a.sqrt() * x + (1 - a).sqrt() * n),
        ("not right yet", lambda x, n, t, a: shaped(a[t - 1]).sqrt() * x),
        ("Return a tensor", lambda x, n, t, a: None),
    ],
    "map_to_grid": [
        ("comes last", lambda x, g: normalised(pool(x, g), (1, 2, 3))),
        ("whole batch", lambda x, g: pool(normalised(x, (0, 1, 2, 3)), g)),
        ("whole batch", lambda x, g: pool((x - x.mean()) / x.std(), g)),
        ("side of a cell", lambda x, g: F.avg_pool2d(normalised(x, (1, 2, 3)), g)),
        ("Each channel", lambda x, g: pool(normalised(x, (2, 3)), g)),
        ("Each channel", lambda x, g: pool(F.instance_norm(x), g)),
        ("Each position", lambda x, g: pool(normalised(x, 1), g)),
        ("not normalised", lambda x, g: pool(x, g)),
        ("mean is still", lambda x, g: pool(x / x.std((1, 2, 3), keepdim=True, correction=0), g)),
        ("scale is as before", lambda x, g: pool(x - x.mean((1, 2, 3), keepdim=True), g)),
        ("by the variance", lambda x, g: pool(
            (x - x.mean((1, 2, 3), keepdim=True)) / x.var((1, 2, 3), keepdim=True, correction=0), g
        )),
        ("correction=0", lambda x, g: pool(
            (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True), g
        )),
        ("largest value", lambda x, g: F.adaptive_max_pool2d(normalised(x, (1, 2, 3)), g)),
        ("Single positions", lambda x, g: F.interpolate(normalised(x, (1, 2, 3)), (g, g))),
        ("old size", lambda x, g: F.group_norm(x, 1)),
        ("shape", lambda x, g: normalised(x, (1, 2, 3)).mean((2, 3))),
    ],
    "fuse": [
        ("vector is missing", lambda p, u, v, wp, wu, wv: tokens(conv(p, wp) + conv(u, wu))),
        ("rows and columns", lambda p, u, v, wp, wu, wv: tokens(
            conv(p, wp) + conv(u, wu) + v @ wv.T
        )),
        ("UNet's part", lambda p, u, v, wp, wu, wv: tokens(
            conv(p, wp) + (v @ wv.T)[:, :, None, None]
        )),
        ("patches' part", lambda p, u, v, wp, wu, wv: tokens(
            conv(u, wu) + (v @ wv.T)[:, :, None, None]
        )),
        ("not averaged", lambda *a: tokens(summed(*a) / 3)),
        ("memory's order", lambda *a: summed(*a).reshape(len(a[0]), -1, len(a[3]))),
        ("still a map", lambda *a: summed(*a)),
        ("swapped", lambda *a: summed(*a).flatten(2)),
        ("column by column", lambda *a: tokens(summed(*a).transpose(2, 3))),
        ("RuntimeError", lambda p, u, v, wp, wu, wv: tokens(p + u + v[:, :, None, None])),
        ("shape", lambda p, u, v, wp, wu, wv: tokens(  # side by side instead of added
            torch.cat([conv(p, wp), conv(u, wu)], dim=1)
        )),
    ],
}  # fmt: skip
