"""The `dte` command.

    dte personalize PICTURE --prompt "S* on the beach" --out out/
    dte generate out/concept.safetensors --prompt "S* at night" --out out/
    dte pretrain | dte world ...        how the shipped weights were made
    dte memory | dte doctor             what fits on this machine, and what would fail
    dte explore                         every switch of the method, in the browser

How it ends is in common/command.py. Prompts, pictures and the output folder are checked before any
slow work.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dte_lab import __version__, placeholder_token
from dte_lab.cli import evaluation, hardware, training
from dte_lab.cli.common import (
    AnyBackbone,
    Checkpointing,
    Device,
    DrawingBatch,
    DType,
    Encoder,
    Offload,
    Out,
    Overwrite,
    TuningBatch,
    given,
    load_pipeline,
    number,
    prepare_out,
    remove_empty,
    whole,
)
from dte_lab.cli.drawings import DrawingOptions, contact_sheet, picture_origins, save_pictures
from dte_lab.cli.explore import explore
from dte_lab.cli.pretrain import pretrain
from dte_lab.common.errors import DTEError
from dte_lab.common.files import keep_inputs
from dte_lab.common.images import Picture, read_pictures, square
from dte_lab.common.origin import check_free, origin_text, pictures_digest
from dte_lab.common.quiet import quiet_libraries, warnings_in_one_line
from dte_lab.prompts import check_tuning

if TYPE_CHECKING:
    from dte_lab import Concept, DTEPipeline, TuneConfig

app = typer.Typer(
    help="Personalize a text-to-image model from one picture.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Prompts = Annotated[
    list[str],
    typer.Option(
        "--prompt", help=f"What to draw, with {placeholder_token} for the concept; repeatable."
    ),
]
Seeds = Annotated[
    list[int],
    typer.Option("--seed", parser=whole, help="One picture per prompt and seed; repeatable."),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", parser=number, help="Of the dual path: 1 soft only, 0 hard only."),
]
TuningSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", parser=whole, help="0 for none; by default 12, for sd15 without encoder 30."
    ),
]
TuningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", parser=number, help="Of the offsets; 0.06. Falls after 6 steps."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", parser=number, help="By default the model's: small 1.5, others 7.5."
    ),
]
Negative = Annotated[str, typer.Option("--negative-prompt", help="What not to draw.")]
InferenceSteps = Annotated[int, typer.Option("--num-inference-steps", parser=whole)]
Masks = Annotated[
    list[Path],
    typer.Option("--mask", help="White where the thing is; one for each picture, in their order."),
]
Fit = Annotated[str, typer.Option("--fit", help="crop to the middle's square, or pad to one.")]
CONCEPT, SHEET = "concept.safetensors", "contact_sheet.png"


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"dte_lab {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def personalize(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures of one concept.")],
    prompt: Prompts,
    out: Out,
    steps: TuningSteps = None,
    mask: Masks = (),
    fit: Fit = "crop",
    seed: Seeds = (0,),
    backbone: AnyBackbone = "small",
    encoder: Encoder = None,
    learning_rate: TuningRate = None,
    guidance_scale: Guidance = None,
    negative_prompt: Negative = "",
    num_inference_steps: InferenceSteps = 25,
    alpha: Alpha = None,
    device: Device = None,
    dtype: DType = None,
    batch_size: TuningBatch = None,
    gradient_checkpointing: Checkpointing = False,
    offload: Offload = False,
    overwrite: Overwrite = False,
) -> None:
    """Learn the concept of one picture, or of a few, and draw it in new settings."""
    start = time.perf_counter()
    prompt, seed = distinct(prompt), distinct(seed)
    drawing = DrawingOptions(
        prompt, seed, guidance_scale, negative_prompt, num_inference_steps, alpha, batch_size
    )
    drawing.check()
    check_tuning(steps, learning_rate, batch_size)
    pictures = read_pictures(images, mask or None, fit)
    origin = pictures_digest(picture.image for picture in pictures)
    drawings = picture_origins(prompt, seed, out, origin)
    outputs = drawings | dict.fromkeys((out / SHEET, out / CONCEPT), {"concept": origin})
    keep_inputs(outputs, [*images, *mask])
    check_free(outputs, overwrite)
    prepare_out(out)
    pipe = load_pipeline(
        backbone, encoder, device, dtype, None if steps == 0 else batch_size or 0,
        gradient_checkpointing=gradient_checkpointing, offload=offload,
    )  # fmt: skip
    pipe.prompt_encoder.tokenize(prompt)  # a prompt may be too long for the text encoder
    from dte_lab import TuneConfig
    from dte_lab.common.plots import save_figure

    steps = pipe.recommended_steps if steps is None else steps
    given_rates = given(batch_size=batch_size, offset_learning_rate=learning_rate)
    config = TuneConfig.of(pipe.backbone.recommended, **given_rates)
    results = learn(pipe, pictures, steps, seed[0], config, fit)
    concept = results["tuned" if steps else "predicted only"]
    if guidance_scale is not None:
        concept.settings = replace(concept.settings, guidance_scale=guidance_scale)
    concept.save(out / CONCEPT)  # first, since it is the costly part
    drawn = {name: drawing.draw(pipe, result) for name, result in results.items()}
    names = save_pictures(list(drawn.values())[-1], drawings)
    inputs = [square(picture.image, pipe.backbone.resolution, fit) for picture in pictures]
    sheet = contact_sheet(inputs, drawn, prompt, seed)
    save_figure(sheet, out / SHEET, dpi=140, metadata=origin_text({"concept": origin}))
    tell(results, steps, time.perf_counter() - start)
    typer.echo(f"wrote {', '.join([*names, SHEET, CONCEPT])} to {out}")


@app.command()
def generate(
    concept: Annotated[Path, typer.Argument(metavar="CONCEPT", help="A concept.safetensors.")],
    prompt: Prompts,
    out: Out,
    seed: Seeds = (0,),
    backbone: Annotated[
        str | None, typer.Option(help="By default the one that the concept was made with.")
    ] = None,
    encoder: Encoder = None,
    guidance_scale: Guidance = None,
    negative_prompt: Negative = "",
    num_inference_steps: InferenceSteps = 25,
    alpha: Alpha = None,
    device: Device = None,
    dtype: DType = None,
    batch_size: DrawingBatch = None,
    offload: Offload = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw a concept that `dte personalize` saved in further settings."""
    prompt, seed = distinct(prompt), distinct(seed)
    drawing = DrawingOptions(
        prompt, seed, guidance_scale, negative_prompt, num_inference_steps, alpha, batch_size
    )
    drawing.check()
    quiet_libraries()
    from dte_lab import Concept

    loaded = Concept.load(concept)
    drawings = picture_origins(prompt, seed, out, loaded.origin)
    check_free(drawings, overwrite)
    prepare_out(out)
    pipe = load_pipeline(backbone or loaded.backbone, encoder, device, dtype, offload=offload)
    names = save_pictures(drawing.draw(pipe, loaded), drawings)
    typer.echo(f"wrote {', '.join(names)} to {out}")


