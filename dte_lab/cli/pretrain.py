"""`dte pretrain`: training the encoder for any backbone, on any pictures."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dte_lab.cli.common import (
    AnyBackbone,
    Checkpointing,
    Device,
    Minutes,
    Out,
    Rank,
    Seed,
    Steps,
    given,
    number,
    prepare_out,
    whole,
)
from dte_lab.common.errors import DTEError
from dte_lab.common.quiet import quiet_libraries
from dte_lab.world.sprites import SAMPLE_CONCEPTS

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from dte_lab.backbone import Backbone
    from dte_lab.encoder import TuningEncoder
    from dte_lab.training.config import PretrainConfig

SharedBatchSize = Annotated[
    int | None, typer.Option(parser=whole, help="Of all processes together.")
]
FrozenPrecision = Annotated[str, typer.Option(help="no, bf16 or fp16: of frozen parts, autocast.")]
Pictures = Annotated[
    str | None,
    typer.Option(
        help="Folder with a sub-folder of pictures per class, or with OpenImages' boxes; tars of a "
        "WebDataset; a Hugging Face dataset with image and label. By default the small world."
    ),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read a Hugging Face dataset without storing it.")
]
FromStream = Annotated[
    int | None, typer.Option(parser=whole, help="How many pictures of a stream the cache takes.")
]
Crops = Annotated[
    int,
    typer.Option(
        parser=whole,
        help="Pairs of random crops of each picture, one to learn from, one as the target; "
        "0: its centre, as both.",
    ),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(help="Write latents and CLIP features there first, and train from them."),
]
Rate = Annotated[float | None, typer.Option(parser=number, help="The highest; 1e-3.")]
Warmup = Annotated[
    int | None, typer.Option(parser=whole, help="Steps until the highest rate; 200.")
]
Accumulation = Annotated[
    int | None, typer.Option(parser=whole, help="Batches a step is made of, one after the other.")
]
Regulariser = Annotated[
    str | None, typer.Option(help="Of v*: contrastive, or none or another to compare it with.")
]
Optimizer8bit = Annotated[
    bool, typer.Option("--optimizer-8bit", help="AdamW8bit of bitsandbytes, if installed.")
]
Workers = Annotated[
    int | None,
    typer.Option(parser=whole, help="Reading pictures; on a GPU one per core, of 8 at most."),
]
Every = Annotated[int | None, typer.Option(parser=whole, help="In steps.")]


def pretrain(
    out: Out,
    backbone: AnyBackbone = "small",
    data: Pictures = None,
    stream: Stream = False,
    pictures: FromStream = None,
    crops: Crops = 0,
    cache: CacheFolder = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch_size: SharedBatchSize = None,
    gradient_accumulation: Accumulation = None,
    learning_rate: Rate = None,
    warmup: Warmup = None,
    seed: Seed = None,
    rank: Rank = None,
    regulariser: Regulariser = None,
    device: Device = "cpu",
    mixed_precision: FrozenPrecision = "no",
    gradient_checkpointing: Checkpointing = False,
    optimizer_8bit: Optimizer8bit = False,
    num_workers: Workers = None,
    log_every: Every = None,
    checkpoint_every: Every = None,
    validate_every: Every = None,
) -> None:
    """Pre-train the tuning encoder; writes OUT/encoder. Several processes: accelerate launch."""
    quiet_libraries()
    from dte_lab.backbone import load_backbone
    from dte_lab.config import EncoderConfig, MethodConfig
    from dte_lab.encoder import TuningEncoder
    from dte_lab.training.config import PretrainConfig
    from dte_lab.training.pretrain import pretrain as train

    options = given(
        steps=steps, max_minutes=minutes, batch_size=batch_size, num_workers=num_workers,
        gradient_accumulation=gradient_accumulation, learning_rate=learning_rate,
        warmup_steps=warmup, seed=seed, log_every=log_every, checkpoint_every=checkpoint_every,
        validate_every=validate_every,
    )  # fmt: skip
    config = PretrainConfig(
        mixed_precision=mixed_precision, optimizer_8bit=optimizer_8bit, **options
    )
    method, changes = MethodConfig(**given(regulariser=regulariser)), given(rank=rank)
    EncoderConfig(**changes)  # mistakes are told before anything is loaded
    check_data(data, stream, crops, pictures)
    prepare_out(out)
    dtype = "fp32" if mixed_precision == "no" else mixed_precision
    parts = load_backbone(backbone, device, dtype, gradient_checkpointing=gradient_checkpointing)
    dataset, shown = training_pictures(parts, data, stream, crops, pictures)
    settings = EncoderConfig.of(parts.recommended, **changes)
    encoder = TuningEncoder.from_backbone(parts, settings, method, seed=config.seed)
    if cache is not None:
        dataset, config = cached(cache, dataset, parts, encoder, config)
        if dataset is None:
            return
    if data is not None:
        dataset, shown["validation"] = with_validation(dataset)
    train(parts, encoder, dataset, config, out_dir=out, **shown)


def check_data(data: str | None, stream: bool, crops: int, pictures: int | None) -> None:
    """Raise DTEError for numbers that mean nothing, and without data for options that read it."""
    from dte_lab.training.pictures import check_counts

    check_counts(crops, pictures)
    if data is None and (stream or crops or pictures):
        raise DTEError("--stream, --pictures and --crops belong to the pictures that --data names.")


def cached(
    folder: Path, dataset: "Dataset", backbone: "Backbone", encoder: "TuningEncoder",
    config: "PretrainConfig",
) -> "tuple[Dataset | None, PretrainConfig]":  # fmt: skip
    """The dataset as a cache has it, None where time was up before that was whole; what is left."""
    from dataclasses import replace

    from dte_lab.training.cache import CachedPictures, fill_cache
    from dte_lab.training.run import accelerator_for

    started, accelerator = time.monotonic(), accelerator_for(backbone, config)
    backbone.to(accelerator.device)
    if not fill_cache(
        folder, dataset, backbone, encoder.settings.clip_layer, accelerator, config.max_minutes,
        partial(typer.echo, err=True), config.num_workers,
    ):  # fmt: skip
        typer.echo("The cache is not whole yet: the same command goes on with it.", err=True)
        return None, config
    if config.max_minutes is not None:
        spent = (time.monotonic() - started) / 60
        config = replace(config, max_minutes=max(0.0, config.max_minutes - spent))
    return CachedPictures(folder), config


def with_validation(dataset: "Dataset") -> "tuple[Dataset, Dataset | None]":
    """What to train on, and what the validation loss is measured on: see `hold_out`."""
    from dte_lab.training.streams import StreamedPictures
    from dte_lab.training.validation import hold_out

    return (dataset, None) if isinstance(dataset, StreamedPictures) else hold_out(dataset)


def training_pictures(
    backbone: "Backbone", data: str | None, stream: bool = False, crops: int = 0,
    pictures: int | None = None,
) -> tuple:  # fmt: skip
    """The dataset of `pretrain`, and its options that depend on what the pictures are.

    Raises DTEError without `data` for a backbone that is no model of the small world.
    """
    if data is not None:
        from dte_lab.training.pictures import load_pictures
        from dte_lab.training.streams import StreamedPictures, is_webdataset

        if stream or is_webdataset(data):
            return StreamedPictures(data, backbone.resolution, crops, pictures), {}
        dataset = load_pictures(data, backbone.resolution, crops)
        n = len(dataset.examples)
        shown = [dataset.examples[i].picture for i in (0, n // 2)]
        return dataset, {"eval_images": shown, "probe_images": shown}
    from dte_lab.training.first_words import fit_token_head
    from dte_lab.world.pairs import ConceptPairs
    from dte_lab.world.scenes import render_image

    if not backbone.draws_small_world:
        raise DTEError(f"{backbone.name} is no model of the small world: say --data FOLDER.")
    shown = [render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS]
    prompts = ("a picture of S*", "a picture of S* on the beach")
    return ConceptPairs(), {
        "eval_images": shown,
        "eval_prompts": prompts,
        "probe_images": shown,
        "initialise": partial(fit_token_head, backbone=backbone),
    }
