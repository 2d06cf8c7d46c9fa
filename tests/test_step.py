"""One step of the encoder's pre-training, worked out by hand for both of its trainers.

Everything that could be confused has a value of its own: two timesteps, two pictures, two noises,
prompts, the features' prompt, a bank with several concepts and empty rows.
"""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from dte_lab import MethodConfig, TuningEncoder, load_backbone
from dte_lab.encoder import EncoderPrediction
from dte_lab.features import image_features, unet_features
from dte_lab.tokens import PromptEncoder
from dte_lab.training import small_world
from dte_lab.training.batches import loading, prepare
from dte_lab.training.config import PretrainConfig
from dte_lab.training.pretrain import train_step
from dte_lab.training.step import (
    Frozen,
    Noise,
    Processes,
    encoder_inputs,
    make_batch,
    training_step,
)
from dte_lab.world.batches import PairBatch

PROMPTS = ["a picture of S*", "S* on the beach", "the red S* at night"]
CONCEPTS = torch.tensor([3, 5, 3])
FEATURE_PROMPT = "blue cat"
METHOD = MethodConfig(
    alpha_blend=1.0, contrastive_weight=0.5, norm_weight=0.25, norm_free=0.4, temperature=0.3,
    num_positives=4,
)  # fmt: skip
BANK_CONCEPTS = torch.tensor([5, -1, 3, 8, -1, 5])


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def frozen(tiny_backbone, fresh):
    return Frozen.of(tiny_backbone, fresh)


@pytest.fixture(scope="module")
def fresh(tiny_backbone, tiny_config):
    """An encoder that already predicts offsets, with a bank of three concepts."""
    settings = dataclasses.replace(tiny_config, feature_prompt=FEATURE_PROMPT)
    encoder = TuningEncoder.from_backbone(tiny_backbone, settings, METHOD)
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=i)
        encoder.bank.copy_(normal(6, 24, seed=60))
        encoder.bank_concepts.copy_(BANK_CONCEPTS)
    return encoder


@pytest.fixture
def encoder(fresh):
    return copy.deepcopy(fresh)


@pytest.fixture(scope="module")
def pictures():
    image, target = (normal(3, 3, 16, 16, seed=s).clamp(-1, 1) for s in (10, 11))
    return {"image": image, "target": target, "prompt": PROMPTS, "concept": CONCEPTS}


NOISE = Noise(
    noise=normal(3, 4, 8, 8, seed=20),
    timesteps=torch.tensor([50, 400, 900]),
    own_noise=normal(3, 4, 8, 8, seed=21),
    own_timesteps=torch.tensor([700, 120, 333]),
    shared=torch.tensor([False, True, False]),
)


