"""What pictures show besides the thing, so that tuning can say so.

Tuning on "a picture of S*" makes the background a part of S*: whatever the prompt leaves unsaid, v*
and the offsets must say. With the setting in the prompt the denoiser knows that part already. CLIP
names it among a few usual ones. (ours, not the paper's)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.backbone import Backbone
from dte_lab.clip_words import clip_embeddings
from dte_lab.features import image_features

SMALL_WORLD_SETTINGS = (
    "on a red background", "on an orange background", "on a yellow background",
    "on a green background", "on a blue background", "on a purple background",
    "on a pink background", "on a brown background", "on a gray background",
    "on a white background", "on the grass", "on the beach", "in the snow", "at night",
    "in the desert", "under water", "in the forest", "at sunset", "on a wooden table", "in space",
)  # fmt: skip
PHOTOGRAPH_SETTINGS = (
    "on a white background", "on a table", "indoors", "outdoors", "on the street", "on the grass",
    "on the beach", "in the snow", "in a forest", "in the water", "in the sky", "at night",
)  # fmt: skip


def picture_prompts(
    backbone: Backbone,
    images: Float[Tensor, "pictures 3 height width"],
    phrase: str = placeholder_token,
) -> tuple[str, ...]:
    """ "a picture of S* on the beach" for each of the pictures in [-1, 1].

    phrase: what stands for the thing. A backbone whose text encoder has no projection to CLIP's
    space cannot name settings: its prompts are "a picture of S*".
    """
    plain = f"a picture of {phrase}"
    if not backbone.has_projection:
        return (plain,) * len(images)
    settings = SMALL_WORLD_SETTINGS if backbone.draws_small_world else PHOTOGRAPH_SETTINGS
    # "of thing", as the small CLIP was trained
    texts = [f"a picture of thing {setting}" for setting in settings]
    with torch.no_grad():
        pictures = image_features(backbone, images).embeds  # (n, p)
        best = (pictures @ clip_embeddings(backbone, texts).T).argmax(dim=-1)
    return tuple(f"{plain} {settings[i]}" for i in best.tolist())
