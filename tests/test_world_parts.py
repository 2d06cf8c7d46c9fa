"""One step of each part of the base model's training, and of Muon, worked out by hand."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dte_lab.common.errors import DTEError
from dte_lab.common.muon import MuonAdamW
from dte_lab.common.schedule import average_of, ema_weight, update_ema
from dte_lab.world import train_autoencoder, train_decoder, train_text, train_towers, train_unet
from dte_lab.world.drawings import Drawings
from dte_lab.world.options import LEAST_DRAWINGS
from dte_lab.world.spoken import Spoken
from dte_lab.world.sprites import split_names
from dte_lab.world.training import TrainConfig, muon_optimizer, train
from dte_lab.world.wide import load
from dte_lab.world.word_space import CODE


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


class FakeBatches:
    """A third of the samples are captions; sample k of each batch says k."""

    def __init__(self):
        self.sizes = []

    def told(self, size):
        return size // 3

    def __call__(self, size):
        self.sizes.append(size)
        k = torch.arange(size, dtype=torch.float32)
        torch.manual_seed(8)
        latents = torch.randn(size, 4, 4, 4)
        return Spoken(
            k[:, None].long().expand(size, 3), (k > 1)[:, None].expand(size, 3), k[:, None],
            latents, torch.zeros(size, 3, 64, 64),
        )  # fmt: skip


class FakePainter(nn.Module):
    """States are 1 + the number of the sample, -1 of the empty caption; it paints twice these."""

    def states(self, ids, is_slot, v):
        assert torch.equal(ids[:, 0].float(), v[:, 0]) and torch.equal(is_slot[:, 0], v[:, 0] > 1)
        return (1 + v)[:, None].expand(len(v), 3, 5)

    def text(self, ids):
        assert torch.equal(ids, EMPTY)
        return SimpleNamespace(last_hidden_state=torch.full((1, 3, 5), -1.0))

    def paint(self, states):
        return 2 * states[:, :1, :1, None].expand(len(states), 4, 4, 4)


EMPTY = torch.tensor([[7, 7, 7]])


def test_the_denoisers_loss():
    B = 1201  # of noisy latents: two of each of 600 samples
    batches, levels = FakeBatches(), train_unet.NoiseLevels("cpu")
    training = train_unet.DenoiserTraining(batches, levels, EMPTY, B)
    unet = Recorder(lambda x, t, states: SimpleNamespace(sample=0.5 * x))
    with training.loss(train_unet.TextToImage(unet, FakePainter())) as (loss, logs):
        pass
    assert batches.sizes == [600]
    ((x_t, t, seen),) = unet.calls
    torch.manual_seed(8)
    z = torch.randn(600, 4, 4, 4).repeat(2, 1, 1, 1)
    dropped = (torch.rand(1200, 1, 1) < 0.1)[:, 0, 0]
    u, noise = torch.rand(1200), torch.randn(1200, 4, 4, 4)
    assert torch.equal(t, (1000 * u.sqrt()).long()) and t.max() > 980
    assert 0.2 < (t < 500).double().mean() < 0.3, "more steps where the caption decides"
    alpha = cosine_alphas()[t][:, None, None, None]
    expected = alpha.sqrt() * z.double() + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(x_t.double(), expected, atol=1e-4, rtol=1e-4)
    number = torch.arange(600.0).repeat(2)
    assert 0.07 < dropped.double().mean() < 0.13, "a tenth without a caption, for guidance"
    assert torch.equal(seen[:, 0, 0], torch.where(dropped, -1, 1 + number))
    assert (seen == seen[:, :1, :1]).all(), "a caption is dropped as a whole"
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * z.double()
    error = (0.5 * x_t - velocity).square().mean((1, 2, 3))
    told = number < 200
    painted = (2 * (1 + number[:600, None, None, None]) - z[:600]).square().mean((1, 2, 3))
    expected = {
        "captions": error[told].mean(), "pictures": error[~told].mean(),
        "painted_captions": painted[told[:600]].mean(),
        "painted_pictures": painted[~told[:600]].mean(),
    }  # fmt: skip
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        assert logs[name].item() == pytest.approx(value.item(), rel=1e-3), name
    total = error.mean() + 0.25 * painted.double().mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_the_text_towers_loss():
    batches = FakeBatches()
    training = train_text.TextTraining(batches, None, 6, None)
    with training.loss(FakePainter()) as (loss, logs):
        pass
    torch.manual_seed(8)
    z, k = torch.randn(6, 4, 4, 4), torch.arange(6)
    error = (2 * (1 + k[:, None, None, None]) - z).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, error.mean())
    assert logs.keys() == {"captions", "pictures"}
    torch.testing.assert_close(logs["captions"], error[:2].mean())
    torch.testing.assert_close(logs["pictures"], error[2:].mean())


def test_the_denoiser_is_measured_on_captions_and_on_the_unseen(tmp_path, monkeypatch):
    test = FakeBatches()(8)
    z = test.latents
    drawn, saved = [], []
    monkeypatch.setattr(train_unet, "SHOWN", 3)
    monkeypatch.setattr(train_unet, "stock_pipeline", lambda *parts: parts)
    monkeypatch.setattr(train_unet, "build_scheduler", lambda: None)
    monkeypatch.setattr(train_unet, "tokenize", lambda tokenizer, texts: EMPTY)
    monkeypatch.setattr(train_unet, "pictures_of", lambda vae, z: z[:, :3].expand(-1, 3, 4, 4))
    monkeypatch.setattr(train_unet, "save_folder", lambda model, folder: saved.append(folder.name))

    def draw(pipe, states, nothing, seed):
        drawn.append((states[:, 0, 0].tolist(), nothing.mean().item()))
        return torch.zeros(len(states), 3, 4, 4)

    monkeypatch.setattr(train_unet, "draw_states", draw)
    unet = Recorder(lambda x, t, states: SimpleNamespace(sample=0.5 * x))
    batches = SimpleNamespace(vae=None, tokenizer=None)
    levels = train_unet.NoiseLevels("cpu")
    samples = train_unet.DenoiserSamples(batches, levels, test, tmp_path, 20)
    monkeypatch.setattr(train_unet, "save_pairs", lambda path, first, second: None)
    measures = samples(train_unet.TextToImage(unet, FakePainter()), 10)
    assert drawn == [([1.0, 2, 3, 5, 6, 7], -1.0)] and saved == [
        "unet-000010",
        "text_encoder-000010",
    ]
    (x_t, t, seen), (pure, last, _) = unet.calls
    assert t.tolist() == [0, 250, 500, 750] * 2 and last.tolist() == [999] * 8
    assert seen[:, 0, 0].tolist() == list(range(1, 9))
    torch.manual_seed(0)
    noise = torch.randn(8, 4, 4, 4)
    assert torch.equal(pure, torch.randn(8, 4, 4, 4))
    alpha = cosine_alphas()[t][:, None, None, None]
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    error = (0.5 * x_t - velocity).square().mean((1, 2, 3))
    told = (-0.5 * pure - z).square().mean((1, 2, 3))
    expected = {
        "test_loss": error[:4], "unseen_loss": error[4:],
        "test_told_error": told[:4], "unseen_told_error": told[4:],
    }  # fmt: skip
    assert measures.keys() == expected.keys()
    for name, values in expected.items():
        assert measures[name] == pytest.approx(values.mean().item(), rel=1e-3), name
    samples(train_unet.TextToImage(unet, FakePainter()), 20)  # the last: they are saved anyway
    assert len(saved) == 2


def test_a_denoiser_that_has_read_another_tower_starts_with_silent_attention(monkeypatch):
    asked = []
    monkeypatch.setattr(train_unet, "align", lambda *args: asked.append(args))
    monkeypatch.setattr(train_unet, "cell_blocks", lambda unet: unet)
    blocks = [SimpleNamespace(attn2=SimpleNamespace(to_out=[nn.Linear(3, 3)])) for _ in range(2)]
    model, levels = (
        SimpleNamespace(unet=blocks, painter=FakePainter()),
        train_unet.NoiseLevels("cpu"),
    )
    batch = FakeBatches()(6)
    train_unet.start_reading(model, batch, levels, trained=False)
    assert all(block.attn2.to_out[0].weight.any() for block in blocks)
    train_unet.start_reading(model, batch, levels, trained=True)
    assert not any(block.attn2.to_out[0].weight.any() for block in blocks)
    unet, x_t, t, states, latents = asked[0]
    assert unet is blocks and torch.equal(latents, batch.latents) and len(t) == len(x_t) == 6
    assert torch.equal(states[:, 0, 0], 1 + batch.v[:, 0])


class FakeBank:
    """Captions of one world: chosen in turn, three at a time at most."""

    def __init__(self, seed, count=5):
        torch.manual_seed(seed)
        self.pictures, self.states = torch.rand(count, 3, 64, 64), torch.randn(count, 6)
        self.sizes = []

    def __call__(self, size):
        which = torch.arange(size).flip(0)
        self.sizes.append(size)
        return which, self.pictures[which], self.states[which]


def test_the_towers_loss(monkeypatch):
    small, wide, B = FakeBank(0), FakeBank(1), 7  # 0.4 of them are of the small world
    labels = {
        "concept": torch.tensor([0, 1, 2, 3, 3]), "style": torch.tensor([0, 1, 0, 1, 1]),
        "scene": torch.tensor([2, 0, 1, 2, 0]),
    }  # fmt: skip
    classes = {k: torch.randn(int(v.max()) + 1, 6) for k, v in labels.items()}
    kinds = torch.tensor([7, 8, 7, 9])
    monkeypatch.setattr(train_towers, "augment", lambda x: 1 - x)
    image = Recorder(lambda x: SimpleNamespace(image_embeds=x[:, :, 0, :2].flatten(1)))
    model = train_towers.Towers(image, nn.Linear(6, 6, bias=False))
    nothing = (torch.zeros(1, 3, 64, 64), {})
    training = train_towers.TowersTraining(small, wide, labels, classes, kinds, B, nothing)
    with training.loss(model) as (loss, logs):
        pass
    assert (small.sizes, wide.sizes) == ([3], [4])
    rows = torch.tensor([2, 1, 0])
    x = 1 - torch.cat([small.pictures[rows], wide.pictures[[3, 2, 1, 0]]])
    torch.testing.assert_close(image.calls[0][0], x)
    embeds = nn.functional.normalize(x[:, :, 0, :2].flatten(1), dim=1)

    def scores(embeds, texts):
        return embeds @ nn.functional.normalize(model.projection(texts), dim=1).T / 0.07

    def entropy(logits, index):
        return -logits.log_softmax(1)[torch.arange(len(index)), index].mean()

    own = torch.arange(B)
    pairs = scores(embeds, torch.cat([small.states[rows], wide.states[[3, 2, 1, 0]]]))
    expected = {"caption": (entropy(pairs, own) + entropy(pairs.T, own)) / 2}
    some = embeds[:3]
    expected |= {k: entropy(scores(some, classes[k]), v[rows]) for k, v in labels.items()}
    share = scores(some, classes["concept"]).softmax(1)  # (3, 4)
    concept = labels["concept"][rows]
    same = [share[i][kinds == kinds[concept[i]]].sum() for i in range(3)]
    expected["kind"] = -torch.stack(same).log().mean()
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_labels_of_captions_are_what_their_drawings_are():
    rows, scenes = torch.tensor([0, 4, 11]), torch.tensor([5, 19, 0])
    labels = train_towers.labels_of(SimpleNamespace(rows=rows, scenes=scenes))
    assert {k: v.tolist() for k, v in labels.items()} == {
        "concept": [0, 1, 3], "style": [0, 1, 2], "scene": [5, 19, 0],
    }  # fmt: skip


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
    x = torch.rand(5, 3, 6, 6)
    monkeypatch.setattr(train_autoencoder, "random_pictures", lambda drawings, size: x[:size])
    decoded = []

    def decode(z):
        decoded.append(z)
        return SimpleNamespace(sample=0.5 * z)

    def encode(x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: 2 * x))

    config = SimpleNamespace(scaling_factor=4.0)
    model = SimpleNamespace(encode=encode, decode=decode, config=config)
    noise, white = torch.randn(5, 3, 6, 6), train_autoencoder.white_noise
    seen = []

    def noise_of(z):
        seen.append(z)
        return noise

    monkeypatch.setattr(train_autoencoder, "white_noise", noise_of)
    training = train_autoencoder.AutoencoderTraining(None, torch.zeros(1, 3, 64, 64), 5, None)
    with training.loss(model) as (loss, logs):
        assert logs == {}
    torch.testing.assert_close(seen[0], 8 * x)  # scaled latents
    torch.testing.assert_close(decoded[0], 2 * x + noise / 4)
    error = noise / 8
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    expected = error.abs().mean() + 0.5 * across.abs().mean() + 0.5 * down.abs().mean()
    torch.testing.assert_close(loss, expected)
    assert white(torch.zeros(4000, 2, 2, 2)).std().item() == pytest.approx(0.08, rel=0.03)


def test_the_autoencoder_sees_drawings_half_of_them_varied(wide_cache, monkeypatch):
    drawings = Drawings(split_names("train")[:2], load(wide_cache))
    seen = []
    real = drawings.things
    monkeypatch.setattr(drawings, "things", lambda *args: (seen.append(args), real(*args))[1])
    torch.manual_seed(0)
    x = train_autoencoder.random_pictures(drawings, 400)
    assert x.shape == (400, 3, 64, 64) and x.abs().max() <= 1
    ((left, right, _, variant),) = seen
    assert torch.equal(left, right), "a seam is no edge of a drawing's"
    assert 0.4 < (variant > 0).double().mean() < 0.6
    assert 0.5 < (left >= drawings.small).double().mean() < 0.7
    monkeypatch.setattr(drawings, "next_allowed", torch.full_like(drawings.next_allowed, 9))
    shown = []
    monkeypatch.setattr(drawings, "before", lambda things, scene: (shown.append(scene), x)[1])
    torch.manual_seed(0)
    train_autoencoder.random_pictures(drawings, 400)
    plain = seen[1][3] == 0
    assert (shown[0][plain] == 9).all() and len(set(shown[0][~plain].tolist())) == 20


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


def test_a_step_with_rates_of_their_own():
    """A first step of AdamW is the rate, of Muon 0.2 times it on average; decay goes with it."""
    torch.manual_seed(0)
    text = nn.ModuleDict({"token_embedding": nn.Embedding(5, 6), "layers": nn.Linear(6, 6)})
    model = nn.ModuleDict({"blocks": nn.Linear(6, 6), "text": text, "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    factors = {"text": 0.25, "text.token_embedding": 3.0, "no such": 9.0}
    config = TrainConfig(
        5, 2, 1e-3, muon_learning_rate=1e-2, weight_decay=0.5, rate_factors=factors
    )
    optimizer = muon_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"].fill_(group["peak"])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    rates = {  # and decay
        "blocks.weight": (1e-2, 0.5), "blocks.bias": (1e-3, 0),
        "text.token_embedding.weight": (3e-3, 0), "text.layers.weight": (0.25e-2, 0.5),
        "text.layers.bias": (0.25e-3, 0), "frozen.weight": (0, 0), "frozen.bias": (0, 0),
    }  # fmt: skip
    assert rates.keys() == before.keys()
    for name, p in model.named_parameters():
        rate, decay = rates[name]
        if name in ("blocks.weight", "text.layers.weight"):
            expected = muon_by_hand(before[name], [gradients[name]], rate, decay)
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-3, atol=1e-5)
        else:
            expected = (1 - rate * decay) * before[name] - rate * gradients[name].sign()
            torch.testing.assert_close(p.detach(), expected, rtol=1e-3, atol=1e-6)
    assert len(optimizer.param_groups) == 5


def test_other_rates_are_another_run(tmp_path):
    def run(**options):
        config = TrainConfig(2, 2, 0.1, warmup_steps=0, **options)
        loss = lambda model: nullcontext((model(torch.ones(1, 3)).square().mean(), {}))  # noqa: E731
        return train(tmp_path, nn.Linear(3, 2), config, loss, lambda model, step: {})

    run(rate_factors={"bias": 0.5})
    with pytest.raises(DTEError, match="rate_factors"):
        run()


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
        ({"rate_factors": {"unet": -1.0}}, "rate_factors is a number from 0"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes is a number"),
    ],
)
def test_a_recipe_with_which_nothing_can_be_trained_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 3, "batch_size": 2, "learning_rate": 0.1} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, "steps is a whole number from 1, not 'many'"),
        ({"batch_size": 3}, "batch_size is a whole number from 4"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"count": 159}, "count is a whole number from 160"),
        ({"minutes": float("inf")}, "minutes is a number from 0"),
        ({"mixed_precision": "fp16"}, "mixed_precision is one of no, bf16"),
    ],
)
def test_a_part_is_refused_before_any_slow_work(change, message):
    for part in (train_text, train_unet, train_decoder, train_towers):
        with pytest.raises(DTEError, match=message):
            part.main("out", parts="no such", wide="no such", **change)
    with pytest.raises(DTEError, match=message):
        train_autoencoder.main("out", wide="no such", **change)
    assert LEAST_DRAWINGS == CODE
