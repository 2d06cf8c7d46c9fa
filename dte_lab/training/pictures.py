"""Pictures to pre-train the encoder on, where no world draws them.

As in the paper, a picture is its own target under a neutral prompt; or, with `crops`, one random
crop of it is the target of another, so that the encoder cannot learn to copy the layout. ("ours")
The concept of a picture is its class, or the label of the box that is cut out of it: pictures of
one class are not pushed apart by the contrastive term. ("ours": the paper trains on ImageNet and
OpenImages and does not say what counts as another concept)
"""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import check_path
from dte_lab.common.images import read_image, to_square_tensor
from dte_lab.common.random import stream
from dte_lab.common.settings import check_whole

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MOST_SKIPPED = 20  # one after the other, before a run ends
SMALLEST_CROP = 0.7  # of a side
SMALLEST_BOX = 0.2  # of a side of its picture
AROUND_BOX = 1.3  # its longer side, times this, is what is cut out
PICTURES, LABELS = ("image", "jpg", "jpeg", "png", "webp"), ("label", "cls", "objects")  # columns
EDGES = ("XMin", "YMin", "XMax", "YMax")  # columns of OpenImages
NEUTRAL_PROMPT = f"a picture of {placeholder_token}"


class Example(NamedTuple):
    """A picture, its class, and where it shows that: left, top, right, bottom in [0, 1]."""

    picture: Path | Image.Image
    concept: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


