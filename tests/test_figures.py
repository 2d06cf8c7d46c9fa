"""The pictures in figures/ show what the weights and results that lie here give."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

MAKE = Path(__file__).parents[1] / "figures" / "make.py"
pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures_make", MAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_figure_is_stale(figures):
    figures.main(["--check"])


def test_a_figure_is_stale_once_its_maker_or_a_source_has_changed(figures, monkeypatch, tmp_path):
    (tmp_path / "numbers.json").write_text("1")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)

    def draw():
        return Figure((1, 0.5))

    def draw_otherwise():
        return Figure((2, 0.5))

    for maker in (draw, draw_otherwise):
        monkeypatch.setattr(figures, "FIGURES", {"a": (maker, ["numbers.json"])})
        with pytest.raises(SystemExit, match="Draw these figures anew: .* a$"):
            figures.main(["--check"])
        figures.main([])
        figures.main(["--check"])
    assert Image.open(tmp_path / "a.png").size == (200, 50)
    shutil.copy(tmp_path / "a.png", tmp_path / "kept.png")
    (tmp_path / "numbers.json").write_text("2")
    assert figures.stale() == ["a"]


def test_a_figure_of_what_is_tuned_is_stale_once_the_settings_have_changed(figures, monkeypatch):
    before = {name: figures.digest(name) for name in figures.FIGURES}
    monkeypatch.setattr(figures, "SMALL_WORLD", replace(figures.SMALL_WORLD, constant_steps=7))
    changed = {name for name in before if figures.digest(name) != before[name]}
    assert changed == {"quickstart", "unseen"}
