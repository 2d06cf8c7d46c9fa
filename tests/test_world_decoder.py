"""The decoder's training: what the denoiser makes of noisy latents, and the borders of cells."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dte_lab.world import train_decoder
from dte_lab.world.spoken import Spoken
from dte_lab.world.train_decoder import Redrawing, border_loss
from dte_lab.world.train_unet import NoiseLevels


class Denoiser(nn.Module):
    """Velocities that are a fixed function of what it is given, which it keeps."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.seen = velocity, []

    def forward(self, x, t, states):
        self.seen.append((x, t, states))
        return SimpleNamespace(sample=self.velocity(x, t))


def redrawing(velocity, size=6):
    torch.manual_seed(0)
    latents = torch.randn(size, 2, 4, 4)
    batch = Spoken(
        torch.zeros(size, 3, dtype=torch.long), torch.zeros(size, 3, dtype=torch.bool),
        torch.zeros(size, 5), latents, torch.rand(size, 3, 64, 64),
    )  # fmt: skip
    painter = SimpleNamespace(states=lambda ids, is_slot, v: v[:, None])
    unet, levels = Denoiser(velocity), NoiseLevels("cpu")
    return Redrawing(lambda size: batch, levels, unet, painter), batch, unet


def angle(levels, t):
    """Of x = cos(angle) picture + sin(angle) noise."""
    return torch.acos(levels.scheduler.alphas_cumprod[t].sqrt()).view(-1, 1, 1, 1)


def test_a_denoiser_that_knows_the_picture_gives_it_back():
    made = {}

    def truth(x, t):  # v = (cos x - z) / sin, of the picture z
        phi = angle(made["levels"], t)
        return (phi.cos() * x - made["z"]) / phi.sin()

    drawn, batch, unet = redrawing(truth)
    made |= {"levels": drawn.levels, "z": batch.latents}
    latents, pictures = drawn(6)
    torch.testing.assert_close(latents, batch.latents, atol=1e-3, rtol=0)
    assert pictures is batch.pictures and len(unet.seen) == 4


def test_rounds_are_turns_of_picture_and_noise():
    """With v at hand, a step of DDIM turns (x, v) by the difference of the angles."""
    drawn, batch, unet = redrawing(lambda x, t: torch.sin(3 * x))
    latents = drawn.redrawn(batch)
    x, start, states = unet.seen[0]
    assert torch.equal(states, batch.v[:, None])
    assert (start >= 250).all() and (start < 1000).all() and len(set(start.tolist())) > 3
    for k in range(4):
        t = start * (4 - k) // 4
        torch.testing.assert_close(unet.seen[k][0], x, atol=1e-4, rtol=1e-4)
        assert torch.equal(unet.seen[k][1], t)
        phi, v = angle(drawn.levels, t), torch.sin(3 * x)
        picture = phi.cos() * x - phi.sin() * v
        turn = angle(drawn.levels, start * (3 - k) // 4) - phi
        x = turn.cos() * x + turn.sin() * v
    torch.testing.assert_close(latents, picture, atol=1e-4, rtol=1e-4)


def test_only_changes_across_borders_of_cells_cost():
    x = torch.rand(2, 3, 64, 64)
    for column, at in ((16, True), (32, True), (48, True), (15, False), (17, False), (8, False)):
        y = x.clone()
        y[..., column:] += 0.25  # one step more, between column - 1 and column
        # 3 of 63 differences of a row are at borders; the mean is over all
        assert border_loss(x, y).item() == pytest.approx(0.5 * 0.25 / 63 if at else 0, abs=1e-6)
        down = border_loss(x.transpose(-1, -2), y.transpose(-1, -2)).item()
        assert down == pytest.approx(border_loss(x, y).item(), abs=1e-6)


def test_half_of_a_batch_is_redrawn_and_weighs_as_the_rest(monkeypatch):
    torch.manual_seed(0)
    z, x = torch.randn(3, 2, 4, 4), torch.rand(3, 3, 64, 64)
    plain = torch.rand(5, 3, 64, 64)
    asked = []
    monkeypatch.setattr(train_decoder, "random_pictures", lambda _, n: (asked.append(n), plain)[1])
    monkeypatch.setattr(train_decoder, "white_noise", lambda z: torch.full_like(z, 0.5))
    monkeypatch.setattr(train_decoder, "scaled_latents", lambda model, x: torch.ones(5, 2, 4, 4))
    decoded = []
    painted = torch.rand(8, 3, 64, 64)
    monkeypatch.setattr(
        train_decoder, "pictures_of", lambda model, z: (decoded.append(z), painted)[1]
    )

    def redraw(size):
        asked.append(size)
        return z, x

    redraw.batches = SimpleNamespace(pairs=SimpleNamespace(drawings=None))
    training = train_decoder.DecoderTraining(redraw, (z, x), x, 7, None)
    with training.loss(None) as (loss, logs):
        pass
    assert asked == [4, 3]  # of 7
    assert torch.equal(decoded[0], torch.cat([z, torch.full((5, 2, 4, 4), 1.5)]))
    error = painted - torch.cat([x, plain])
    across, down = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    borders = [15, 31, 47]
    expected = error.abs().mean() + 0.5 * (across.mean() + down.mean())
    expected += across[..., borders].sum() / across.numel()
    expected += down[..., borders, :].sum() / down.numel()
    torch.testing.assert_close(loss, expected)
