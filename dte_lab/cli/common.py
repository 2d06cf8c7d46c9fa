"""What the commands share: their options, the output folder, and loading a pipeline."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dte_lab.common.errors import DTEError
from dte_lab.common.quiet import quiet_libraries

if TYPE_CHECKING:
    from dte_lab import DTEPipeline

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
    typer.Option("--batch-size", help="Noise levels per step, and pictures drawn at once."),
]
DrawingBatch = Annotated[int | None, typer.Option("--batch-size", help="Pictures drawn at once.")]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="fp16, bf16 or fp32; fp16 for sd15 on a GPU, fp32 elsewhere."),
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, max=16, help="Rank of the offsets.")]
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


def prepare_folder(out: Path) -> None:
    """Make the output folder and try it, so that a full run cannot end without a place to write.

    Raises DTEError when it cannot be made or written.
    """
    if out.exists() and not out.is_dir():
        raise DTEError(f"{out} is a file; --out needs a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise DTEError(f"the output folder {out} cannot be written ({reason}).") from error


def load_pipeline(
    backbone: str, encoder: Path | None, device: str | None = None, dtype: str | None = None,
    tuning_batch: int | None = None, **options: bool,
) -> "DTEPipeline":  # fmt: skip
    """DTEPipeline for a backbone, said on stderr. options: of DTEPipeline.from_pretrained.

    tuning_batch: noise levels per step, where it is to be tuned; 0 for the recommended number.
    Raises DTEError, before anything is loaded, when the GPU is too small for Stable Diffusion 1.5.
    """
    typer.echo(f"loading the backbone {backbone} ...", err=True)
    quiet_libraries()
    from dte_lab import DTEPipeline
    from dte_lab.backbone import DTYPES
    from dte_lab.common.settings import check_one_of
    from dte_lab.hardware.device import checked_device
    from dte_lab.memory_needs import Setting, check_room
    from dte_lab.recommended import STABLE_DIFFUSION
    from dte_lab.zero_shot import ZeroShotStart

    if dtype is not None:
        check_one_of("--dtype", dtype, tuple(DTYPES))
    device = checked_device(device)
    if backbone == "sd15" and tuning_batch is not None:
        batch = tuning_batch or STABLE_DIFFUSION.batch_size
        check_room(Setting(batch=batch, dtype=dtype or "fp16", **options), "tuning", device)
    pipe = DTEPipeline.from_pretrained(
        backbone, encoder=encoder, device=device, dtype=DTYPES.get(dtype), **options
    )
    if isinstance(pipe.encoder, ZeroShotStart):
        typer.echo(
            f"no encoder for {backbone}: v* starts from the nearest words, and tuning has to learn "
            "the rest; 25 to 50 --steps are right, and some hundred overfit.",
            err=True,
        )
    return pipe
