"""recipes/sd15.py: what it says it costs, and its whole path on a tiny backbone."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dte_lab import load_encoder
from dte_lab.training.cache import bytes_each

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "recipes").is_dir(), reason="needs a checkout, not an installed package"
)


@pytest.fixture(scope="module")
def recipe():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "recipes" / "sd15.py")))


def test_what_it_costs(recipe):
    plan = recipe.Plan(items=100_000, steps=100_000, batch_size=16)
    rows = {line[:8].strip(): line[8:].split() for line in str(plan).splitlines()[2:6]}
    a100 = [float(x) for x in rows["A100"][:4]]
    assert a100[0] == 100
    assert a100[1] == pytest.approx(1e5 * (2 * recipe.ENCODE + recipe.CLIP) / 100 / 3600, abs=0.05)
    left = recipe.WHOLE_STEP - 2 * recipe.ENCODE - recipe.CLIP
    assert a100[2] == pytest.approx(1.6e6 * left / 100 / 3600, abs=0.05)
    assert a100[3] == pytest.approx(a100[1] + a100[2], abs=0.11)
    assert float(rows["T4"][3]) == pytest.approx(10 * a100[3], rel=0.02)
    assert float(rows["8 x A100"][3]) == pytest.approx(a100[3] / 7.2, abs=0.06)
    low, _, high, whole = rows["A100"][4:]
    assert float(whole.strip("()")) == pytest.approx(1.6e6 * 4.871 / 100 / 3600, abs=0.05)
    assert (float(low), float(high)) == pytest.approx((1.3 * a100[3], 3.5 * a100[3]), abs=0.7)
    assert "63 GB of disk" in str(plan)


def test_an_item_is_as_large_as_one_of_the_cache(recipe):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dte_lab.backbone import Backbone
    from dte_lab.sd15 import random_parts

    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = Backbone(name="sd15", **random_parts("cpu"))
    assert recipe.ITEM == bytes_each(backbone, 2)


def test_the_whole_path_in_pieces(tiny_path, tiny_backbone, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(20):
        (tmp_path / "data" / f"{k:02d}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{k:02d}" / "0.png")
    command = [
        *(sys.executable, ROOT / "recipes" / "sd15.py", "--backbone", tiny_path, "--device", "cpu"),
        *("--data", tmp_path / "data", "--out", tmp_path / "out", "--precision", "no"),
        *("--pictures", "20", "--steps", "3", "--batch-size", "2"),
    ]

    def call(*options):
        made = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
        assert made.returncode == 0, made.stderr
        return made.stdout

    assert "20 cached items and 3 steps of 2" in call("--plan") and not (tmp_path / "out").exists()
    assert "Not finished: the same command goes on." in call("--minutes", "0")
    said = call()
    assert "loss on classes never seen" in said and "after 3 of 3 steps. Use it:" in said
    encoder = load_encoder(tmp_path / "out" / "encoder", tiny_backbone)
    assert encoder.bank_concepts.max() < 19, "the last class is held out"
