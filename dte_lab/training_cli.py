"""The commands that made the shipped weights: `dte pretrain` and `dte world ...`.

Each training command writes logs, sample grids and checkpoints to `--out` and, when called again
with the same folder, goes on where it stopped.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

world = typer.Typer(help="Build, train and evaluate the small world.", no_args_is_help=True)
train = typer.Typer(help="Train a part of the small base model.", no_args_is_help=True)
world.add_typer(train, name="train")

Out = Annotated[Path, typer.Option("--out", help="Folder for what is written.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Train this many steps in all.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop this call after so long.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures a step; 1,024 on a GPU.")]
BankSize = Annotated[int | None, typer.Option(min=1, help="Pictures rendered beforehand.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")]
Precision = Annotated[
    Literal["no", "bf16"],
    typer.Option(help="bf16 is faster where the processor has it (avx512_bf16, or a GPU)."),
]
Backbone = Annotated[str, typer.Option(help="small, or a folder with a model of the small world.")]
Run = Annotated[Path, typer.Option(help="OUT of its `dte world train`.")]

SAMPLE_CONCEPTS = ("strawberry", "peacock", "tractor", "cupcake")  # val: not trained on


def pretrain(
    out: Out,
    backbone: Annotated[
        str, typer.Option(help="small, sd15, or a folder in the Stable Diffusion layout.")
    ] = "small",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with a sub-folder of pictures per class, or a Hugging Face dataset with "
            "image and label; by default the small world."
        ),
    ] = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of all processes together.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=16, help="Rank of the offsets.")] = None,
    regulariser: Annotated[
        str | None, typer.Option(help="Of v*: contrastive, or none or another to compare it with.")
    ] = None,
    device: Device = "cpu",
    mixed_precision: Annotated[
        str, typer.Option(help="no, bf16 or fp16: of frozen parts and autocast.")
    ] = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third slower.")
    ] = False,
    optimizer_8bit: Annotated[
        bool, typer.Option("--optimizer-8bit", help="AdamW8bit of bitsandbytes, if installed.")
    ] = False,
    num_workers: Annotated[int | None, typer.Option(min=0, help="Reading pictures.")] = None,
    log_every: Annotated[int | None, typer.Option(min=1, help="In steps.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="In steps.")] = None,
) -> None:
    """Pre-train the tuning encoder; writes OUT/encoder. Several processes: accelerate launch."""
    from dte_lab.backbone import load_backbone
    from dte_lab.data import load_pictures
    from dte_lab.encoder import DTEConfig, TuningEncoder
    from dte_lab.hardware_cli import checked_device
    from dte_lab.pretrain import PretrainConfig, pretrain
    from dte_lab.world.first_words import fit_token_head
    from dte_lab.world.pairs import ConceptPairs
    from dte_lab.world.scenes import render_image

    parts = load_backbone(
        backbone,
        checked_device(device),
        checked_precision(mixed_precision),
        gradient_checkpointing=gradient_checkpointing,
    )
    dte = DTEConfig(**given(rank=rank, regulariser=regulariser))
    encoder = TuningEncoder.from_backbone(parts, dte)
    if data is not None:
        dataset = load_pictures(data, parts.resolution)
        shown, start = [dataset.pairs[0][0], dataset.pairs[len(dataset) // 2][0]], None
        prompts = ("a picture of S*",)
    elif parts.resolution <= 64:
        dataset = ConceptPairs()
        start = partial(fit_token_head, backbone=parts)
        shown = [render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS]
        prompts = ("a picture of S*", "a picture of S* on the beach")
    else:
        raise ValueError(f"{backbone} is no model of the small world: say --data FOLDER.")
    pretrain(
        parts,
        encoder,
        dataset,
        PretrainConfig(
            mixed_precision=mixed_precision,
            optimizer_8bit=optimizer_8bit,
            **given(
                steps=steps,
                max_minutes=minutes,
                batch_size=batch_size,
                num_workers=num_workers,
                log_every=log_every,
                checkpoint_every=checkpoint_every,
            ),
        ),
        out_dir=out,
        eval_images=shown,
        eval_prompts=prompts,
        watched_images=shown,
        start=start,
    )


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
    train_autoencoder.main(out, device=device, mixed_precision=mixed_precision, **options)


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
    train_clip.main(out, parts, device=device, mixed_precision=mixed_precision, **options)


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
    train_unet.main(out, parts, device=device, mixed_precision=mixed_precision, **options)


@train.command()
def encoder(
    out: Out,
    backbone: Backbone = "small",
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    concepts: Annotated[int | None, typer.Option(min=2, help="Learn from so many.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Of tokens and queries.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=16, help="Rank of the offsets.")] = None,
    regulariser: Annotated[str | None, typer.Option(help="Of v*, as in dte pretrain.")] = None,
    e4t: Annotated[bool, typer.Option("--e4t", help="The E4T-style baseline instead.")] = False,
    device: Device = "cpu",
    mixed_precision: Precision = "no",
) -> None:
    """Train the tuning encoder; writes OUT/encoder. Faster on a GPU than `dte pretrain`."""
    from dte_lab.world import train_encoder

    options = given(
        steps=steps, minutes=minutes, batch_size=batch_size, concepts=concepts, width=width,
        rank=rank, regulariser=regulariser,
    )  # fmt: skip
    train_encoder.main(
        out, backbone, e4t=e4t, device=device, mixed_precision=mixed_precision, **options
    )


@world.command()
def pack(
    out: Out,
    autoencoder: Run,
    clip: Run,
    unet: Run,
    encoder: Annotated[Path | None, typer.Option(help="OUT of its training.")] = None,
) -> None:
    """Gather the trained parts into one backbone folder, in half precision, as it ships."""
    from dte_lab.world import pack

    pack.main(given(autoencoder=autoencoder, clip=clip, unet=unet, encoder=encoder), out)


@world.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="JSON file for the measures.")],
    backbone: Backbone = "small",
    captions: Annotated[
        int, typer.Option(min=4, help="Captions drawn, seen and novel each.")
    ] = 500,
) -> None:
    """Measure the base model: autoencoder, CLIP, and what its pictures show."""
    from dte_lab.world import evaluate

    evaluate.main(out, backbone, captions)


def checked_precision(name: str):
    """The torch.dtype of frozen parts; ValueError for a word that is none of --mixed-precision."""
    import torch

    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--mixed-precision is no, bf16 or fp16, not {name}.")
    return dtypes[name]


def given(**options) -> dict:
    """The options that the user gave; the others keep the default of the called function."""
    return {name: value for name, value in options.items() if value is not None}
