"""The small world: what a caption promises, the picture shows; splits and training are exact."""

import copy
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dte_lab.common.errors import DTEError
from dte_lab.common.muon import MuonAdamW, orthogonalise
from dte_lab.patch_autoencoder import PatchAutoencoder
from dte_lab.world import SCENES, STYLES, caption, concepts, render, sampling, split_names
from dte_lab.world.build import plain_name, split_concepts
from dte_lab.world.captions import held_out, noun_phrase, random_caption
from dte_lab.world.clip import WORDS, build_tokenizer, cells, from_cells, tokenize
from dte_lab.world.data import (
    pixel_grid,
    random_batch,
    random_item,
    to_tensor,
)
from dte_lab.world.pairs import (
    OTHER_SCENE,
    SAME_PICTURE,
    VARIANTS,
    ConceptPairs,
    mix,
    vary,
)
from dte_lab.world.scenes import COLOURS, OFFSET, SPRITE_PX, background, compose
from dte_lab.world.sprites import UNSEEN_STYLE, sprite, unseen_names
from dte_lab.world.training import TrainConfig, muon_optimizer, schedule, train
from dte_lab.world.words import grammar_words


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["wardrobe", "zeppelin"])


def test_822_concepts_in_four_splits_spread_over_all_groups():
    names = {split: split_names(split) for split in ("train", "val", "test", "extra")}
    assert [len(n) for n in names.values()] == [400, 60, 60, 302]
    assert len(set().union(*names.values())) == len(concepts()) == 822
    whole = Counter(c.group for c in concepts().values())
    for split, members in names.items():
        part = Counter(concepts()[n].group for n in members)
        for group, count in whole.items():
            assert abs(part[group] / len(members) - count / 822) < 0.05, (split, group)


def test_splits_are_a_function_of_the_concepts():
    listed = [vars(c) for c in concepts().values()]
    for split, names in split_concepts(listed).items():
        assert sorted(names) == sorted(split_names(split))


def test_clocks_flags_and_symbols_are_left_out():
    assert not [n for n in concepts() if "clock" in n or n.endswith("thirty")]
    assert {c.group for c in concepts().values()} == {
        "nature", "food", "places", "objects", "activities"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("label", "name"),
    [("Woman’s hat", "womans hat"), ("piñata", "pinata"), ("T-Rex", "t rex"),
     ("1st place medal", "first place medal"), ("pool 8 ball", "pool eight ball")],
)  # fmt: skip
def test_names_are_plain_words(label, name):
    assert plain_name(label) == name


def test_render_is_pure_and_says_what_is_unknown():
    picture = render("red apple", "fluent", "beach", 3)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render("red apple", "fluent", "beach", 3))
    assert not np.array_equal(picture, render("red apple", "noto", "beach", 3))
    apple = "red apple"
    for wrong in (("no such", "noto", "red"), (apple, "oil", "red"), (apple, "noto", "?")):
        with pytest.raises(DTEError, match="Unknown|There is no red apple in the style"):
            render(*wrong)


def test_render_takes_about_a_millisecond():
    names = split_names("train")[:50]
    [render(n, "noto", "red") for n in names]  # sprites are resized once
    start = time.process_time()
    for i in range(200):
        render(names[i % 50], "noto", SCENES[i % len(SCENES)], i)
    assert (time.process_time() - start) / 200 < 0.005  # generous: CI machines are shared


def test_sprite_is_drawn_where_promised_and_nowhere_else():
    rgba = sprite("red apple", "noto", SPRITE_PX)
    box = np.s_[OFFSET : OFFSET + SPRITE_PX, OFFSET : OFFSET + SPRITE_PX]
    behind = background("blue", np.random.default_rng(5))
    empty, full = (compose(drawn, "blue", behind) for drawn in (np.zeros_like(rgba), rgba))
    outside = np.ones((64, 64), bool)
    outside[box] = False
    assert np.array_equal(full[outside], empty[outside])
    opaque = rgba[..., 3] > 0.999
    expected = (rgba[..., :3][opaque] * 255 + 0.5).astype(np.uint8)
    assert np.abs(full[box][opaque].astype(int) - expected).max() <= 1


