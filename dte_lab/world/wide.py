"""The wide world: some 15,000 drawings by others, to train on and not to ship.

    dte world build --wide CACHE

fetches the npm packages of `SOURCES`, draws the icons that `assets/wide.json` lists (48 px, with
transparency) and writes them to CACHE. Things of `val` and `test` are not among them, in any style,
and neither is anything of the style `UNSEEN_STYLE`, but for those same things: to measure with.
"""

import base64
import hashlib
import http.client
import io
import json
import tarfile
import urllib.request
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import check_path, write_atomically
from dte_lab.world.build import read_member, write_atlas
from dte_lab.world.scenes import COLOURS, SPRITE_PX
from dte_lab.world.sprites import ASSETS, ATLAS_COLUMNS, UNSEEN_SIZE, UNSEEN_STYLE
from dte_lab.world.wide_names import Emoji, HeldOut, icon_name

LIST = ASSETS / "wide.json"
REGISTRY = "https://registry.npmjs.org"
INKS = tuple(sorted(COLOURS.keys() - {"white"}))  # what many scenes would swallow is left out
LEAST_INK = 0.02  # share of the square: what is emptier was drawn with fonts, or not at all


@dataclass(frozen=True)
class Source:
    """One npm package of icons and the word for its style; `is_emoji`: named after emoji."""

    package: str
    style: str
    is_emoji: bool = False
    variant: str = ""  # the end of the names of icons in a second style, or empty

    @property
    def npm(self) -> str:
        return f"@iconify-json/{self.package}"


SOURCES = (
    Source("fluent-emoji-flat", "fluent flat", is_emoji=True),
    Source("emojione", "emojione", is_emoji=True),
    Source("fxemoji", "fxemoji", is_emoji=True),
    Source("noto-v1", "old noto", is_emoji=True),
    Source("game-icons", "game"),
    Source("icon-park", "park"),
    Source("material-icon-theme", "material"),
    Source("fluent-color", "fluent icon"),
    Source("flat-color-icons", "flat"),
    Source("streamline-ultimate-color", "ultimate"),
    Source("streamline-plump-color", "plump", variant="flat"),
    Source("streamline-flex-color", "flex", variant="flat"),
    Source("streamline-freehand-color", "freehand"),
    Source("streamline-kameleon-color", "kameleon", variant="duo"),
)
EMOJIBASE = "emojibase-data"
SHORTCODES = ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")


@dataclass(frozen=True)
class Drawing:
    """One drawing: `name` in plain words; `colour` of an icon in one colour, or None."""

    icon: str
    name: str
    style: str
    colour: str | None


@dataclass
class Wide:
    """The drawings in a cache: to train on, and (`held_out`) of val and test things in the unseen
    style, whose names are those of the small world."""

    drawings: list[Drawing]
    rgba: Tensor  # (N, 48, 48, 4) uint8, colours premultiplied by alpha
    held_out: list[Drawing]
    held_out_rgba: Tensor  # (M, 48, 48, 4)


def colour_of(icon: str) -> str:
    """The colour in which an icon of `currentColor` is drawn, one of INKS: by its name."""
    return INKS[zlib.crc32(icon.encode()) % len(INKS)]


def style_of(source: Source, icon: str) -> str:
    second = source.variant and icon.endswith(f"-{source.variant}")
    return f"{source.style} {source.variant}" if second else source.style


def read_json(archive: tarfile.TarFile, member: str) -> dict:
    return json.loads(read_member(archive, member))


def draw_icon(icons: dict, icon: str, colour: str) -> np.ndarray:
    """(48, 48, 4) uint8, colours premultiplied; `currentColor` in a colour of COLOURS."""
    import resvg_py  # extra: world

    entry = icons["icons"][icon]
    left, top = entry.get("left", 0), entry.get("top", 0)
    width = entry.get("width", icons.get("width", 16))
    height = entry.get("height", icons.get("height", 16))
    red, green, blue = (round(255 * c) for c in COLOURS[colour])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SPRITE_PX}" height="{SPRITE_PX}" viewBox="{left} {top} {width} {height}" '
        f'color="rgb({red},{green},{blue})">{entry["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa"))


