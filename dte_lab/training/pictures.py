"""Pictures to pre-train the encoder on, where no world draws them.

As in the paper, a picture is its own target under a neutral prompt. The concept of a picture is its
class: pictures of one class are not pushed apart by the contrastive term. ("ours": the paper
trains on ImageNet and OpenImages and does not say what counts as another concept)
"""

from pathlib import Path

from torch.utils.data import Dataset

from dte_lab import placeholder_token
from dte_lab.common.images import read_image, to_square_tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class ClassPictures(Dataset):
    """Items of `pretrain` from (picture, class index) pairs; a picture is a path or PIL image."""

    def __init__(self, pairs, resolution):
        self.pairs, self.resolution = pairs, resolution

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        picture, concept = self.pairs[index]
        pixels = to_square_tensor(read_image(picture), self.resolution)
        prompt = f"a picture of {placeholder_token}"
        return {"image": pixels, "target": pixels, "prompt": prompt, "concept": concept}


class HubPairs:
    """(picture, class index) pairs of a Hugging Face dataset with `image` and `label`, read lazily.

    Raises ValueError when the library `datasets` is missing or the columns are.
    """

    def __init__(self, name):
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{name} is no folder, and Hugging Face datasets need: pip install datasets"
            ) from error
        self.rows = load_dataset(name, split="train")
        if missing := {"image", "label"} - set(self.rows.column_names):
            raise ValueError(f"The dataset {name} has no column {sorted(missing)[0]}.")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return row["image"], row["label"]


def load_pictures(source, resolution):
    """ClassPictures of a folder with a sub-folder of pictures per class, or of a hub dataset.

    Raises ValueError when a folder has no such pictures, and see `HubPairs`.
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
        raise ValueError(f"{root} has no sub-folders with pictures: make one for each class.")
    return ClassPictures(pairs, resolution)