def test_every_colour_is_the_nearest_named_colour_of_its_background():
    table = np.array(list(COLOURS.values()))
    for i, name in enumerate(COLOURS):
        for seed in range(5):
            mean = background(name, np.random.default_rng(seed)).mean((0, 1))
            assert np.abs(table - mean).sum(1).argmin() == i, name


def test_captions():
    assert caption("red apple", "fluent", "blue") == (
        "a fluent picture of a red apple on a blue background"
    )
    assert caption("S*", None, "night") == "a picture of S* at night"
    assert noun_phrase("octopus") == "an octopus" and noun_phrase("grapes") == "grapes"
    assert caption("grapes", None, "orange") == "a picture of grapes on an orange background"


def test_random_captions_name_the_concept_and_leave_parts_out(tokenizer):
    rng = np.random.default_rng(0)
    texts = [random_caption("red apple", "noto", "beach", rng, ("fruit",)) for _ in range(500)]
    assert all("red apple" in t for t in texts)
    for words, low, high in (("noto", 0.7, 0.9), ("on the beach", 0.88, 0.98), ("fruit", 0.1, 0.2)):
        assert low < np.mean([words in t for t in texts]) < high, words


def test_tokenizer_has_one_token_per_train_word_and_no_unseen_word(tokenizer):
    words = {w for n in split_names("train") for w in n.split()}
    assert len(tokenizer) <= 9000
    assert tokenizer.tokenize("a wardrobe") == ["a</w>", "wardrobe</w>"]
    assert len(build_tokenizer([]).tokenize("zeppelin")) > 1
    assert np.mean([len(tokenizer.tokenize(w)) == 1 for w in words]) > 0.98
    assert len(tokenizer.tokenize("scorpion")) > 1  # a val concept that no tag names
    assert tokenizer.tokenize(", 1")[0] == ",</w>"  # punctuation is no end token


def test_a_tokenizer_is_the_same_each_time(tokenizer):
    again = build_tokenizer(["wardrobe", "zeppelin"]).backend_tokenizer.to_str()
    assert again == tokenizer.backend_tokenizer.to_str()


def test_longest_caption_leaves_the_cells_to_themselves(tokenizer):
    names = split_names("train")
    lengths = [len(tokenizer(caption(n, "twemoji", "table")).input_ids) for n in names]
    assert max(lengths) <= WORDS


def test_held_out_combinations_are_five_percent_and_never_drawn():
    rng = np.random.default_rng(0)
    names = split_names("train")
    share = np.mean([held_out(n, s, c) for n in names for s in STYLES for c in SCENES])
    assert 0.045 < share < 0.055
    assert not any(held_out(*random_item(rng, names)[:3]) for _ in range(2000))


def test_pairs_are_pure_and_prompts_hold_the_placeholder():
    pairs = ConceptPairs()
    for i in range(40):
        item = pairs[i]
        assert "S*" in item["prompt"] and item["image"].shape == (3, 64, 64)
        assert item["image"].abs().max() <= 1
        again = pairs[i]
        assert torch.equal(item["target"], again["target"]) and item["prompt"] == again["prompt"]
        if item["prompt"] == "a picture of S*":
            assert torch.equal(item["image"], item["target"])
    assert not torch.equal(ConceptPairs(seed=1)[0]["image"], pairs[0]["image"])
    kinds = Counter("picture of S*" if pairs[i]["prompt"].endswith("S*") else "edit"
                    for i in range(300))  # fmt: skip
    assert 0.15 < kinds["picture of S*"] / 300 < 0.35


def test_a_prompt_names_the_style_that_changed_and_no_other():
    """What another scene alone changes keeps its style unnamed: the encoder has to see it."""
    pairs, styles = ConceptPairs(varied=0, mixed=0), Counter()
    for i in range(120):
        rng = np.random.default_rng((0, i))  # as the item draws
        random_item(rng, pairs.names)
        rng.random(), rng.random()
        kind = rng.random()
        named = any(f"a {style} picture" in pairs[i]["prompt"] for style in STYLES)
        assert named == (kind >= SAME_PICTURE + OTHER_SCENE), pairs[i]["prompt"]
        styles[named] += 1
    assert min(styles.values()) > 10


