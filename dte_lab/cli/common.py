"""What the commands share: their options, the output folder, and loading a pipeline."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.common.quiet import quiet_libraries

Out = Annotated[Path, typer.Option("--out", help="Folder for what is written.")]
BackboneName = Annotated[
    str, typer.Option("--backbone", help="small, sd15, or a folder in the Stable Diffusion layout.")
]
EncoderFolder = Annotated[
    Path | None,
    typer.Option("--encoder", help="A folder, or small/none; by default the backbone's own."),
]


def prepare_folder(out: Path) -> None:
    """Make the output folder and try it, so that a full run cannot end without a place to write.

    Raises OSError when it cannot be made or written.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out needs a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"the output folder {out} cannot be written ({reason}).") from error


def load_pipeline(backbone: str, encoder: Path | None, device: str | None = None, **options):
    """DTEPipeline for a backbone; one that lies on the disk never needs the network."""
    typer.echo(f"loading the backbone {backbone} ...", err=True)
    if backbone == "small" or (Path(backbone) / "image_encoder").is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries()
    from dte_lab import DTEPipeline
    from dte_lab.hardware.device import checked_device
    from dte_lab.zero_shot import ZeroShotStart

    device = checked_device(device)
    pipe = DTEPipeline.from_pretrained(backbone, encoder=encoder, device=device, **options)
    if isinstance(pipe.encoder, ZeroShotStart):
        typer.echo(
            f"no encoder for {backbone}: v* starts from the nearest word, and tuning has to learn "
            "the rest; plan for some hundred --steps.",
            err=True,
        )
    return pipe


Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; by default cuda where there is a GPU.")
]
TuningBatch = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Noise levels per tuning step.")
]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Tune with less memory, about a third slower."),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep image encoder and autoencoder on the CPU while idle."),
]


def given(**options) -> dict:
    """The options that the user gave; the others keep the default of the called function."""
    return {name: value for name, value in options.items() if value is not None}