def learn(
    pipe: "DTEPipeline",
    pictures: Sequence[Picture],
    steps: int,
    seed: int,
    config: "TuneConfig",
    fit: str,
) -> dict[str, "Concept"]:
    """The concept as predicted, where an encoder says more than words do, and as tuned."""
    results, options = {}, {"seed": seed, "fit": fit}
    if pipe.has_trained_encoder or not steps:
        results["predicted only"] = pipe.personalize(pictures, 0, **options)
    if steps:
        results["tuned"] = pipe.personalize(pictures, steps, config=config, **options)
    return results


def tell(results: Mapping[str, "Concept"], steps: int, seconds: float) -> None:
    """Print what was learned: words near v*, and what the last of the results took."""
    typer.echo("nearest real words of v* (cosine)")
    for name, result in results.items():
        words = (f"{word} {cosine:.2f}" for word, cosine in result.info["words_after"])
        typer.echo(f"  {name:<16}{', '.join(words)}")
    info = list(results.values())[-1].info
    peak = info["peak_memory_mb"]
    typer.echo(
        f"learned in {info['seconds']:.1f} s with {steps} tuning steps ({seconds:.1f} s in all)"
        + (f", peak memory {peak / 1024:.1f} GB" if peak else "")
    )


def distinct(values: Sequence) -> list:
    """The values in the given order, each once."""
    return list(dict.fromkeys(values))


app.command()(pretrain)
app.command()(explore)
app.command()(hardware.memory)
app.command()(hardware.parameters)
app.command()(hardware.doctor)
app.command()(evaluation.evaluate)
app.command()(evaluation.report)
app.command()(evaluation.export)
app.add_typer(training.world, name="world")


def run(arguments: Sequence[str] | None = None) -> int | None:
    """Run a command; returns its status. Raises DTEError for a wrong option, too."""
    try:
        with warnings_in_one_line():
            return app(arguments, prog_name="dte", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise DTEError(error.format_message()) from error  # a wrong option
    finally:
        remove_empty()
