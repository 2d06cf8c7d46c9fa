"""What fits: `dte memory`, `dte parameters`, `dte doctor`, and the options of memory."""

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from dte_lab.cli.common import (
    AnyBackbone,
    Checkpointing,
    Device,
    Encoder,
    Offload,
    given,
    number,
    whole,
)
from dte_lab.common.errors import one_line
from dte_lab.common.quiet import quiet_libraries


def memory(
    backbone: Annotated[str, typer.Option(help="sd15.")] = "sd15",
    resolution: Annotated[
        int, typer.Option(parser=whole, help="Side of the picture in pixels.")
    ] = 512,
    batch: Annotated[
        int, typer.Option(parser=whole, help="Noise levels, or pictures, per step.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="Of frozen parts: fp16, bf16 or fp32.")] = "fp16",
    rank: Annotated[int, typer.Option(parser=whole, help='Of the offsets, or "full".')] = 4,
    gradient_checkpointing: Checkpointing = False,
    offload: Offload = False,
    card: Annotated[
        float | None, typer.Option(parser=number, help="GPU memory in GB to fit into.")
    ] = None,
) -> None:
    """Predict peak GPU memory and time of tuning, pre-training and sampling, without a GPU."""
    quiet_libraries()
    from dte_lab.hardware.memory import ACHIEVED, Setting, advise, check_card, needs

    if card is not None:
        check_card(card)
    setting = Setting(backbone, resolution, batch, dtype, rank, gradient_checkpointing, offload)
    found = needs(setting)
    typer.echo(f"{setting}\npeak of all tensors on the GPU, predicted from a trace of the step:")
    for name, need in found.items():
        typer.echo(f"  {name:<14}{need.bytes / 1e9:6.2f} GB")
    typer.echo("CUDA itself and fragments of the allocator come on top: about 1 GB, not predicted.")
    if card is not None:
        typer.echo(advise(setting, card, found["tuning"].bytes))
    speeds = ", ".join(f"{card} {speed / 1e12:.0f}" for card, speed in ACHIEVED.items())
    typer.echo(f"\narithmetic, counted; seconds at an assumed TFLOP/s of {speeds}:")
    units = ("of a tuning step", "of a pre-training step", "of a picture, 25 steps")
    for unit, need in zip(units, found.values(), strict=True):
        seconds = "".join(f"{need.flops / s:8.2f} s {card}" for card, s in ACHIEVED.items())
        typer.echo(f"  {unit:<24}{need.flops / 1e12:7.2f} TFLOP{seconds}")


def parameters(
    width: Annotated[
        int | None, typer.Option(parser=whole, help="Of the hypernetwork's tokens.")
    ] = None,
) -> None:
    """Count the parameters of the hypernetwork for Stable Diffusion 1.5, by rank and in full."""
    quiet_libraries()
    import torch
    from diffusers import UNet2DConditionModel

    from dte_lab.config import EncoderConfig
    from dte_lab.hypernetwork import count_parameters
    from dte_lab.lora import projection_shapes
    from dte_lab.sd15 import UNET

    settings = EncoderConfig(**given(width=width))
    with torch.device("meta"):
        shapes = projection_shapes(UNet2DConditionModel(**UNET))
    typer.echo(f"{'rank':<6}{'hypernetwork':>18}{'of which heads':>18}{'offsets':>14}")
    for rank in (1, 2, 4, 8, 16, "full"):
        n = count_parameters(shapes, rank, settings.width, settings.num_heads, settings.trunk_depth)
        typer.echo(f"{rank:<6}{n['hypernetwork']:>18,}{n['heads']:>18,}{n['offsets']:>14,}")


def doctor(
    backbone: AnyBackbone = "small",
    encoder: Encoder = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Where results would go.")] = Path("."),
    notebooks: Annotated[
        bool, typer.Option("--notebooks", help="Also try what the notebooks need, in their kernel.")
    ] = False,
) -> None:
    """Say what is installed and what would fail; exit status 1 if anything would."""
    from tqdm.auto import tqdm

    from dte_lab.hardware.doctor import examine
    from dte_lab.hardware.kernel import examine_kernel

    failures, findings = 0, examine(backbone, encoder, device, out)
    for finding in chain(findings, examine_kernel(out)) if notebooks else findings:
        failures += not finding.good
        verdict = "ok  " if finding.good else "FAIL"
        with tqdm.external_write_mode():
            typer.echo(f"{verdict} {finding.topic:<17}{one_line(finding.text)}")
    if failures:
        sys.exit(1)
