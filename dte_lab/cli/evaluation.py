"""The commands that measure and export: `dte evaluate`, `dte report`, `dte export`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dte_lab import placeholder_token
from dte_lab.cli.common import (
    AnyBackbone,
    Device,
    Encoder,
    Out,
    Overwrite,
    SmallBackbone,
    load_pipeline,
    prepare_out,
    whole,
)
from dte_lab.common.errors import DTEError
from dte_lab.common.files import keep_inputs
from dte_lab.common.origin import check_free
from dte_lab.common.processes import usable_cores
from dte_lab.common.quiet import quiet_libraries


def evaluate(
    out: Out,
    quick: Annotated[
        bool, typer.Option("--quick", help="6 concepts, 4 edits, few steps: does everything run?")
    ] = False,
    experiment: Annotated[
        str, typer.Option(help="table, long, steps, blend, rank or regulariser.")
    ] = "table",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Instead, such as dte:0,12 or dte@alpha_blend=1:12; repeatable."),
    ] = None,
    concepts: Annotated[int, typer.Option(parser=whole, help="How many held-out concepts.")] = 60,
    split: Annotated[
        str, typer.Option(help="test; val to choose settings on; fxemoji, an unseen style.")
    ] = "test",
    scene: Annotated[
        list[str] | None, typer.Option(help="Ask for this one; repeatable; by default for ten.")
    ] = None,
    seeds: Annotated[int, typer.Option(parser=whole, help="Pictures per edit.")] = 2,
    backbone: SmallBackbone = "small",
    encoder: Encoder = None,
    device: Device = "cpu",
    processes: Annotated[
        int | None,
        typer.Option(parser=whole, help="That share the concepts; by default one a core."),
    ] = None,
) -> None:
    """Compare the tuning encoder with what people use instead; goes on where it stopped."""
    quiet_libraries()
    name = "quick" if quick else experiment
    load = partial(load_pipeline, backbone, encoder, device)
    try:
        from dte_lab.evaluation.edits import QUICK_SCENES
        from dte_lab.evaluation.methods import Methods
        from dte_lab.evaluation.run import EvaluationConfig, check_run, measure_methods
        from dte_lab.evaluation.specifications import methods_of

        config = EvaluationConfig(seeds=seeds, split=split, concepts=concepts)
        if scene:
            config = replace(config, scenes=tuple(scene))
        if quick:
            config = replace(config, concepts=6, scenes=QUICK_SCENES, num_inference_steps=10)
        if processes is None:
            processes = usable_cores() if device == "cpu" else 1
        check_run(method or methods_of(name), config, processes)  # before anything is loaded
        prepare_out(out)
        pipe = load()
        specs = method or Methods(pipe).experiment(name)
        measure_methods(out, pipe, specs, config, processes=processes, load=load)
    except ImportError as error:  # the outside judges
        raise DTEError(str(error)) from error
    report(out)


def report(
    run: Annotated[Path, typer.Argument(help="OUT of `dte evaluate`.")],
) -> None:
    """Turn a finished run into table.md and figures, beside its measures."""
    from dte_lab.common.files import write_atomically
    from dte_lab.common.plots import save_figure
    from dte_lab.evaluation.figures import picture_sheet, step_curves_figure, tradeoff
    from dte_lab.evaluation.report import finished, markdown, steps_table

    summary, rows = finished(run)
    text = markdown(summary) + steps_table(rows)
    write_atomically(run / "table.md", (text.rstrip() + "\n").encode())
    save_figure(tradeoff(summary), run / "tradeoff.png")
    if (figure := step_curves_figure(summary)) is not None:
        save_figure(figure, run / "steps.png")
    if (run / "pictures").is_dir():
        save_figure(picture_sheet(run, summary), run / "pictures.png")
    typer.echo(text)


def export(
    concept: Annotated[
        Path | None, typer.Argument(metavar="CONCEPT", help="A concept.safetensors.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the files: NAME, NAME_lora, NAME_kohya.")
    ] = None,
    token: Annotated[
        str, typer.Option(help="The word for the concept in prompts; each concept its own.")
    ] = placeholder_token,
    overwrite: Overwrite = False,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="Write the model itself there, as ONNX graphs.")
    ] = None,
    backbone: AnyBackbone = "small",
    encoder: Encoder = None,
) -> None:
    """Write a concept as LoRA (PEFT, diffusers; kohya) and textual-inversion embedding.

    With --onnx DIR alone: encoder, text tower, UNet, autoencoder and a step of tuning as graphs.
    """
    if onnx is not None:
        return export_model(onnx, backbone, encoder, [concept, out, name])
    if concept is None or out is None:
        raise DTEError("dte export needs a CONCEPT and --out DIR; or, for the model, --onnx DIR.")
    quiet_libraries()
    from dte_lab import Concept
    from dte_lab.export import export, export_origin, export_paths, recipe

    loaded = Concept.load(concept)
    outputs = export_paths(loaded, out, name)
    keep_inputs(outputs, [concept])
    check_free(dict.fromkeys(outputs, export_origin(loaded, token)), overwrite)
    paths = export(loaded, out, name, token)
    typer.echo(f"wrote {', '.join(path.name for path in paths)} to {out}")
    typer.echo(f"in diffusers:\n\n{recipe(loaded, paths, token)}\n")
    typer.echo(
        "they hold the soft path alone: what `dte generate --alpha 1` draws. The offsets were "
        f"tuned as {loaded.config.alpha_blend} of a blend: where the prompt is lost, try a "
        "strength between that and 1"
    )


def export_model(folder: Path, backbone: str, encoder: Path | None, rest: list) -> None:
    """What `dte export --onnx` does. Raises DTEError when something of a concept is given too."""
    if any(value is not None for value in rest):
        raise DTEError("--onnx writes the model alone: leave out CONCEPT, --out and --name.")
    prepare_out(folder)
    try:
        from dte_lab.onnx_parts.export import export_onnx
    except ImportError as error:
        raise DTEError(f"{error}: pip install 'dte_lab[page]' brings what ONNX needs.") from error
    pipe = load_pipeline(backbone, encoder, "cpu")
    paths = export_onnx(pipe, folder)
    size = sum(path.stat().st_size for path in paths) / 1e6
    typer.echo(f"wrote {', '.join(path.name for path in paths)} to {folder}: {size:.0f} MB")
