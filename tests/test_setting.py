"""What a picture shows besides the thing, named by CLIP for tuning's prompts."""

import torch
import torch.nn.functional as F

from dte_lab.backbone import Backbone
from dte_lab.features import image_features
from dte_lab.setting import PHOTOGRAPH_SETTINGS, SMALL_WORLD_SETTINGS, picture_prompts
from dte_lab.tuning import draw_batch
from dte_lab.world.captions import scene_words
from dte_lab.world.data import to_tensor
from dte_lab.world.scenes import SCENES, render_all
from dte_lab.world.sprites import split_names


def test_the_small_worlds_settings_are_its_scenes():
    assert list(SMALL_WORLD_SETTINGS) == [scene_words(scene) for scene in SCENES]


def test_every_scene_is_named_behind_things_that_no_training_saw(small_pipe):
    names = split_names("val")
    items = [(names[i], "fluent", scene, i) for i, scene in enumerate(SCENES)]
    images = to_tensor(render_all(items))
    found = picture_prompts(small_pipe.backbone, images, "S* cup")
    truth = [f"a picture of S* cup {scene_words(scene)}" for scene in SCENES]
    assert list(found) == truth


def test_the_best_setting_is_that_with_the_largest_cosine(tiny_backbone):
    """Of another model than the small world's, among those of photographs."""
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    embeds = image_features(tiny_backbone, images).embeds
    cosines = []
    for setting in PHOTOGRAPH_SETTINGS:
        text = f"a picture of thing {setting}"
        ids = tiny_backbone.tokenizer([text], truncation=True, return_tensors="pt").input_ids
        text = tiny_backbone.text_encoder(ids).text_embeds[0]
        cosines.append(F.cosine_similarity(embeds, text, dim=-1))
    best = torch.stack(cosines).argmax(dim=0).tolist()
    found = picture_prompts(tiny_backbone, images)
    assert found == tuple(f"a picture of S* {PHOTOGRAPH_SETTINGS[i]}" for i in best)
    assert len(set(found)) > 1


def test_without_a_projection_nothing_is_named(tiny_backbone, monkeypatch):
    monkeypatch.setattr(Backbone, "has_projection", property(lambda self: False))
    assert picture_prompts(tiny_backbone, torch.zeros(2, 3, 16, 16)) == ("a picture of S*",) * 2


def test_each_picture_keeps_its_own_prompt(tiny_backbone):
    """In a batch the pictures come in random order, and their prompts with them."""
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 4, 8, 8)
    generator, order = torch.Generator().manual_seed(4), []
    for step in range(4):
        batch = draw_batch(
            tiny_backbone, latents, ("zero", "one", "two"), step, 4, generator, matched=True
        )
        shown = batch.latents[:, 0, 0, 0].long().tolist()
        assert batch.prompts == [("zero", "one", "two")[i] for i in shown]
        order += shown
    assert order != [i % 3 for i in range(12)]
