"""Names and folders that no program likes are answered by one line, at each place for a path."""

import datasets
import pytest
from PIL import Image

from dte_lab.cli import main

NAMES = ["~/x", "-x", "a\nb", "a\x1b[31mb", "[*]?{a,b}", "👩‍👩‍👧", "-/-", "a//b", "x" * 97]
PROMPT = ["--prompt", "S*", "--num-inference-steps", "1", "--steps", "0"]


def refused(arguments, capsys):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([str(x) for x in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "Traceback" not in "".join(lines)
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["folder", "stream"])
def test_data_that_is_nothing(name, options, tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "--backbone", tiny_path, "--out", "out", f"--data={name}", *options]
    assert "is no folder of pictures, and no dataset" in refused(command, capsys)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 10240], ids=["empty", "junk", "no file"])
def test_tars_without_pictures(content, stream, tiny_path, tmp_path, capsys):
    (tmp_path / "0.tar").write_bytes(content)
    command = ["pretrain", "--backbone", tiny_path, "--out", tmp_path / "out"]
    said = refused([*command, "--data", tmp_path, *stream], capsys)
    assert str(tmp_path) in said


@pytest.mark.parametrize("place", ["circle", "circle/below", "file/below"])
def test_an_output_folder_that_cannot_be(place, tiny_path, tmp_path, capsys):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste((200, 0, 0), (8, 8, 24, 24))
    picture.save(tmp_path / "a.png")
    learn = ["personalize", tmp_path / "a.png", *PROMPT, "--backbone", tiny_path, "--out"]
    assert place.split("/")[0] in refused([*learn, tmp_path / place], capsys)
    main_path = tmp_path / "made"
    with pytest.raises(SystemExit) as ended:
        main([str(x) for x in [*learn, main_path]])
    assert ended.value.code in (None, 0)
    concept = main_path / "concept.safetensors"
    for command in (["export", concept], ["generate", concept, *PROMPT[:4]]):
        assert refused([*command, "--out", tmp_path / place], capsys)
