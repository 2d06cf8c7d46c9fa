import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dte_lab import (
    DTEPipeline,
    EncoderConfig,
    MethodConfig,
    PromptEncoder,
    TuningEncoder,
    load_encoder,
)
from dte_lab.backbone import add_noise
from dte_lab.common.random import stream
from dte_lab.dual_path import dual_path
from dte_lab.encoder import word_clip_embeddings
from dte_lab.features import ImageFeatures, image_features, unet_features


def features(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    clip = ImageFeatures(
        torch.randn(batch, 20, 4, 4, generator=g),
        F.normalize(torch.randn(batch, 12, generator=g), dim=-1),
    )
    return clip, torch.randn(batch, 16 * 3 + 32 * 2, 4, 4, generator=g), torch.arange(batch) * 300


def perturb(encoder):
    """Move every parameter away from its initial value."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return encoder


def test_fresh_encoder_is_an_exact_no_op_on_the_unet(tiny_backbone, tiny_encoder):
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 300, 900])
    prediction = tiny_encoder(*features())
    text = PromptEncoder(tiny_backbone)(["S* on the beach"] * 3, prediction.v_star)
    expected = tiny_backbone.unet(x, t, text).sample
    with dual_path(tiny_backbone.unet, prediction.offsets):
        ours = tiny_backbone.unet(x, t, text).sample
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(prediction.v_star, tiny_encoder.zero_shot(features()[0].embeds))


def test_zero_shot_against_a_plain_formula(tiny_backbone, tiny_encoder):
    table = PromptEncoder(tiny_backbone).table
    embeds = features()[0].embeds
    ours = tiny_encoder.zero_shot(embeds)
    for v, e in zip(ours, embeds, strict=True):
        scores = []
        for i, word in enumerate(table.words):
            ids = tiny_backbone.tokenizer(
                f"a picture of a {word}", padding="max_length", return_tensors="pt"
            ).input_ids
            text = tiny_backbone.text_encoder(input_ids=ids).text_embeds[0]
            scores.append((F.cosine_similarity(text, e, dim=0).item(), i))
        best = sorted(scores, reverse=True)[:4]
        w = torch.tensor([s for s, _ in best]).div(0.1).softmax(0)
        words = table.embeddings[[i for _, i in best]]
        mixture = (w[:, None] * words).sum(0)
        expected = mixture / mixture.norm() * (w * words.norm(dim=1)).sum()
        torch.testing.assert_close(v, expected, atol=1e-4, rtol=1e-3)


def test_class_word_is_the_first_word_of_the_guess(tiny_backbone, tiny_encoder):
    table, clip = PromptEncoder(tiny_backbone).table, features()[0]
    word_clip = word_clip_embeddings(tiny_backbone, table)
    expected = [max(range(len(table)), key=lambda i: (word_clip[i] @ e).item()) for e in clip[1]]
    assert torch.equal(tiny_encoder(*features()).class_word, table.embeddings[expected])


def test_v_star_is_the_weighted_guess_and_the_head_in_units_of_a_word(tiny_backbone, tiny_config):
    settings = replace(tiny_config, token_scale=0.7, zero_shot_temperature=0.03)
    encoder = TuningEncoder.from_backbone(tiny_backbone, settings)
    table, bias = PromptEncoder(tiny_backbone).table, torch.linspace(-1, 1, 24)
    with torch.no_grad():
        encoder.zero_shot_weight.fill_(0.25)
        encoder.token_head.out.bias.copy_(bias)
    clip, unet, t = features()
    for v_star, e in zip(encoder(clip, unet, t).v_star, clip.embeds, strict=True):
        similarity = word_clip_embeddings(tiny_backbone, table) @ e
        w, rows = similarity.topk(4)
        w = (w / 0.03).exp() / (w / 0.03).exp().sum()
        words = table.embeddings[rows]
        mixture = w @ words
        guess = mixture / mixture.norm() * (w @ words.norm(dim=1))
        entry = table.embeddings.square().mean().sqrt()
        torch.testing.assert_close(v_star, 0.25 * guess + 0.7 * entry * bias)


def test_samples_do_not_mix(tiny_encoder):
    clip, unet, t = features()
    whole = perturb(tiny_encoder)(clip, unet, t)
    alone = tiny_encoder(ImageFeatures(clip[0][1:2], clip[1][1:2]), unet[1:2], t[1:2])
    torch.testing.assert_close(whole.v_star[1:2], alone.v_star, atol=1e-5, rtol=1e-4)
    for key, (a, b) in alone.offsets.items():
        torch.testing.assert_close(whole.offsets[key][0][1:2], a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.offsets[key][1][1:2], b, atol=1e-5, rtol=1e-4)


def test_save_and_load_round_trip(tiny_backbone, tiny_encoder, tmp_path):
    perturb(tiny_encoder).enqueue(torch.ones(2, 24), torch.tensor([4, 5]))
    tiny_encoder.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path, tiny_backbone)
    assert loaded.settings == tiny_encoder.settings
    for (name, mine), theirs in zip(tiny_encoder.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    ours, again = tiny_encoder(*features()), loaded(*features())
    assert torch.equal(ours.v_star, again.v_star)
    for key in ours.offsets:
        torch.testing.assert_close(ours.offsets[key], again.offsets[key], atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_loading_what_does_not_fit(tiny_backbone, tiny_encoder, tmp_path):
    with pytest.raises(ValueError, match="No encoder at"):
        load_encoder(tmp_path, tiny_backbone)
    tiny_encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    key = next(iter(config["projections"]))
    config["projections"]["elsewhere.to_q"] = config["projections"].pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mismatch in projections"):
        load_encoder(tmp_path, tiny_backbone)


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone(tiny_backbone, tiny_config):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (
        TuningEncoder.from_backbone(tiny_backbone, tiny_config, seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    states = [e.hypernetwork.queries for e in (one, two, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_bank_is_a_ring(tiny_encoder):
    for i in range(4):
        rows = torch.full((4, 24), float(i))
        tiny_encoder.enqueue(rows, torch.full((4,), i))
    # six rows, sixteen writes: 0000 1111 2222 3333, of which the last six remain
    assert sorted(tiny_encoder.bank_concepts.tolist()) == [2, 2, 3, 3, 3, 3]
    assert torch.equal(tiny_encoder.bank[:, 0].long(), tiny_encoder.bank_concepts)


def test_static_prediction(tiny_backbone, tiny_encoder, tiny_pixels):
    encoder = perturb(tiny_encoder)
    one = encoder.predict(tiny_backbone, tiny_pixels, seed=0)
    two = encoder.predict(tiny_backbone, tiny_pixels, seed=0)
    other = encoder.predict(tiny_backbone, tiny_pixels, seed=1)
    assert one.v_star.shape == (1, 24) and not one.v_star.requires_grad
    assert all(len(a) == len(b) == 1 for a, b in one.offsets.values())
    assert torch.equal(one.v_star, two.v_star)
    key = next(iter(one.offsets))
    assert torch.equal(one.offsets[key][0], two.offsets[key][0])
    assert not torch.equal(one.offsets[key][0], other.offsets[key][0])


def test_static_prediction_is_the_mean_over_pictures_and_noise_levels(
    tiny_backbone, tiny_encoder, tiny_pixels
):
    encoder, encode = perturb(tiny_encoder), PromptEncoder(tiny_backbone)
    T, pictures = len(tiny_backbone.alphas_cumprod), tiny_pixels[:2]
    latents = tiny_backbone.encode_images(pictures)
    noise = torch.randn(6, 4, 8, 8, generator=stream(5, "static features"))
    rows = []
    for i, picture in enumerate(pictures):
        for j, fraction in enumerate((0.2, 0.4, 0.6)):
            t = torch.tensor([round(fraction * (T - 1))])
            noisy = add_noise(tiny_backbone, latents[i : i + 1], noise[3 * i + j][None], t)
            clip = image_features(tiny_backbone, picture[None])
            unet = unet_features(tiny_backbone, noisy, t, encode.plain([""]), grid=4)
            rows.append(encoder(clip, unet, t))
    ours = encoder.predict(tiny_backbone, pictures, seed=5)
    expected = torch.stack([row.v_star for row in rows]).mean(0)
    torch.testing.assert_close(ours.v_star, expected, atol=1e-6, rtol=1e-4)
    for key, pair in ours.offsets.items():
        for side in (0, 1):
            expected = torch.stack([row.offsets[key][side] for row in rows]).mean(0)
            torch.testing.assert_close(pair[side], expected, atol=1e-5, rtol=1e-3)


def test_chosen_features_reach_the_encoder(tiny_backbone, tiny_config, tiny_pixels, tmp_path):
    """Other layers, another prompt and whole matrices: saved, loaded, and used in predictions."""
    chosen = {"unet_layers": ("conv_in", "mid_block"), "clip_layer": -2, "rank": "full"}
    settings = replace(tiny_config, feature_prompt="a picture of the cat", **chosen)
    encoder = perturb(TuningEncoder.from_backbone(tiny_backbone, settings))
    assert encoder.config.unet_dim == 16 + 32
    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path, tiny_backbone)
    assert loaded.settings == settings
    one, two = (e.predict(tiny_backbone, tiny_pixels) for e in (encoder, loaded))
    torch.testing.assert_close(one.v_star, two.v_star)
    with dual_path(tiny_backbone.unet, one.offsets):
        pass  # they fit
    for change in ({"feature_prompt": ""}, {"clip_layer": -1}):
        loaded.settings = replace(settings, **change)
        other = loaded.predict(tiny_backbone, tiny_pixels)
        assert (other.v_star - one.v_star).abs().max() > 1e-6, change


def test_settings_that_do_not_exist_are_refused():
    for name, value in [
        ("regulariser", "l1"), ("offsets_on", "both"), ("granularity", "unet"),
        ("prediction_interval", "never"), ("prediction_interval", -1),
        ("prediction_interval", True), ("alpha_blend", 3), ("alpha_blend", (0.1, 0.2, 0.3)),
        ("alpha_blend", float("nan")), ("temperature", 0), ("num_positives", 0),
        ("num_positives", 2.5), ("norm_weight", -0.1), ("unconditional_offsets", 1),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} is .*, not "):
            MethodConfig(**{name: value})
    for name, value in [
        ("rank", 0), ("rank", "half"), ("feature_timesteps", (2,)), ("feature_timesteps", ()),
        ("width", 20), ("width", 0), ("num_heads", 0), ("token_scale", 0), ("grid", 1.5),
        ("unet_layers", ()), ("clip_layer", "last"), ("feature_prompt", None),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            EncoderConfig(**{name: value})
    assert MethodConfig(alpha_blend=[0.2, 0.9]).alpha_blend == (0.2, 0.9)  # as JSON gives it
    assert EncoderConfig(unet_layers=["conv_in"]).unet_layers == ("conv_in",)


def test_a_backbone_without_projection_is_refused(tiny_backbone):
    from transformers import CLIPTextModel

    plain = CLIPTextModel(tiny_backbone.text_encoder.config)
    bare = replace(tiny_backbone, text_encoder=plain)
    with pytest.raises(ValueError, match="no projection"):
        word_clip_embeddings(bare, PromptEncoder(bare).table)


def test_default_size():
    """About 2 million parameters on a UNet like the small backbone's."""
    from diffusers import UNet2DConditionModel

    from dte_lab.features import unet_feature_dim
    from dte_lab.lora import projection_shapes

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=192,
        attention_head_dim=4,
    )
    encoder = TuningEncoder(projection_shapes(unet), 192, 192, unet_feature_dim(unet), 192, 10)
    assert encoder.settings == EncoderConfig() and encoder.method == MethodConfig()
    assert 1.5e6 < sum(p.numel() for p in encoder.parameters()) < 4e6


