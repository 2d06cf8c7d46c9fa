"""A photograph learned by Stable Diffusion 1.5, and what it draws after each of some steps.

Section 7 of notebook 05, which runs where there is a GPU. Never run with the real weights yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.common.images import square
from dte_lab.concept import Concept
from dte_lab.memory_needs import Setting
from dte_lab.pipeline import DTEPipeline
from dte_lab.tuning import TuneConfig

SIDE_IN_NOTEBOOK = 192  # pixels of a picture's side in the notebook


def largest_fitting(
    choices: Sequence[Setting], bytes_needed: Mapping[str, int], card: int
) -> Setting:
    """The choice in fp16 that uses a card of so many bytes best; a gigabyte stays free for CUDA.

    bytes_needed: of each choice, by its name. Raises DTEError where none fits.
    """
    fitting = [c for c in choices if c.dtype == "fp16" and bytes_needed[str(c)] <= card - 1e9]
    if not fitting:
        raise DTEError(f"No setting fits a card of {card / 1e9:.0f} GB.")
    return max(
        fitting,
        key=lambda c: (c.resolution, min(c.batch, 4), not c.gradient_checkpointing, -c.batch),
    )


def over_steps(
    picture: Image.Image, choice: Setting, device: str, steps: Sequence[int], prompts: Sequence[str]
) -> tuple[dict[str, list[Image.Image]], Concept]:
    """{"N steps": a drawing of each prompt}, with the input first, and the concept of the last."""
    pipe = DTEPipeline.from_pretrained(
        "sd15", device=device, dtype=torch.float16, offload=choice.offload,
        gradient_checkpointing=choice.gradient_checkpointing,
    )  # fmt: skip
    pipe.backbone.unet.register_to_config(sample_size=choice.resolution // 8)
    picture, kept = square(picture, pipe.backbone.resolution), {}

    def keep_some(state: dict) -> None:
        if state["step"] in steps:
            kept[state["step"]] = state["v_star"], state["offsets"]

    config = TuneConfig.of(pipe.backbone.recommended, batch_size=choice.batch)
    last = pipe.personalize(picture, steps[-1], callback=keep_some, config=config)
    states = {n: replace(last, v_star=v, offsets=offsets) for n, (v, offsets) in kept.items()}
    states[len(last.info["losses"])] = last  # fewer steps where tuning had to stop
    drawn = {"the input": [picture] * len(prompts)}
    for n, state in states.items():
        rows = pipe.generate(state, list(prompts), batch_size=1, progress=False)
        drawn[f"{n} steps"] = [row[0] for row in rows]
    small = (SIDE_IN_NOTEBOOK, SIDE_IN_NOTEBOOK)
    return {name: [image.resize(small) for image in row] for name, row in drawn.items()}, last
