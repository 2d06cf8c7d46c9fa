"""The numbers and commands of docs/ against the code."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dte_lab.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs a checkout")


def test_parameter_table_is_what_the_command_prints():
    table = re.findall(r"^\| (\d+|whole matrices) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$",
                       (DOCS / "sd15.md").read_text(), re.M)  # fmt: skip
    output = CliRunner().invoke(app, ["parameters"], catch_exceptions=False).output
    printed = [line.split() for line in output.splitlines() if re.match(r"(\d+|full) ", line)]
    assert len(printed) == 6
    assert [list(row[1:]) for row in table] == [row[1:] for row in printed]


def test_commands_have_the_options_that_the_page_uses():
    commands = typer.main.get_command(app).commands
    text = (DOCS / "sd15.md").read_text().replace("\\\n", " ")
    used = re.findall(r"^(?:dte (\w+)|accelerate launch .*-m dte_lab (pretrain)) (.*)$", text, re.M)
    assert len(used) >= 6
    for ours, launched, arguments in used:
        options = {o for p in commands[ours or launched].params for o in p.opts}
        wanted = set(re.findall(r"(?<=\s)--[a-z-]+", " " + arguments))
        assert wanted <= options, (ours or launched, wanted - options)
