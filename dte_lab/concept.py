"""A personalized concept: everything `generate` needs beside the backbone, in one small file."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path, write_atomically
from dte_lab.common.origin import digest, origin_text
from dte_lab.config import MethodConfig
from dte_lab.lora import Offsets, check_offsets, projection_shapes
from dte_lab.recommended import Recommended

FORMAT = "dte-concept-2"
UNREADABLE = (
    SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError,
)  # fmt: skip
LARGEST = 1e6  # of the values in a file; an embedding has some 0.01 to 100


@dataclass
class Concept:
    """v* and the low-rank offsets of one concept.

    offsets: {"layer.projection": (A (1, Din, r), B (1, r, Dout))}. backbone: the name of that which
    it belongs to. info: what happened: seconds, peak_memory_mb, losses, words_before, ...
    pictures: those it was made from, as the backbone sees them; what `prediction_interval` needs to
    predict anew, so they are in the file as well. settings: what it was tuned with, and the
    guidance to draw it with; None for the backbone's own.
    """

    v_star: Float[Tensor, "1 dim"]
    offsets: Offsets
    backbone: str
    config: MethodConfig = field(default_factory=MethodConfig)
    info: dict = field(default_factory=dict)
    pictures: UInt8[Tensor, "pictures 3 height width"] | None = None
    settings: Recommended | None = None

    @property
    def nearest_words(self) -> list[tuple[str, float]]:
        """[[word, cosine similarity], ...] of the usable words nearest to v*."""
        return self.info.get("words_after", [])

    @property
    def seconds(self) -> float:
        """Wall-clock time that `personalize` took."""
        return self.info.get("seconds", 0.0)

    @property
    def origin(self) -> str:
        """Digits that tell which pictures it was made from; without them, which numbers it has."""
        known = self.info.get("origin")
        return known or digest([self.v_star.detach().float().cpu().numpy().tobytes()])

    def word_alone(self) -> "Concept":
        """The same v* without the offsets: what the word alone says."""
        offsets = {key: (a, torch.zeros_like(b)) for key, (a, b) in self.offsets.items()}
        return replace(self, offsets=offsets)

    def weights_alone(self, word: Float[Tensor, "1 dim"]) -> "Concept":
        """The same offsets with another v*, of a word that says nothing of it such as "thing"."""
        return replace(self, v_star=word.to(self.v_star))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, atomically. Raises OSError when the folder is not writable."""
        check_path("the concept file", path)
        tensors = {"v_star": self.v_star}
        for key, (a, b) in self.offsets.items():
            tensors |= {f"offsets.{key}.A": a, f"offsets.{key}.B": b}
        metadata = {
            "format": FORMAT,
            "backbone": self.backbone,
            "config": json.dumps(asdict(self.config)),
            "info": json.dumps(self.info),
            **origin_text({"concept": self.origin}),
        }
        if self.settings is not None:
            metadata["settings"] = json.dumps(asdict(self.settings))
        tensors = {key: t.detach().float().cpu().contiguous() for key, t in tensors.items()}
        if self.pictures is not None:
            tensors["pictures"] = self.pictures.cpu().contiguous()
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: Path | str) -> "Concept":
        """Read a file that `save` wrote.

        Raises FileNotFoundError when there is none and DTEError when it is damaged.
        """
        check_path("the concept file", path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no concept file at {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')}, not {FORMAT}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            settings, info = metadata.get("settings"), json.loads(metadata["info"])
            if not isinstance(info, dict) or not metadata["backbone"].isprintable():
                raise ValueError("its info or its backbone's name is of another kind")
            v_star, offsets, pictures = _parts(tensors)
            return cls(
                v_star,
                offsets,
                metadata["backbone"],
                MethodConfig(**json.loads(metadata["config"])),
                info,
                pictures,
                None if settings is None else Recommended(**json.loads(settings)),
            )
        except UNREADABLE as error:
            raise DTEError(
                f"{path} is not a readable concept file ({error}): "
                "copy it again, or make a new one with personalize."
            ) from error

    def check(self, backbone: Backbone) -> None:
        """Raise DTEError when the concept does not fit the backbone."""
        width = backbone.text_encoder.config.hidden_size
        if self.v_star.shape != (1, width):
            raise DTEError(
                f"The concept's v* has shape {tuple(self.v_star.shape)}, "
                f"but backbone {backbone.name} needs (1, {width})."
            )
        check_offsets(self.offsets, projection_shapes(backbone.unet))


def _parts(tensors: dict[str, Tensor]) -> tuple[Tensor, Offsets, Tensor | None]:
    """v*, offsets and pictures of a file's tensors.

    Complains of one that is missing, has no place, or is not as `save` writes it.
    """
    tensors = dict(tensors)
    for key, tensor in tensors.items():
        dtype = torch.uint8 if key == "pictures" else torch.float32
        dimensions = {"v_star": 2, "pictures": 4}.get(key, 3)
        if tensor.dtype != dtype or tensor.ndim != dimensions or not tensor.numel():
            raise ValueError(f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        if key != "pictures" and (len(tensor) != 1 or not tensor.abs().max() < LARGEST):
            raise ValueError(f"{key} is several, or holds values that are not finite")
    v_star, pictures, offsets = tensors.pop("v_star"), tensors.pop("pictures", None), {}
    for name in [key[:-2] for key in tensors if key.endswith(".A")]:
        a, b = tensors.pop(f"{name}.A"), tensors.pop(f"{name}.B")
        if a.shape[2] != b.shape[1]:
            raise ValueError(f"{name} has A of {tuple(a.shape)} and B of {tuple(b.shape)}")
        offsets[name.removeprefix("offsets.")] = a, b
    if tensors:
        raise ValueError(f"{next(iter(tensors))} has no place in it")
    return v_star, offsets, pictures
