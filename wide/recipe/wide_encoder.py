"""The tuning encoder for the wide base model: first its word by regression, then the objective."""
import sys, json, time
from contextlib import contextmanager
from pathlib import Path
import torch, torch.nn.functional as F
from dte_lab.backbone import load_backbone
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.encoder import TuningEncoder, EncoderPrediction
from dte_lab.tokens import PromptTokens
from dte_lab.training.step import Frozen, Noise, make_batch, encoder_inputs, training_step
from dte_lab.world import wide as W, training
from dte_lab.world.training import TrainConfig, train
from dte_lab.world.wide_batches import Shares, WideBatches
from dte_lab.world.word_space import PictureWords
from dte_lab.common.checkpoint import save_folder
from dte_lab.training.config import PretrainConfig

BASE = Path("runs/base"); CACHE = Path("cache/wide")

class Pairs:
    def __init__(self, backbone, wide, shares):
        self.batches = WideBatches(backbone.tokenizer, wide, shares)
    def __call__(self, n):
        b = self.batches._made(n)
        slots = torch.where(b.is_slot, 0, -1)
        return {"image": b.image, "target": b.target, "prompt": PromptTokens(b.ids, slots), "concept": b.concept, "white": b.white}

def draw(backbone):
    def f(both):
        noise, own = torch.randn_like(both).chunk(2)
        t, own_t = torch.randint(1000, (len(both),)).chunk(2)
        return Noise(noise, t, own, own_t, torch.rand(len(t)) < PretrainConfig.shared_timestep_probability)
    return f

def main(out, phase, steps, minutes, batch_size=64, teach=0.0, drop=0.25, lr=1e-3, muon=3e-3, **options):
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(str(BASE))
    code = PictureWords(*torch.load(BASE / "code.pt"))
    known = EncoderConfig.__dataclass_fields__
    settings = EncoderConfig(**{k: v for k, v in options.items() if k in known})
    method = MethodConfig(**{k: v for k, v in options.items() if k not in known})
    encoder = TuningEncoder.from_backbone(backbone, settings, method)
    with torch.no_grad(): encoder.zero_shot_weight.zero_()
    if phase == 2:
        from dte_lab.common.checkpoint import Checkpoint
        state = torch.load(out.parent / f"{out.name.replace('-2','-1')}" / "average.pt")
        encoder.load_state_dict(state)
    else:
        encoder.hypernetwork.requires_grad_(False)
    frozen = Frozen.of(backbone, encoder)
    pairs = Pairs(backbone, W.load(CACHE), Shares(dictionary=0, wide=0.6, mixed=0.3, varied=0.5, same_scene=0.25, restyled=0.2))
    def truth(white): return code(backbone.encode_images(white).float())
    unit = encoder.typical_entry
    def word_error(v, white):
        y = truth(white); return (v - y).square().mean() / (y - y.mean(0)).square().mean()
    @contextmanager
    def loss(encoder):
        p = pairs(batch_size)
        batch = make_batch(backbone, p, draw(backbone))
        if phase == 1:
            v = encoder_v(encoder, encoder_inputs(encoder, frozen, batch))
            e = word_error(v.float(), p["white"])
            yield e, {"unexplained": e}
        else:
            def forward(*inputs):
                pr = encoder(*inputs)
                keep = (torch.rand(len(pr.v_star), 1, 1) >= drop).float()
                return EncoderPrediction(pr.v_star, {k: (a, b * keep) for k, (a, b) in pr.offsets.items()}, pr.class_word)
            with training_step(encoder, frozen, batch, forward=forward) as (losses, pr):
                e = word_error(pr.v_star.float(), p["white"])
                total = losses.pop("loss") + teach * e
                yield total, losses | {"unexplained": e}
    def encoder_v(encoder, inputs):
        clip, unet, t = inputs
        tokens = encoder.fusion(clip, unet, t)
        sim = clip.embeds @ encoder.word_clip.T
        return encoder.zero_shot_weight * encoder.mix_words(sim) + encoder.residual_unit * encoder.token_head(tokens, clip.patches)
    # unseen: fx drawings and val in scenes
    wide = W.load(CACHE)
    from dte_lab.world.wide_batches import small_rgba
    from dte_lab.world.sprites import split_names
    c = pairs.batches.compose
    sets = {"val": small_rgba(split_names("val")).float() / 255, "fx": wide.held_out_rgba.float() / 255}
    torch.manual_seed(5)
    shown = {k: (c(x, torch.randint(20, (len(x),))), c(x, torch.full((len(x),), 0 * 0 + __import__("dte_lab.world.scenes", fromlist=["SCENES"]).SCENES.index("white")))) for k, x in sets.items()}
    @torch.no_grad()
    def sample(ema, step):
        m = {}
        for k, (image, white) in shown.items():
            clip, unet, t = ema.static_features(backbone, image, 0, frozen.prompt_encoder)
            v = encoder_v(ema, (clip, unet, t)).view(len(image), -1, encoder.config.token_dim).mean(1)
            y = truth(white); m[f"unexplained_{k}"] = ((v - y).square().mean() / (y - y.mean(0)).square().mean()).item()
            m[f"norm_{k}"] = (v.norm(dim=-1).mean() / frozen.prompt_encoder.table.mean_norm).item()
        print(step, m, flush=True)
        return m
    config = TrainConfig(steps=steps, batch_size=batch_size, learning_rate=lr, muon_learning_rate=muon, warmup_steps=50,
                         decay_fraction=0.35, ema_decay=0.995, mixed_precision="bf16", log_every=20, sample_every=100)
    ema = train(out, encoder, config, loss, sample, minutes)
    torch.save(ema.state_dict(), out / "average.pt")
    save_folder(ema, out / "encoder")

if __name__ == "__main__":
    torch.set_num_threads(1)
    o = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), **o)