def by_hand(backbone, encoder, pictures, noise, bank, merged_unet, dropped=(False,) * 3):
    """(loss, gradient of v*, v*) of one batch: a merged UNet for each sample, the bank as given.

    dropped: samples that are drawn without offsets.
    """
    scheduler = DDPMScheduler.from_config(backbone.scheduler.config)
    scale = backbone.vae.config.scaling_factor
    with torch.no_grad():
        z, own_z = (
            scale * backbone.vae.encode(pictures[name]).latent_dist.mode()
            for name in ("target", "image")
        )
        x_t = scheduler.add_noise(z, noise.noise, noise.timesteps)
        own_x_t = scheduler.add_noise(own_z, noise.own_noise, noise.own_timesteps)
        seen = torch.stack([(x_t if s else own_x_t)[i] for i, s in enumerate(noise.shared)])
        seen_t = [(noise.timesteps if s else noise.own_timesteps)[i]
                  for i, s in enumerate(noise.shared)]  # fmt: skip
        ids = backbone.tokenizer(FEATURE_PROMPT, padding="max_length", return_tensors="pt")
        prompt = backbone.text_encoder(ids.input_ids).last_hidden_state
        unet = unet_features(backbone, seen, torch.stack(seen_t), prompt, encoder.settings.grid)
        clip = image_features(backbone, pictures["image"], encoder.settings.clip_layer)
        prediction = encoder(clip, unet, torch.stack(seen_t))
    v = prediction.v_star.clone().requires_grad_()
    encode, words = PromptEncoder(backbone), PromptEncoder(backbone).table.embeddings
    velocity = scheduler.get_velocity(z, noise.noise, noise.timesteps)
    text = encode(pictures["prompt"], v)
    diffusion, contrastive = 0, 0
    for i in range(3):
        offsets = {k: (a[i : i + 1], b[i : i + 1]) for k, (a, b) in prediction.offsets.items()}
        with torch.no_grad():
            merged = backbone.unet if dropped[i] else merged_unet(offsets)
        output = merged(x_t[i : i + 1], noise.timesteps[i], text[i : i + 1]).sample
        diffusion += (output - velocity[i : i + 1]).square().mean() / 3
        near = (F.normalize(words, dim=-1) @ F.normalize(v[i].detach(), dim=-1)).topk(4).indices
        others = [(v[j], c) for j, c in enumerate(pictures["concept"].tolist())]
        others += list(zip(*bank, strict=True))
        far = torch.stack([u for u, c in others if c not in (-1, pictures["concept"][i])])
        pull, push = (
            (F.cosine_similarity(v[i], u, dim=-1) / METHOD.temperature).exp().sum()
            for u in (words[near], far)
        )
        contrastive += -(pull / (pull + push)).log() / 3
    excess = v.norm(dim=-1) / words.norm(dim=-1).mean() - 0.4
    assert (excess > 0).any()
    norm = excess.clamp(min=0).square().mean()
    loss = diffusion + 0.5 * contrastive + 0.25 * norm
    loss.backward()
    return loss.item(), v.grad, v.detach()


def test_loss_and_gradient_of_a_step(tiny_backbone, frozen, encoder, pictures, merged_unet):
    bank = encoder.bank.clone(), BANK_CONCEPTS.tolist()
    loss, gradient, v_star = by_hand(tiny_backbone, encoder, pictures, NOISE, bank, merged_unet)
    batch = make_batch(tiny_backbone, pictures, lambda both: NOISE)
    with training_step(encoder, frozen, batch) as (losses, prediction):
        prediction.v_star.retain_grad()
        losses["loss"].backward()
        assert torch.equal(encoder.bank, bank[0]), "the bank is the one before the step"
    assert losses["loss"].item() == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(prediction.v_star.detach(), v_star)
    torch.testing.assert_close(prediction.v_star.grad, gradient, rtol=1e-3, atol=1e-5)
    assert encoder.bank_concepts.tolist() == [3, 5, 3, 8, -1, 5]
    torch.testing.assert_close(encoder.bank[:3], v_star)
    assert torch.equal(encoder.bank[3:], bank[0][3:]) and encoder.bank_position == 3

    with torch.no_grad(), training_step(encoder, frozen, batch, enqueue=False) as (losses, _):
        assert losses["loss"].item() != pytest.approx(loss, rel=1e-4), "another bank"
    assert encoder.bank_position == 3


