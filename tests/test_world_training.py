"""The whole recipe of the base model in two steps a part: train, pack, load, draw, personalize."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_world import shrink

from dte_lab import DTEPipeline
from dte_lab.backbone import load_backbone
from dte_lab.common.checkpoint import CHECKPOINT, read_state
from dte_lab.common.errors import DTEError
from dte_lab.encoder import TuningEncoder
from dte_lab.evaluation.base_model import generate
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.tokens import TokenTable
from dte_lab.training.first_words import fit_token_head, name_embeddings
from dte_lab.world import (
    pack,
    render_image,
    split_names,
    train_autoencoder,
    train_decoder,
    train_text,
    train_towers,
    train_unet,
    training,
)
from dte_lab.world.data import random_batch, random_items, rendered
from dte_lab.world.latents import scaled_latents
from dte_lab.world.painter import TextPainter
from dte_lab.world.training import TrainConfig
from dte_lab.world.word_space import PICTURE_WORDS, PictureWords

TINY = {"steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def tiny_world():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_world, wide_cache):
    """Folders of all runs, and `parts`, which is packed with each of them as they end."""
    root = tmp_path_factory.mktemp("runs")
    parts = root / "parts"
    train_autoencoder.main(root / "autoencoder", **TINY)
    pack.main({"autoencoder": root / "autoencoder"}, parts)
    for name, module in (("text", train_text), ("unet", train_unet), ("towers", train_towers)):
        shutil.copytree(parts, root / f"before-{name}")
        module.main(root / name, parts, wide_cache, **TINY)
        pack.main({name: root / name}, parts)
    return root


@pytest.fixture(scope="module")
def backbone(runs):
    return load_backbone(runs / "parts")


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_every_run_logs_and_shows_samples(runs):
    for run in ("autoencoder", "text", "unet", "towers"):
        first, last = lines(runs / run)
        assert first["step"] == 2 and first["loss"] > 0
        assert last["step"] == 2 and all(np.isfinite(list(last.values())))
        assert (runs / run / "config.json").is_file()
    for picture in ("autoencoder/samples.png", "text/samples.png", "unet/samples-000002.png"):
        assert (runs / picture).is_file()


def test_all_that_was_trained_is_packed_in_half_precision_under_40_mb(runs):
    files = {f.relative_to(runs / "parts"): load_file(f) for f in runs.glob("parts/**/*.safe*")}
    assert len(files) == 6
    assert all(v.dtype == torch.float16 for f in files.values() for v in f.values())
    assert sum(v.numel() * 2 for f in files.values() for v in f.values()) < 40e6


def test_the_last_text_encoder_is_the_one_that_stays(runs):
    """The denoiser's run moves it, that of the towers gives it a projection."""

    def weights(run):
        return load_file(runs / run / "text_encoder" / "model.safetensors")

    text, unet, towers, packed = map(weights, ("text", "unet", "towers", "parts"))
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(text[name].half(), unet[name].half())
    assert torch.equal(unet[name].half(), towers[name].half())
    assert torch.equal(packed[name], towers[name].half())
    projection = "text_projection.weight"
    assert not torch.equal(unet[projection].half(), towers[projection].half())
    assert torch.equal(packed[projection], towers[projection].half())
    moved = [runs / run / "painter.safetensors" for run in ("text", "unet")]
    assert not torch.equal(*(load_file(file)["weight"] for file in moved))


def test_the_trained_folder_is_a_backbone_that_draws(backbone):
    assert backbone.resolution == 64 and backbone.latent_shape == (96, 4, 4)
    pictures = generate(backbone, ["a noto picture of a red apple"], seed=0)
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all()


def test_it_can_be_personalized(backbone):
    pipe = DTEPipeline(backbone, TuningEncoder.from_backbone(backbone))
    concept = pipe.personalize(render_image("tractor", "noto", "white"), num_steps=1)
    picture = pipe.generate(concept, "S* at night", num_inference_steps=2)[0][0]
    assert picture.size == (64, 64)


def test_known_words_are_those_that_captions_say(backbone, runs):
    words = json.loads((runs / "parts" / "words.json").read_text())
    assert words == sorted(set(words))
    train = {word for name in split_names("train")[:54] for word in name.split()}
    grammar = set("a an picture of on in at under the background noto twemoji fluent".split())
    assert train | grammar | {"war", "axe", "steel", "beach", "wooden"} <= set(words)
    assert not {"solitaire", "strawberry", "S*"} & set(words)  # of one drawing; held out; no word
    assert set(TokenTable(backbone).words) <= set(words)


