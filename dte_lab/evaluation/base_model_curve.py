"""How the base model's pictures improve with the samples that its UNet has seen.

    python -m dte_lab.evaluation.base_model_curve RUN --out results/world_curve.json

RUN is the folder of `dte world train unet`, which keeps the EMA weights of UNet and text tower at
steps 500, 1,000, 2,000, 4,000, ...; the other parts are those of the backbone that it became. The
judges are those of base_model.py.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection

from dte_lab.backbone import Backbone, load_backbone
from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from dte_lab.common.stats import interval
from dte_lab.common.weights import load_weights
from dte_lab.evaluation.base_model import Classifier, evaluation_items, generate, scene_hits
from dte_lab.evaluation.base_model_tables import curve_table
from dte_lab.world.captions import caption
from dte_lab.world.clip import tokenize
from dte_lab.world.data import rendered
from dte_lab.world.sprites import split_names


@torch.no_grad()
def told_error(b: Backbone, items: list[tuple], seed: int = 0) -> list[float]:
    """Squared error per picture of what the UNet draws from pure noise at once, -v, of captions.

    In units of a latent's variance; the caption leaves the background's shade and waves open.
    """
    z = b.encode_images(rendered([(*item, k) for k, item in enumerate(items)]))
    text = b.text_encoder(tokenize(b.tokenizer, [caption(*i) for i in items])).last_hidden_state
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    told = -b.unet(noise, torch.full((len(z),), len(b.alphas_cumprod) - 1), text).sample
    return nn.functional.mse_loss(told, z, reduction="none").mean((1, 2, 3)).tolist()


def main(
    run: Annotated[Path, typer.Argument(help="Folder of `dte world train unet`.")],
    out: Annotated[Path, typer.Option(help="JSON file for the curve.")],
    captions: Annotated[int, typer.Option(min=4, help="Captions drawn at each point.")] = 500,
    backbone: Annotated[
        str, typer.Option(help="small, or the folder it was packed into.")
    ] = "small",
) -> None:
    """Judge the weights that a run of the UNet kept, and those it ended with."""
    classifier, b = Classifier(split_names("train")), load_backbone(backbone)
    items = evaluation_items(captions, 20_002, False)
    config = json.loads((run / "config.json").read_text())
    folders = sorted(run.glob("unet-*")) + [run / "unet"]
    points = []
    for folder in tqdm(folders, desc="curve"):
        b.unet = load_weights(UNet2DConditionModel.from_pretrained, folder).eval()
        text = run / folder.name.replace("unet", "text_encoder")
        load = CLIPTextModelWithProjection.from_pretrained
        b.text_encoder = load_weights(load, text, dtype=torch.float32).eval()
        x = generate(b, [caption(*item) for item in items], seed=0).clamp(-1, 1)
        hits = classifier.hits(classifier.features(x), items) | {"scene": scene_hits(x, items)}
        steps = config["steps"] if folder.name == "unet" else int(folder.name.split("-")[1])
        points.append(
            {"steps": steps, "samples": steps * config["batch_size"]}
            | {name: interval(values) for name, values in hits.items()}
            | {"told_error": interval(told_error(b, items))}
        )
        write_atomically(out, json.dumps({"config": config, "points": points}, indent=1).encode())

    print(curve_table(points))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
