"""Which concept a file was made of, written into it: so that no other's result is written over.

PNG files have it as a text chunk, safetensors files in their metadata, both as JSON under KEY.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from dte_lab.common.errors import DTEError

KEY = "dte_lab"


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits that tell what the bytes are."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]


def pictures_digest(pictures: Iterable[Image.Image]) -> str:
    """Of RGB pictures in this order; their files' names and formats do not count."""
    return digest(str(p.size).encode() + p.tobytes() for p in pictures)


def origin_text(origin: Mapping[str, str]) -> dict[str, str]:
    """What to write into a file: {KEY: JSON}."""
    return {KEY: json.dumps(origin, sort_keys=True)}


def origin_of(path: Path) -> dict | None:
    """What `origin_text` wrote into a file; None for any other file."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                text = image.info[KEY]
        else:
            with safe_open(path, "np") as file:
                text = file.metadata()[KEY]
        return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def check_free(outputs: Mapping[Path, Mapping[str, str]], overwrite: bool) -> None:
    """Raise DTEError where a file is in the way that was not made of the same.

    outputs: the origin of each file that is going to be written.
    """
    for path, origin in outputs.items():
        if not overwrite and path.exists() and origin_of(path) != origin:
            raise DTEError(
                f"{path} is there already, and was made of another picture or prompt: choose "
                "another --out, or say --overwrite."
            )