def test_a_word_of_a_picture_is_that_of_its_latents(runs, backbone):
    x, _, _ = random_batch(np.random.default_rng(1), 3, "val")
    z = scaled_latents(backbone.vae, x)
    v = PictureWords.load(runs / "parts" / PICTURE_WORDS)(z)
    assert torch.equal(v, PictureWords.load(runs / "text" / PICTURE_WORDS)(z))
    assert v.shape == (3, backbone.text_encoder.config.hidden_size)


def test_the_decoder_alone_is_trained_on_what_the_denoiser_draws(
    runs, tmp_path, wide_cache, tiny_world
):
    train_decoder.main(tmp_path / "more", runs / "parts", wide_cache, **TINY)
    before = PatchAutoencoder.from_pretrained(runs / "parts" / "vae", torch_dtype=torch.float32)
    after = PatchAutoencoder.from_pretrained(tmp_path / "more" / "vae")
    assert after.config.scaling_factor == before.config.scaling_factor
    moved = {
        name.split(".")[0]
        for name, p in after.named_parameters()
        if not torch.equal(p, before.get_parameter(name))
    }
    assert moved == {"decoder", "linear_decode"}
    measures = {"val_psnr", "redrawn_psnr", "border_ratio", "border_ratio_true"}
    assert measures <= set(lines(tmp_path / "more")[-1])


def test_scaled_latents_have_unit_variance(backbone):
    x, _, _ = random_batch(np.random.default_rng(5), 256)
    assert backbone.encode_images(x).std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("name", "module"), [("text", train_text), ("unet", train_unet)], ids=["text", "unet"]
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(
    runs, tmp_path, tiny_world, wide_cache, monkeypatch, name, module
):
    """Bit for bit, from the state of its first step, which another folder keeps."""
    often = partial(TrainConfig, log_every=1, checkpoint_minutes=0)
    monkeypatch.setattr(module, "TrainConfig", often)
    real, calls = training.TrainStep.__call__, []

    def step(self):
        calls.append(0)
        if len(calls) == 2:
            assert read_state(tmp_path / "whole" / CHECKPOINT)[1]["step"] == "1"
            shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
        return real(self)

    monkeypatch.setattr(training.TrainStep, "__call__", step)
    for out in ("whole", "pieces"):
        module.main(tmp_path / out, runs / f"before-{name}", wide_cache, **TINY)
    assert len(calls) == 3
    files = sorted(tmp_path.glob("whole/**/*.safetensors"))
    assert len(files) >= 3
    for file in files:
        pieces = load_file(tmp_path / "pieces" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(v, pieces[k]) for k, v in load_file(file).items()), file


def test_a_finished_run_ends_at_once(runs, tiny_world):
    before = (runs / "autoencoder" / "log.jsonl").read_text()
    train_autoencoder.main(runs / "autoencoder", **TINY)
    assert (runs / "autoencoder" / "log.jsonl").read_text() == before


def test_what_is_missing_is_said_in_one_sentence(runs, tmp_path, wide_cache, tiny_world):
    with pytest.raises(DTEError, match="holds no wide world: dte world build --wide"):
        train_text.main(tmp_path / "a", runs / "parts", tmp_path, **TINY)
    pack.main({"autoencoder": runs / "autoencoder"}, tmp_path / "parts")
    with pytest.raises(DTEError, match="text_encoder"):
        train_unet.main(tmp_path / "b", tmp_path / "parts", wide_cache, **TINY)
    with pytest.raises(DTEError, match="painter.safetensors cannot be read .No such file"):
        TextPainter.load(runs / "towers")


def test_a_denoiser_goes_on_with_the_tower_that_it_was_trained_with(
    runs, tmp_path, tiny_world, wide_cache, monkeypatch
):
    """Also after its packing and CLIP's training, as it was; with another tower it starts anew."""
    monkeypatch.setattr(train_unet, "train", lambda out, model, *others: model)
    train_unet.main(tmp_path / "on", runs / "parts", wide_cache, **TINY)
    file = "unet/diffusion_pytorch_model.safetensors"
    packed, on = load_file(runs / "parts" / file), load_file(tmp_path / "on" / file)
    assert all(torch.equal(v.float(), on[k]) for k, v in packed.items())

    shutil.copytree(runs / "parts", tmp_path / "parts")
    pack.main({"text": runs / "text"}, tmp_path / "parts")  # the tower as it was before
    train_unet.main(tmp_path / "anew", tmp_path / "parts", wide_cache, **TINY)
    silent = [k for k in packed if k.endswith("attn2.to_out.0.weight")]
    anew = load_file(tmp_path / "anew" / file)
    assert len(silent) == 4 and not any(anew[k].any() for k in silent)
    assert all(on[k].any() for k in silent)


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
