"""The commands that made the shipped weights: `dte pretrain` and `dte world ...`.

Each training command writes logs, sample grids and checkpoints to `--out` and, when called again
with the same folder, goes on where it stopped.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dte_lab.cli.common import (
    AnyBackbone,
    Checkpointing,
    Device,
    Out,
    Rank,
    SmallBackbone,
    given,
)
from dte_lab.common.errors import DTEError
from dte_lab.world.sprites import SAMPLE_CONCEPTS

if TYPE_CHECKING:
    import torch

    from dte_lab.backbone import Backbone

world = typer.Typer(help="Build, train and evaluate the small world.", no_args_is_help=True)
train = typer.Typer(help="Train a part of the small base model.", no_args_is_help=True)
world.add_typer(train, name="train")

Steps = Annotated[int | None, typer.Option(min=1, help="Train this many steps in all.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop this call after so long.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures a step; 1,024 on a GPU.")]
SharedBatchSize = Annotated[int | None, typer.Option(min=1, help="Of all processes together.")]
BankSize = Annotated[int | None, typer.Option(min=1, help="Pictures rendered beforehand.")]
Precision = Annotated[
    Literal["no", "bf16"],
    typer.Option(help="bf16 is faster where the processor has it (avx512_bf16, or a GPU)."),
]
FrozenPrecision = Annotated[str, typer.Option(help="no, bf16 or fp16: of frozen parts, autocast.")]
TrainedPart = Annotated[Path, typer.Option(help="OUT of its `dte world train`.")]
Pictures = Annotated[
    str | None,
    typer.Option(
        help="Folder with a sub-folder of pictures per class, or a Hugging Face dataset with "
        "image and label; by default the small world."
    ),
]
Regulariser = Annotated[
    str | None, typer.Option(help="Of v*: contrastive, or none or another to compare it with.")
]
Optimizer8bit = Annotated[
    bool, typer.Option("--optimizer-8bit", help="AdamW8bit of bitsandbytes, if installed.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Reading pictures.")]
Every = Annotated[int | None, typer.Option(min=1, help="In steps.")]


def pretrain(
    out: Out,
    backbone: AnyBackbone = "small",
    data: Pictures = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: SharedBatchSize = None,
    rank: Rank = None,
    regulariser: Regulariser = None,
    device: Device = "cpu",
    mixed_precision: FrozenPrecision = "no",
    gradient_checkpointing: Checkpointing = False,
    optimizer_8bit: Optimizer8bit = False,
    num_workers: Workers = None,
    log_every: Every = None,
    checkpoint_every: Every = None,
) -> None:
    """Pre-train the tuning encoder; writes OUT/encoder. Several processes: accelerate launch."""
    from dte_lab.backbone import load_backbone
    from dte_lab.config import EncoderConfig, MethodConfig
    from dte_lab.encoder import TuningEncoder
    from dte_lab.hardware.device import checked_device
    from dte_lab.training.pretrain import PretrainConfig, pretrain

    options = given(
        steps=steps, max_minutes=minutes, batch_size=batch_size, num_workers=num_workers,
        log_every=log_every, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    config = PretrainConfig(
        mixed_precision=mixed_precision, optimizer_8bit=optimizer_8bit, **options
    )
    method = MethodConfig(**given(regulariser=regulariser))
    parts = load_backbone(
        backbone,
        checked_device(device),
        checked_precision(mixed_precision),
        gradient_checkpointing=gradient_checkpointing,
    )
    dataset, shown = training_pictures(parts, data)
    settings = EncoderConfig.of(parts.recommended, **given(rank=rank))
    encoder = TuningEncoder.from_backbone(parts, settings, method)
    pretrain(parts, encoder, dataset, config, out_dir=out, **shown)


def training_pictures(backbone: "Backbone", data: str | None) -> tuple:
    """The dataset of `pretrain`, and its options that depend on what the pictures are.

    Raises DTEError without `data` for a backbone that is no model of the small world.
    """
    if data is not None:
        from dte_lab.training.pictures import load_pictures

        dataset = load_pictures(data, backbone.resolution)
        pictures = [dataset.pairs[0][0], dataset.pairs[len(dataset) // 2][0]]
        return dataset, {"eval_images": pictures, "probe_images": pictures}
    from dte_lab.training.first_words import fit_token_head
    from dte_lab.world.pairs import ConceptPairs
    from dte_lab.world.scenes import render_image

    if not backbone.draws_small_world:
        raise DTEError(f"{backbone.name} is no model of the small world: say --data FOLDER.")
    pictures = [render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS]
    prompts = ("a picture of S*", "a picture of S* on the beach")
    return ConceptPairs(), {
        "eval_images": pictures,
        "eval_prompts": prompts,
        "probe_images": pictures,
        "initialise": partial(fit_token_head, backbone=backbone),
    }


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
        int, typer.Option(min=4, help="Captions drawn, seen and novel each.")
    ] = 500,
) -> None:
    """Measure the base model: autoencoder, CLIP, and what its pictures show."""
    from dte_lab.evaluation import base_model as evaluate

    evaluate.main(out, backbone, captions)


def checked(device: str | None) -> str:
    from dte_lab.hardware.device import checked_device

    return checked_device(device)


def checked_precision(name: str) -> "torch.dtype":
    """The torch.dtype of frozen parts; DTEError for a word that is none of --mixed-precision."""
    import torch

    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise DTEError(f"--mixed-precision is no, bf16 or fp16, not {name}.")
    return dtypes[name]
