"""Own drawing nearest, from linear words of pictures on white: python nearest.py RUN"""
import sys, json
from pathlib import Path
import torch, numpy as np
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModelWithProjection
from dte_lab.evaluation.nearest import NearestDrawing, rendered_drawings
from dte_lab.world import wide as W
from dte_lab.world.train_decoder import border_ratio
from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.sprites import split_names
from dte_lab.world.scenes import SCENES
from dte_lab.world.train_words import scaled_latents
from dte_lab.world.train_wide_unet import draw_states
from dte_lab.world.wide_batches import WideBatches, small_rgba
from joint import load_tower, RUNS, Both
from dte_lab.checkpoint import read_state
torch.set_num_threads(1)
run = Path(sys.argv[1])
tokenizer, words, code = load_tower(RUNS / "tower")
unet = UNet2DConditionModel.from_pretrained("dte_lab/weights/small/unet", torch_dtype=torch.float32)
model = Both(unet, words)
if run.name != "tower":
    model.load_state_dict(read_state(run / "checkpoint.safetensors")[0]["ema"])
model.eval()
vae = PatchAutoencoder.from_pretrained(RUNS / "dec/vae").eval()
batches = WideBatches(tokenizer, None)
wide = W.load(Path("cache/wide"))
sets = {"val": small_rgba(split_names("val"))[2::3][:60], "fx": wide.held_out_rgba}
rows = {}
with torch.no_grad():
    for name, rgba in sets.items():
        v = code(scaled_latents(vae, rendered_drawings(rgba, "white", 1)))
        for scene in ("white", "beach"):
            near = NearestDrawing(rgba, scene, Path("cache/nearest"))
            i = 1 + SCENES.index(scene)
            s = words.states(batches.prompts[[i] * len(rgba)], batches.slots[[i] * len(rgba)], v)
            if run.name == "tower": x = vae.decode(words.paint(s) / vae.config.scaling_factor).sample
            else: x = draw_states(vae, words, tokenizer, model.unet, s, seed=0)
            m = near.measures(x)
            rows[f"{name} {scene}"] = {k: round(float(a.mean()), 3) for k, a in m.items()} | {"border": round(float(border_ratio(x).mean()), 3), "n": len(rgba)}
            print(name, scene, rows[f"{name} {scene}"], flush=True)
true = rendered_drawings(sets["val"], "beach"); print("true border", float(border_ratio(true).mean()))
(run / "nearest.json").write_text(json.dumps(rows, indent=1))
