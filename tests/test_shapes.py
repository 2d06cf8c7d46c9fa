"""The tests check the shapes that the signatures of dte_lab name."""

import importlib

import pytest
import torch
from conftest import modules_with_shapes
from jaxtyping import TypeCheckError, install_import_hook

TOY = """
from jaxtyping import Float
from torch import Tensor

def product(
    a: Float[Tensor, "n k"], b: dict[str, Float[Tensor, "k m"]], c: int
) -> Float[Tensor, "n m"]:
    return a @ b["b"] if c else a
"""


def test_a_wrong_shape_raises_and_a_stand_in_does_not(tmp_path, monkeypatch):
    (tmp_path / "toy_shapes.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("toy_shapes", "conftest.checked_shapes"):
        product = importlib.import_module("toy_shapes").product
    a, b = torch.ones(2, 3), {"b": torch.ones(3, 4)}
    assert product(a, b, "no int").shape == (2, 4)
    with pytest.raises(TypeCheckError, match="parameter 'b'"):
        product(a, {"b": b["b"].T}, 1)
    with pytest.raises(TypeCheckError, match="parameter 'a'"):
        product(a.long(), b, 1)
    with pytest.raises(TypeCheckError, match="return value"):
        product(a, b, 0)


def test_every_module_with_shapes_checks_them():
    for name in modules_with_shapes():
        assert type(importlib.import_module(name).__loader__).__name__ == "_JaxtypingLoader"
