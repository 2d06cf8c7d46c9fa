"""Pre-training of the tuning encoder for the small world, in the loop that trains the base model.

What `dte pretrain` does with any pictures, with the small world's own: they are composed on the
device, so that a GPU takes a whole step at once.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dte_lab.backbone import load_backbone
from dte_lab.baselines import E4TEncoder, e4t_config
from dte_lab.common.files import write_atomically
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.encoder import TuningEncoder
from dte_lab.objective import Batch, objective
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import PromptEncoder
from dte_lab.training.first_words import fit_token_head
from dte_lab.training.pair_batches import PairBatches
from dte_lab.training.predictions import Predictions
from dte_lab.training.pretrain import PREDICTIONS, PretrainConfig, seen_by_features
from dte_lab.world.pairs import ConceptPairs
from dte_lab.world.scenes import render_image
from dte_lab.world.sprites import SAMPLE_CONCEPTS, split_names
from dte_lab.world.training import TrainConfig, train

UNSEEN = 256  # pairs of val concepts, for the log
UNSEEN_EACH = 16  # pairs of each val concept, at the end
BY_CONCEPT = "unseen.json"


def main(
    out: Path,
    backbone: str = "small",
    steps: int = 10_000,
    minutes: float | None = None,
    batch_size: int = 32,
    concepts: int | None = None,
    e4t: bool = False,
    seed: int = 0,
    device: str = "cpu",
    mixed_precision: str = "no",
    **options,
) -> Path:
    """Train and save the EMA weights to `out/encoder`, which is returned.

    concepts: how many to learn from, None for all. e4t: the E4T-style baseline instead. seed: of
    the first weights and of all that training draws. options: of EncoderConfig and MethodConfig.
    The log's `unseen_diffusion` is the loss on UNSEEN pairs of val concepts, and `out/unseen.json`
    that of the saved weights by concept, UNSEEN_EACH pairs each, with the same pairs and noise for
    every run; predictions.jsonl is that of `dte pretrain`.
    """
    out = Path(out)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
    out.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(backbone, device)
    backbone.scheduler.alphas_cumprod = backbone.alphas_cumprod  # on the device once and for all
    prompt_encoder = PromptEncoder(backbone)
    known = EncoderConfig.__dataclass_fields__
    settings = EncoderConfig(**{k: v for k, v in options.items() if k in known})
    given = {k: v for k, v in options.items() if k not in known}
    if e4t:
        method, kind = replace(e4t_config(), **given), E4TEncoder
    else:
        method, kind = MethodConfig(**given), TuningEncoder
    encoder = kind.from_backbone(backbone, settings, method, seed=seed)
    T = len(backbone.alphas_cumprod)
    feature_prompt = prompt_encoder.plain([settings.feature_prompt])
    fresh = not (out / "checkpoint.safetensors").exists()
    if fresh:
        seen = set(ConceptPairs(count=concepts).names) & set(split_names("train"))
        fit_token_head(encoder, backbone, sorted(seen), seed=seed)
    batches = PairBatches(prompt_encoder, count=concepts)
    torch.manual_seed(0)
    val = PairBatches(prompt_encoder, ("val",), varied=0, mixed=0)
    unseen = val(UNSEEN)
    pixels = DTEPipeline(backbone, encoder).pixels(
        [render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS]
    )
    watched = Predictions(out / PREDICTIONS, backbone, encoder, pixels, prompt_encoder)

    def losses_of(encoder: TuningEncoder, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """v* (B, d) and the losses of one batch, with random noise and timesteps."""
        B = len(batch["image"])
        both = backbone.encode_images(torch.cat([batch["target"], batch["image"]])).float()
        latents, image_latents = both.chunk(2)  # (B, 96, 4, 4)
        noise, own_noise = torch.randn_like(both).chunk(2)
        t, own_t = torch.randint(T, (2 * B,), device=device).chunk(2)
        shared = torch.rand(B, device=device) < PretrainConfig.shared_timestep_probability
        noisy, feature_t = seen_by_features(
            backbone, shared, (latents, noise, t), (image_latents, own_noise, own_t)
        )
        features = encoder.unet_features(backbone, noisy, feature_t, feature_prompt)
        clip = encoder.image_features(backbone, batch["image"])
        prediction = encoder(clip, features, feature_t)
        bank = encoder.bank.clone(), encoder.bank_concepts.clone()
        target = Batch(latents, noise, t, batch["prompts"], batch["concepts"])
        with objective(
            backbone, prompt_encoder, prediction, target, encoder.method, bank
        ) as losses:
            return prediction.v_star, losses

    def loss(encoder: TuningEncoder) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batches(batch_size)
        v_star, losses = losses_of(encoder, batch)
        encoder.enqueue(v_star, batch["concepts"])
        return losses.pop("loss"), losses

    def sample(ema: TuningEncoder, step: int) -> dict[str, float]:
        watched.write(ema, step)
        torch.manual_seed(0)
        return {"unseen_diffusion": losses_of(ema, unseen)[1]["diffusion"].item()}

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        warmup_steps=min(TrainConfig.warmup_steps, steps // 5),
        mixed_precision=mixed_precision,
        seed=seed,
        log_every=20,
        sample_every=4,
    )
    if fresh:
        watched.write(encoder, 0)
    ema = train(out, encoder, config, loss, sample, minutes, device)
    ema.load_state_dict({**ema.state_dict(), **dict(encoder.named_buffers())}, strict=False)
    ema.save_pretrained(out / "encoder")
    torch.manual_seed(0)
    with torch.no_grad():
        by_concept = {
            name: losses_of(ema, val.only(name)(UNSEEN_EACH))[1]["diffusion"].item()
            for name in val.names
        }
    write_atomically(out / BY_CONCEPT, json.dumps(by_concept, indent=1).encode())
    return out / "encoder"