def short_hash(rgba: np.ndarray) -> str:
    return hashlib.sha256(rgba.tobytes()).hexdigest()[:8]


def is_blank(rgba: np.ndarray) -> bool:
    return (rgba[..., 3] > 25).mean() < LEAST_INK


def fetch_package(package: str, version: str, integrity: str | None, folder: Path) -> Path:
    """The archive of a package of npm's registry, from `folder` if it is there already.

    Raises DTEError where it cannot be fetched, or has another sha512 (in npm's form).
    """
    name = package.split("/")[-1]
    path = Path(folder) / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        address = f"{REGISTRY}/{package}/-/{name}-{version}.tgz"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                archive = answer.read()
        except (OSError, http.client.HTTPException) as error:  # URLError's reason is an error, too
            said = reason_of(getattr(error, "reason", None) or error)
            raise DTEError(f"{address} cannot be had ({said}): save it as {path}.") from error
        write_atomically(path, archive)
    found = integrity_of(path.read_bytes())
    if integrity and found != integrity:
        raise DTEError(f"{path} has the checksum {found}, not {integrity}: delete it.")
    return path


def integrity_of(data: bytes) -> str:
    """npm's checksum of an archive."""
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def main(cache: Path, sources: tuple[Source, ...] = SOURCES, listed: dict | None = None) -> Wide:
    """Fetch what is missing, draw what is listed and write `cache/wide.{json,safetensors}`.

    listed: the content of `assets/wide.json`, which is the default. Raises DTEError for archives
    that are not those of the list; drawings that another version of resvg made are counted aloud.
    """
    cache, listed = Path(cache), listed or json.loads(LIST.read_text())
    parts = {"drawings": [], "held_out": []}
    pixels = {"drawings": [], "held_out": []}
    changed = 0
    for source in sources:
        entry = listed["packages"][source.package]
        path = fetch_package(source.npm, entry["version"], entry["integrity"], cache / "npm")
        with tarfile.open(path) as archive:
            icons = read_json(archive, "icons.json")
        for key, icon, name, digest in tqdm(entry["icons"], desc=source.package, mininterval=5):
            rgba = draw_icon(icons, icon, colour_of(icon))
            changed += short_hash(rgba) != digest
            parts[key].append(drawing(source, icons, icon, name))
            pixels[key].append(rgba)
    if changed:
        warnings.warn(
            f"{changed} drawings differ from the list's: resvg_py is of another version.",
            stacklevel=2,
        )
    text = json.dumps({key: [vars(d) for d in value] for key, value in parts.items()}, indent=0)
    empty = np.zeros((0, SPRITE_PX, SPRITE_PX, 4), np.uint8)
    tensors = {k: torch.from_numpy(np.stack(v) if v else empty) for k, v in pixels.items()}
    write_atomically(cache / "wide.json", text.encode())
    write_atomically(cache / "wide.safetensors", save(tensors, {"json": sha256(text)}))
    return load(cache)


