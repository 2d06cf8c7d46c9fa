"""The measures beside the explorer's pictures, named for people.

By CLIP for every picture. For a thing of the small world identity is judged on the thing's own
region by a network that had no part in making the pictures, where it is installed; and where the
prompt is one of the world's captions, the true rendering is known.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.backbone import Backbone
from dte_lab.clip_words import clip_embeddings
from dte_lab.evaluation.base_model import JUDGE_SIZE, classify_scene
from dte_lab.evaluation.edits import object_mask, object_region
from dte_lab.evaluation.judges import ImageJudge
from dte_lab.features import image_features
from dte_lab.pipeline import DTEPipeline
from dte_lab.world.captions import caption, scene_words
from dte_lab.world.data import to_tensor
from dte_lab.world.scenes import BOX, SCENES, SIZE, render
from dte_lab.world.sprites import STYLES

NAMES = {  # measure: (what a person reads, digits)
    "clip_input": ("like the input, by CLIP (cosine)", 3),
    "clip_prompt": ("as the prompt says, by CLIP (cosine)", 3),
    "identity": ("the thing's identity (cosine, EfficientNet)", 3),
    "scene": ("share with the scene asked for", 2),
    "truth_error": ("off the true rendering (0 to 1)", 3),
    "word_length": ("length of the word (1: as words are)", 2),
    "seconds": ("seconds to learn", 1),
    "drawing_seconds": ("seconds to draw", 1),
}
LOWER_IS_BETTER = ("truth_error", "seconds", "drawing_seconds")


def scene_of(prompt: str) -> str | None:
    """The scene of the small world that a prompt asks for, if it is one."""
    return next(
        (scene for scene in SCENES if prompt.rstrip(" .").endswith(scene_words(scene))), None
    )


def truth_of(name: str, style: str | None, prompt: str) -> tuple[str, str] | None:
    """(style, scene) of what a prompt truly shows of a thing; None where nobody knows."""
    text, scene = prompt.strip(" ."), scene_of(prompt)
    if style is None or scene is None:
        return None
    if text in (
        caption(placeholder_token, None, scene),
        f"{placeholder_token} {scene_words(scene)}",
    ):
        return style, scene
    styles = (s for s in STYLES if text == caption(placeholder_token, s, scene))
    return next(((s, scene) for s in styles), None)


@cache
def outside_judge() -> ImageJudge | None:
    """Where it is installed; loaded when it is first needed."""
    try:
        return ImageJudge(size=JUDGE_SIZE)
    except ImportError:  # the extra `evaluate`
        return None


def warm_up() -> None:
    """Load and compute what is kept for all measures, so that no run waits for it."""
    size = (3, SIZE, SIZE)
    classify_scene(torch.zeros(1, *size))
    if (judge := outside_judge()) is not None:
        judge.features(torch.zeros(1, *size))


@torch.no_grad()
def measured(
    pipe: DTEPipeline,
    subject: object,
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
) -> dict[str, float]:
    """{measure of NAMES: mean over the pictures}; what cannot be known is left out.

    subject: an `explorer_runs.Subject`. pictures: a row per prompt.
    """
    drawn = torch.stack([pipe.pixels(row) for row in pictures])  # (P, S, 3, H, W)
    given = pipe.pixels([subject.picture.image])  # (1, 3, H, W)
    found = _by_clip(pipe.backbone, drawn, given, prompts)
    if pipe.backbone.draws_small_world:
        found |= _scene(drawn, prompts)
        if subject.style is not None:
            found |= _of_thing(drawn, given, subject, prompts)
    return found


def _by_clip(
    backbone: Backbone,
    drawn: Float[Tensor, "prompts seeds 3 height width"],
    given: Float[Tensor, "1 3 height width"],
    prompts: Sequence[str],
) -> dict[str, float]:
    embeds = image_features(backbone, torch.cat([given, drawn.flatten(0, 1)])).embeds
    found = {"clip_input": (embeds[1:] @ embeds[0]).mean().item()}
    if backbone.has_projection:
        texts = [prompt.replace(placeholder_token, "a thing") for prompt in prompts]
        said = clip_embeddings(backbone, texts).to(embeds)  # (P, p)
        rows = embeds[1:].view(*drawn.shape[:2], -1)  # (P, S, p)
        found["clip_prompt"] = (rows * said[:, None]).sum(-1).mean().item()
    return found


def _scene(
    drawn: Float[Tensor, "prompts seeds 3 height width"], prompts: Sequence[str]
) -> dict[str, float]:
    asked = [scene_of(prompt) for prompt in prompts]
    hits = [
        hit
        for row, scene in zip(drawn, asked, strict=True)
        if scene is not None
        for hit in classify_scene(row) == SCENES.index(scene)
    ]
    return {"scene": sum(hits) / len(hits)} if hits else {}


def _of_thing(
    drawn: Float[Tensor, "prompts seeds 3 height width"],
    given: Float[Tensor, "1 3 height width"],
    subject: object,
    prompts: Sequence[str],
) -> dict[str, float]:
    found, own, judge = {}, object_mask(subject.name, subject.style), outside_judge()
    if judge is not None:
        regions = object_region(torch.cat([given, drawn.flatten(0, 1)]), own)
        features = F.normalize(judge.features(regions), dim=-1)  # (1 + P * S, 1280)
        found["identity"] = (features[1:] @ features[0]).mean().item()
    errors = []
    for row, prompt in zip(drawn, prompts, strict=True):
        if (shows := truth_of(subject.name, subject.style, prompt)) is None:
            continue
        mask = object_mask(subject.name, shows[0])
        true = to_tensor(render(subject.name, *shows, 0)[None])
        off = (row - true)[..., BOX, BOX][..., mask]  # (S, 3, n)
        errors += (off.square().mean((1, 2)).sqrt() / 2).tolist()
    return found | ({"truth_error": sum(errors) / len(errors)} if errors else {})