def test_varied_concepts_are_other_concepts_made_of_the_same_pixels():
    rgba = np.random.default_rng(0).random((48, 48, 4), np.float32)
    rgba[..., :3] *= rgba[..., 3:]
    assert np.array_equal(vary(rgba, 0), rgba) and len(VARIANTS) == 48
    seen = {vary(rgba, i).tobytes() for i in range(len(VARIANTS))}
    assert len(seen) == len(VARIANTS)
    assert np.array_equal(np.sort(vary(rgba, 31), None), np.sort(rgba, None))
    varied = vary(rgba, 31)
    assert (varied[..., :3] <= varied[..., 3:] + 1e-6).all()  # still premultiplied
    plain, turned = ConceptPairs(varied=0), ConceptPairs(varied=1)
    pairs = len(concepts()) ** 2
    assert all(plain[i]["concept"] < pairs <= turned[i]["concept"] for i in range(20))


def test_mixed_concepts_are_half_of_one_beside_half_of_another():
    left, right = np.zeros((48, 48, 4), np.float32), np.ones((48, 48, 4), np.float32)
    mixed = mix(left, right)
    assert not mixed[:, :24].any() and mixed[:, 24:].all()
    assert np.array_equal(mix(left, left), left)
    pure, both = (ConceptPairs(varied=0, mixed=share) for share in (0, 1))
    halves = [[divmod(p[i]["concept"], len(concepts())) for i in range(20)] for p in (pure, both)]
    assert all(a == b for a, b in halves[0]) and sum(a != b for a, b in halves[1]) > 15


def test_pairs_of_fewer_concepts_are_spread_over_all_groups():
    few = ConceptPairs(count=50)
    assert len(set(few.names)) == 50 and set(few.names) < set(ConceptPairs().names)
    groups = {concepts()[name].group for name in ConceptPairs().names}
    assert {concepts()[name].group for name in few.names} == groups


def test_pca_start_is_as_good_as_pca_and_round_trips(tmp_path):
    x, _, _ = random_batch(np.random.default_rng(0), 128)
    vae = PatchAutoencoder(width=32, fine_width=16)
    vae.initialise_from_pca(x)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z).sample
    assert z.shape == (128, 96, 4, 4)
    patches = torch.nn.functional.pixel_unshuffle(x.double(), 8).permute(0, 2, 3, 1).flatten(0, 2)
    centred = patches - patches.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(patches))
    expected = eigenvalues[:-24].sum() / 192  # mean squared error of the best rank-24 basis
    assert torch.allclose((y - x).pow(2).mean().double(), expected, rtol=1e-3)
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())


def test_pca_start_is_half_way_to_whitening():
    """A component's variance is then what its standard deviation was."""
    x, _, _ = random_batch(np.random.default_rng(0), 128)
    vae = PatchAutoencoder(width=16, fine_width=16)
    vae.initialise_from_pca(x)
    patches = F.unfold(x, 8, stride=8).transpose(1, 2).flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)[:24]
    with torch.no_grad():
        z = F.pixel_shuffle(vae.encode(x).latent_dist.mode(), 2)  # (B, 24, 8, 8)
    torch.testing.assert_close(
        z.transpose(0, 1).flatten(1).var(1), variances.sqrt(), rtol=0.01, atol=1e-4
    )


