"""Pictures to pre-train the encoder on, where no world draws them.

As in the paper, a picture is its own target under a neutral prompt. The concept of a picture is its
class: pictures of one class are not pushed apart by the contrastive term. ("ours": the paper
trains on ImageNet and OpenImages and does not say what counts as another concept)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch.utils.data import Dataset

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.common.images import read_image, to_square_tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MOST_SKIPPED = 20  # one after the other, before a run ends


class Pairs(Protocol):
    """(picture, class index) pairs; a picture is a path or a PIL image."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Path | Image.Image, int]: ...


class ClassPictures(Dataset):
    """Items of `pretrain` from (picture, class index) pairs.

    In place of a picture that cannot be read stands the next that can, whenever the item is drawn,
    and `skipped` says so. Raises DTEError where `MOST_SKIPPED` in a row cannot be read.
    """

    def __init__(self, pairs: Pairs | Sequence[tuple[Path, int]], resolution: int) -> None:
        self.pairs, self.resolution = pairs, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        skipped = []
        for i in range(index, index + MOST_SKIPPED):
            i %= len(self)
            try:
                picture, concept = self.pairs[i]
                pixels = to_square_tensor(read_image(picture), self.resolution)
            except (ValueError, OSError) as error:  # a hub's row is decoded when it is drawn
                skipped.append(f"{i}: {error}")
                continue
            prompt = f"a picture of {placeholder_token}"
            return {
                "image": pixels, "prompt": prompt, "concept": concept,
                "skipped": " ".join(skipped),
            }  # fmt: skip
        raise DTEError(f"{len(skipped)} pictures in a row cannot be read: {skipped[0]}")


class HubPairs:
    """(picture, class index) pairs of a Hugging Face dataset with `image` and `label`, read lazily.

    Raises DTEError when the library `datasets` is missing or the columns are.
    """

    def __init__(self, name: str) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DTEError(
                f"{name} is no folder, and Hugging Face datasets need: pip install datasets"
            ) from error
        self.rows = load_dataset(name, split="train")
        if missing := {"image", "label"} - set(self.rows.column_names):
            raise DTEError(f"The dataset {name} has no column {sorted(missing)[0]}.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return row["image"], row["label"]


def load_pictures(source: str | Path, resolution: int) -> ClassPictures:
    """ClassPictures of a folder with a sub-folder of pictures per class, or of a hub dataset.

    Raises DTEError when a folder has no such pictures, and see `HubPairs`.
    """
    root = Path(source)
    if not root.is_dir():
        return ClassPictures(HubPairs(str(source)), resolution)
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    pairs = [
        (path, index)
        for index, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not pairs:
        raise DTEError(f"{root} has no sub-folders with pictures: make one for each class.")
    return ClassPictures(pairs, resolution)
