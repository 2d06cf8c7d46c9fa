"""The command and the pipeline refuse the same values with the same sentence, before slow work."""

import io
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dte_lab.cli import main
from dte_lab.common.errors import DTEError
from dte_lab.objective import weighted_error
from dte_lab.pipeline import DTEPipeline
from dte_lab.prompts import check_prompts

VALUES = [  # option, argument of `generate`, value
    ("--guidance-scale", "guidance_scale", math.inf),
    ("--guidance-scale", "guidance_scale", math.nan),
    ("--guidance-scale", "guidance_scale", -1.0),
    ("--guidance-scale", "guidance_scale", 1e38),
    ("--num-inference-steps", "num_inference_steps", 0),
    ("--num-inference-steps", "num_inference_steps", 1001),
    ("--alpha", "alpha_blend", -0.1),
    ("--alpha", "alpha_blend", 1.5),
    ("--alpha", "alpha_blend", math.nan),
    ("--batch-size", "batch_size", 0),
    ("--batch-size", "batch_size", -3),
    ("--negative-prompt", "negative_prompt", "a\udcff"),
    ("--prompt", "prompts", "a cat"),
    ("--prompt", "prompts", ""),
    ("--prompt", "prompts", "S* a\udcff"),
    ("--prompt", "prompts", "S* and S2* on the beach"),
]


@pytest.mark.parametrize(("option", "argument", "value"), VALUES)
def test_both_doors_say_the_same(option, argument, value, tmp_path, photo_file, capsys):
    pipe = DTEPipeline.__new__(DTEPipeline)  # nothing of it is used
    pipe.backbone = pipe.prompt_encoder = SimpleNamespace()
    with pytest.raises(DTEError) as caught:
        pipe.generate(None, **{"prompts": "S*", argument: value})
    prompt = [] if option == "--prompt" else ["--prompt", "S*"]
    out = ["--out", str(tmp_path / "out"), f"{option}={value}"]
    for start in (["personalize", str(photo_file)], ["generate", "missing.safetensors"]):
        with pytest.raises(SystemExit) as ended:
            main([*start, *prompt, *out])
        said = capsys.readouterr().err
        shown = str(caught.value).encode("utf-8", "backslashreplace").decode()
        assert ended.value.code == 2 and said.split() == f"error: {shown}".split()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def photo_file(tmp_path, picture):
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("value", ["S2* at night, S*", "S* and s*", "S*, s_1*", "s*"])
def test_a_near_miss_of_the_placeholder_is_answered(value):
    with pytest.raises(DTEError, match="S"):
        check_prompts([value])


@pytest.mark.parametrize("value", ["S*", "S*'s house", "<S*>", "S**", "xS*y", "US2 S*", "cats* S*"])
def test_prompts_that_name_the_concept_pass(value):
    check_prompts([value])


def test_the_error_counts_as_much_as_the_weights_say():
    g = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 3, 4, 4, generator=g)
    weights = torch.rand(2, 1, 4, 4, generator=g)
    total = sum(
        weights[b, 0, y, x] * (output[b, c, y, x] - target[b, c, y, x]) ** 2
        for b in range(2) for c in range(3) for y in range(4) for x in range(4)
    )  # fmt: skip
    torch.testing.assert_close(weighted_error(output, target, weights), total / weights.sum() / 3)
    plain = torch.nn.functional.mse_loss(output, target)
    assert torch.equal(weighted_error(output, target, None), plain)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_stream_that_lacks_letters_ends_nothing(encoding, tmp_path, picture):
    picture.save(tmp_path / "图.png")
    command = [sys.executable, "-m", "dte_lab", "personalize", tmp_path / "图.png"]
    command += ["--prompt", "s* 海", "--out", tmp_path / "aus 图"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert encoding == "ascii" or r"\u6d77" in ended.stderr  # click writes UTF-8 for ASCII


def test_the_streams_of_the_command_show_what_they_can(monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        main(["--version"])
    print("wrote 图")
    out.flush()
    assert rb"wrote \u56fe" in out.buffer.getvalue()
