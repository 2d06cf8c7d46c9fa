"""A message is one short line that a terminal can show, whatever names and values it cites."""

import warnings

import pytest
import torch

from dte_lab import Concept, load_backbone
from dte_lab.cli import main
from dte_lab.common.errors import LONGEST_LINE, DTEError, one_line, reason_of
from dte_lab.common.files import check_path
from dte_lab.common.images import read_image
from dte_lab.common.quiet import quiet_libraries
from dte_lab.common.settings import check_number, check_one_of, check_text, check_whole
from dte_lab.evaluation.specifications import parse
from dte_lab.prompts import check_drawing, check_prompts

LONG = "x" * 5000
SENTENCES = {  # what is asked for: (a call, its start, its end)
    "picture": (lambda: read_image(f"/{LONG}.png"), "/xxx", "cannot be read (File name too long)."),
    "folders": (lambda: read_image("a/" * 2500), "a/a/", "cannot be read (File name too long)."),
    "concept": (lambda: Concept.load(LONG), "the concept file xxx", "too long)."),
    "prompt": (lambda: check_prompts([LONG]), "the prompt 'xxx", '"S* on the beach".'),
    "words": (lambda: check_prompts(["a b " * 1250]), "the prompt 'a b a", '"S* on the beach".'),
    "method": (lambda: parse(f"{LONG}:12"), "Unknown method 'xxx", "oracle, other."),
    "option": (lambda: parse(f"dte@{LONG}=1:12"), "'dte@xxx", "."),
    "value": (lambda: parse(f"dte@alpha_blend={LONG}:12"), "'dte@alpha_blend=xxx", "xxx'."),
    "device": (lambda: load_backbone(device=LONG), "a device is auto", "xxx'."),
    "backbone": (lambda: load_backbone(LONG), "the backbone xxx", "too long)."),
}  # fmt: skip
COMMANDS = [
    ["personalize", f"{LONG}.png", "--prompt", "S*", "--out", "x"],
    ["personalize", "a.png", "--prompt", LONG, "--out", "x"],
    ["generate", LONG, "--prompt", "S*", "--out", "x"],
    ["evaluate", "--out", "x", "--method", LONG],
    ["evaluate", "--out", LONG, "--method", "dte:1"],
    ["pretrain", "--out", "x", "--steps", LONG],
    ["pretrain", "--out", "x", "--data", LONG],
    ["report", LONG],
    ["export", LONG, "--out", "x"],
    ["explore", f"--backbone={LONG}"],
    ["world", "pack", "--out", "x", "--text", LONG],
    ["world", "train", "text", "--out", "x", "--parts", LONG, "--wide", LONG],
    ["memory", f"--{LONG}"],
    ["memory", LONG],
    [LONG],
]


@pytest.mark.parametrize(("call", "start", "end"), SENTENCES.values(), ids=SENTENCES)
def test_a_long_name_lacks_its_middle_and_the_sentence_stays(call, start, end):
    with pytest.raises(DTEError) as caught:
        call()
    said = str(caught.value)
    assert said.startswith(start) and said.endswith(end) and "..." in said
    assert len(said) <= LONGEST_LINE and "x" * 300 not in said


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: " ".join(x[:12] for x in a))
def test_a_command_answers_long_values_in_a_short_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[-1].startswith("error: ")
    assert all(len(line) <= LONGEST_LINE for line in lines)


def test_what_is_short_is_said_whole():
    text = "the picture 'a b c' " + "y" * 200 + " is missing: " + "say so, " * 60
    assert one_line(text) == text.strip()
    assert one_line("a" * 150 + "b" * 100 + "c" * 150 + " d") == "a" * 98 + "..." + "c" * 98 + " d"


def test_a_terminal_is_told_nothing_by_a_name(tmp_path):
    name = "a\x1b[2J\r\n\u202eb\x07\x9b.png"
    assert one_line(name) == r"a\x1b[2J \u202eb\x07\x9b.png"
    with pytest.raises(DTEError) as caught:
        read_image(tmp_path / "a\x1b[2J\x07.png")
    assert str(caught.value) == rf"{tmp_path}/a\x1b[2J\x07.png does not exist."
    assert one_line("Bücher 图 👩‍👩‍👧") == "Bücher 图 👩‍👩‍👧"


def test_warnings_are_short_too(capsys):
    with quiet_libraries():
        warnings.warn(f"{LONG} is\nlong", stacklevel=1)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: xxx") and line.endswith("xxx is long") and len(line) < 300


def test_the_reason_of_an_exception_fits_into_a_sentence():
    assert reason_of(OSError(2, "No such file", "a.png")) == "No such file"
    assert reason_of(ValueError("It is\nbroken.")) == "It is broken"
    assert reason_of(KeyError()) == "KeyError" == reason_of(KeyError("")).replace("''", "KeyError")
    assert len(reason_of(ValueError("a b " * 999))) <= 200


def test_numbers_of_any_size_are_answered():
    """Some have no float, and Python writes none of more than 4,300 digits."""
    for value in (10**400, -(10**5000), 2**64):
        for check in (check_whole, check_number):
            with pytest.raises(DTEError, match="^x is a (whole )?number"):
                check("x", value, None if check == check_whole else 0, 10**9)
    for check in (check_text, lambda *a: check_one_of(*a, ("a", "b"))):
        with pytest.raises(DTEError, match="^x is .* not a number of thousands of digits"):
            check("x", 10**5000)
    with pytest.raises(DTEError, match="^seed is a whole number of at most 64 bits"):
        check_drawing(["S*"], [2**64])


def test_doctor_says_long_names_in_short_lines(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--backbone", LONG, "--device", LONG])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("FAIL")]) == 3
    assert max(map(len, lines)) <= LONGEST_LINE + 30 and torch.__version__ in "".join(lines)


def test_whether_a_name_can_be_looked_for(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    for name in ("", "nothing", "file", "file/below", "nothing/below"):
        check_path("the model", tmp_path / name)
    for name in ("x" * 256, "circle", "circle/below", "a\0b", "a\udcff"):
        with pytest.raises(DTEError, match="^the model ") as caught:
            check_path("the model", tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