def test_a_step_of_pretrain_is_clipped_and_changes_the_weights(frozen, encoder, pictures):
    batch = make_batch(frozen.backbone, pictures, lambda both: NOISE)
    reference = copy.deepcopy(encoder)
    with training_step(reference, frozen, batch) as (losses, _):
        losses["loss"].backward()
    gradients = [p.grad for p in reference.parameters()]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    limit = norm.item() / 3
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    found, _, grad_norm = train_step(
        Accelerator(cpu=True), encoder, optimizer, frozen, batch, limit
    )
    assert grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert found["diffusion"].item() == pytest.approx(losses["diffusion"].item(), rel=1e-6)
    for before, after, g in zip(
        reference.parameters(), encoder.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(after, before - 0.5 * g / 3, rtol=1e-4, atol=1e-6)
        assert after.grad is None
    assert torch.equal(encoder.bank_concepts, reference.bank_concepts)
    assert encoder.bank_concepts[:3].tolist() == CONCEPTS.tolist()


def test_the_gradient_of_a_step_is_the_mean_over_its_batches(frozen, encoder, pictures):
    batches = [
        make_batch(frozen.backbone, pictures | {"concept": CONCEPTS + 10 * k}, lambda both: NOISE)
        for k in range(2)
    ]
    batches[1].noise = -batches[1].noise
    reference, gradients, losses = copy.deepcopy(encoder), [], []
    for batch in batches:
        reference.zero_grad()
        with training_step(reference, frozen, batch) as (found, _):
            found["loss"].backward()
        gradients.append([p.grad.clone() for p in reference.parameters()])
        losses.append(found["loss"].item())
    mean = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    before = [p.detach().clone() for p in encoder.parameters()]
    optimizer = accelerator.prepare(torch.optim.SGD(encoder.parameters(), lr=0.5))
    for k, batch in enumerate(batches):
        found, _, norm = train_step(accelerator, encoder, optimizer, frozen, batch, 1e9)
        assert found["loss"].item() == pytest.approx(losses[k], rel=1e-5)
        if k == 0:
            assert norm == 0
            assert all(torch.equal(p, q) for p, q in zip(encoder.parameters(), before, strict=True))
    assert norm.item() == pytest.approx(sum(g.square().sum() for g in mean).sqrt().item(), rel=1e-4)
    for p, q, g in zip(encoder.parameters(), before, mean, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.5 * g, rtol=1e-4, atol=1e-6)
    assert encoder.bank_concepts.tolist() == reference.bank_concepts.tolist()
    Accelerator(cpu=True)  # the number of batches is a state of the process


def test_pretrain_draws_all_timesteps_and_shares_as_often_as_it_is_told(tiny_backbone, monkeypatch):
    B, pixels = 400, normal(400, 3, 4, 4, seed=0)
    monkeypatch.setattr(tiny_backbone, "encode_images", lambda pixels: pixels)
    pictures = {
        "image": pixels, "target": -pixels, "prompt": [PROMPTS[0]] * B, "concept": torch.arange(B),
    }  # fmt: skip
    config = PretrainConfig(batch_size=B, shared_timestep_probability=0.3, seed=4)
    batch = prepare(tiny_backbone, pictures, config, part=7)
    shared = batch.feature_timesteps == batch.timesteps
    assert 0.22 < shared.double().mean() < 0.38
    for t in (batch.timesteps, batch.feature_timesteps[~shared]):
        assert t.min() < 25 and 1000 > t.max() > 975 and 450 < t.double().mean() < 550
    assert abs(batch.noise.mean()) < 0.05 and abs(batch.noise.std() - 1) < 0.05


def pair_batch(frozen, pictures):
    """The pictures as the small world's batches give them; the thing on white is another."""
    ids, slots = frozen.prompt_encoder.tokenize(pictures["prompt"])
    white = normal(3, 3, 16, 16, seed=12).clamp(-1, 1)
    return PairBatch(ids, slots == 0, pictures["image"], pictures["target"], white, CONCEPTS)


def linear_word(latents):
    """Stands for PictureWords."""
    return latents.flatten(1)[:, :24] * 2 + 0.1


class Unseen:
    """Stands for the pairs of val things, of two."""

    drawings = SimpleNamespace(names=["cup", "bus"])

    def __init__(self, pairs):
        self.pairs, self.asked = pairs, []

    def __call__(self, size, rows=None):
        self.asked.append((size, rows))
        return self.pairs


def test_the_small_world_takes_the_same_step(tiny_backbone, frozen, encoder, pictures, merged_unet):
    """Its own random numbers, in their order; some samples lose their offsets, and a tenth of the
    word's regression is added. Measures leave the bank alone."""
    recorded, asked = [], []
    other = {**pictures, "image": pictures["target"], "target": pictures["image"]}
    unseen = Unseen(pair_batch(frozen, other))
    predictions = SimpleNamespace(write=lambda *given: recorded.append(given))

    def pairs(size):
        asked.append(size)
        return pair_batch(frozen, pictures)

    training = small_world.EncoderTraining(frozen, pairs, unseen, linear_word, 3, predictions)
    torch.manual_seed(3)
    dropped = torch.rand(3) < 0.25
    assert dropped.any() and not dropped.all()
    layout = torch.empty(6, 4, 8, 8).to(memory_format=torch.channels_last)  # as the latents lie
    noise, own_noise = torch.randn_like(layout).chunk(2)
    t, own_t = torch.randint(1000, (6,)).chunk(2)
    drawn = Noise(noise, t, own_noise, own_t, torch.rand(3) < 0.5)
    assert drawn.shared.any() and not drawn.shared.all()
    bank = encoder.bank.clone(), BANK_CONCEPTS.tolist()
    loss, _, v_star = by_hand(
        tiny_backbone, encoder, pictures, drawn, bank, merged_unet, dropped.tolist()
    )
    white = pair_batch(frozen, pictures).white
    latents = tiny_backbone.vae.encode(white).latent_dist.mode()
    truth = linear_word(latents.detach() * tiny_backbone.vae.config.scaling_factor).double().numpy()
    unexplained = ((v_star.double().numpy() - truth) ** 2).mean() / truth.var(axis=0).mean()
    torch.manual_seed(3)
    with training.loss(encoder) as (value, logs):
        value.backward()
    assert value.item() == pytest.approx(loss + 0.1 * unexplained, rel=1e-4) and asked == [3]
    assert set(logs) == {"diffusion", "contrastive", "norm", "unexplained"}
    assert logs["unexplained"].item() == pytest.approx(unexplained, rel=1e-4)
    torch.testing.assert_close(encoder.bank[:3], v_star)

    position = encoder.bank_position.item()
    with torch.no_grad():
        first, again = (training.sample(encoder, 8) for _ in range(2))
        by_concept = training.errors_by_concept(encoder)
    torch.manual_seed(0)
    batch = make_batch(tiny_backbone, small_world.step_pictures(unseen.pairs), training.draw)
    with torch.no_grad(), training_step(encoder, frozen, batch, enqueue=False) as (losses, _):
        diffusion = losses["diffusion"].item()
    assert first == again and first["unseen_diffusion"] == by_concept["cup"] == diffusion
    assert first.keys() == {"unseen_diffusion", "unseen_unexplained", "unseen_norm"}
    assert by_concept.keys() == {"cup", "bus"} and by_concept["bus"] != by_concept["cup"]
    assert recorded == [(encoder, 8), (encoder, 8)]
    assert unseen.asked[-2:] == [(16, (0, 3)), (16, (3, 6))], "the three drawings of each thing"
    assert encoder.bank_position == position
    assert encoder.bank_concepts.tolist() == [3, 5, 3, 8, -1, 5], "measures leave the bank alone"


def test_the_word_is_learned_alone_first(tiny_backbone, frozen, encoder, pictures):
    pairs = pair_batch(frozen, pictures)
    training = small_world.EncoderTraining(
        frozen, lambda size: pairs, Unseen(pairs), linear_word, 3, None
    )
    before = encoder.bank.clone()
    torch.manual_seed(3)
    with training.word_loss(encoder) as (value, _):
        value.backward()
    torch.manual_seed(3)
    inputs = encoder_inputs(encoder, frozen, training.batch(pairs))
    v_star = encoder(*inputs).v_star.detach().double()
    truth = linear_word(tiny_backbone.encode_images(pairs.white).float()).double()
    variance = truth.var(dim=0, correction=0).mean()
    error = ((v_star - truth) ** 2).mean() / variance
    assert value.item() == pytest.approx(error.item(), rel=1e-4)
    assert torch.equal(encoder.bank, before)
    reached = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert reached == {"fusion", "token_head", "zero_shot_weight"}
    assert reached == {key.split(".")[0] for key in small_world.word_state(encoder)}

    found = training.unseen_word(encoder, 5)
    features = encoder.static_features(tiny_backbone, pairs.image)
    predicted = encoder(*features).v_star.detach().unflatten(0, (3, -1)).mean(dim=1)  # per picture
    norm = predicted.norm(dim=-1).mean() / frozen.prompt_encoder.table.mean_norm
    assert found["unseen_norm"] == pytest.approx(norm.item(), rel=1e-4)
    error = ((predicted.double() - truth) ** 2).mean() / variance
    assert found["unseen_unexplained"] == pytest.approx(error.item(), rel=1e-4)


def test_processes_share_gather_and_leave_themselves_out():
    x = torch.arange(6)[:, None]
    second = Processes(1, 3)
    assert second.share(x).flatten().tolist() == [2, 3]
    assert second.others(x).flatten().tolist() == [0, 1, 4, 5]
    alone = Processes()
    assert alone.gather(x) is x and alone.others(x).shape == (0, 1)


def test_frozen_parts_get_no_gradient(frozen, encoder, pictures):
    batch = make_batch(frozen.backbone, pictures, lambda both: NOISE)
    with training_step(encoder, frozen, batch) as (losses, prediction):
        losses["loss"].backward()
    assert isinstance(prediction, EncoderPrediction)
    assert all(p.grad is None for m in frozen.backbone.modules for p in m.parameters())
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_picture_that_is_its_own_target_is_encoded_once(tiny_backbone, pictures, monkeypatch):
    counts, encode = [], tiny_backbone.encode_images

    def counted(pixels):
        counts.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(tiny_backbone, "encode_images", counted)
    alone = {name: value for name, value in pictures.items() if name != "target"}
    once = make_batch(tiny_backbone, alone, lambda both: NOISE)
    twice = make_batch(tiny_backbone, alone | {"target": alone["image"]}, lambda both: NOISE)
    assert counts == [3, 6]
    for name in ("latents", "feature_latents", "images"):
        torch.testing.assert_close(getattr(once, name), getattr(twice, name))


def test_the_autoencoder_encodes_a_batch_and_decodes_one_by_one(tiny_backbone, monkeypatch):
    sizes = []
    for name in ("encoder", "decoder"):
        getattr(tiny_backbone.vae, name).register_forward_pre_hook(
            lambda module, args: sizes.append(len(args[0]))
        )
    z = tiny_backbone.encode_images(normal(3, 3, 16, 16, seed=1))
    pictures = tiny_backbone.decode_latents(z)
    assert sizes == [3, 1, 1, 1] and pictures.shape == (3, 3, 16, 16)


def test_a_gpu_has_workers_and_pinned_memory(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loading([], None, gpu) == {"num_workers": 8, "pin_memory": True}
    assert loading([], 3, gpu)["num_workers"] == 3
    assert loading([], None, cpu) == {"num_workers": 0, "pin_memory": False}


def test_autocast_is_for_the_encoder_alone(tiny_path, tiny_config, pictures):
    """What is frozen has its own precision, and autocast would keep its norms in fp32."""
    backbone, on = load_backbone(tiny_path, dtype=torch.bfloat16), {}
    encoder = TuningEncoder.from_backbone(backbone, tiny_config)
    parts = {"unet": backbone.unet, "text": backbone.text_encoder, "encoder": encoder}
    frozen = Frozen.of(backbone, encoder)
    for name, module in parts.items():
        module.register_forward_pre_hook(
            lambda *_, name=name: on.update({name: torch.is_autocast_enabled("cpu")})
        )
    batch = make_batch(backbone, pictures, lambda both: NOISE)
    with training_step(encoder, frozen, batch, autocast=torch.autocast("cpu", torch.bfloat16)) as (
        losses,
        _,
    ):
        losses["loss"].backward()
    assert on == {"unet": False, "text": False, "encoder": True}
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in encoder.parameters())
