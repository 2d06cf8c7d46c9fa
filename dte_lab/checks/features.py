"""Checks of the exercises in 01_features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dte_lab.checks.compare import call, compare, exercise


@exercise
def noisy_latent(answer: Callable[..., object]) -> None:
    """01, exercise 1: (x0 (B, C, h, w), noise alike, t (B,), alphas_cumprod (T,)) -> x_t."""
    g = torch.Generator().manual_seed(0)
    # As wide as the batch is long: there (B,) broadcasts, along the wrong axis and silently.
    x0, noise = torch.randn(2, 3, 2, 3, 3, generator=g)
    alphas_cumprod = torch.linspace(0.98, 0.02, 12) ** 2
    t = torch.tensor([9, 1, 5])
    abar = alphas_cumprod[t]  # (3,)
    a = abar[:, None, None, None]
    once = alphas_cumprod[t[0]]
    compare(
        call(answer, x0, noise, t, alphas_cumprod),
        a.sqrt() * x0 + (1 - a).sqrt() * noise,
        {
            "Signal and noise are swapped: at small t nearly all is signal, since abar is near "
            "1.": a.sqrt() * noise + (1 - a).sqrt() * x0,
            "The square roots are missing: abar is a variance, and the latent is multiplied by a "
            "standard deviation.": a * x0 + (1 - a) * noise,
            "The noise's coefficient is sqrt(1 - abar): the root goes over the whole difference, "
            "so that the two variances add up to 1.": a.sqrt() * x0 + (1 - a.sqrt()) * noise,
            "The signal has to shrink as the noise grows: multiply x0 by sqrt(abar).": x0
            + (1 - a).sqrt() * noise,
            "The noise counts in full at every t: multiply it by sqrt(1 - abar).": a.sqrt() * x0
            + noise,
            "abar of shape (B,) was spread over the last axis, the picture's width: give it the "
            "shape (B, 1, 1, 1), so that each picture has its own t.": abar.sqrt() * x0
            + (1 - abar).sqrt() * noise,
            "Every picture of the batch has its own t; here all got the first one's.": once.sqrt()
            * x0
            + (1 - once).sqrt() * noise,
        },
        "Look abar up at each picture's t, alphas_cumprod[t], shape it (B, 1, 1, 1), and weigh x0 "
        "by its root and the noise by the root of the rest.",
    )
    print("noisy_latent: right. The two variances add up to 1 at every t.")


@exercise
def map_to_grid(answer: Callable[..., object]) -> None:
    """01, exercise 2: (map (B, C, h, w), grid) -> each normalised over itself, (B, C, grid, grid).

    h and w are multiples of grid.
    """
    g = torch.Generator().manual_seed(0)
    # Batch entries, channels and positions all have scales and means of their own.
    scale = 3 + 40 * torch.rand(2, 3, 1, 1, generator=g)
    shift = 20 * torch.randn(2, 1, 6, 6, generator=g)
    x = (
        scale * torch.randn(2, 3, 6, 6, generator=g)
        + shift
        + torch.tensor([5.0, 90.0])[:, None, None, None]
    )
    compare(
        call(answer, x, 2),
        pooled(normalised(x, (1, 2, 3))),
        map_mistakes(x),
        "Subtract each picture's mean over channels and positions, divide by its standard "
        "deviation, then average down to grid x grid.",
    )
    print("map_to_grid: right. Maps of very different scales can now be laid side by side.")


def map_mistakes(x: Tensor) -> dict[str, Tensor]:
    """{sentence: what this known mistake makes of the map x (B, C, 6, 6) and a grid of 2}."""
    whole = (1, 2, 3)
    return {
        "Averaging comes last: it shrinks the variance, so a map that is normalised after it "
        "gets another scale.": normalised(pooled(x), whole),
        "Mean and variance were taken over the whole batch: each picture's map is normalised "
        "over itself, dims (1, 2, 3), or its features would depend on its "
        "neighbours.": pooled(normalised(x, (0, 1, 2, 3))),
        "Mean and standard deviation are those of the whole batch, and std divided by n - 1: each "
        "picture's map is normalised over itself, dims (1, 2, 3), correction=0.": pooled(
            normalised(x, (0, 1, 2, 3), correction=1)
        ),
        "Each channel was normalised alone, which hides how strongly one channel answers "
        "beside another: take mean and variance over channels and positions, dims "
        "(1, 2, 3).": pooled(normalised(x, (2, 3))),
        "Each position was normalised alone, which hides where the map is strong: take mean "
        "and variance over channels and positions, dims (1, 2, 3).": pooled(normalised(x, 1)),
        "The map is not normalised yet: subtract its mean and divide by its standard "
        "deviation.": pooled(x),
        "The mean is still in it: subtract it before you divide.": pooled(
            x / x.std(whole, keepdim=True, correction=0)
        ),
        "The map is centred, but its scale is as before: divide by the standard deviation.": pooled(
            x - x.mean(whole, keepdim=True)
        ),
        "It was divided by the variance: divide by the standard deviation, its root.": pooled(
            (x - x.mean(whole, keepdim=True)) / x.var(whole, keepdim=True, correction=0)
        ),
        "std divides by n - 1 by default: with correction=0 the variance is exactly 1.": pooled(
            normalised(x, whole, correction=1)
        ),
        "The largest value of each cell was kept: take the mean, avg_pool instead of "
        "max_pool.": F.adaptive_max_pool2d(normalised(x, whole), 2),
        "grid is the number of cells on a side, and was taken for the side of a cell: "
        "F.adaptive_avg_pool2d(x, grid).": F.avg_pool2d(normalised(x, whole), 2),
        "Single positions were picked and the rest dropped: average over the cell.": normalised(
            x, whole
        )[..., ::3, ::3],
        "The map has its old size: average it down to grid x grid.": normalised(x, whole),
    }


def normalised(x: Tensor, dims: int | tuple[int, ...], correction: int = 0) -> Tensor:
    """x with mean 0 and standard deviation 1 over `dims`."""
    std = x.std(dims, keepdim=True, correction=correction)
    return (x - x.mean(dims, keepdim=True)) / std


def pooled(x: Tensor) -> Tensor:
    """Means of 3 x 3 positions: 6 to 2."""
    return F.adaptive_avg_pool2d(x, 2)


@exercise
def fuse(answer: Callable[..., object]) -> None:
    """01, exercise 3: two maps and a vector per picture -> one token per position (B, g*g, d).

    (patches (B, Dc, g, g), unet (B, Du, g, g), whole (B, De), w_clip (d, Dc), w_unet (d, Du),
    w_whole (d, De)).
    """
    g = torch.Generator().manual_seed(0)
    # Batch, grid and width are alike, so that a vector spread over the wrong axis is no error.
    B, grid, d = 4, 4, 4
    patches, unet = (torch.randn(B, c, grid, grid, generator=g) for c in (3, 5))
    whole = torch.randn(B, 6, generator=g)
    weights = [torch.randn(d, c, generator=g) for c in (3, 5, 6)]
    clip_map, unet_map = (
        torch.einsum("dc,bchw->bdhw", w, x) for w, x in zip(weights, (patches, unet), strict=False)
    )  # (B, d, g, g)
    vector = whole @ weights[2].T  # (B, d)
    both = clip_map + unet_map

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)  # (B, g*g, d)

    right = both + vector[:, :, None, None]
    compare(
        call(answer, patches, unet, whole, *weights),
        tokens(right),
        {
            "The whole picture's vector is missing: project it and add it at every "
            "position.": tokens(both),
            "The vector (B, d) was spread over the picture's rows and columns: it belongs to the "
            "channels, so give it the shape (B, d, 1, 1).": tokens(both + vector),
            "The UNet's part is missing: project its maps too and add them.": tokens(
                clip_map + vector[:, :, None, None]
            ),
            "The patches' part is missing: project them too and add them.": tokens(
                unet_map + vector[:, :, None, None]
            ),
            "The three parts are added, not averaged: each projection finds its own scale.": tokens(
                right / 3
            ),
            "reshape kept the memory's order and so mixed channels with positions: flatten the "
            "positions first, then swap the last two axes.": right.reshape(B, grid**2, d),
            "This is still a map (B, d, g, g): make a token (d numbers) of each position.": right,
            "Channels and positions are swapped: a token is a position, so the result is "
            "(B, g*g, d).": right.flatten(2),
            "Positions are counted column by column: go row by row, as flatten(2) "
            "does.": right.transpose(2, 3).flatten(2).transpose(1, 2),
        },
        "Project the channels of each input to d, add the three, with the vector at every "
        "position, and list the positions row by row.",
    )
    print("fuse: right. Each token knows its place in CLIP's map and in the UNet's.")
