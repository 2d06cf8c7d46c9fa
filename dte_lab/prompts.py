"""What is asked for, checked before any slow work: by the command and by the pipeline alike.

Every function raises DTEError with one sentence that names the value. All bounds are ours.
"""

import re
from collections.abc import Sequence

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.common.settings import check_number, check_text, check_whole

NEAR_MISS = re.compile(r"(?<![\w'])(?:[Ss]_?\d+ ?\*|s\*)")  # S2*, s_1*, s*


def check_prompts(prompts: Sequence[str]) -> None:
    """Every prompt must name the one concept, and no other."""
    if not isinstance(prompts, list | tuple) or not prompts:
        raise DTEError(f"prompts are one or more texts in a list, not {prompts!r}.")
    for prompt in prompts:
        check_text("the prompt", prompt)
        if placeholder_token not in prompt:
            raise DTEError(
                f"the prompt {prompt!r} does not contain {placeholder_token}, which stands for the "
                f'concept; write for example "{placeholder_token} on the beach".'
            )
        if found := NEAR_MISS.search(prompt):
            raise DTEError(
                f"the prompt {prompt!r} has {found[0]}, which would be read as plain text: the one "
                f"concept that is drawn is written {placeholder_token}."
            )


def check_drawing(
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float | None = None,
    num_inference_steps: int = 25,
    negative_prompt: str = "",
    alpha_blend: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
) -> None:
    """The arguments of `DTEPipeline.generate`; None is its default."""
    check_prompts(prompts)
    if not isinstance(seeds, list | tuple) or not seeds:
        raise DTEError(f"seeds are one or more whole numbers in a list, not {seeds!r}.")
    for seed in seeds:
        check_whole("seed", seed)
    if guidance_scale is not None:
        check_number("guidance_scale", guidance_scale, 0, 100)
    check_whole("num_inference_steps", num_inference_steps, 1, 1000)
    check_text("negative_prompt", negative_prompt)
    pair = alpha_blend if isinstance(alpha_blend, tuple | list) else (alpha_blend,)
    for value in pair:
        if value is not None:
            check_number("alpha_blend", value, 0, 1)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)


def check_tuning(
    num_steps: int | None, learning_rate: float | None, batch_size: int | None
) -> None:
    """What `dte personalize` hands to TuneConfig, by its names there; None is its default."""
    if num_steps is not None:
        check_whole("num_steps", num_steps, 0)
    if learning_rate is not None:
        check_number("offset_learning_rate", learning_rate, 0)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
