"""Denoiser and text tower together, on dictionary words and linear words of pictures."""
import sys, json
from pathlib import Path
import numpy as np, torch
from torch import nn, Tensor
from PIL import Image
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer
from dte_lab.checkpoint import read_state
from dte_lab.world import wide as W, training
from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.align import align, cell_blocks
from dte_lab.world.clip import build_text_tower, tokenize
from dte_lab.world.data import picture_grid
from dte_lab.world.muon import MuonAdamW, hidden_matrices
from dte_lab.world.scenes import SCENES
from dte_lab.world.train_unet import CAPTION_DROPOUT, SCHEDULER, TIMESTEP_POWER
from dte_lab.world.train_wide_unet import draw_states
from dte_lab.world.train_words import Words, scaled_latents
from dte_lab.world.wide_batches import Shares, WideBatches, small_rgba
from dte_lab.world.word_space import PictureWords
from dte_lab.world.sprites import split_names, STYLES
from dte_lab.world.captions import caption

NOISES, PAINT, TOWER_RATE, WORD_RATE = 2, 0.25, 0.15, 1e-3
PARTS = Path("dte_lab/weights/small"); RUNS = Path("runs")

class Both(nn.Module):
    def __init__(self, unet, words):
        super().__init__(); self.unet, self.words = unet, words

def load_tower(run):
    parts, _ = read_state(run / "checkpoint.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    words = Words(build_text_tower(tokenizer), None, 96)
    words.load_state_dict(parts["ema"])
    code = PictureWords(*torch.load(run / "start.pt")["words"])
    return tokenizer, words, code

def groups_of(model, c):
    tower = {id(p) for p in model.words.parameters()}
    hidden = {id(p) for p in hidden_matrices(model)}
    table = model.words.text.get_input_embeddings().weight
    groups = [{"params": [table], "peak": WORD_RATE, "weight_decay": 0.0}]
    for is_tower in (False, True):
        rate = TOWER_RATE if is_tower else 1.0
        own = [p for p in model.parameters() if (id(p) in tower) == is_tower and p.requires_grad and p is not table]
        m = [p for p in own if id(p) in hidden]; r = [p for p in own if id(p) not in hidden]
        groups += [{"params": m, "muon": True, "peak": rate * c.muon_learning_rate},
                   {"params": [p for p in r if p.ndim > 1], "peak": rate * c.learning_rate},
                   {"params": [p for p in r if p.ndim <= 1], "peak": rate * c.learning_rate, "weight_decay": 0.0}]
    return groups

def build_optimizer(model, c, device="cpu"):
    groups = groups_of(model, c)
    for g in groups: g["lr"] = torch.tensor(0.0)
    return MuonAdamW(groups, betas=c.betas, weight_decay=c.weight_decay, fused=True,
                     dtype=torch.bfloat16 if c.mixed_precision == "bf16" else torch.float32)


def main(out, steps, minutes, lr=5e-4, muon=1.5e-3, batch=256, seed=0, decay=0.3):
    training.build_optimizer = build_optimizer
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    tokenizer, words, code = load_tower(RUNS / "tower")
    vae = PatchAutoencoder.from_pretrained(RUNS / "dec/vae").eval().requires_grad_(False).to(memory_format=torch.channels_last)
    wide = W.load(Path("cache/wide"))
    batches = WideBatches(tokenizer, wide, Shares(dictionary=0.5, wide_names=0.3, on_white=True))
    unet = UNet2DConditionModel.from_pretrained(PARTS / "unet", torch_dtype=torch.float32)
    words.text.text_projection.requires_grad_(False)
    words.train(); scheduler = DDPMScheduler(**SCHEDULER)
    nothing_ids = tokenize(tokenizer, [""])

    def said(model, batch):
        v = code(scaled_latents(vae, batch.image))
        some = v.new_zeros(len(batch.ids) - len(v), v.shape[1])
        return model.states(batch.ids, batch.is_slot, torch.cat([some, v]))

    def random_t(n): return (torch.rand(n) ** (1 / TIMESTEP_POWER) * 1000).long()

    torch.manual_seed(3)
    if not (out / "checkpoint.safetensors").exists():
        with torch.no_grad():
            b = batches(512); z = scaled_latents(vae, b.target); t = random_t(512)
            states = said(words, b).float()
            x_t = scheduler.add_noise(z, torch.randn_like(z), t)
            align(unet, x_t, t, states, z)
            for block in cell_blocks(unet): nn.init.zeros_(block.attn2.to_out[0].weight)
    model = Both(unet, words)

    def loss(model):
        batch = batches(batch // 1) if False else batches(BATCH // NOISES)
        z1 = scaled_latents(vae, batch.target).float()
        s1 = said(model.words, batch)
        paint = (model.words.paint(s1).float() - z1).pow(2).mean((1, 2, 3))
        nothing = model.words.text(nothing_ids).last_hidden_state
        z, states = z1.repeat(NOISES, 1, 1, 1), s1.repeat(NOISES, 1, 1)
        states = torch.where(torch.rand(len(z), 1, 1) < CAPTION_DROPOUT, nothing, states)
        t, noise = random_t(len(z)), torch.randn_like(z)
        x_t, v = scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)
        error = (model.unet(x_t, t, states).sample.float() - v).pow(2).mean((1, 2, 3)).view(NOISES, -1)
        made = len(batch.image)
        return error.mean() + PAINT * paint.mean(), {
            "dictionary": error[:, :-made].mean(), "made": error[:, -made:].mean(),
            "paint_dictionary": paint[:-made].mean(), "paint_made": paint[-made:].mean()}
    BATCH = batch
    # held out: val and FxEmoji drawings, beach, from their picture on white
    val = small_rgba(split_names("val"))[1::3]  # twemoji
    fx = wide.held_out_rgba
    shown_rgba = val[:24] if fx is None else torch.cat([val[:24], fx[:24]])
    torch.manual_seed(1)
    known = batches(30); 
    def sample(model, step):
        torch.manual_seed(2)
        c = batches.compose
        rgba = shown_rgba.float() / 255
        n = len(rgba); white = torch.full((n,), SCENES.index("white")); there = torch.arange(n) % len(SCENES)
        v = code(scaled_latents(vae, c(rgba, white))); target = c(rgba, there)
        s = model.words.states(batches.prompts[1 + there], batches.slots[1 + there], v)
        k = 12
        s2 = model.words.text(known.ids[:k]).last_hidden_state
        drawn = draw_states(vae, model.words, tokenizer, model.unet, torch.cat([s, s2]), seed=0)
        both = torch.stack([torch.cat([target, known.target[:k]]), drawn], 1).flatten(0, 1)
        Image.fromarray(picture_grid(both, 12)).save(out / f"samples-{step:05d}.png")
        return {}
    config = training.TrainConfig(steps=steps, batch_size=batch, learning_rate=lr, muon_learning_rate=muon,
        warmup_steps=50, decay_fraction=decay, seed=seed, ema_decay=0.995, log_every=20, sample_every=200,
        checkpoint_minutes=5, mixed_precision="bf16")
    ema = training.train(out, model, config, loss, sample, minutes)
    ema.unet.save_pretrained(out / "unet"); ema.words.text.save_pretrained(out / "text_encoder")
    torch.save(ema.words.cell.state_dict(), out / "cell.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
