"""Every check accepts the package's own function and rejects what a student might write instead.

The cases are in check_cases, one module per notebook: OWN, OTHER_RIGHT and WRONG by check.
"""

import importlib
import pkgutil

import check_cases
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from dte_lab import checks

CASES = [
    importlib.import_module(f"check_cases.{module.name}")
    for module in pkgutil.iter_modules(check_cases.__path__)
]
OWN, OTHER_RIGHT, WRONG = (
    {name: case for module in CASES for name, case in getattr(module, kind).items()}
    for kind in ("OWN", "OTHER_RIGHT", "WRONG")
)


def all_checks():
    return {
        name: check
        for name, check in vars(checks).items()
        if callable(check) and not name.startswith("_") and name != "yours"
    }


def test_every_check_is_covered():
    assert set(all_checks()) == set(OWN) == set(OTHER_RIGHT) == set(WRONG)
    assert all(len(wrong) >= 3 for wrong in WRONG.values())


@pytest.mark.parametrize("functions", [OWN, OTHER_RIGHT], ids=["package", "other"])
@pytest.mark.parametrize("name", OWN)
def test_accepts_right_functions(functions, name, capsys):
    getattr(checks, name)(functions[name])
    assert capsys.readouterr().out.startswith(f"{name}: right")


@pytest.mark.parametrize(
    ("name", "message", "wrong"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_rejects_wrong_functions_and_says_why(name, message, wrong):
    with pytest.raises(AssertionError, match=message):
        getattr(checks, name)(wrong)


@pytest.mark.parametrize("name", OWN)
def test_a_part_not_yet_written_is_not_called_wrong(name):
    def skeleton(*arguments):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        getattr(checks, name)(skeleton)


@pytest.mark.parametrize("name", OWN)
def test_an_answer_cannot_change_the_question(name):
    """A function that writes into its arguments is judged by what it returns."""

    def careless(*arguments):
        answer = OWN[name](*arguments)
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                argument.zero_()
        return answer

    getattr(checks, name)(careless)


def test_a_right_answer_is_handed_on_and_a_wrong_one_is_not(capsys):
    right, wrong = OWN["blend"], lambda soft, hard, alpha: soft
    checks.blend(right)
    assert checks.yours("blend", otherwise=wrong) is right
    with pytest.raises(AssertionError):
        checks.blend(wrong)
    assert checks.yours("blend", otherwise=max) is max
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["computed with your own blend", "computed with the notebook's blend"]


def test_a_notebook_shows_one_sentence_and_no_source():
    """Through a real kernel: what a wrong answer and a skeleton print."""
    wrong = "def blend(soft, hard, alpha):\n    return soft + hard\nchecks.blend(blend)"
    missing = wrong.replace("return soft + hard", 'raise NotImplementedError("Write this part.")')
    sources = ["from dte_lab import checks", wrong, missing]
    cells = [new_code_cell(source) for source in sources]
    notebook = new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, allow_errors=True).execute()
    shown = [cell.outputs[0].traceback for cell in notebook.cells[1:]]
    assert shown == [
        ["Both paths count in full: weigh them with alpha and 1 - alpha."], ["Write this part."]
    ]  # fmt: skip


def test_a_function_that_stops_is_told_shapes_only_where_there_are_tensors():
    with pytest.raises(AssertionError, match=r"stopped with KeyError: 3\.$"):
        checks.steps_needed(lambda curve, level, patience: curve[3])
    with pytest.raises(
        AssertionError, match=r"of shapes \(3, 5\), \(4, 5\), \(5, 2\), \(2, 4\)\.$"
    ):
        checks.low_rank_offset(lambda x, w, a, b: x @ w)