def test_linear_and_convolutional_path_add_up_in_both_directions():
    vae = PatchAutoencoder(width=16, fine_width=16)
    with torch.no_grad():
        for p in vae.parameters():  # the convolutional path starts at zero
            p.normal_(0, 0.1)
        x = torch.randn(2, 3, 64, 64)
        weight, bias = vae.linear_encode.weight.view(24, 3, 8, 8), vae.linear_encode.bias
        z = F.conv2d(x, weight, bias, stride=8) + vae.encoder(x)  # (B, 24, 8, 8)
        latents = vae.encode(x).latent_dist.mode()
        torch.testing.assert_close(F.pixel_shuffle(latents, 2), z, rtol=1e-4, atol=1e-4)
        weight = vae.linear_decode.weight.view(192, 24).T.reshape(24, 3, 8, 8)
        linear = F.conv_transpose2d(z, weight, stride=8)
        linear += vae.linear_decode.bias.view(3, 8, 8).repeat(1, 8, 8)
        y = linear + vae.decoder(z)
        torch.testing.assert_close(vae.decode(latents).sample, y, rtol=1e-4, atol=1e-4)


def test_cells_are_positions_of_the_latent_row_by_row():
    latents = torch.randn(3, 64, 4, 4)
    cut = cells(latents)
    assert torch.equal(cut[1, 6], latents[1, :, 1, 2])
    assert torch.equal(from_cells(cut), latents)


def test_picture_grid_puts_pictures_row_by_row():
    pictures = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(6)])
    grid = pixel_grid(to_tensor(pictures), 3)
    assert grid.shape == (8, 12, 3) and grid[0, 0, 0] == 0 and grid[-1, -1, 0] == 5


def _tiny_run(out, steps, minutes=None, stop_after=None, device="cpu"):
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 1, 3))
    last = torch.nn.Conv2d(1, 1, 1)
    model = torch.nn.Sequential(OrderedDict(blocks=blocks, last=last))
    seen = []

    @contextmanager
    def loss(model):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(0)
        yield (model(torch.randn(2, 3, 8, 8, device=device)) - 1).pow(2).mean(), {}

    config = TrainConfig(
        steps, 2, 1e-2, muon_learning_rate=1e-2, warmup_steps=3, sample_every=100,
        checkpoint_minutes=0, log_every=1,
    )  # fmt: skip
    return train(out, model, config, loss, lambda model, step: {}, minutes, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_train_as_eager_ones(tmp_path, monkeypatch):
    captured = _tiny_run(tmp_path / "captured", 12, device="cuda")
    monkeypatch.setattr("dte_lab.world.training.EAGER_STEPS", 100)
    eager = _tiny_run(tmp_path / "eager", 12, device="cuda")
    for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_training_goes_on_bit_for_bit_where_it_stopped(tmp_path):
    whole = _tiny_run(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        _tiny_run(tmp_path / "pieces", 12, stop_after=5)
    pieces = _tiny_run(tmp_path / "pieces", 12)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_warms_up_holds_and_ends_near_zero():
    c = TrainConfig(100, 2, 1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [schedule(s, c) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1.0 and rates[-1] == pytest.approx(0.05)


def test_orthogonalise_sets_singular_values_to_about_one():
    for shape in ((6, 20), (20, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        ours = orthogonalise(matrix)
        assert torch.linalg.svdvals(ours).sub(1).abs().max() < 0.35  # as Muon's author has it
        assert torch.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_bf16_is_used_where_it_is_asked_for(tmp_path):
    seen = []

    def loss(model):
        y = model["blocks"](torch.ones(2, 8))
        seen.append(y.dtype)
        return nullcontext((y.float().square().mean(), {}))

    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(torch.nn.Linear(8, 8))})
        config = TrainConfig(2, 2, 1e-3, muon_learning_rate=1e-3, mixed_precision=precision)
        assert muon_optimizer(model, config).dtype == dtype
        trained = train(tmp_path / precision, model, config, loss, lambda model, step: {})
        assert seen[-1] == dtype and trained["blocks"][0].weight.dtype == torch.float32


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    model = torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(4, 8),
            "blocks": torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 8)]),
        }
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(5, 2, 1e-3, muon_learning_rate=1e-2, weight_decay=0.0)
    optimizer = muon_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"].fill_(group["peak"])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        step = (p - before[name]).pow(2).mean().sqrt().item()
        # A first step of AdamW is the rate everywhere; Muon's is 0.2 times its rate on average.
        muon = name.startswith("blocks") and name.endswith("weight")
        assert step == pytest.approx(0.2 * 1e-2 if muon else 1e-3, rel=0.3), name


