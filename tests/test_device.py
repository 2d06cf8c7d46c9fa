"""Which device is taken, and whose memory is read."""

from pathlib import Path

import pytest
import torch

from dte_lab import DTEPipeline, load_backbone
from dte_lab.common.device import checked_device
from dte_lab.common.errors import DTEError
from dte_lab.export import diffusers_pipeline
from dte_lab.hardware.device import PeakMemory


@pytest.fixture
def cuda(monkeypatch):
    """set(there) -> whether torch finds a GPU."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def there(found):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 * found)

    return there


def test_a_gpu_is_taken_where_there_is_one_and_nothing_is_asked(cuda, monkeypatch):
    cuda(False)
    assert checked_device(None) == checked_device("auto") == "cpu"
    cuda(True)
    assert checked_device(None) == checked_device("cuda") == "cuda:0"
    assert checked_device("cpu") == "cpu" and checked_device("cuda:3") == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "2")  # of several processes each has its own
    assert checked_device("cuda") == "cuda:2" and checked_device("cuda:3") == "cuda:3"


def test_a_gpu_that_is_not_there_is_one_sentence(cuda, monkeypatch):
    cuda(True)
    monkeypatch.setenv("LOCAL_RANK", "5")
    for device in ("cuda:4", "cuda:99999999999", "cuda", torch.device("cuda:7")):
        with pytest.raises(DTEError, match=r"cuda:\d+ is not there: torch finds 4 CUDA device"):
            checked_device(device)
    assert checked_device(torch.device("cuda:2")) == "cuda:2"
    assert checked_device(torch.device("cpu")) == "cpu"


def test_from_python_a_device_is_no_other(monkeypatch, tiny_path, tiny_backbone):
    monkeypatch.setattr("dte_lab.backbone.load_parts", lambda *_: pytest.fail("loaded"))
    for device in ("foo", "cpu:3", 0, torch.device("meta")):
        for call in (
            lambda: load_backbone(tiny_path, device),  # noqa: B023
            lambda: DTEPipeline.from_pretrained(tiny_path, device=device),  # noqa: B023
            lambda: tiny_backbone.to(device),  # noqa: B023
            lambda: diffusers_pipeline(tiny_path, device),  # noqa: B023
        ):
            with pytest.raises(DTEError, match="a device is auto, cpu, cuda, cuda:N or mps, not"):
                call()
    assert tiny_backbone.device.type == "cpu"


@pytest.mark.parametrize("word", ["foo", "CPU", "", "meta", "xla", "cpu:x", "-1"])
def test_what_is_no_device_is_one_sentence(cuda, word):
    cuda(False)
    with pytest.raises(DTEError, match="a device is auto, cpu, cuda, cuda:N or mps, not"):
        checked_device(word)


def test_a_device_that_is_not_there(cuda, monkeypatch):
    cuda(False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for word, kind in (("cuda", "CUDA"), ("cuda:1", "CUDA"), ("mps", "MPS")):
        with pytest.raises(DTEError, match=f"finds no {kind} device"):
            checked_device(word)


def test_peak_memory_is_that_of_its_own_device(monkeypatch):
    """The current device is another: each call names the one that is asked."""
    peaks = {"cuda:0": 900 * 2**20, "cuda:1": 100 * 2**20}
    reset = []
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device=None: reset.append(str(device))
    )
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device="cuda:0": peaks[str(device)]
    )
    memory = PeakMemory(torch.device("cuda:1"))
    assert reset == ["cuda:1"]
    peaks["cuda:1"] += 30 * 2**20
    peaks["cuda:0"] += 500 * 2**20
    assert memory.read() == 30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_memory_of_a_process_forgets_what_was_before():
    large = torch.ones(40 * 2**20)  # 160 MB
    del large
    memory = PeakMemory(torch.device("cpu"))
    small = torch.ones(10 * 2**20)  # 40 MB
    del small
    assert 30 < memory.read() < 100
