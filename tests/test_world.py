"""The small world: what a caption promises, the picture shows; splits and training are exact."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

from dte_lab.world import SCENES, STYLES, caption, concepts, render, split_names
from dte_lab.world.autoencoder import PatchAutoencoder
from dte_lab.world.build import plain_name, split_concepts
from dte_lab.world.captions import held_out, noun_phrase, random_caption
from dte_lab.world.clip import MAX_LENGTH, build_tokenizer
from dte_lab.world.data import picture_grid, random_batch, random_item, to_tensor
from dte_lab.world.pairs import ConceptPairs
from dte_lab.world.scenes import COLOURS, OFFSET, SPRITE_PX, background, compose
from dte_lab.world.sprites import sprite
from dte_lab.world.training import TrainConfig, learning_rate_at, train


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_822_concepts_in_three_splits_spread_over_all_groups():
    names = {split: split_names(split) for split in ("train", "val", "test")}
    assert [len(n) for n in names.values()] == [702, 60, 60]
    assert len(set().union(*names.values())) == len(concepts()) == 822
    whole = Counter(c.group for c in concepts().values())
    for split in ("val", "test"):
        part = Counter(concepts()[n].group for n in names[split])
        for group, count in whole.items():
            assert abs(part[group] / 60 - count / 822) < 0.05, (split, group)


def test_splits_are_a_function_of_the_concepts():
    listed = [vars(c) for c in concepts().values()]
    assert split_concepts(listed) == {s: sorted(split_names(s)) for s in ("train", "val", "test")}


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
        with pytest.raises(ValueError, match="unknown"):
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
    empty = compose(np.zeros_like(rgba), "blue", 5)
    full = compose(rgba, "blue", 5)
    outside = np.ones((64, 64), bool)
    outside[box] = False
    assert np.array_equal(full[outside], empty[outside])
    opaque = rgba[..., 3] > 0.999
    shown = full[box][opaque] if np.random.default_rng(5).random() >= 0.5 else None
    expected = (rgba[..., :3][opaque] * 255 + 0.5).astype(np.uint8)
    flipped = full[box][:, ::-1][opaque]
    assert np.abs((flipped if shown is None else shown).astype(int) - expected).max() <= 1


def test_concepts_that_mirroring_would_rename_are_not_mirrored():
    columns = [render("chart increasing", "noto", "white", s)[8:56, 8:56] for s in range(8)]
    assert max(np.abs(c.astype(int) - columns[0]).mean() for c in columns) < 6


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
    assert len(tokenizer) <= 4000
    assert np.mean([len(tokenizer.tokenize(w)) == 1 for w in words]) > 0.98
    assert len(tokenizer.tokenize("scorpion")) > 1  # a val concept that no tag names
    assert tokenizer.tokenize(", 1")[0] == ",</w>"  # punctuation is no end token


def test_longest_caption_fits(tokenizer):
    lengths = [len(tokenizer(caption(n, "twemoji", "table")).input_ids) for n in concepts()]
    assert max(lengths) <= MAX_LENGTH


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
    kinds = Counter("picture of S*" if pairs[i]["prompt"].endswith("S*") else "edit"
                    for i in range(300))  # fmt: skip
    assert 0.15 < kinds["picture of S*"] / 300 < 0.35


def test_pca_start_is_as_good_as_pca_and_round_trips(tmp_path):
    x, _, _ = random_batch(np.random.default_rng(0), 128)
    vae = PatchAutoencoder(width=32, fine_width=16)
    vae.initialise_from_pca(x)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    patches = torch.nn.functional.pixel_unshuffle(x.double(), 8).permute(0, 2, 3, 1).flatten(0, 2)
    centred = patches - patches.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(patches))
    expected = eigenvalues[:-16].sum() / 192  # mean squared error of the best rank-16 basis
    assert torch.allclose((y - x).pow(2).mean().double(), expected, rtol=1e-3)
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())


def test_picture_grid_puts_pictures_row_by_row():
    pictures = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(6)])
    grid = picture_grid(to_tensor(pictures), 3)
    assert grid.shape == (8, 12, 3) and grid[0, 0, 0] == 0 and grid[-1, -1, 0] == 5


def _tiny_run(out, steps, minutes=None, stop_after=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 1, 3))
    seen = []

    def loss(model, rng):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(0)
        x = torch.from_numpy(rng.normal(size=(2, 3, 8, 8)).astype(np.float32))
        return (model(x + 0.1 * torch.randn_like(x)) - 1).pow(2).mean(), {}

    config = TrainConfig(steps, 2, 1e-2, warmup_steps=3, sample_every=100, checkpoint_minutes=0)
    return train(out, model, config, loss, lambda model, step: {}, minutes)


def test_training_goes_on_bit_for_bit_where_it_stopped(tmp_path):
    whole = _tiny_run(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        _tiny_run(tmp_path / "pieces", 12, stop_after=5)
    pieces = _tiny_run(tmp_path / "pieces", 12)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_warms_up_holds_and_ends_near_zero():
    c = TrainConfig(100, 2, 1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [learning_rate_at(s, c) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1.0 and rates[-1] == pytest.approx(0.05)


def test_training_stops_on_a_gradient_that_is_not_finite(tmp_path):
    model = torch.nn.Linear(2, 1)
    config = TrainConfig(5, 2, 1e-2)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(tmp_path, model, config, lambda m, r: (m(torch.full((1, 2), torch.nan)).sum(), {}),
              lambda m, s: {})  # fmt: skip


def test_known_words_are_names_of_train_concepts_and_caption_words():
    from dte_lab.world.words import known_words

    words = known_words()
    assert words == sorted(set(words))
    assert {"picture", "background", "beach", "wooden", "red", *STYLES} <= set(words)
    train = {word for name in split_names("train") for word in name.split()}
    grammar = {w for s in SCENES for style in STYLES for w in caption("S*", style, s).split()}
    assert set(words) == train | grammar - {"S*"}
    assert "injury" not in words  # a tag: "adhesive bandage" has it, no name does
