"""The whole recipe of the base model in two steps a part: train, pack, load, draw, personalize."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import DTEPipeline
from dte_lab.backbone import load_backbone
from dte_lab.encoder import TuningEncoder
from dte_lab.evaluation.base_model import generate
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.training.first_words import fit_token_head, name_embeddings
from dte_lab.world import (
    pack,
    render_image,
    sampling,
    train_autoencoder,
    train_clip,
    train_text,
    train_towers,
    train_unet,
)
from dte_lab.world.align import align, cell_blocks
from dte_lab.world.clip import MAX_LENGTH, WORDS, cells
from dte_lab.world.data import random_batch, random_items, rendered

TINY = {"steps": 2, "batch_size": 2, "bank_size": 256}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "STEPS", 2)
        patch.setattr(train_text, "latent_bank", one_of_sixty(train_text.latent_bank))
        patch.setattr(train_text, "COMPONENTS_FROM", 300)
        for part in (train_autoencoder, train_towers):
            patch.setattr(part, "random_batch", a_few)
        return train_all(tmp_path_factory.mktemp("runs"))


def a_few(rng, size, split="train"):
    return random_batch(rng, 24, split)


def one_of_sixty(bank):
    """A bank that draws the first of each thing's styles and scenes alone, for all of them."""
    return lambda vae, items: bank(vae, items[::60]).repeat_interleave(60, dim=0)


def train_all(root):
    train_autoencoder.main(root / "autoencoder", **TINY)
    pack.main({"autoencoder": root / "autoencoder"}, root / "parts")
    train_clip.main(root / "clip", root / "parts", **TINY)
    pack.main({"clip": root / "clip"}, root / "parts")
    train_unet.main(root / "unet", root / "parts", **TINY)
    runs = {part: root / part for part in ("autoencoder", "clip", "unet")}
    pack.main(runs, root / "small")
    return root


@pytest.fixture(scope="module")
def backbone(runs):
    return load_backbone(runs / "small")


def test_every_run_logs_and_shows_samples(runs):
    for run in ("autoencoder", "clip/text", "clip/towers", "unet"):
        lines = [json.loads(line) for line in (runs / run / "log.jsonl").read_text().splitlines()]
        assert lines[0]["step"] == 2 and lines[0]["loss"] > 0
        assert (runs / run / "config.json").is_file()
    assert (runs / "unet" / "samples-000002.png").is_file()


def test_scaled_latents_have_unit_variance(backbone):

    x, _, _ = random_batch(np.random.default_rng(5), 256)
    assert backbone.encode_images(x).std().item() == pytest.approx(1, abs=0.1)


def test_weights_are_stored_in_half_precision_under_35_mb(runs):
    files = list((runs / "small").rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) < 35e6


def test_the_trained_folder_is_a_backbone_that_draws(backbone):
    assert backbone.resolution == 64 and backbone.latent_shape == (96, 4, 4)
    pictures = generate(backbone, ["a noto picture of a red apple"], seed=0)
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all()


def test_it_can_be_personalized(backbone):
    pipe = DTEPipeline(backbone, TuningEncoder.from_backbone(backbone))
    concept = pipe.personalize(render_image("tractor", "noto", "white"), num_steps=1)
    picture = pipe.generate(concept, "S* at night", num_inference_steps=2)[0][0]
    assert picture.size == (64, 64)


