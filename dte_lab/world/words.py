"""The words that the small base model knows well enough to be the nearest word of an embedding."""

from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, split_names


def caption_words() -> list[str]:
    """Words in the names of train concepts and in the grammar of captions, sorted.

    A backbone's folder holds them as `words.json`. Tags of concepts are left out: they stand in few
    captions, so their embeddings mean little, and yet they can lie near everything.
    """
    texts = split_names("train")
    texts += [caption("", style, scene) for style in STYLES for scene in SCENES]
    return sorted({word for text in texts for word in text.split()})
