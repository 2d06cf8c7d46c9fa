"""Backbone folder of the EMA of the joint run and the towers."""
import json, shutil, sys
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection
from dte_lab.checkpoint import read_state
from dte_lab.world import wide as W
from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, split_names
from dte_lab.world.train_unet import build_scheduler
from dte_lab.world.wide_batches import wide_words
from joint import load_tower, RUNS, Both
out = Path("runs/base"); out.mkdir(exist_ok=True)
tokenizer, words, code = load_tower(RUNS / "tower")
unet = UNet2DConditionModel.from_pretrained("dte_lab/weights/small/unet", torch_dtype=torch.float32)
model = Both(unet, words); parts, meta = read_state(RUNS / "joint/checkpoint.safetensors"); model.load_state_dict(parts["ema"])
towers = RUNS / "towers"
if (towers / "towers.pt").exists():
    words.text.text_projection.weight.data = torch.load(towers / "towers.pt")["projection.weight"]
    src = towers
else: src = Path("dte_lab/weights/small"); print("NO TOWERS YET")
model.unet.save_pretrained(out / "unet"); words.text.save_pretrained(out / "text_encoder"); tokenizer.save_pretrained(out / "tokenizer")
build_scheduler().save_pretrained(out / "scheduler")
for p, s in (("image_encoder", src), ("feature_extractor", src), ("vae", RUNS / "dec")):
    shutil.copytree(s / p, out / p, dirs_exist_ok=True)
for p in ("vae", "image_encoder"): pass
torch.save((code.mean, code.basis), out / "code.pt")
texts = split_names("train") + [caption("", s, c) for s in STYLES for c in SCENES]
known = {w for t in texts for w in t.split()} | set(wide_words(W.load(Path("cache/wide"))))
(out / "words.json").write_text(json.dumps(sorted(known)))
print("step", meta, len(known))