def test_two_steps_of_muon_by_hand():
    """Momentum 0.95 with a look ahead (Nesterov), decay apart from the gradient."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 4, 9, generator=generator)
    p = torch.nn.Parameter(start.clone())
    optimizer = MuonAdamW([{"params": [p], "muon": True}], lr=0.1, weight_decay=0.5)
    momentum, expected = torch.zeros(4, 9), start
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = orthogonalise(0.05 * gradient + 0.95 * momentum)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 9**0.5 * ahead
    torch.testing.assert_close(p.detach(), expected)


def test_the_base_model_alone_is_drawn_with_guidance_by_the_empty_caption(
    tiny_backbone, monkeypatch
):
    b, captions = tiny_backbone, ["a red apple", "the cat at night"]
    monkeypatch.setattr(sampling, "STEPS", 2)
    drawn = sampling.draw(b.vae, b.text_encoder, b.tokenizer, b.unet, b.scheduler, captions, seed=3)

    scheduler = copy.deepcopy(b.scheduler)
    scheduler.set_timesteps(2)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    z = z * scheduler.init_noise_sigma
    empty, states = (
        b.text_encoder(tokenize(b.tokenizer, texts)).last_hidden_state for texts in ([""], captions)
    )
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(z, t)
            without, told = (b.unet(x, t, s.expand(2, -1, -1)).sample for s in (empty, states))
            z = scheduler.step(without + 3 * (told - without), t, z).prev_sample
        pictures = b.vae.decode(z / b.vae.config.scaling_factor).sample
    torch.testing.assert_close(drawn, pictures.clamp(-1, 1), atol=1e-4, rtol=0)


def test_training_stops_on_a_gradient_that_is_not_finite(tmp_path):
    model, x = torch.nn.Linear(2, 1), torch.full((1, 2), torch.nan)
    config = TrainConfig(5, 2, 1e-2)
    with pytest.raises(FloatingPointError, match="before 5"):
        train(tmp_path, model, config, lambda m: nullcontext((m(x).sum(), {})), lambda m, s: {})


def test_what_is_not_finite_is_not_saved(tmp_path):
    model, seen = torch.nn.Linear(2, 1), []

    def loss(model):
        seen.append(0)
        x = torch.full((1, 2), torch.nan if len(seen) > 2 else 1.0)
        return nullcontext((model(x).sum(), {}))

    config = TrainConfig(40, 2, 1e-2, checkpoint_minutes=0, log_every=1)
    with pytest.raises(FloatingPointError, match="before 3"):
        train(tmp_path, model, config, loss, lambda m, s: {})
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(x.isfinite().all() for x in saved.values())


def test_words_of_the_grammar_are_those_of_captions():
    words = grammar_words()
    assert words == sorted(set(words))
    assert {"picture", "background", "beach", "wooden", "red", *STYLES} <= set(words)
    grammar = {w for s in SCENES for style in STYLES for w in caption("S*", style, s).split()}
    assert set(words) == grammar - {"S*"}


def test_the_unseen_style_has_things_that_no_training_saw():
    names = unseen_names()
    assert len(names) == len(set(names)) == 71
    assert {concepts()[name].split for name in names} == {"val", "test"}
    drawn = sprite("peacock" if "peacock" in names else names[0], UNSEEN_STYLE)
    assert drawn.shape == (48, 48, 4) and 0.1 < drawn[..., 3].mean() < 0.9
    assert (drawn[..., :3] <= drawn[..., 3:] + 0.02).all(), "premultiplied"
    kinds = {sprite(name, UNSEEN_STYLE).tobytes() for name in names}
    assert len(kinds) == 71, "each its own"
    with pytest.raises(DTEError, match="There is no red apple in the style 'fxemoji'"):
        sprite("red apple", UNSEEN_STYLE)
