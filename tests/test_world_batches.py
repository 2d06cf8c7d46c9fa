"""The wide world's batches: what is composed, named and asked for is what the picture shows."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from dte_lab.world import batches as module
from dte_lab.world import drawings as drawings_module
from dte_lab.world.batches import (
    PLACEHOLDER,
    Captions,
    PicturePairs,
    Shares,
    named_drawings,
    wide_caption,
    wide_words,
)
from dte_lab.world.captions import caption, held_out, noun_phrase, scene_words
from dte_lab.world.clip import WORDS, build_tokenizer
from dte_lab.world.data import to_tensor
from dte_lab.world.drawings import WHITE, Drawings, drawings_never_seen, next_allowed
from dte_lab.world.pairs import VARIANTS, behind, vary
from dte_lab.world.scenes import SCENES, SPRITE_PX, compose
from dte_lab.world.sprites import STYLES, split_names, sprite
from dte_lab.world.wide import Drawing, Wide, load

NAMES = [*split_names("train")[:5], *split_names("extra")[:2]]
ROOMS = 2  # backgrounds of each scene


@pytest.fixture(scope="module")
def drawings(wide_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawings_module, "BACKGROUNDS", ROOMS)
        yield Drawings(NAMES, load(wide_cache))


@pytest.fixture(scope="module")
def tokenizer(drawings):
    return build_tokenizer(wide_words(drawings.wide))


def rgba_of(drawings, row):
    """A drawing as `compose` takes it."""
    if row < drawings.small:
        return sprite(NAMES[row // 3], STYLES[row % 3], SPRITE_PX)
    return drawings.rgba[row].numpy().astype(np.float32) / 255


def room(scene, seed):
    """A background as the device keeps it."""
    return behind(SCENES[scene], seed).astype(np.float16).astype(np.float32)


def shows(picture, rgba, scene):
    """Whether a picture is a sprite before one of the backgrounds of a scene."""
    truths = [compose(rgba, SCENES[scene], room(scene, seed)) for seed in range(ROOMS)]
    return any(torch.equal(picture, to_tensor(truth[None])[0]) for truth in truths)


def test_a_drawing_is_composed_as_single_pictures_are(drawings):
    generator = torch.Generator().manual_seed(0)
    for variant, scene in product(range(0, len(VARIANTS), 5), range(len(SCENES))):
        left, right = torch.randint(len(drawings), (2, 1), generator=generator)
        seam = torch.randint(1, SPRITE_PX, (1,), generator=generator)
        things = drawings.things(left, right, seam, torch.tensor([variant]))
        torch.manual_seed(scene)
        drawn = drawings.before(things, torch.tensor([scene]))[0]
        torch.manual_seed(scene)
        seed = int(torch.randint(ROOMS, (1,)))
        a, b = (rgba_of(drawings, int(row)) for row in (left, right))
        mixed = vary(np.concatenate([a[:, :seam], b[:, seam:]], axis=1), variant)
        truth = compose(mixed, SCENES[scene], room(scene, seed))
        assert torch.equal(drawn, to_tensor(truth[None])[0]), (variant, SCENES[scene])
        exact = compose(mixed, SCENES[scene], behind(SCENES[scene], seed))
        assert (drawn - to_tensor(exact[None])[0]).abs().max() < 1.1 / 127.5  # one level


def test_plain_drawings_are_as_they_are(drawings):
    rows = torch.tensor([0, 4, drawings.small, len(drawings) - 1])
    scene = torch.tensor([3, 12, 17, 9])
    for k, picture in enumerate(drawings.plain(rows, scene)):
        assert shows(picture, rgba_of(drawings, int(rows[k])), int(scene[k]))


def test_so_many_drawings_are_the_small_worlds_first(wide_cache):
    wide = load(wide_cache)
    few = Drawings(NAMES, wide, count=9)
    assert (few.names, few.small, len(few), few.wide) == (NAMES[:3], 9, 9, [])
    more = Drawings(NAMES, wide, count=25)
    assert (len(more), more.small, more.wide) == (25, 21, wide.drawings[:4])
    assert torch.equal(more.rgba[21:], wide.rgba[:4])
    assert more.train_names == NAMES[:5] and few.train_names == NAMES[:3]
    assert len(Drawings(NAMES, wide)) == 21 + len(wide.drawings) and len(Drawings(NAMES)) == 21


def test_random_drawings_have_the_share_of_the_wide_world(drawings):
    torch.manual_seed(0)
    rows = drawings.random(4000, 0.7)
    assert abs((rows >= drawings.small).double().mean() - 0.7) < 0.03
    assert len(set(rows.tolist())) == len(drawings)
    assert Drawings(NAMES).random(500, 0.7).max() == 20


def test_what_watches_training_is_never_trained_on(wide_cache):
    unseen, wide = drawings_never_seen(wide_cache, "cpu"), load(wide_cache)
    assert unseen.names == split_names("val") and unseen.wide == wide.held_out
    assert torch.equal(unseen.rgba[unseen.small :], wide.held_out_rgba)
    assert unseen.train_names == []


def test_the_next_scene_that_is_allowed():
    torch.manual_seed(0)
    allowed = torch.rand(30, 7) < 0.4
    allowed[:, 5] = True
    found = next_allowed(allowed)
    for row, scene in product(range(30), range(7)):
        expected = next(s % 7 for s in range(scene, scene + 7) if allowed[row, s % 7])
        assert found[row, scene] == expected


@pytest.fixture
def few_scenes(monkeypatch):
    """A world in which nearly all is kept to measure with: what is left, by style."""
    left = {"noto": ("red", "beach"), "twemoji": ("red",), "fluent": ("night", "red")}
    monkeypatch.setattr(
        drawings_module, "held_out", lambda name, style, scene: scene not in left[style]
    )
    monkeypatch.setattr(drawings_module, "BACKGROUNDS", ROOMS)
    return {style: [SCENES.index(scene) for scene in scenes] for style, scenes in left.items()}


def test_what_is_kept_is_never_shown_whole(few_scenes, tokenizer):
    drawings = Drawings(NAMES)
    pairs = PicturePairs(tokenizer, drawings, Shares(mixed=0, varied=0.3, restyled=0.5))
    torch.manual_seed(0)
    batch = pairs(150)
    allowed = {
        (row, scene): rgba_of(drawings, row)
        for row in range(drawings.small)
        for scene in few_scenes[STYLES[row % 3]]
    }
    for k, concept in enumerate(batch.concept.tolist()):
        row, variant = concept % len(drawings), concept // len(drawings) ** 2
        if variant:
            continue
        mine = {key: rgba for key, rgba in allowed.items() if key[0] // 3 == row // 3}
        for picture in (batch.image[k], batch.target[k]):
            assert any(shows(picture, rgba, scene) for (_, scene), rgba in mine.items()), k
    captions = Captions(tokenizer, drawings, 0.0, 300)
    seen = set(zip(captions.rows.tolist(), captions.scenes.tolist(), strict=True))
    assert seen <= set(allowed) and len(seen) > 15


def test_what_is_asked_for_is_what_the_target_shows(drawings, tokenizer):
    """Rebuilt from the concept's number and the prompt alone."""
    pairs = PicturePairs(tokenizer, drawings)
    texts = [caption(PLACEHOLDER, None, None)]
    texts += [caption(PLACEHOLDER, style, scene) for style in (None, *STYLES) for scene in SCENES]
    texts += [f"{PLACEHOLDER} {scene_words(scene)}" for scene in SCENES]
    n, kinds = len(drawings), Counter()
    torch.manual_seed(0)
    batch = pairs(120)
    assert (batch.is_slot.sum(1) == 1).all()
    assert (batch.ids[batch.is_slot] == tokenizer.encode(PLACEHOLDER)[1]).all()
    for k, concept in enumerate(batch.concept.tolist()):
        first, second, variant = concept % n, concept // n % n, concept // n**2
        said = tokenizer.decode(batch.ids[k], skip_special_tokens=True).strip()
        prompt = texts.index(said)
        if prompt == 0:
            assert torch.equal(batch.target[k], batch.image[k])
            kinds["same"] += 1
            continue
        asked, scene = divmod(prompt - 1, len(SCENES))
        if asked in (1, 2, 3):  # a style
            kinds["restyled"] += 1
            assert first == second < drawings.small
            first = second = first // 3 * 3 + asked - 1
        kinds["mixed" if first != second else "whole"] += 1
        kinds["varied" if variant else "plain"] += 1
        a, b = (rgba_of(drawings, row) for row in (first, second))
        seams = range(12, 36) if first != second else [0]
        made = [vary(np.concatenate([a[:, :s], b[:, s:]], axis=1), variant) for s in seams]
        assert any(shows(batch.target[k], rgba, scene) for rgba in made), said
        kinds["short"] += asked == 4
    assert all(kinds[name] >= 5 for name in ("same", "mixed", "whole", "varied", "short")), kinds
    assert kinds["restyled"] >= 3