def test_decoder_alone_is_trained_further(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(train_autoencoder, "random_batch", a_few)
    train_autoencoder.main(tmp_path / "more", runs / "parts", **TINY)
    before = PatchAutoencoder.from_pretrained(runs / "parts" / "vae", torch_dtype=torch.float32)
    after = PatchAutoencoder.from_pretrained(tmp_path / "more" / "vae")
    assert after.config.scaling_factor == before.config.scaling_factor
    moved = {
        name.split(".")[0]
        for name, p in after.named_parameters()
        if not torch.equal(p, before.get_parameter(name))
    }
    assert moved == {"decoder", "linear_decode"}


def test_a_finished_run_ends_at_once(runs, monkeypatch):
    monkeypatch.setattr(train_autoencoder, "random_batch", a_few)
    before = (runs / "autoencoder" / "log.jsonl").read_text()
    train_autoencoder.main(runs / "autoencoder", **TINY)
    assert (runs / "autoencoder" / "log.jsonl").read_text() == before


def test_fitted_token_head_knows_the_words_of_pictures(tiny_backbone, tiny_config):
    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    fit_token_head(encoder, tiny_backbone, pictures=256)
    items = random_items(np.random.default_rng(0), 256)
    clip = encoder.image_features(tiny_backbone, rendered(items))
    head, rows = encoder.token_head, torch.zeros(256, 16, 16)
    read = encoder.residual_unit * head(rows, clip.patches)
    truth = name_embeddings(tiny_backbone, [name for name, *_ in items])
    assert (read.mean(0) - truth.mean(0)).abs().max() < 1e-5
    error = (read - truth).square().mean()
    assert error < 0.9 * (truth - truth.mean(0)).square().mean()
    unet, t = torch.randn(256, encoder.config.unet_dim, 4, 4), torch.zeros(256, dtype=torch.long)
    prediction = encoder(clip, unet, t)  # nothing of the guess, and no offsets yet
    torch.testing.assert_close(prediction.v_star, read)
    assert all((a @ b).abs().max() == 0 for a, b in prediction.offsets.values())


def test_a_seed_chooses_the_pictures_that_the_token_head_is_fitted_to(tiny_backbone, tiny_config):
    heads = [TuningEncoder.from_backbone(tiny_backbone, tiny_config) for _ in range(2)]
    for seed, encoder in enumerate(heads):
        fit_token_head(encoder, tiny_backbone, pictures=32, seed=seed)
    first, second = (encoder.token_head.read.weight for encoder in heads)
    assert not torch.allclose(first, second, rtol=0.01)


def test_the_token_head_narrows_patches_to_where_they_differ_most(tiny_backbone, tiny_config):
    encoder = TuningEncoder.from_backbone(tiny_backbone, replace(tiny_config, patch_channels=4))
    fit_token_head(encoder, tiny_backbone, pictures=32)
    pixels = rendered(random_items(np.random.default_rng(0), 32))
    patches = encoder.image_features(tiny_backbone, pixels).patches
    channels = F.group_norm(patches, 1).transpose(0, 1).flatten(1)
    channels = channels - channels.mean(1, keepdim=True)
    most = torch.linalg.svdvals(channels.double())[:4].square().sum()
    kept = (encoder.token_head.narrow.weight.flatten(1) @ channels).square().sum()
    torch.testing.assert_close(kept.double(), most, rtol=1e-4, atol=0)


def centred(x):
    return (x - x.mean((0, 1))).flatten(0, 1)


def test_aligned_heads_look_at_their_cell_and_read_it():
    torch.manual_seed(0)
    unet = train_unet.build_unet().eval()
    shown = torch.randn(64, 96, 4, 4)
    latents = shown + 2 * torch.randn(96, 1, 1)  # of a mean that no caption tells
    basis = torch.linalg.qr(torch.randn(192, 192))[0]
    states = torch.randn(64, MAX_LENGTH, 192)  # words are noise; a cell says which and what it is
    states[:, WORDS:] = 4 * basis[:16] + cells(shown) @ basis[16:112]
    x_t, t = torch.randn_like(latents), torch.randint(1000, (64,))
    align(unet, x_t, t, states, latents)
    for block in cell_blocks(unet):
        seen = []
        hook = block.norm2.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with torch.no_grad():
            unet(x_t, t, states)
        hook.remove()
        attention = block.attn2
        query, key, value = (
            layer(x).unflatten(2, (4, 48))[:, :, :2]  # the first two heads
            for layer, x in (
                (attention.to_q, seen[0]), (attention.to_k, states), (attention.to_v, states),
            )
        )  # fmt: skip
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 48**0.5
        share = scores.softmax(-1)[..., WORDS:].diagonal(dim1=2, dim2=3)
        assert share.mean() > 0.3  # of 32 tokens
        for head, part in ((0, slice(0, 48)), (1, slice(48, 96))):
            truth = centred(cells(latents)[..., part])
            read = centred(value[:, WORDS:, head])
            assert torch.corrcoef(torch.stack([read.flatten(), truth.flatten()]))[0, 1] > 0.98
            least_squares = torch.linalg.lstsq(centred(states[:, WORDS:]), truth, driver="gelsd")
            rows = slice(48 * head, 48 * head + 48)
            torch.testing.assert_close(
                attention.to_v.weight[rows].T, least_squares.solution, rtol=0, atol=3e-3
            )
        assert not attention.to_out[0].weight[:, :96].any()
