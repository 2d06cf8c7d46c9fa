import pytest
import torch

from dte_lab import sd15
from dte_lab.cli import main
from dte_lab.hardware import doctor


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["doctor", *map(str, arguments)])
    return end.value.code or 0


def test_a_healthy_machine(capsys, tiny_path, tmp_path, tiny_encoder):
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    code = run("--backbone", tiny_path, "--encoder", tmp_path / "encoder", "--device", "cpu")
    text = capsys.readouterr().out
    assert code == 0 and "FAIL" not in text
    for word in ("torch", "diffusers", "cpu (as asked for)", "GB free", str(tiny_path)):
        assert word in text, word


def test_everything_that_would_fail(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sd15.constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable():
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sd15, "check_hub", unreachable)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    encoder, out = tmp_path / "none", tmp_path / "file"
    out.write_text("")
    code = run("--backbone", "sd15", "--encoder", encoder, "--device", "cuda", "--out", out)
    failures = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAIL")]
    assert code == 1 and len(failures) == 4
    for words in ("no CUDA device", "no route to host", "no encoder at", "cannot be written"):
        assert sum(words in line for line in failures) == 1, words


def test_a_missing_backbone_and_a_missing_encoder_differ(tmp_path, tiny_path):
    assert not doctor._backbone(str(tmp_path / "nowhere"), None).good
    finding = doctor._encoder(str(tiny_path), None)  # no encoder: tuning starts from a word
    assert finding.good and "nearest words" in finding.text


def topics(findings):
    return {finding.topic: finding for finding in findings}


def test_the_device_is_tried(monkeypatch):
    """A GPU may be there and its driver too old."""

    def broken(*_, device):
        assert device == "cpu"
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("torch.ones", broken)
    (finding,) = doctor._device("cpu")
    assert not finding.good
    assert finding.text == "cpu (as asked for) cannot be used: no kernel image is available"


@pytest.mark.parametrize(
    ("capability", "says"), [((7, 5), "fp16; bf16 needs"), ((8, 0), "and bf16")]
)
def test_a_gpu_says_its_precisions(monkeypatch, capability, says):
    ones = torch.ones
    monkeypatch.setattr("torch.ones", lambda *size, device: ones(*size))
    monkeypatch.setattr("dte_lab.common.device.checked_device", lambda device: "cuda:1")
    for name, value in {
        "get_device_capability": capability, "mem_get_info": (8e9, 16e9), "get_device_name": "X",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    found = topics(doctor._device(None))
    assert says in found["precision"].text and found["memory"].text == "X: 8.0 of 16.0 GB free"


@pytest.mark.parametrize(("gigabytes", "good"), [(16, True), (6, False)])
def test_the_card_is_held_against_the_default_batch(monkeypatch, gigabytes, good):
    monkeypatch.setattr("dte_lab.common.device.checked_device", lambda device: "cuda:0")
    monkeypatch.setattr("dte_lab.memory_needs.room", lambda device: ("X", gigabytes * 10**9))
    (finding,) = doctor._room("sd15", None)
    assert finding.good == good and "batch 4 takes" in finding.text
    assert ("it fits with --" in finding.text) == (not good)
    assert not list(doctor._room("small", None))


def test_a_cpu_is_called_slow():
    (finding,) = doctor._room("sd15", "cpu")
    assert finding.good and "minutes" in finding.text


def test_packages_that_single_options_need(monkeypatch):
    there = {"datasets": "3.0", "jupyterlab": "4"}
    monkeypatch.setattr(doctor, "_version", there.get)
    extra = "; extra == 'notebooks'"
    requires = ["torch>=2.6", f"jupyterlab>=4.2{extra}", f"peft>=1{extra}"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    found = topics(doctor._optional())
    assert found["datasets"].text == "3.0"
    assert found["bitsandbytes"].text.endswith("--optimizer-8bit: pip install bitsandbytes")
    assert found["notebooks"].text == "without peft: pip install dte_lab[notebooks]"
    assert all(finding.good for finding in found.values())
