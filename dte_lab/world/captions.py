"""A small grammar of captions, and which combinations the base model never sees."""

import zlib

import numpy as np

from dte_lab.world.scenes import PLACES
from dte_lab.world.sprites import concepts


def scene_words(scene: str) -> str:
    """'red' -> 'on a red background', 'beach' -> 'on the beach'."""
    if scene in PLACES:
        return PLACES[scene]
    return f"on {'an' if scene[0] in 'aeiou' else 'a'} {scene} background"


def noun_phrase(name: str) -> str:
    """'red apple' -> 'a red apple', 'octopus' -> 'an octopus', 'grapes' -> 'grapes'."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(concept: str, style: str | None, scene: str | None) -> str:
    """The full caption; leave out what is None. `concept` may be the placeholder "S*"."""
    thing = concept if concept not in concepts() else noun_phrase(concept)
    words = [f"a {style} picture of" if style else "a picture of", thing]
    return " ".join(words + ([scene_words(scene)] if scene else []))


def random_caption(
    concept: str, style: str, scene: str, rng: np.random.Generator, tags: tuple[str, ...] = ()
) -> str:
    """One of the ways to say it: style or scene left out, short form, now and then with a tag."""
    thing = concept if concept not in concepts() else noun_phrase(concept)
    if tags and rng.random() < 0.15:
        thing += f", {tags[rng.integers(len(tags))]},"
    where = scene_words(scene) if rng.random() < 0.93 else ""
    kind = rng.random()
    if kind < 0.70:
        words = f"a {style} picture of {thing} {where}"
    elif kind < 0.80:
        words = f"a picture of {thing} {where}"
    elif kind < 0.90:
        words = f"{thing} {where}"
    else:
        words = f"{thing} {where}, {style}"
    return " ".join(words.replace(" ,", ",").split()).rstrip(",")


def held_out(concept: str, style: str, scene: str) -> bool:
    """True for the 5 % of combinations that no training sees (to measure recombination)."""
    return zlib.crc32(f"{concept}|{style}|{scene}".encode()) % 20 == 0
