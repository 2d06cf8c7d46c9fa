import pytest

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
    for words in ("no CUDA device", "no route to host", "there is none at", "cannot be written"):
        assert sum(words in line for line in failures) == 1, words


def test_a_missing_backbone_and_a_missing_encoder_differ(tmp_path, tiny_path):
    assert not doctor._backbone(str(tmp_path / "nowhere"), None).good
    finding = doctor._encoder(str(tiny_path), None)  # no encoder: tuning starts from a word
    assert finding.good and "nearest word" in finding.text
