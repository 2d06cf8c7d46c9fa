"""The predicted memory against a count of real tensors, and what the options save."""

import functools
from contextlib import nullcontext

import pytest
import torch

from dte_lab import sd15
from dte_lab.hardware import memory
from dte_lab.hardware.memory import Setting, needs, predict
from dte_lab.hardware.trace import TracedMemory, traced_peak
from dte_lab.memory_needs import needed

SETTING = Setting(resolution=128, batch=2, dtype="fp32")


@pytest.fixture
def tiny(monkeypatch, tiny_sd15):
    monkeypatch.setattr(memory, "random_parts", functools.partial(sd15.random_parts, **tiny_sd15))


def test_storages_are_counted_once_and_forgotten():
    with TracedMemory() as count:
        a = torch.zeros(1000)  # 4000 bytes, 4096 in blocks of 512
        b = a[10:].view(-1, 2)  # no memory of its own
        assert count.now == 4096
        c = torch.zeros(100)
        assert count.now == 4096 + 512
        del a, c
        assert count.now == 4096 and count.peak == 4608
        del b
        assert count.now == 0
        x = torch.ones(1000, requires_grad=True)
        y = x.exp().sum()  # exp's result is kept for the backward pass
        assert count.now == 2 * 4096 + 512
        y.backward()
        del y
        assert count.now == 2 * 4096  # x and its gradient


def test_traced_peak_is_what_a_step_makes_beyond_what_is_frozen():
    frozen, other = torch.ones(128, 256), torch.ones(64, 256)  # 131,072 and 65,536 bytes

    def step():
        turned = other.T  # no memory of its own, but a storage that is seen here first
        product = frozen @ turned  # 32,768 bytes
        return product.relu() + 1  # two more, of which one remains

    made = 3 * 32_768
    assert traced_peak(step, [frozen, other]) == made
    assert traced_peak(step, [frozen]) == made + 65_536
    assert step().unique().tolist() == [257]  # what was given can still be computed with


def test_fake_steps_take_what_real_ones_take(tiny, monkeypatch):
    fake = predict(SETTING)
    work = {name: need.flops for name, need in needs(SETTING).items()}
    monkeypatch.setattr(memory, "FakeTensorMode", lambda **kwargs: nullcontext())
    real = predict(SETTING)
    assert {name: need.flops for name, need in needs(SETTING).items()} == work
    assert set(fake) == {"tuning", "pre-training", "sampling"}
    for name in fake:
        assert fake[name] == pytest.approx(real[name], rel=0.02), name


def test_options_save_memory(tiny, tiny_sd15):
    from dataclasses import replace

    def tuning(**changes):
        return predict(replace(SETTING, **changes), ("tuning",))["tuning"]

    plain, offload = tuning(), tuning(offload=True)
    parts = sd15.random_parts("meta", **tiny_sd15)
    idle = sum(4 * p.numel() for part in ("image_encoder", "vae") for p in parts[part].parameters())
    assert plain - offload == pytest.approx(idle, rel=0.05)
    large = tuning(batch=4)  # where activations outweigh the encoder
    assert large > 1.3 * plain
    assert tuning(batch=4, gradient_checkpointing=True) < 0.8 * large


def test_advice(monkeypatch):
    needs = {(False, False): 20e9, (False, True): 19e9, (True, False): 9e9, (True, True): 8e9}

    def fake(setting, parts):
        need = needs[setting.gradient_checkpointing, setting.offload]
        return {"tuning": need - (4e9 if setting.batch == 1 else 0)}

    monkeypatch.setattr(memory, "predict", fake)
    setting = Setting(batch=4)
    advise = functools.partial(memory.advise, peak=20e9)
    assert advise(setting, 24) == "Tuning fits a card of 24 GB as it is."
    assert advise(setting, 10).endswith("with --gradient-checkpointing: 9.00 GB.")
    assert advise(setting, 6).endswith(
        "--gradient-checkpointing --offload --batch-size 1: 4.00 GB."
    )
    assert advise(setting, 4) == "Tuning does not fit a card of 4 GB: it needs 4.00 GB at least."


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match="sd15 alone, not for sdxl"):
        predict(Setting(backbone="sdxl"))


def test_flops_are_twice_the_products():
    """A product of matrices, a convolution, and attention forwards and backwards."""
    with TracedMemory() as count:
        torch.ones(3, 5) @ torch.ones(5, 7)
        assert count.flops == 2 * 3 * 5 * 7
        torch.nn.functional.conv2d(torch.ones(1, 4, 9, 9), torch.ones(6, 4, 3, 3))
        assert count.flops == 2 * (3 * 5 * 7 + 6 * 7 * 7 * 4 * 9)
        q, k, v = (torch.rand(1, 2, n, 8, requires_grad=True) for n in (11, 13, 13))
        before = count.flops
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        forward = count.flops - before
        assert forward == 2 * 2 * (2 * 11 * 13 * 8)  # scores and values, two heads
        out.sum().backward()
        assert count.flops - before - forward == 2.5 * forward  # scores anew, and four gradients


def test_work_grows_with_the_batch_but_not_that_of_a_picture(tiny):
    """The look at the picture before the first step is no part of the step."""
    from dataclasses import replace

    two, four = (needs(replace(SETTING, batch=batch)) for batch in (2, 4))
    for part in ("tuning", "pre-training"):
        assert four[part].flops == pytest.approx(2 * two[part].flops, rel=0.05)
    assert four["sampling"].flops == pytest.approx(two["sampling"].flops, rel=0.02)


def test_predicting_leaves_accelerates_state_alone(tiny):
    """Whoever trains on a GPU has set it, and could not predict any more."""
    from accelerate.state import AcceleratorState, PartialState

    states = AcceleratorState._shared_state, PartialState._shared_state
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        predict(SETTING, ("pre-training",))
        assert not any(states)
    finally:
        for state, old in zip(states, before, strict=True):
            state.update(old)


def test_what_is_shipped_is_what_is_predicted():
    setting = Setting(batch=1, offload=True)
    assert predict(setting, ("sampling",))["sampling"] == pytest.approx(
        needed(setting, "sampling"), rel=0.02
    )
