"""Picture tower and projections anew for a text tower of the wide world."""
import sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from dte_lab.checkpoint import read_state
from dte_lab.world import wide as W
from dte_lab.world.captions import caption
from dte_lab.world.clip import *
from dte_lab.world.clip import whitening, tokenize, build_image_tower, build_image_processor
from dte_lab.world.data import *
from dte_lab.world.scenes import SCENES
from dte_lab.world.sprites import STYLES, split_names
from dte_lab.world.train_clip import Towers, augment, first_end_state, kinds_of
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import Shares, WideBatches
from joint import load_tower, RUNS

def main(out, steps, minutes, text_folder=None, start=None, lr=1e-3, muon=3e-3):
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    tokenizer, words, code = load_tower(RUNS / "tower")
    text = words.text
    if text_folder: text = CLIPTextModelWithProjection.from_pretrained(text_folder, dtype=torch.float32)
    text = text.eval().requires_grad_(False)
    batches = WideBatches(tokenizer, W.load(Path("cache/wide")), Shares(wide_names=1.0))
    torch.manual_seed(0); rng = np.random.default_rng(79)
    names = split_names("train")
    items = random_items(rng, 20000)
    pictures = picture_bank(items); captions = caption_bank(tokenizer, items, rng, 1)
    numbers = indices(items, names)
    torch.manual_seed(1)
    wide_x, wide_ids = [], []
    for _ in range(80):
        ids, x = batches._dictionary(300); wide_ids.append(ids); wide_x.append(((x + 1) * 127.5).round().byte())
    wide_x, wide_ids = torch.cat(wide_x), torch.cat(wide_ids)
    @torch.no_grad()
    def pooled(ids): return first_end_state(text(ids).last_hidden_state, ids, tokenizer.eos_token_id)
    def bank(ids): return torch.cat([pooled(p).half() for p in ids.split(256)])
    torch.save((pictures, captions, numbers, wide_x, wide_ids), 'runs/towers-bank.pt')
    P = bank(captions.flatten(0, 1)).unflatten(0, captions.shape[:2]); WP = bank(wide_ids)
    if start:
        image = CLIPVisionModelWithProjection.from_pretrained(start / "image_encoder", dtype=torch.float32)
        model = Towers(image, text.text_projection.requires_grad_(True))
        model.load_state_dict(torch.load(start / "towers.pt"))
    else:
        image = build_image_tower(from_bytes(torch.cat([pictures[:512], wide_x[:512]])))
        model = Towers(image, text.text_projection.requires_grad_(True))
        with torch.no_grad(): model.projection.weight.copy_(whitening(torch.cat([P[:1500, 0], WP[:1500]]).float(), 128))
    texts = {"concept": [caption(n, None, None) for n in names], "style": [f"a {s} picture of a thing" for s in STYLES],
             "scene": [caption("thing", None, s) for s in SCENES]}
    classes = {k: pooled(tokenize(tokenizer, t)) for k, t in texts.items()}
    kind_of = kinds_of(names); ce = nn.functional.cross_entropy
    def loss(model):
        r = random_rows(pictures, 64); w = random_rows(wide_x, 96)
        x = augment(from_bytes(torch.cat([pictures[r], wide_x[w]])))
        image = model.image(x).image_embeds
        t = torch.cat([one_caption(P, r).float(), WP[w].float()])
        logits = model.logits(image, t); own = torch.arange(len(t))
        losses = {"caption": (ce(logits, own) + ce(logits.T, own)) / 2}
        image = image[:64]; truth = {k: n[r] for k, n in numbers.items()}
        scores = {k: model.logits(image, classes[k]) for k in truth}
        for k, i in truth.items(): losses[k] = ce(scores[k], i)
        same = kind_of == kind_of[truth["concept"]][:, None]
        losses["kind"] = -(scores["concept"].softmax(1) * same).sum(1).clamp(min=1e-6).log().mean()
        return sum(losses.values()), losses
    x_test, _, test_items = random_batch(np.random.default_rng(10_000), 400)
    def sample(model, step):
        image = model.image(x_test).image_embeds
        return {f"{k}_top1": (model.logits(image, classes[k]).argmax(1) == i).float().mean().item() for k, i in indices(test_items, names).items()}
    model = train(out, model, TrainConfig(steps=steps, batch_size=160, learning_rate=lr, muon_learning_rate=muon, ema_decay=0.998, log_every=50, sample_every=250, warmup_steps=100, mixed_precision="bf16"), loss, sample, minutes)
    text.text_projection = model.projection
    text.save_pretrained(out / "text_encoder"); model.image.save_pretrained(out / "image_encoder")
    build_image_processor().save_pretrained(out / "feature_extractor"); torch.save(model.state_dict(), out / "towers.pt")
if __name__ == "__main__":
    torch.set_num_threads(1)
    a = sys.argv
    main(a[1], int(a[2]), float(a[3]), *(Path(p) for p in a[4:6]))
