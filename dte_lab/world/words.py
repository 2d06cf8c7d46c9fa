"""The words that the small base model knows well enough to be the nearest word of an embedding."""

from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES

WORDS_FILE = "words.json"  # in a backbone's folder: these, and those in the names that captions say


def grammar_words() -> list[str]:
    """Words of captions besides the names of things, sorted.

    Tags of things are not among them: they stand in few captions, so their embeddings mean little,
    and yet they can lie near everything.
    """
    texts = [caption("", style, scene) for style in STYLES for scene in SCENES]
    return sorted({word for text in texts for word in text.split()})