def test_features_are_noised_by_a_stream_of_their_own(tiny_backbone, tiny_encoder, tiny_pixels):
    """Equal seeds of prediction and sampling must not mean the same noise."""
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)
    expected = stream(3, "static features")
    for other in (torch.Generator().manual_seed(3), stream(3, "initial noise")):
        assert not torch.equal(torch.randn(4, generator=other), torch.randn(4, generator=expected))
    seen = []
    tiny_encoder.unet_features = lambda backbone, noisy, t, prompt: seen.append(noisy) or noisy
    tiny_encoder.static_features(tiny_backbone, tiny_pixels[:1], 3)
    latents = tiny_backbone.encode_images(tiny_pixels[:1])
    alpha = tiny_backbone.alphas_cumprod[[round(f * 999) for f in (0.2, 0.4, 0.6)]]
    alpha = alpha[:, None, None, None]
    noise = (seen[0] - alpha.sqrt() * latents) / (1 - alpha).sqrt()  # (3, 4, 8, 8)
    assert (noise[0] - pipe.initial_noise(3)[0]).abs().max() > 0.1
    drawn = torch.randn(3, 4, 8, 8, generator=stream(3, "static features"))
    torch.testing.assert_close(noise, drawn, atol=1e-4, rtol=1e-3)


def test_the_units_of_the_residual(tiny_backbone, tiny_config):
    table = PromptEncoder(tiny_backbone).table
    for scale in (0.3, 1.7):
        settings = replace(tiny_config, token_scale=scale)
        encoder = TuningEncoder.from_backbone(tiny_backbone, settings)
        assert encoder.residual_unit.item() == pytest.approx(scale * table.typical_entry)


def test_the_words_are_computed_and_those_of_old_folders_are_taken(
    tiny_backbone, tiny_encoder, tmp_path
):
    tiny_encoder.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    saved = {k: v.clone() for k, v in load_file(file).items()}  # not of the file written over
    assert "word_clip" not in saved and "word_clip" not in tiny_encoder.state_dict()
    loaded = load_encoder(tmp_path, tiny_backbone)
    assert torch.equal(loaded.word_clip, tiny_encoder.word_clip)
    assert torch.equal(copy.deepcopy(loaded).word_clip, tiny_encoder.word_clip)

    old = torch.rand_like(tiny_encoder.word_clip).half()
    save_file(saved | {"word_clip": old}, file)
    assert torch.equal(load_encoder(tmp_path, tiny_backbone).word_clip, old.float())
    tiny_encoder.load_state_dict(saved | {"word_clip": old})  # an old checkpoint's
    assert torch.equal(loaded.word_clip, tiny_encoder.word_clip)
    for broken in (old[1:], old * torch.nan):
        save_file(saved | {"word_clip": broken}, file)
        with pytest.raises(ValueError, match="the tensor word_clip is damaged"):
            load_encoder(tmp_path, tiny_backbone)
