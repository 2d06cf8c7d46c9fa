"""The commands that made the shipped weights: `dte world ...`.

Each training command writes logs, sample grids and checkpoints to `--out` and, when called again
with the same folder, goes on where it stopped.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dte_lab.cli.common import Device, Out, Rank, SmallBackbone, given, whole

world = typer.Typer(help="Build, train and evaluate the small world.", no_args_is_help=True)
train = typer.Typer(help="Train a part of the small base model.", no_args_is_help=True)
world.add_typer(train, name="train")

Steps = Annotated[int | None, typer.Option(min=1, help="Train this many steps in all.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop this call after so long.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures a step; 1,024 on a GPU.")]
BankSize = Annotated[int | None, typer.Option(min=1, help="Pictures rendered beforehand.")]
Precision = Annotated[
    Literal["no", "bf16"],
    typer.Option(help="bf16 is faster where the processor has it (avx512_bf16, or a GPU)."),
]
TrainedPart = Annotated[Path, typer.Option(help="OUT of its `dte world train`.")]


@world.command()
def build(
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the archives from `npm pack`.")
    ] = None,
    wide: Annotated[
        Path | None, typer.Option(help="Fetch and draw the wide world into this folder instead.")
    ] = None,
) -> None:
    """Build the sprite atlases from four npm packages; or the wide world, to train on (175 MB)."""
    if (packages is None) == (wide is None):
        raise typer.BadParameter("Give either --packages or --wide.")
    if wide:
        from dte_lab.world.wide import main
    else:
        from dte_lab.world.build import main
    main(wide or packages)


@world.command()
def drawings(
    out: Out,
    each: Annotated[int, typer.Option(min=1, help="Drawings of each thing.")] = 12,
) -> None:
    """Draw a folder of pictures, a sub-folder of each thing, as `dte pretrain --data` takes it."""
    from dte_lab.world.data import write_drawings

    write_drawings(out, each)


@train.command()
def autoencoder(
    out: Out,
    parts: Annotated[
        Path | None, typer.Option(help="Folder with vae: train only its decoder further.")
    ] = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    bank_size: BankSize = None,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the autoencoder; writes OUT/vae."""
    from dte_lab.world import train_autoencoder

    options = given(
        parts=parts, steps=steps, minutes=minutes, batch_size=batch_size, bank_size=bank_size
    )
    train_autoencoder.main(out, device=checked(device), mixed_precision=mixed_precision, **options)


@train.command()
def clip(
    out: Out,
    parts: Annotated[Path, typer.Option(help="Folder with vae.")],
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    bank_size: BankSize = None,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train CLIP; writes OUT/tokenizer, text_encoder, image_encoder and feature_extractor."""
    from dte_lab.world import train_clip

    options = given(steps=steps, minutes=minutes, batch_size=batch_size, bank_size=bank_size)
    train_clip.main(out, parts, device=checked(device), mixed_precision=mixed_precision, **options)


@train.command()
def unet(
    out: Out,
    parts: Annotated[Path, typer.Option(help="Folder with vae, text_encoder and tokenizer.")],
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    bank_size: BankSize = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, pictures and noise.")] = None,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the UNet on the latents of the small world; writes OUT/unet and OUT/scheduler."""
    from dte_lab.world import train_unet

    options = given(
        steps=steps, minutes=minutes, batch_size=batch_size, bank_size=bank_size, seed=seed
    )
    train_unet.main(out, parts, device=checked(device), mixed_precision=mixed_precision, **options)


@train.command()
def encoder(
    out: Out,
    backbone: SmallBackbone = "small",
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    concepts: Annotated[int | None, typer.Option(min=2, help="Learn from so many.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Of tokens and queries.")] = None,
    rank: Rank = None,
    regulariser: Annotated[str | None, typer.Option(help="Of v*, as in dte pretrain.")] = None,
    e4t: Annotated[bool, typer.Option("--e4t", help="The E4T-style baseline instead.")] = False,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the tuning encoder; writes OUT/encoder. Faster on a GPU than `dte pretrain`."""
    from dte_lab.training import small_world as train_encoder

    options = given(
        steps=steps, minutes=minutes, batch_size=batch_size, concepts=concepts, width=width,
        rank=rank, regulariser=regulariser,
    )  # fmt: skip
    train_encoder.main(
        out, backbone, e4t=e4t, device=checked(device), mixed_precision=mixed_precision, **options
    )


@world.command()
def pack(
    out: Out,
    autoencoder: TrainedPart,
    clip: TrainedPart,
    unet: TrainedPart,
    encoder: Annotated[Path | None, typer.Option(help="OUT of its training.")] = None,
) -> None:
    """Gather the trained parts into one backbone folder, in half precision, as it ships."""
    from dte_lab.world import pack

    pack.main(given(autoencoder=autoencoder, clip=clip, unet=unet, encoder=encoder), out)


@world.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="JSON file for the measures.")],
    backbone: SmallBackbone = "small",
    captions: Annotated[
        int, typer.Option(parser=whole, help="Captions drawn, seen and novel each.")
    ] = 500,
) -> None:
    """Measure the base model: autoencoder, CLIP, and what its pictures show."""
    from dte_lab.evaluation import base_model as evaluate

    evaluate.main(out, backbone, captions)


def checked(device: str | None) -> str:
    from dte_lab.common.device import checked_device

    return checked_device(device)
