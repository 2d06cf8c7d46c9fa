"""One step of each part of the base model's training, and of Muon, worked out by hand."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dte_lab.common.schedule import average_of, ema_weight, update_ema
from dte_lab.world import train_autoencoder, train_text, train_towers, train_unet
from dte_lab.world.clip import cells
from dte_lab.world.data import picture_bank, random_items, rendered
from dte_lab.world.muon import MuonAdamW
from dte_lab.world.training import TrainConfig, train


class Recorder(nn.Module):
    """Stands for a network: keeps what it is called with, and gives what it is told."""

    def __init__(self, gives):
        super().__init__()
        self.gives, self.calls = gives, []

    def forward(self, *arguments):
        self.calls.append(arguments)
        return self.gives(*arguments)


def cosine_alphas():
    """abar of the cosine schedule (arXiv 2102.09672), betas at most 0.999."""
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return torch.tensor(np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999)))


def test_the_denoisers_loss():
    B = 2000
    states = torch.arange(1, 9.0).reshape(4, 2, 1, 1).expand(4, 2, 3, 5).half()
    empty = torch.zeros(1, 3, 5).half()
    latents = torch.arange(4.0)[:, None, None, None].expand(4, 2, 2, 2).half() - 1.5
    training = train_unet.DenoiserTraining(latents, states, empty, B)
    unet = Recorder(lambda x, t, states: SimpleNamespace(sample=0.5 * x))
    torch.manual_seed(3)
    with training.loss(unet) as (loss, logs):
        assert logs == {}
    ((x_t, t, seen),) = unet.calls
    torch.manual_seed(3)
    rows, u = torch.randint(4, (B,)), torch.rand(B)
    noise = torch.randn(B, 2, 2, 2)
    assert torch.equal(t, (1000 * u.sqrt()).long()) and t.max() > 990
    share = (t < 500).double().mean()
    assert 0.2 < share < 0.3, "a quarter: more steps where the caption decides"
    alpha = cosine_alphas()[t][:, None, None, None]
    z = latents[rows].double()
    torch.testing.assert_close(
        x_t.double(), alpha.sqrt() * z + (1 - alpha).sqrt() * noise, atol=1e-4, rtol=1e-4
    )
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    expected = (0.5 * x_t - velocity).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    value = seen[:, 0, 0]
    dropped = value == 0
    assert 0.08 < dropped.double().mean() < 0.12, "a tenth without a caption, for guidance"
    own = 2 * rows[:, None] + torch.tensor([1, 2])  # the two captions of each row
    hits = value[:, None] == own
    assert (hits.any(1) | dropped).all() and 0.4 < hits[~dropped, 0].double().mean() < 0.6
    assert (seen == value[:, None, None]).all(), "a caption is dropped as a whole"


def test_the_text_towers_loss():
    torch.manual_seed(0)
    latents, truth = torch.randn(3, 6, 4, 4), torch.randn(3, 5)
    looked = []

    def look_up(labels):
        looked.append(labels)
        return latents[: len(labels)]

    pictures = SimpleNamespace(look_up=look_up, components=lambda z: truth[: len(z)])
    painted, components = torch.randn(3, 16, 6), torch.randn(3, 5)
    kind = torch.randn(3, 4)
    model = Recorder(lambda ids: (painted, components, kind))
    captions = torch.arange(2 * 3 * 7).reshape(2, 3, 7)
    labels, kinds = torch.tensor([[1, 0, 2], [0, 1, 1]]), torch.tensor([3, 2])
    training = train_text.TextTraining(pictures, captions, labels, kinds, 3, None, None)
    torch.manual_seed(6)
    with training.loss(model) as (loss, logs):
        pass
    torch.manual_seed(6)
    rows, which = torch.randint(2, (3,)), torch.randint(3, (3,))
    assert rows.tolist() == [0, 1, 1]
    assert torch.equal(model.calls[0][0], captions[rows, which])
    assert torch.equal(looked[0], labels[rows])
    expected = {
        "cells": (painted - cells(latents)).square().mean(),
        "unexplained": (components - truth).square().mean() / truth.square().mean(),
        "kind": -torch.stack(
            [kind[i].log_softmax(0)[kinds[labels[rows[i], 0]]] for i in range(3)]
        ).mean(),
    }
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value)
    total = expected["cells"] + 0.3 * expected["unexplained"] + 0.05 * expected["kind"]
    torch.testing.assert_close(loss, total)


def test_the_towers_loss(monkeypatch):
    torch.manual_seed(0)
    N, B, d = 5, 4, 6
    pictures = torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8)
    captions, states = torch.arange(N * 2).reshape(N, 2, 1), torch.randn(N * 2, d)
    labels = {
        "concept": torch.tensor([0, 1, 2, 3, 3]), "style": torch.tensor([0, 1, 0, 1, 1]),
        "scene": torch.tensor([2, 0, 1, 2, 0]),
    }  # fmt: skip
    classes = {k: torch.randn(int(v.max()) + 1, d) for k, v in labels.items()}
    kinds = torch.tensor([7, 8, 7, 9])
    monkeypatch.setattr(train_towers, "end_states", lambda text, ids: states[ids[:, 0]])
    monkeypatch.setattr(train_towers, "augment", lambda x: x)
    image = Recorder(lambda x: SimpleNamespace(image_embeds=x[:, :, 0, :2].flatten(1)))
    model = train_towers.Towers(image, nn.Linear(d, 6, bias=False))
    training = train_towers.TowersTraining(
        None, pictures, captions, labels, classes, kinds, B, None
    )
    torch.manual_seed(4)
    with training.loss(model) as (loss, logs):
        pass
    torch.manual_seed(4)
    rows, which = torch.randint(N, (B,)), torch.randint(2, (B,))
    assert len(set(rows.tolist())) > 2
    x = pictures[rows].float() / 127.5 - 1
    torch.testing.assert_close(image.calls[0][0], x)
    embeds = nn.functional.normalize(x[:, :, 0, :2].flatten(1), dim=1)

    def scores(texts):
        return embeds @ nn.functional.normalize(model.projection(texts), dim=1).T / 0.07

    def entropy(logits, index):
        return -logits.log_softmax(1)[torch.arange(len(index)), index].mean()

    own = torch.arange(B)
    pairs = scores(states[captions[rows, which, 0]])
    expected = {"caption": (entropy(pairs, own) + entropy(pairs.T, own)) / 2}
    expected |= {k: entropy(scores(classes[k]), v[rows]) for k, v in labels.items()}
    share = scores(classes["concept"]).softmax(1)  # (B, 4)
    concept = labels["concept"][rows]
    same = [share[i][kinds == kinds[concept[i]]].sum() for i in range(B)]
    expected["kind"] = -torch.stack(same).log().mean()
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_pictures_are_shifted_and_their_colours_scaled():
    x = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    torch.manual_seed(10)
    drawn = (torch.randint(7, (2,)) - 3).tolist()  # down and to the right
    assert drawn[0] != drawn[1]
    torch.manual_seed(10)
    y = train_towers.augment(x)
    fits, shifts = [], []
    for top in range(-3, 4):
        for left in range(-3, 4):
            inner = x[:, :, 3 + top : 13 + top, 3 + left : 13 + left]
            gain = (y[:, :, 3:13, 3:13] + 1) / (inner + 1)  # one per picture and colour
            fits.append((gain - gain.mean((2, 3), keepdim=True)).abs().max().item())
            shifts.append([top, left])
    assert min(fits) < 1e-4 and sorted(fits)[1] > 0.1
    assert shifts[fits.index(min(fits))] == drawn
    assert y.abs().max() <= 1


def test_the_autoencoders_loss(monkeypatch):
    torch.manual_seed(0)
    bank = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    monkeypatch.setattr(train_autoencoder, "varied", lambda x: x.flip(3))
    decoded = []

    def decode(z):
        decoded.append(z)
        return SimpleNamespace(sample=0.5 * z)

    def encode(x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: 2 * x))

    model = SimpleNamespace(encode=encode, decode=decode)
    training = train_autoencoder.AutoencoderTraining(bank, 0.3, torch.zeros(1, 3, 6, 6), 5, None)
    torch.manual_seed(2)
    with training.loss(model) as (loss, logs):
        assert logs == {}
    torch.manual_seed(2)
    x = (bank[torch.randint(4, (5,))].float() / 127.5 - 1).flip(3)
    noise = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(decoded[0], 2 * x + 0.3 * noise)
    error = 0.15 * noise
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    expected = error.abs().mean() + 0.5 * across.abs().mean() + 0.5 * down.abs().mean()
    torch.testing.assert_close(loss, expected)


def test_half_of_the_pictures_are_varied_in_each_way():
    torch.manual_seed(0)
    x = torch.rand(300, 3, 4, 4)
    y = train_autoencoder.varied(x)
    found = 0
    for mirrored in (False, True):
        for turned in (False, True):
            for rolled in (False, True):
                z = x.flip(3) if mirrored else x
                z = z.mT if turned else z
                z = z.roll(1, 1) if rolled else z
                share = (z == y).flatten(1).all(1).double().mean()
                assert 0.05 < share < 0.2, "an eighth"
                found += share
    assert found == pytest.approx(1)


def muon_by_hand(weights, gradients, lr, decay):
    """Steps of Muon on one matrix in float64: Nesterov momentum, then U V^T by five iterations."""
    w, momentum = weights.double().numpy().reshape(len(weights), -1), 0.0
    for g in gradients:
        g = g.double().numpy().reshape(w.shape)
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / np.linalg.norm(x)
        for _ in range(5):  # of 3.4445 x - 4.775 x^3 + 2.0315 x^5, in the singular values
            u, s, v = np.linalg.svd(x, full_matrices=False)
            x = u * (3.4445 * s - 4.775 * s**3 + 2.0315 * s**5) @ v
        w = w - lr * decay * w - lr * 0.2 * max(w.shape) ** 0.5 * x
    return torch.tensor(w).reshape(weights.shape)


@pytest.mark.parametrize("shape", [(6, 4), (3, 10), (4, 3, 2, 2)])
def test_two_steps_of_muon(shape):
    torch.manual_seed(0)
    p, other = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    before = [p.detach().clone(), other.detach().clone()]
    gradients = [[torch.randn(shape) for _ in range(2)] for _ in range(2)]
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = MuonAdamW([{"params": [p, other], "muon": True, "lr": 0.02}], **options)
    for step in range(2):
        p.grad, other.grad = gradients[0][step], gradients[1][step]
        optimizer.step()
    for q, start, g in zip((p, other), before, gradients, strict=True):
        expected = muon_by_hand(start, g, 0.02, 0.1)
        torch.testing.assert_close(q.detach().double(), expected, rtol=1e-3, atol=1e-5)


def test_steps_of_the_loop_against_adamw_clipping_schedule_and_average(tmp_path):
    """Two steps: warm-up, decay, gradients clipped together, no weight decay for vectors, EMA."""
    config = TrainConfig(
        3, 4, 0.1, warmup_steps=2, decay_fraction=0.7, weight_decay=0.5, betas=(0.8, 0.9),
        clip_norm=0.01, ema_decay=0.15, seed=3, log_every=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weights = {k: v.detach().clone() for k, v in model.named_parameters()}
    average = {k: v.clone() for k, v in weights.items()}
    state = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in weights.items()}

    def loss(model):
        return nullcontext(((model(torch.randn(4, 3)) - 1).square().mean(), {}))

    reference = copy.deepcopy(model)
    trained = train(tmp_path, model, config, loss, lambda m, s: {})
    rates = [0.05, 0.1, 0.05]  # half of the warm-up; held; decay: one step of two is left
    for step, rate in enumerate(rates):
        reference.load_state_dict(weights)
        torch.manual_seed(3 * 1_000_003 + step)
        reference.zero_grad()
        (reference(torch.randn(4, 3)) - 1).square().mean().backward()
        norm = sum(p.grad.square().sum() for p in reference.parameters()).sqrt()
        assert norm > 0.01
        w = 1 - min(0.15, (1 + step) / (10 + step))
        for name, p in reference.named_parameters():
            g, (m, v) = p.grad * 0.01 / norm, state[name]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            state[name] = m, v
            m, v = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
            decay = 0.5 if p.ndim > 1 else 0.0
            weights[name] = p.detach() * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
            average[name] = (1 - w) * average[name] + w * weights[name]
    for name in weights:
        torch.testing.assert_close(model.get_parameter(name), weights[name], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(trained.get_parameter(name), average[name], atol=1e-5, rtol=1e-3)


def test_an_average_moves_by_its_weight_and_forgets_the_start():
    model = nn.Linear(2, 2)
    average = average_of(model)
    start = average.weight.clone()
    with torch.no_grad():
        model.weight += 1
    update_ema(average, model, torch.tensor(0.25))
    torch.testing.assert_close(average.weight, start + 0.25)
    assert ema_weight(0, 0.999) == pytest.approx(0.9)
    assert ema_weight(10, 0.999) == pytest.approx(1 - 11 / 20)
    assert ema_weight(10**6, 0.999) == pytest.approx(0.001)


def test_a_bank_is_what_is_rendered_by_other_processes(monkeypatch):
    from dte_lab.world import data

    contexts = []
    real = data.multiprocessing.get_context
    monkeypatch.setattr(
        data.multiprocessing, "get_context", lambda kind: contexts.append(kind) or real(kind)
    )
    items = random_items(np.random.default_rng(0), 520)  # three chunks
    bank = picture_bank(items)
    assert contexts == ["spawn"] and bank.shape == (520, 3, 64, 64) and bank.dtype == torch.uint8
    for i in (0, 300, 519):
        assert torch.equal(bank[i].float() / 127.5 - 1, rendered(items[i : i + 1])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size is a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate is a number from 0"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate is a number"),
        ({"decay_fraction": 1.5}, "decay_fraction is a number from 0 to 1"),
        ({"ema_decay": -0.1}, "ema_decay is a number"),
        ({"clip_norm": 0.0}, "clip_norm is a number above 0"),
        ({"betas": (0.9,)}, "betas are two numbers"),
        ({"betas": (0.9, 2.0)}, "betas is a number from 0 to 1"),
        ({"mixed_precision": "fp16"}, "mixed_precision is one of no, bf16"),
        ({"seed": -1}, "seed is a whole number"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes is a number"),
    ],
)
def test_a_recipe_with_which_nothing_can_be_trained_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 3, "batch_size": 2, "learning_rate": 0.1} | change)
