"""The pictures that `dte personalize` and `dte generate` draw: their names, files and overview."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from dte_lab import placeholder_token
from dte_lab.cli.common import given
from dte_lab.common.images import save_png
from dte_lab.common.origin import origin_text
from dte_lab.prompts import check_drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dte_lab import Concept, DTEPipeline

NAME_BYTES = 120  # of a prompt in a file's name


class DrawingOptions(NamedTuple):
    """What to draw, and how; None is the default of DTEPipeline.generate."""

    prompts: list[str]
    seeds: list[int]
    guidance_scale: float | None
    negative_prompt: str
    num_inference_steps: int
    alpha: float | None
    batch_size: int | None

    def check(self) -> None:
        """Raise DTEError for what DTEPipeline.generate would refuse."""
        check_drawing(
            self.prompts, self.seeds, self.guidance_scale, self.num_inference_steps,
            self.negative_prompt, self.alpha, self.batch_size,
        )  # fmt: skip

    def draw(self, pipe: "DTEPipeline", concept: "Concept") -> list[list[Image.Image]]:
        """One picture per prompt and seed."""
        return pipe.generate(
            concept,
            self.prompts,
            seeds=self.seeds,
            **given(guidance_scale=self.guidance_scale, batch_size=self.batch_size),
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            alpha_blend=self.alpha,
        )


def picture_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
    """File names per prompt and seed, such as on-the-beach_seed0.png for "S* on the beach".

    Letters of any script stay. Prompts that would get the same name are numbered.
    """
    taken, names = set(), []
    for prompt in prompts:
        slug = re.sub(r"[\W_]+", "-", prompt.replace(placeholder_token, " ").lower())
        slug = slug.encode(errors="ignore")[:NAME_BYTES].decode(errors="ignore").strip("-")
        slug = slug or "concept"
        name = next(n for n in chain([slug], (f"{slug}-{i}" for i in count(2))) if n not in taken)
        taken.add(name)
        names.append([f"{name}_seed{seed}.png" for seed in seeds])
    return names


def picture_origins(
    prompts: Sequence[str], seeds: Sequence[int], out: Path, concept: str
) -> dict[Path, dict[str, str]]:
    """{file: what it is made of} for each prompt and seed. concept: see `Concept.origin`."""
    return {
        out / name: {"concept": concept, "prompt": prompt}
        for prompt, names in zip(prompts, picture_names(prompts, seeds), strict=True)
        for name in names
    }


def save_pictures(
    drawn: Sequence[Sequence[Image.Image]], origins: Mapping[Path, Mapping[str, str]]
) -> list[str]:
    """Write one PNG per prompt and seed, with its origin; return their names."""
    pictures = [picture for row in drawn for picture in row]
    for picture, (path, origin) in zip(pictures, origins.items(), strict=True):
        save_png(picture, path, origin_text(origin))
    return [path.name for path in origins]


def contact_sheet(
    pictures: Sequence[Image.Image],
    drawn: Mapping[str, Sequence[Sequence[Image.Image]]],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> "Figure":
    """One row per prompt: an input picture, then for each result one picture per seed."""
    from dte_lab.common.plots import picture_grid

    rows = [
        [pictures[r % len(pictures)], *(p for result in drawn.values() for p in result[r])]
        for r in range(len(prompts))
    ]
    columns = ["input"]
    for name in drawn:
        columns += [name if len(seeds) == 1 else f"{name}\nseed {seed}" for seed in seeds]
    return picture_grid(rows, columns, prompts)