def drawing(source: Source, icons: dict, icon: str, name: str) -> Drawing:
    plain = "currentColor" in icons["icons"][icon]["body"] and not source.is_emoji
    return Drawing(icon, name, style_of(source, icon), colour_of(icon) if plain else None)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load(cache: Path) -> Wide:
    """What `main` wrote. Raises DTEError when it is not there, damaged, or parts of two builds."""
    check_path("the wide world", cache)
    listed, pixels = Path(cache) / "wide.json", Path(cache) / "wide.safetensors"
    if not (listed.is_file() and pixels.is_file()):
        raise DTEError(f"{cache} holds no wide world: dte world build --wide {cache} makes it.")
    try:
        text = listed.read_text(encoding="utf-8")
        with safe_open(pixels, "pt") as file:
            if file.metadata()["json"] != sha256(text):
                raise DTEError(f"{cache} holds parts of two builds: build it anew.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, UnicodeError, LookupError, TypeError) as error:
        raise DTEError(f"{cache} is damaged ({reason_of(error)}): build it anew.") from error
    parts = {key: [Drawing(**d) for d in value] for key, value in json.loads(text).items()}
    return Wide(parts["drawings"], tensors["drawings"], parts["held_out"], tensors["held_out"])


def write_unseen(wide: Wide) -> None:
    """Write `assets/fxemoji.{webp,json}` from what `dte world build --wide` made: one drawing each
    of those val and test things that this style has.
    """
    rows = {d.name: row for d, row in zip(wide.held_out, wide.held_out_rgba, strict=True)}
    size = ATLAS_COLUMNS * UNSEEN_SIZE, -(-len(rows) // ATLAS_COLUMNS) * UNSEEN_SIZE
    atlas = Image.new("RGBA", size)
    for i, name in enumerate(sorted(rows)):
        row, column = divmod(i, ATLAS_COLUMNS)
        drawn = Image.frombytes("RGBa", (UNSEEN_SIZE, UNSEEN_SIZE), rows[name].numpy().tobytes())
        atlas.paste(drawn.convert("RGBA"), (column * UNSEEN_SIZE, row * UNSEEN_SIZE))
    write_atlas(UNSEEN_STYLE, atlas)
    write_atomically(ASSETS / f"{UNSEEN_STYLE}.json", json.dumps(sorted(rows), indent=0).encode())


def make_list(versions: dict[str, str], folder: Path) -> dict:
    """The content of `assets/wide.json` for versions {package: version}, emojibase-data's too."""
    emojibase = fetch_package(EMOJIBASE, versions[EMOJIBASE], None, folder)
    with tarfile.open(emojibase) as archive:
        codes = [read_json(archive, f"en/shortcodes/{name}.json") for name in SHORTCODES]
        emoji = Emoji(read_json(archive, "en/data.json"), codes)
    aliases = emoji.aliases()
    packages = {}
    for source in SOURCES:
        path = fetch_package(source.npm, versions[source.package], None, folder)
        with tarfile.open(path) as archive:
            packages[source.package] = {
                "version": versions[source.package], "integrity": integrity_of(path.read_bytes()),
                **choose(source, archive, emoji, HeldOut(aliases)),
            }  # fmt: skip
    return {"aliases": aliases, "packages": packages}


def choose(source: Source, archive: tarfile.TarFile, emoji: Emoji, held_out: HeldOut) -> dict:
    """Which icons of a package are kept, as [key, icon, name, hash], and how many are not, and why.

    key: the list in `Wide` that an icon belongs to.
    """
    icons, info = read_json(archive, "icons.json"), read_json(archive, "info.json")
    has_more = "package/metadata.json" in archive.getnames()
    about = read_json(archive, "metadata.json") if has_more else {}
    category = {i: c for c, names in about.get("categories", {}).items() for i in names}
    kept, seen = [], set()
    counts = dict.fromkeys(("hidden", "person", "held out", "style", "blank", "twice"), 0)
    newest = {icon_name(i): i for i in sorted(icons["icons"], key=_size)}
    for icon, entry in sorted(icons["icons"].items()):
        found = emoji.find(icon) if source.is_emoji else None
        name = icon_name(found["label"] if found else icon)
        rgba = draw_icon(icons, icon, colour_of(icon))
        digest = short_hash(rgba)
        if entry.get("hidden"):
            why = "hidden"
        elif source.is_emoji and emoji.is_personal(icon, category.get(icon, "")):
            why = "person"
        elif source.style == UNSEEN_STYLE:
            if whole := held_out.thing(icon) or held_out.thing(name):
                kept.append(["held_out", icon, whole, digest])
            why = "held out" if whole else "style"
        elif held_out.inside(icon) or held_out.inside(name):
            why = "held out"
        elif is_blank(rgba):
            why = "blank"
        elif digest in seen or (source.package == "fluent-color" and newest[name] != icon):
            why = "twice"
        else:
            seen.add(digest)
            kept.append(["drawings", icon, name, digest])
            continue
        counts[why] += 1
    whose = {"licence": info["license"]["spdx"], "author": info["author"]}
    return whose | {"left_out": counts, "icons": kept}


def _size(icon: str) -> int:
    """48 of 'heart-48', for packages that draw an icon in several sizes."""
    return int(last) if (last := icon.rsplit("-", 1)[-1]).isdigit() else 0