def test_the_input_on_white_is_the_same_thing(drawings, tokenizer):
    torch.manual_seed(1)
    batch = PicturePairs(tokenizer, drawings, Shares(mixed=0))(60)
    n = len(drawings)
    for k, concept in enumerate(batch.concept.tolist()):
        rgba = vary(rgba_of(drawings, concept % n), concept // n**2)
        assert shows(batch.white[k], rgba, WHITE)
        assert any(shows(batch.image[k], rgba, scene) for scene in range(len(SCENES)))
    on_white = PicturePairs(tokenizer, drawings, Shares(mixed=0, varied=1, on_white=True))(40)
    for k, concept in enumerate(on_white.concept.tolist()):
        rgba = vary(rgba_of(drawings, concept % n), concept // n**2)
        assert shows(on_white.image[k], rgba, WHITE)


def test_shares_and_numbers_of_things(drawings, tokenizer):
    shares = Shares(wide=0.7, mixed=0.2, varied=0.4, same_scene=0.25, restyled=0.5, short=0.6)
    torch.manual_seed(0)
    pairs = PicturePairs(tokenizer, drawings, shares)
    concept, prompts, small = [], [], drawings.small
    for _ in range(8):
        batch = pairs(200)
        concept.append(batch.concept)
        prompts.append((batch.ids[:, None] == pairs.ids).all(-1).int().argmax(1))
    concept, prompt = torch.cat(concept), torch.cat(prompts)
    n = len(drawings)
    first, second, variant = concept % n, concept // n % n, concept // n**2
    same, asked = prompt == 0, (prompt - 1) // len(SCENES)
    restyled, could = (1 <= asked) & (asked <= 3), (first < small) & (first == second) & ~same

    def near(hits, share):
        """Within four standard errors."""
        error = (share * (1 - share) / len(hits)) ** 0.5
        assert abs(hits.double().mean() - share) < 4 * error, (hits.double().mean(), share)

    near(first >= small, 0.7)
    near(first != second, 0.2 * (1 - 0.3 / small * 0.3 - 0.7 / (n - small) * 0.7))
    near(variant > 0, 0.4)
    near(same, 0.25)
    assert not restyled[~could].any()
    near(restyled[could & (variant > 0)], 0.5)
    near(asked[~same & ~restyled] == 4, 0.6)
    assert variant.max() < len(VARIANTS) and len(set(concept.tolist())) > 500
    assert Shares() == Shares(0.6, 0.3, 0.5, 0.15, 0.15, 0.3, False)


def test_rows_can_be_asked_for(drawings, tokenizer):
    torch.manual_seed(0)
    batch = PicturePairs(tokenizer, drawings, Shares(mixed=0.5))(60, rows=(4, 7))
    assert set((batch.concept % len(drawings)).tolist()) == {4, 5, 6}


def drawing(name, style="game", colour=None):
    return Drawing("icon", name, style, colour)


def test_words_of_two_names_are_known():
    named = [drawing(name) for name in ("war axe", "axe", "axe axe lamp", "war lamb", "box box")]
    assert wide_words(named) == ["axe", "war"]


def test_captions_name_short_drawings_of_known_words(wide_cache):
    train = split_names("train")[:5]
    names = ["war axe", "axe of war", "axe", "war axe of axe", "sword", f"{train[0]}", "of axe"]
    wide = Wide([drawing(n) for n in names], torch.zeros(7, 48, 48, 4, dtype=torch.uint8), [], None)
    d = Drawings(train, wide)
    assert [names[row - d.small] for row in named_drawings(d)] == [
        "war axe", "axe of war", "axe", train[0], "of axe",
    ]  # fmt: skip


def test_ways_to_say_a_drawing():
    axe, rng = drawing("war axe", "plump flat", "red"), np.random.default_rng(0)
    counts = Counter(wide_caption(axe, "beach", rng) for _ in range(2000))
    expected = {
        "a red plump flat picture of a war axe on the beach": 0.6,
        "a red picture of a war axe on the beach": 0.3,
        "a war axe on the beach, red plump flat": 0.1,
    }
    assert counts.keys() == expected.keys()
    assert all(abs(counts[text] / 2000 - share) < 0.05 for text, share in expected.items())
    plain = {wide_caption(drawing("oars"), "red", rng) for _ in range(99)}
    assert plain == {
        "a game picture of oars on a red background", "a picture of oars on a red background",
        "oars on a red background, game",
    }  # fmt: skip


def test_captions_say_what_their_pictures_show(drawings, tokenizer):
    captions, wide = Captions(tokenizer, drawings, 0.5, 400), 0
    train = split_names("train")[:5]
    held = {name for split in ("val", "test", "extra") for name in split_names(split)}
    torch.manual_seed(0)
    which = captions.random(80)
    pictures = captions.pictures(which)
    for k, number in enumerate(which.tolist()):
        row, scene = int(captions.rows[number]), int(captions.scenes[number])
        assert shows(pictures[k], rgba_of(drawings, row), scene)
        said = tokenizer.decode(captions.ids[number], skip_special_tokens=True)
        if row >= drawings.small:
            wide += 1
            name = drawings.wide[row - drawings.small].name
            assert row in captions.named
        else:
            name = train[row // 3]
        assert noun_phrase(name) in said.replace(" ,", ",")
        assert not any(f"picture of {noun_phrase(name)} " in said for name in held)
    assert 20 < wide < 60
    assert (captions.ids[:, WORDS - 1 :] == tokenizer.eos_token_id).all()
    shown = zip(captions.rows.tolist(), captions.scenes.tolist(), strict=True)
    shown = [(train[r // 3], STYLES[r % 3], SCENES[s]) for r, s in shown if r < drawings.small]
    full = {caption(*item) for item in shown}
    said = {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in captions.ids}
    assert len(full & said) > 0.5 * len(full)
    assert not any(held_out(*item) for item in shown)
    ids, _ = captions(5)
    assert all((row == captions.ids).all(1).any() for row in ids)


def test_captions_that_reach_into_the_cells_tokens_are_left_out(tokenizer):
    wide = [drawing(name, " ".join(["flat"] * 12)) for name in ("axe", "war axe", "war")]
    rgba = torch.zeros(3, 48, 48, 4, dtype=torch.uint8)
    captions = Captions(tokenizer, Drawings(NAMES[:1], Wide(wide, rgba, [], rgba)), 1.0, 200)
    assert 30 < len(captions.ids) < 90  # the three in ten that leave the style out
    assert (captions.ids[:, WORDS - 1 :] == tokenizer.eos_token_id).all()
    assert len(captions.rows) == len(captions.scenes) == len(captions.ids)


def test_a_seed_chooses_the_captions(drawings, tokenizer):
    banks = [Captions(tokenizer, drawings, 0.5, 40, seed).ids for seed in (0, 0, 1)]
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0][:30], banks[2][:30])


def test_captions_without_a_wide_world_are_of_the_small_one(tokenizer):
    captions = Captions(tokenizer, Drawings(NAMES), 0.9, 60)
    assert captions.rows.max() < 15 and captions.named == []
    words = {word for name in NAMES[:5] for word in name.split()}
    assert captions.words() == sorted(words)
    assert module.LONGEST_NAME == 3
