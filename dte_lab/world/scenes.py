"""Scenes: procedural backgrounds, and `render`, the ground truth of every caption.

A picture is a pure function of (concept, style, scene, seed). The seed decides the small
variation of the background; nothing else varies, because a base model that two CPU cores can train
has to spend its capacity on sprites: mirroring half of them cost twice the training.
Everything is float32 RGB in [0, 1] until the last line of `render`.
"""

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.world.sprites import sprite

SIZE = 64  # px, side of a picture
SPRITE_PX = 48  # side of the sprite in it: whole 8 px cells, as the autoencoder's latents are
OFFSET = 8  # px from the left and top edges
BOX = slice(OFFSET, OFFSET + SPRITE_PX)  # its rows, and its columns

COLOURS = {
    "red": (0.84, 0.20, 0.20),
    "orange": (0.96, 0.58, 0.20),
    "yellow": (0.97, 0.88, 0.35),
    "green": (0.27, 0.66, 0.33),
    "blue": (0.22, 0.42, 0.84),
    "purple": (0.55, 0.31, 0.74),
    "pink": (0.97, 0.66, 0.78),
    "brown": (0.50, 0.33, 0.20),
    "gray": (0.56, 0.57, 0.59),
    "white": (0.97, 0.97, 0.97),
}
PLACES = {  # scene name -> the words that a caption uses
    "grass": "on the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "desert": "in the desert",
    "water": "under water",
    "forest": "in the forest",
    "sunset": "at sunset",
    "table": "on a wooden table",
    "space": "in space",
}
SCENES = (*COLOURS, *PLACES)

_y, _x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1)  # (64, 64), 0 at top left


def _mix(a: ArrayLike, b: ArrayLike, weight: np.ndarray) -> np.ndarray:
    """Blend colours a and b by a (64, 64) weight -> (64, 64, 3)."""
    w = np.clip(weight, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - w) + np.asarray(b, np.float32) * w


def _soft(distance: np.ndarray, width: float = 0.02) -> np.ndarray:
    """Antialiased step: 0 below zero, 1 above, over `width` of the picture's side."""
    return np.clip(distance / width + 0.5, 0, 1)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return _soft(radius - np.hypot(_x - x, _y - y))


def _ground(
    sky: np.ndarray, near: ArrayLike, far: ArrayLike, horizon: np.ndarray | float
) -> np.ndarray:
    """Put ground below a horizon (fraction of the height), brighter colour `far` at the back."""
    depth = np.clip((_y - horizon) / (1 - np.min(horizon)), 0, 1)
    w = _soft(_y - horizon)[..., None]
    return sky * (1 - w) + _mix(far, near, depth) * w


def _stars(picture: np.ndarray, rng: np.random.Generator, count: int, top: float) -> np.ndarray:
    for _ in range(count):
        w = _disc(rng.uniform(), rng.uniform(0, top), 0.016)[..., None]
        picture = picture * (1 - w) + w
    return picture


def _wave(rng: np.random.Generator, amplitude: float, cycles: float) -> np.ndarray:
    """(64, 64) sideways wave of given amplitude (fraction of the height), random phase."""
    return amplitude * np.sin(2 * np.pi * (cycles * _x + rng.uniform()))


