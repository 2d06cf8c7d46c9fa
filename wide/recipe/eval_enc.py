"""python eval_enc.py ENCODER OUT [n] [steps,steps]: own nearest in a new scene; word alone, both, after tuning."""
import sys, json
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from dte_lab.backbone import load_backbone
from dte_lab.common.images import to_pil
from dte_lab.encoder import load_encoder
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.nearest import NearestDrawing, rendered_drawings
from dte_lab.pipeline import DTEPipeline
from dte_lab.tuning import TuneConfig
from dte_lab.world import wide as W
from dte_lab.world.scenes import SCENES, BOX
from dte_lab.world.sprites import split_names
from dte_lab.world.wide_batches import small_rgba
torch.set_num_threads(1)
CELL = 16
def border_ratio(x):
    box = x[..., BOX, BOX]; across, elsewhere = [], []
    for axis in (-1, -2):
        steps = box.diff(dim=axis).abs().mean(1).transpose(axis, -1)
        at = (torch.arange(47) + BOX.start + 1) % CELL == 0
        across.append(steps[..., at].flatten(1).mean(1)); elsewhere.append(steps[..., ~at].flatten(1).mean(1))
    return sum(across) / sum(elsewhere)
enc, out = Path(sys.argv[1]), Path(sys.argv[2])
n = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
steps_list = [int(s) for s in sys.argv[4].split(",")] if len(sys.argv) > 4 else [0, 12]
backbone = load_backbone("runs/base")
pipe = DTEPipeline(backbone, load_encoder(enc, backbone))
wide = W.load(Path("cache/wide"))
sets = {"val": small_rgba(split_names("val"))[2::3], "fx": wide.held_out_rgba}
from PIL import Image
sheets = []; rows = {}
others = [s for s in SCENES if s != "beach"]
for name, rgba in sets.items():
    near = NearestDrawing(rgba, "beach", Path("cache/nearest"))
    k = min(n, len(rgba)); idx = list(range(k))
    inputs = torch.cat([rendered_drawings(rgba[i : i + 1], others[i % len(others)], 3) for i in idx])
    pics = {}
    def show(label, concepts):
        x = []
        for c in concepts:
            im = pipe.generate(c, ["a picture of S* on the beach"], seeds=[0], progress=False)[0][0]
            x.append(torch.from_numpy(np.asarray(im)).permute(2, 0, 1).float() / 127.5 - 1)
        x = torch.stack(x); pics[label] = x
        full = torch.zeros(len(rgba), 3, 64, 64); full[:k] = x
        m = {a: float(np.mean(b[:k])) for a, b in near.measures(full).items()}
        m["scene"] = float((classify_scene(x) == SCENES.index("beach")).mean()); m["border"] = float(border_ratio(x).mean()); m["n"] = k
        rows[f"{name} {label}"] = m; print(name, label, {a: round(b, 3) for a, b in m.items()}, flush=True)
    pils = to_pil(inputs)
    zero = [pipe.personalize(p, num_steps=0, progress=False) for p in pils]
    norm = float(torch.cat([c.v_star for c in zero]).norm(dim=-1).mean() / pipe.prompt_encoder.table.mean_norm)
    print(name, "norm", norm, [c.info["words_before"][0][0] for c in zero[:12]], flush=True)
    show("word", [replace(c, offsets={key: (a, b * 0) for key, (a, b) in c.offsets.items()}, config=replace(c.config, alpha_blend=1.0)) for c in zero])
    show("0 steps", zero)
    show("0 steps alpha 1", [replace(c, config=replace(c.config, alpha_blend=1.0)) for c in zero])
    for s in steps_list:
        if s: show(f"{s} steps", [pipe.personalize(p, num_steps=s, progress=False) for p in pils])
    m = min(24, k)
    true = rendered_drawings(rgba[:m], "beach")
    sheets.append(torch.stack([inputs[:m], true, *(x[:m] for x in pics.values())], 1))
    rows[f"{name} norm"] = norm
x = torch.cat(sheets)  # (48, c, 3, 64, 64)
c = x.shape[1]
per = 3
grid = x.view(-1, per, c, 3, 64, 64).permute(0, 4, 1, 2, 5, 3).reshape(-1, per * c * 64, 3)
Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(out.with_suffix(".png"))
out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
