"""The commands that made the shipped weights: `dte world ...`.

Each training command writes logs, sample grids and checkpoints to `--out` and, when called again
with the same folder, goes on where it stopped.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.cli.common import (
    Device,
    Minutes,
    Out,
    Rank,
    Seed,
    SmallBackbone,
    Steps,
    given,
    prepare_out,
    whole,
)

world = typer.Typer(help="Build, train and evaluate the small world.", no_args_is_help=True)
train = typer.Typer(help="Train a part of the small base model.", no_args_is_help=True)
world.add_typer(train, name="train")

BatchSize = Annotated[int | None, typer.Option(parser=whole, help="Pictures; on a GPU, 1,024.")]
Count = Annotated[
    int | None,
    typer.Option(parser=whole, help="Learn from so many drawings, the small world's first."),
]
WIDE = typer.Option("--wide", help="Folder of `dte world build --wide`.")
Precision = Annotated[
    str,
    typer.Option(help="no; or bf16, faster where the processor has it (avx512_bf16, or a GPU)."),
]
TrainedPart = Annotated[Path | None, typer.Option(help="OUT of its `dte world train`.")]


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
    each: Annotated[int, typer.Option(parser=whole, help="Drawings of each thing.")] = 12,
) -> None:
    """Draw a folder of pictures, a sub-folder of each thing, as `dte pretrain --data` takes it."""
    from dte_lab.world.data import write_drawings

    write_drawings(out, each)


@train.command()
def autoencoder(
    out: Out,
    wide: Annotated[Path | None, WIDE] = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    count: Count = None,
    seed: Seed = None,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the autoencoder; writes OUT/vae."""
    from dte_lab.world import train_autoencoder

    options = given(
        wide=wide, steps=steps, minutes=minutes, batch_size=batch_size, count=count, seed=seed
    )
    train_autoencoder.main(out, device=device, mixed_precision=mixed_precision, **options)


def part_command(name: str, given_parts: str, does: str) -> None:
    """Add the command of a part that learns from other parts; all of them take the same options.

    given_parts: what the help says of `--parts`.
    """

    def command(
        out: Out,
        parts: Annotated[Path, typer.Option(help=given_parts)],
        wide: Annotated[Path, WIDE],
        steps: Steps = None,
        minutes: Minutes = None,
        batch_size: BatchSize = None,
        count: Count = None,
        seed: Seed = None,
        device: Device = "cpu",
        mixed_precision: Precision = "no",
    ) -> None:
        run = import_module(f"dte_lab.world.train_{name}").main
        options = given(steps=steps, minutes=minutes, batch_size=batch_size, count=count, seed=seed)
        run(out, parts, wide, device=device, mixed_precision=mixed_precision, **options)

    train.command(name, help=does)(command)


part_command(
    "text",
    "Folder with vae.",
    "Train the text tower by painting; writes OUT/tokenizer, text_encoder and the word space.",
)
part_command(
    "unet",
    "Folder with vae and what `text` wrote; goes on with its unet.",
    "Train the UNet and, with it, the text tower; writes OUT/unet, text_encoder and scheduler.",
)
part_command(
    "decoder",
    "Folder with a trained base model.",
    "Train the autoencoder's decoder on what the denoiser draws; writes OUT/vae.",
)
part_command(
    "towers",
    "Folder with tokenizer and the final text_encoder.",
    "Train CLIP's picture tower; writes OUT/image_encoder, text_encoder, feature_extractor.",
)


@train.command()
def encoder(
    out: Out,
    backbone: SmallBackbone = "small",
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    wide: Annotated[Path | None, WIDE] = None,
    count: Count = None,
    word_steps: Annotated[int | None, typer.Option(parser=whole, help="Of the word.")] = None,
    word: Annotated[
        Path | None, typer.Option(help="word.safetensors of another run, instead.")
    ] = None,
    seed: Seed = None,
    width: Annotated[int | None, typer.Option(parser=whole, help="Of tokens and queries.")] = None,
    rank: Rank = None,
    regulariser: Annotated[str | None, typer.Option(help="Of v*, as in dte pretrain.")] = None,
    e4t: Annotated[bool, typer.Option("--e4t", help="The E4T-style baseline instead.")] = False,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the tuning encoder; writes OUT/encoder. Faster on a GPU than `dte pretrain`."""
    from dte_lab.training import small_world as train_encoder
    from dte_lab.world.wide import load

    options = given(
        steps=steps, minutes=minutes, batch_size=batch_size, count=count, word_steps=word_steps,
        word=word, seed=seed, width=width, rank=rank, regulariser=regulariser,
    )  # fmt: skip
    prepare_out(out)
    drawings = None if wide is None else load(wide)
    train_encoder.main(
        out, backbone, drawings, e4t=e4t, device=device, mixed_precision=mixed_precision, **options
    )


@world.command()
def pack(
    out: Out,
    autoencoder: TrainedPart = None,
    text: TrainedPart = None,
    unet: TrainedPart = None,
    decoder: TrainedPart = None,
    towers: TrainedPart = None,
    encoder: TrainedPart = None,
) -> None:
    """Gather trained parts into one backbone folder, in half precision, as it ships."""
    from dte_lab.world import pack

    runs = given(
        autoencoder=autoencoder, text=text, unet=unet, decoder=decoder, towers=towers,
        encoder=encoder,
    )  # fmt: skip
    if not runs:
        raise typer.BadParameter("Give the folder of one run at least, such as --text.")
    pack.main(runs, out)


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
