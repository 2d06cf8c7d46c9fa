"""What the commands share: their options, and loading a pipeline.

Numbers and words are handed on as they were typed: what is asked for is checked in one place, where
it is asked from Python as well.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dte_lab.common.errors import one_line
from dte_lab.common.files import prepare_folder
from dte_lab.common.quiet import quiet_libraries

if TYPE_CHECKING:
    from dte_lab import DTEPipeline


def whole(text: str) -> int | str:
    """A whole number; or what was typed, which the check of its setting answers."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> float | str:
    """A number; or what was typed, which the check of its setting answers."""
    try:
        return float(text)
    except ValueError:
        return text


NEW_FOLDERS: list[Path] = []  # that `prepare_out` made
Out = Annotated[Path, typer.Option("--out", help="Folder for what is written.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what another picture or prompt has left there.")
]
AnyBackbone = Annotated[
    str, typer.Option("--backbone", help="small, sd15, or a folder in the Stable Diffusion layout.")
]
SmallBackbone = Annotated[
    str, typer.Option("--backbone", help="small, or a folder with a model of the small world.")
]
Encoder = Annotated[
    Path | None,
    typer.Option("--encoder", help="A folder, or small/none; by default the backbone's own."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="auto (cuda if there is a GPU), cpu, cuda, cuda:N or mps."),
]
TuningBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size", parser=whole, help="Noise levels per step, and pictures drawn at once."
    ),
]
DrawingBatch = Annotated[
    int | None, typer.Option("--batch-size", parser=whole, help="Pictures drawn at once.")
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="fp16, bf16 or fp32; fp16 for sd15 on a GPU, fp32 elsewhere."),
]
Rank = Annotated[
    int | None, typer.Option("--rank", parser=whole, help='Of the offsets, or "full"; 4.')
]
Steps = Annotated[int | None, typer.Option(parser=whole, help="Train this many steps in all.")]
Seed = Annotated[int | None, typer.Option(parser=whole, help="Of weights, pictures and noise.")]
Minutes = Annotated[float | None, typer.Option(parser=number, help="Stop this call after so long.")]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Train with less memory, about a third slower."),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep image encoder and autoencoder on the CPU while idle."),
]


def given(**options: object) -> dict[str, object]:
    """The options that the user gave; the others keep the default of the called function."""
    return {name: value for name, value in options.items() if value is not None}


def prepare_out(out: Path) -> None:
    """`prepare_folder`, for `remove_empty` after what is refused later, such as a device."""
    NEW_FOLDERS.extend(x for x in (out, *out.parents) if not os.path.lexists(x))
    prepare_folder(out)


def remove_empty() -> None:
    """Remove the folders, innermost first, that this command made and wrote nothing to."""
    with suppress(OSError):
        for folder in NEW_FOLDERS:
            folder.rmdir()
    NEW_FOLDERS.clear()


def load_pipeline(
    backbone: str, encoder: Path | None, device: str | None = None, dtype: str | None = None,
    tuning_batch: int | None = None, **options: bool,
) -> "DTEPipeline":  # fmt: skip
    """DTEPipeline for a backbone, said on stderr. options: of DTEPipeline.from_pretrained.

    tuning_batch: noise levels per step, where it is to be tuned; 0 for the recommended number.
    Raises DTEError, before anything is loaded, when the GPU is too small for Stable Diffusion 1.5.
    """
    typer.echo(one_line(f"loading the backbone {backbone} ..."), err=True)
    quiet_libraries()
    from dte_lab import DTEPipeline
    from dte_lab.backbone import checked_dtype
    from dte_lab.common.device import checked_device
    from dte_lab.memory_needs import Setting, check_room
    from dte_lab.recommended import STABLE_DIFFUSION
    from dte_lab.zero_shot import ZeroShotStart

    device = checked_device(device)
    if dtype is not None:
        checked_dtype(dtype)
    if backbone == "sd15" and tuning_batch is not None:
        batch = tuning_batch or STABLE_DIFFUSION.batch_size
        check_room(Setting(batch=batch, dtype=dtype or "fp16", **options), "tuning", device)
    pipe = DTEPipeline.from_pretrained(
        backbone, encoder=encoder, device=device, dtype=dtype, **options
    )
    if isinstance(pipe.encoder, ZeroShotStart):
        typer.echo(
            f"no encoder for {backbone}: v* starts from the nearest words, and tuning has to learn "
            "the rest; 25 to 50 --steps are right, and some hundred overfit.",
            err=True,
        )
    return pipe