class Examples(Protocol):
    """What `ClassPictures` shows; `concepts` are their classes."""

    concepts: Sequence[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class ExampleList(list[Example]):
    @property
    def concepts(self) -> list[int]:
        return [example.concept for example in self]


def check_counts(crops: int, pictures: int | None = None) -> None:
    """Of pairs of random crops of each picture, and of pictures of a stream. Raises DTEError."""
    check_whole("crops", crops, 0)
    if pictures is not None:
        check_whole("pictures", pictures, 1)


class ClassPictures(Dataset):
    """Items of `pretrain`; item i shows example i modulo their number.

    crops: how many pairs of random crops of each, drawn for each item anew; 0 for its centre alone.
    In place of a picture that cannot be read stands the next that can, whenever the item is drawn,
    and `skipped` says so. Raises DTEError where `MOST_SKIPPED` in a row cannot be read.
    """

    def __init__(
        self, examples: Examples, resolution: int, crops: int = 0, source: str = ""
    ) -> None:
        check_counts(crops)
        self.examples, self.resolution, self.crops = examples, resolution, crops
        self.source = f"{source} with {crops} crops" if crops else source

    def __len__(self) -> int:
        return len(self.examples) * max(1, self.crops)

    @property
    def concepts(self) -> list[int]:
        return list(self.examples.concepts) * max(1, self.crops)

    def __getitem__(self, index: int) -> dict:
        skipped = []
        for i in range(index, index + MOST_SKIPPED):
            i %= len(self.examples)
            try:
                example = self.examples[i]
                generator = stream(0, "crops", index) if self.crops else None
                item = make_item(example, self.resolution, generator)
            except (ValueError, OSError) as error:  # a hub's row is decoded when it is drawn
                skipped.append(f"{i}: {error}")
                continue
            return item | {"skipped": " ".join(skipped)}
        raise DTEError(f"{len(skipped)} pictures in a row cannot be read: {skipped[0]}")


def make_item(example: Example, resolution: int, generator: torch.Generator | None) -> dict:
    """image, prompt and concept; with a generator also target, both being random crops."""
    picture = cut_out(read_image(example.picture), example.box)
    names = ("image",) if generator is None else ("image", "target")
    crops = [picture if generator is None else random_crop(picture, generator) for _ in names]
    pixels = {n: to_square_tensor(x, resolution) for n, x in zip(names, crops, strict=True)}
    return pixels | {"prompt": NEUTRAL_PROMPT, "concept": example.concept}


def cut_out(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A square around a box, within the picture as far as there is one; all of it for (0, 0, 1, 1).

    Raises DTEError for a box that is none.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1.001 and 0 <= top < bottom <= 1.001):
        raise DTEError(f"{box} is no box.")
    if box == (0, 0, 1, 1):
        return image
    W, H = image.size
    side = min(W, H, round(AROUND_BOX * max((right - left) * W, (bottom - top) * H)))
    x = min(max(0, round((left + right) / 2 * W - side / 2)), W - side)
    y = min(max(0, round((top + bottom) / 2 * H - side / 2)), H - side)
    return image.crop((x, y, x + side, y + side))


def random_crop(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """A square of `SMALLEST_CROP` to all of the shorter side, mirrored half of the time."""
    share, x, y, mirrored = torch.rand(4, generator=generator).tolist()
    W, H = image.size
    side = round((SMALLEST_CROP + (1 - SMALLEST_CROP) * share) * min(W, H))
    left, top = round(x * (W - side)), round(y * (H - side))
    crop = image.crop((left, top, left + side, top + side))
    return ImageOps.mirror(crop) if mirrored < 0.5 else crop


class HubExamples:
    """Examples of a Hugging Face dataset, read lazily: see `example_of_row`.

    Raises DTEError when the library `datasets` is missing or the dataset has no pictures.
    """

    def __init__(self, name: str) -> None:
        library = hub_library(name)
        with readable(name):
            self.rows = library.load_dataset(name, split="train")
        check_columns(name, self.rows.column_names)

    @property
    def concepts(self) -> list[int]:
        if "label" in self.rows.column_names:
            return list(self.rows["label"])
        return [0] * len(self)  # known when a row is read, so that no class can be held out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return example_of_row(self.rows[index])


def hub_library(name: str) -> ModuleType:
    """The library `datasets`. Raises DTEError where it is missing, for the data called `name`."""
    try:
        import datasets
    except ImportError as error:
        raise DTEError(
            f"{name} is no folder of pictures, and Hugging Face datasets and tars of a WebDataset "
            f"need: pip install datasets ({reason_of(error)})."
        ) from error
    return datasets


@contextmanager
def readable(name: str) -> Iterator[None]:
    """DTEError for whatever `datasets` cannot find or read inside, of the data called `name`."""
    try:
        yield
    except Exception as error:  # of the network, of tars, of pyarrow, of scripts, ...
        raise DTEError(
            f"{name} is no folder of pictures, and no dataset that can be read "
            f"({reason_of(error)})."
        ) from error


def check_columns(name: str, columns: Sequence[str]) -> None:
    """Raise DTEError where there is no picture or nothing that says what it shows."""
    for known in (PICTURES, LABELS):
        if not set(known) & set(columns):
            raise DTEError(f"The dataset {name} has no column {' or '.join(known)}.")


def example_of_row(row: dict) -> Example:
    """Of a picture and its label, or of the largest of its `objects`.

    objects: as in datasets with COCO's layout, {"bbox": [[x, y, width, height] in pixels, ...],
    "category" or "label": [...]}. Raises DTEError for a picture without any.
    """
    try:
        return _example(row)
    except DTEError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise DTEError(f"The row has no picture with a label or boxes ({error}).") from error


def _example(row: dict) -> Example:
    [picture, *_] = [row[name] for name in PICTURES if row.get(name) is not None]
    picture = picture if isinstance(picture, Image.Image) else read_image(as_file(picture))
    if row.get("objects") is None:
        return Example(picture, int(row["label"] if "label" in row else row["cls"]))
    boxes = row["objects"]["bbox"]
    if not boxes:
        raise DTEError("There is no box in the picture.")
    k = max(range(len(boxes)), key=lambda k: boxes[k][2] * boxes[k][3])
    labels = row["objects"].get("category") or row["objects"]["label"]
    (x, y, w, h), (W, H) = boxes[k], picture.size
    box = tuple(min(1.0, max(0.0, v)) for v in (x / W, y / H, (x + w) / W, (y + h) / H))
    return Example(picture, int(labels[k]), box)


def as_file(picture: dict) -> Path | io.BytesIO:
    """What `read_image` takes, of an undecoded picture {"bytes", "path"}."""
    return io.BytesIO(picture["bytes"]) if picture.get("bytes") else Path(picture["path"])


def load_pictures(source: str | Path, resolution: int, crops: int = 0) -> ClassPictures:
    """ClassPictures of a folder with a sub-folder of pictures per class, or of a hub dataset.

    A folder with a CSV file of OpenImages' boxes is read with those: see `boxes_of`.
    Raises DTEError when a folder has no such pictures, and see `HubExamples`.
    """
    check_path("the pictures", source)
    root = Path(source)
    if not root.is_dir():
        return ClassPictures(HubExamples(str(source)), resolution, crops, str(source))
    if tables := sorted(root.glob("*.csv")):
        return ClassPictures(boxes_of(root, tables), resolution, crops, str(source))
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    examples = ExampleList(
        Example(path, index)
        for index, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    )
    if not examples:
        raise DTEError(f"{root} has no sub-folders with pictures: make one for each class.")
    return ClassPictures(examples, resolution, crops, str(source))


def read_boxes(table: Path) -> Iterator[dict]:
    """The rows of a table with OpenImages' columns, with numbers for the EDGES.

    Raises DTEError, with the line, for a table that is none.
    """
    line = 1
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"ImageID", "LabelName", *EDGES} <= set(rows.fieldnames or ()):
                raise DTEError(f"{table} has not the columns of OpenImages' boxes.")
            for row in rows:
                line = rows.line_num
                yield row | {edge: float(row[edge]) for edge in EDGES}
    except (OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, DTEError):
            raise
        raise DTEError(f"{table} cannot be read behind line {line} ({error}).") from error


def boxes_of(root: Path, tables: Sequence[Path]) -> ExampleList:
    """An example for each box in tables with OpenImages' columns, of the pictures in `root`.

    Groups and boxes under `SMALLEST_BOX` of a side are left out. Raises DTEError for a table with
    other columns, and where nothing is left.
    """
    pictures = {p.stem: p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES}
    found = []
    for table in tables:
        for row in read_boxes(table):
            left, top, right, bottom = box = tuple(row[edge] for edge in EDGES)
            large = max(right - left, bottom - top) >= SMALLEST_BOX
            if row["ImageID"] in pictures and large and row.get("IsGroupOf") != "1":
                found.append((pictures[row["ImageID"]], row["LabelName"], box))
    if not found:
        raise DTEError(f"{root} has no picture to which a box in {tables[0]} belongs.")
    labels = {label: index for index, label in enumerate(sorted({label for _, label, _ in found}))}
    return ExampleList(Example(path, labels[label], box) for path, label, box in found)
