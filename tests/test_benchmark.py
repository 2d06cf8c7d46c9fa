"""benchmarks/sd15.py on a tiny model of the same layout; the GPU is a stub."""

import json
from functools import partial

import pytest
import torch

from benchmarks import sd15 as benchmark
from dte_lab import sd15
from dte_lab.backbone import load_backbone
from dte_lab.hardware.memory import Need, Setting

BYTES = 1000


@pytest.fixture
def card(monkeypatch, tmp_path, tiny_sd15):
    """run(settings, load) -> the file, where a GPU is the CPU and takes BYTES at most."""
    for name, value in {
        "is_available": True, "synchronize": None, "reset_peak_memory_stats": None,
        "max_memory_allocated": BYTES, "get_device_name": "Card X", "empty_cache": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    parts = partial(sd15.random_parts, resolution=64, **tiny_sd15)
    monkeypatch.setattr("dte_lab.backbone.random_parts", lambda device, dtype: parts("cpu", dtype))

    def on_cpu(name, device, dtype, **options):
        return load_backbone(name, "cpu", torch.float32, **options)

    def run(settings, load=on_cpu):
        monkeypatch.setattr(benchmark, "SETTINGS", settings)
        monkeypatch.setattr(benchmark, "load_backbone", load)
        monkeypatch.setattr("sys.argv", ["sd15.py", "--out", str(tmp_path)])
        benchmark.main()
        return json.loads((tmp_path / "sd15_card_Card_X.json").read_text())

    run.load = on_cpu
    return run


def test_it_finishes_with_predictions_first_and_a_file_after_every_setting(
    card, monkeypatch, tmp_path, capsys
):
    """The second setting does not fit: that is noted, and the others are measured."""
    order = []

    def predicted(setting):
        order.append(("predicted", setting.batch))
        return {part: Need(1050, 10**9) for part in ("tuning", "pre-training", "sampling")}

    def load(*arguments, **options):
        files = list(tmp_path.glob("*.json"))
        order.append(("rows", len(json.loads(files[0].read_text())["rows"]) if files else 0))
        if len(order) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB")
        return card.load(*arguments, **options)

    monkeypatch.setattr(benchmark, "needs", predicted)
    monkeypatch.setattr(benchmark, "measure_sampling", lambda pipe, setting: {})
    settings = [Setting(batch=b, gradient_checkpointing=b == 3, offload=b == 3) for b in (1, 2, 3)]
    found = card(settings, load)
    assert order == [*(("predicted", b) for b in (1, 2, 3)), ("rows", 0), ("rows", 1), ("rows", 2)]
    first, second, third = found["rows"]
    assert second["too small"] == "CUDA out of memory. Tried to allocate 2 GiB"
    assert [row["setting"]["batch"] for row in found["rows"]] == [1, 2, 3]
    tuned = first["measured"]["tuning"]
    assert tuned["bytes"] == BYTES and tuned["predicted bytes"] == 1050 and tuned["flops"] == 1e9
    assert set(first["measured"]) >= {"prediction", "pre-training", "tuning, soft path alone"}
    assert "pre-training" not in third["measured"]  # it keeps every part on the card
    assert "tuning +5.0%, within the goal of 10%" in capsys.readouterr().out


def test_other_faults_end_it(card, monkeypatch):
    monkeypatch.setattr(benchmark, "needs", lambda setting: {})

    def broken(*_, **__):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        card([Setting(batch=1)], broken)


def test_a_step_is_timed_without_what_comes_before_it(monkeypatch):
    """A look at the picture that takes 10 s, and steps of 3 s."""
    from types import SimpleNamespace

    from dte_lab.config import MethodConfig

    clock = [0.0]

    def wait(seconds):
        clock[0] += seconds

    def timed(call):
        before = clock[0]
        call()
        return clock[0] - before, BYTES

    monkeypatch.setattr(benchmark, "timed", timed)
    monkeypatch.setattr(benchmark, "tune", lambda *a, **_: wait(3 * a[5].num_steps))
    pipe = SimpleNamespace(
        backbone=SimpleNamespace(resolution=8), prompt_encoder=None,
        encoder=SimpleNamespace(predict=lambda *_: wait(10), method=MethodConfig()),
    )  # fmt: skip
    found = benchmark.measure_tuning(pipe, Setting(batch=1))
    assert found["tuning"]["seconds"] == pytest.approx(3)
    assert found["prediction"]["seconds"] == 10


def test_the_settings_are_those_of_the_page():
    found = {(s.batch, s.dtype, s.offload) for s in benchmark.SETTINGS}
    assert {(b, "fp16", o) for b in (1, 4, 8) for o in (False, True)} < found
    assert (4, "bf16", False) in found
