"""Section 7 of notebook 05, with a stand-in for the model that needs a GPU."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.evaluation import sd15_steps
from dte_lab.memory_needs import Setting
from dte_lab.recommended import STABLE_DIFFUSION


def test_the_largest_setting_that_fits_is_chosen():
    small, large, whole = (Setting(batch=1), Setting(batch=4), Setting(batch=4, dtype="fp32"))
    needs = {str(small): 4e9, str(large): 7e9, str(whole): 1e9}
    choose = sd15_steps.largest_fitting
    assert choose([small, large, whole], needs, 8e9) == large
    assert choose([small, large, whole], needs, 7.9e9) == small  # a gigabyte is CUDA's
    with pytest.raises(DTEError, match="No setting fits a card of 4 GB"):
        choose([small, large, whole], needs, 4e9)


@dataclass
class State:
    v_star: int
    offsets: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)


def test_each_number_of_steps_draws_from_its_own_state(monkeypatch):
    class Pipe:
        backbone = SimpleNamespace(
            resolution=64,
            recommended=STABLE_DIFFUSION,
            unet=SimpleNamespace(register_to_config=lambda **options: None),
        )

        def personalize(self, picture, num_steps, callback, config):
            assert picture.size == (64, 64) and config.batch_size == 2
            for step in range(num_steps):
                callback({"step": step, "v_star": step, "offsets": {}})
            return State(num_steps, info={"losses": [0.0] * num_steps})

        def generate(self, state, prompts, **options):
            return [[Image.new("RGB", (8, 8), (state.v_star, k, 0))] for k in range(len(prompts))]

    monkeypatch.setattr(sd15_steps.DTEPipeline, "from_pretrained", lambda *a, **options: Pipe())
    drawn, last = sd15_steps.over_steps(
        Image.new("RGB", (100, 80)), Setting(batch=2), "cpu", (0, 2, 5), ("a", "b")
    )
    assert list(drawn) == ["the input", "0 steps", "2 steps", "5 steps"] and last.v_star == 5
    for name, row in list(drawn.items())[1:]:
        assert [p.getpixel((0, 0)) for p in row] == [(int(name[0]), k, 0) for k in (0, 1)]
        assert row[0].size == (192, 192)
