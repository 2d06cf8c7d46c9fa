"""Build the sprite atlases of the small world from four npm packages (see NOTICE for the licences).

    dte world build --packages DIR

`DIR` holds the archives that `npm pack` writes for the packages in `PACKAGES`. Run once by the
project; the result (`assets/`, about 6 MB) is committed, so nobody needs npm to use the package.
"""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dte_lab.common.files import write_atomically
from dte_lab.world.sprites import (
    ASSETS,
    ATLAS_COLUMNS,
    SPRITE_SIZE,
    STYLES,
)

PACKAGES = {
    "noto": "emoji-datasource-google-16.0.0.tgz",
    "twemoji": "emoji-datasource-twitter-16.0.0.tgz",
    "fluent": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "names": "emojibase-data-17.0.0.tgz",
}
GROUPS = {  # emoji category -> our short group name
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "places",
    "Objects": "objects",
    "Activities": "activities",
}
SPLIT_SIZE = 60  # concepts in each of val and test
TRAIN_SIZE = 400  # concepts that the base model learns; two CPU cores cannot draw 700 well


def plain_name(label: str) -> str:
    """'Woman’s hat' -> 'womans hat', 'piñata' -> 'pinata', 'T-Rex' -> 't rex': lower-case words."""
    text = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    for ordinal, word in (("1st", "first"), ("2nd", "second"), ("3rd", "third"), ("8", "eight")):
        text = text.replace(ordinal, word)
    return " ".join("".join(c if c.isalpha() else " " for c in text).split())


def is_clock(name: str) -> bool:
    return "clock" in name or name.endswith(" thirty")


def _open_packages(folder: Path) -> dict[str, tarfile.TarFile]:
    missing = [file for file in PACKAGES.values() if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; fetch them with `npm pack`.")
    return {key: tarfile.open(folder / file) for key, file in PACKAGES.items()}


def read_member(package: tarfile.TarFile, member: str) -> bytes:
    return package.extractfile(f"package/{member}").read()


def _bare(code: str) -> str:
    """Emoji code point without the variation selector, on whose use the packages disagree."""
    return code.lower().replace("-fe0f", "")


def split_concepts(concepts: list[dict], seed: int = 0) -> dict[str, list[str]]:
    """Four splits with the same balance of groups.

    From each of 60 runs of neighbouring concepts come one of val, one of test, and the six or seven
    with the shortest names of train. The rest are `extra`: concepts that the base model has never
    seen, for the encoder to learn from besides those of train.
    """
    names = [c["name"] for c in sorted(concepts, key=lambda c: (c["group"], c["subgroup"]))]
    rng = np.random.default_rng(seed)
    splits = {"train": [], "val": [], "test": [], "extra": []}
    shares = np.diff(np.linspace(0, TRAIN_SIZE, SPLIT_SIZE + 1).round().astype(int))
    for run, share in zip(np.array_split(np.array(names), SPLIT_SIZE), shares, strict=True):
        val, test = rng.choice(len(run), 2, replace=False)
        splits["val"].append(str(run[val]))
        splits["test"].append(str(run[test]))
        rest = [str(n) for i, n in enumerate(run) if i not in (val, test)]
        rest.sort(key=lambda name: (len(name.split()), len(name), name))
        splits["train"] += rest[:share]
        splits["extra"] += rest[share:]
    return {key: sorted(value) for key, value in splits.items()}


def main(packages: Path) -> None:
    """Write `assets/{noto,twemoji,fluent}.webp`, `concepts.json` and `splits.json`."""
    archives = _open_packages(Path(packages))
    labels = {
        _bare(e["hexcode"]): e for e in json.loads(read_member(archives["names"], "en/data.json"))
    }
    in_twemoji = {
        _bare(e["unified"]): e["image"]
        for e in json.loads(read_member(archives["twemoji"], "emoji.json"))
        if e["has_img_twitter"]
    }
    in_fluent = {
        _bare(Path(member).stem): Path(member).name
        for member in archives["fluent"].getnames()
        if member.startswith("package/assets/")
    }
    concepts, files = [], {style: [] for style in STYLES}
    for emoji in json.loads(read_member(archives["noto"], "emoji.json")):
        code = _bare(emoji["unified"])
        if emoji["category"] not in GROUPS or not emoji["has_img_google"]:
            continue
        name = plain_name(labels[code]["label"])
        if code not in in_twemoji or code not in in_fluent or is_clock(name):
            continue
        tags = sorted({plain_name(tag) for tag in labels[code].get("tags", [])} - {name, ""})
        group = GROUPS[emoji["category"]]
        concepts.append(
            {"name": name, "group": group, "subgroup": emoji["subcategory"], "tags": tags}
        )
        files["noto"].append(f"img/google/64/{emoji['image']}")
        files["twemoji"].append(f"img/twitter/64/{in_twemoji[code]}")
        files["fluent"].append(f"assets/{in_fluent[code]}")

    rows = -(-len(concepts) // ATLAS_COLUMNS)
    for style in STYLES:
        atlas = Image.new("RGBA", (ATLAS_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
        for i, file in enumerate(tqdm(files[style], desc=style)):
            sprite = Image.open(io.BytesIO(read_member(archives[style], file))).convert("RGBA")
            sprite = sprite.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
            row, column = divmod(i, ATLAS_COLUMNS)
            atlas.paste(sprite, (column * SPRITE_SIZE, row * SPRITE_SIZE))
        write_atlas(style, atlas)
    write_atomically(ASSETS / "concepts.json", json.dumps(concepts, indent=0).encode())
    splits = split_concepts(concepts)
    write_atomically(ASSETS / "splits.json", json.dumps(splits, indent=1).encode())


def write_atlas(style: str, atlas: Image.Image) -> None:
    buffer = io.BytesIO()
    atlas.save(buffer, "webp", lossless=True, quality=100, method=6)
    write_atomically(ASSETS / f"{style}.webp", buffer.getvalue())