def background(scene: str, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3) background of a scene. Raises DTEError for a scene that does not exist."""
    if scene in COLOURS:
        base = np.array(COLOURS[scene], np.float32) * rng.uniform(0.95, 1.03)
        return _mix(base * 1.03, base * 0.95, _y)
    if scene == "grass":
        sky = _mix((0.55, 0.80, 0.97), (0.84, 0.94, 0.99), _y / 0.5)
        return _ground(sky, (0.30, 0.62, 0.20), (0.52, 0.80, 0.33), 0.56 + _wave(rng, 0.03, 1))
    if scene == "beach":
        sky = _mix((0.45, 0.78, 0.98), (0.80, 0.93, 1.00), _y / 0.4)
        sea = _ground(sky, (0.20, 0.72, 0.75), (0.07, 0.45, 0.70), 0.40)
        return _ground(sea, (0.90, 0.76, 0.50), (0.98, 0.90, 0.70), 0.66 + _wave(rng, 0.03, 1))
    if scene == "snow":
        sky = _mix((0.66, 0.76, 0.86), (0.84, 0.90, 0.95), _y / 0.5)
        picture = _ground(sky, (0.90, 0.94, 0.99), (1.0, 1.0, 1.0), 0.60 + _wave(rng, 0.04, 1))
        return _stars(picture, rng, 8, 0.6)
    if scene == "night":
        sky = _mix((0.03, 0.05, 0.17), (0.13, 0.17, 0.40), _y / 0.8)
        sky = _stars(sky, rng, 5, 0.5)
        side = rng.choice((0.09, 0.91))
        sky = sky + _disc(side, 0.1, 0.07)[..., None] * ((0.98, 0.95, 0.75) - sky)
        return _ground(sky, (0.03, 0.07, 0.10), (0.06, 0.12, 0.16), 0.80 + _wave(rng, 0.02, 1))
    if scene == "desert":
        sky = _mix((0.96, 0.80, 0.55), (0.99, 0.92, 0.76), _y / 0.5)
        far = _ground(sky, (0.80, 0.50, 0.28), (0.86, 0.58, 0.34), 0.50 + _wave(rng, 0.06, 1))
        return _ground(far, (0.86, 0.58, 0.30), (0.93, 0.70, 0.42), 0.68 + _wave(rng, 0.04, 1))
    if scene == "water":
        deep = _mix((0.25, 0.75, 0.85), (0.02, 0.22, 0.45), _y)
        rays = np.clip(np.sin(2 * np.pi * (2.5 * (_x + 0.35 * _y) + rng.uniform())), 0, 1)
        return deep + 0.13 * (rays * (1 - _y))[..., None]
    if scene == "forest":
        sky = _mix((0.62, 0.78, 0.60), (0.35, 0.55, 0.38), _y / 0.7)
        shift = rng.uniform(-0.03, 0.03)
        for trunk in (0.05, 0.35, 0.65, 0.95):
            bark = _soft(0.045 - np.abs(_x - trunk - shift))[..., None]
            sky = sky * (1 - bark) + np.array((0.27, 0.20, 0.13), np.float32) * bark
        crown = 0.20 + _wave(rng, 0.03, 3)
        w = _soft(crown - _y)[..., None]
        picture = sky * (1 - w) + np.array((0.10, 0.34, 0.16), np.float32) * w
        return _ground(picture, (0.16, 0.27, 0.12), (0.28, 0.40, 0.18), 0.80)
    if scene == "sunset":
        sky = _mix((0.36, 0.20, 0.47), (0.98, 0.52, 0.30), _y / 0.62)
        sun = _disc(rng.uniform(0.2, 0.8), 0.6, 0.16)[..., None]
        sky = sky * (1 - sun) + np.array((1.0, 0.86, 0.45), np.float32) * sun
        return _ground(sky, (0.20, 0.10, 0.28), (0.55, 0.24, 0.33), 0.70)
    if scene == "table":
        wall = _mix((0.93, 0.90, 0.83), (0.87, 0.82, 0.74), _y / 0.6)
        wood = _ground(wall, (0.55, 0.33, 0.17), (0.72, 0.47, 0.27), 0.60)
        grain = 0.04 * np.sin(2 * np.pi * (9 * _y + 0.5 * _x + rng.uniform())) * _soft(_y - 0.60)
        return wood + grain[..., None]
    if scene == "space":
        glow = np.exp(-8 * np.hypot(_x - rng.uniform(0, 1), _y - rng.uniform(0, 1)) ** 2)
        return _stars(_mix((0.02, 0.01, 0.05), (0.30, 0.08, 0.38), 0.9 * glow), rng, 14, 1.0)
    raise DTEError(f"Unknown scene {scene!r}: use one of {', '.join(SCENES)}.")


LIGHT = {  # what the light of a place does to the sprite: (multiply by, then mix with, how much)
    "night": ((0.62, 0.66, 0.86), (0.0, 0.0, 0.0), 0.0),
    "water": ((0.80, 0.95, 1.00), (0.08, 0.45, 0.60), 0.25),
    "sunset": ((1.00, 0.84, 0.74), (0.0, 0.0, 0.0), 0.0),
}


def compose(rgba: np.ndarray, scene: str, behind: np.ndarray) -> np.ndarray:
    """Put a premultiplied (48, 48, 4) sprite before a scene's background: (64, 64, 3) uint8."""
    picture = behind.copy()
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if scene in LIGHT:
        multiply, mixed, amount = LIGHT[scene]
        colour = colour * np.float32(multiply)
        colour = colour * (1 - amount) + alpha * np.float32(mixed) * amount
    picture[BOX, BOX] = picture[BOX, BOX] * (1 - alpha) + colour
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def render(concept: str, style: str, scene: str, seed: int = 0) -> np.ndarray:
    """The picture that the caption of (concept, style, scene) describes: (64, 64, 3) uint8.

    Pure and quick (under 1 ms). Raises DTEError for an unknown concept, style or scene.
    """
    behind = background(scene, np.random.default_rng(seed))
    return compose(sprite(concept, style, SPRITE_PX), scene, behind)


def render_image(concept: str, style: str, scene: str, seed: int = 0) -> Image.Image:
    """`render` as a PIL image."""
    return Image.fromarray(render(concept, style, scene, seed))


def render_all(items: list[tuple[str, str, str, int]]) -> np.ndarray:
    """`render` of each (concept, style, scene, seed): (B, 64, 64, 3) uint8."""
    return np.stack([render(*item) for item in items])
