"""An exported concept works in a stock pipeline, and draws what our own soft path draws."""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from dte_lab import Concept, DTEPipeline, MethodConfig
from dte_lab.common.errors import DTEError
from dte_lab.common.origin import origin_of
from dte_lab.export import EMBEDDING, KOHYA, LORA, export, recipe
from dte_lab.recommended import STABLE_DIFFUSION
from dte_lab.sd15 import SD15

PROMPT = "a picture of S* on the beach"


@pytest.fixture
def concept(tiny_backbone, tiny_offsets):
    v_star = torch.randn(1, 24, generator=torch.Generator().manual_seed(4))
    return Concept(
        v_star, tiny_offsets(scale=0.5), tiny_backbone.name, MethodConfig(alpha_blend=0.5)
    )


@pytest.fixture
def stock(tiny_backbone, tiny_path):
    """A pipeline as anyone would build it, without any of our modules."""
    scheduler = tiny_backbone.scheduler
    pipe = StableDiffusionPipeline(
        vae=tiny_backbone.vae,
        text_encoder=CLIPTextModel.from_pretrained(tiny_path / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_path / "tokenizer"),
        unet=copy.deepcopy(tiny_backbone.unet),
        scheduler=type(scheduler).from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(stock, ours, prompt=PROMPT):
    image = stock(
        prompt, latents=ours.initial_noise(3), guidance_scale=1.5,
        num_inference_steps=4, output_type="np",
    ).images[0]  # fmt: skip
    return image * 255


@pytest.mark.parametrize("name", [LORA, KOHYA])
def test_a_stock_pipeline_draws_the_soft_path(name, stock, tiny_backbone, tiny_encoder, concept,
                                              tmp_path):  # fmt: skip
    paths = export(concept, tmp_path)
    assert [path.name for path in paths] == [EMBEDDING, LORA, KOHYA]
    ours = DTEPipeline(tiny_backbone, tiny_encoder)
    stock.load_textual_inversion(tmp_path / EMBEDDING)
    without = draw(stock, ours)
    stock.load_lora_weights(tmp_path, weight_name=name)
    assert stock.get_active_adapters() == ["default_0"]
    layers = [m for m in stock.unet.modules() if hasattr(m, "lora_A") and "default_0" in m.lora_A]
    assert len(layers) == len(concept.offsets)
    theirs = draw(stock, ours)
    assert np.abs(theirs - without).mean() > 1, "the adapters change nothing"

    own = ours.generate(
        concept,
        PROMPT,
        seeds=[3],
        guidance_scale=1.5,
        num_inference_steps=4,
        alpha_blend=1,
        progress=False,
    )[0][0]
    assert np.abs(theirs - np.asarray(own, float)).max() < 0.6  # half a grey level of rounding


def test_kohya_file_scales_by_one(concept, tmp_path):
    export(concept, tmp_path)
    kohya = load_file(tmp_path / KOHYA)
    key = next(iter(concept.offsets))
    name = f"lora_unet_{key.replace('.', '_')}" + ("_0" if key.endswith("to_out") else "")
    down, up = kohya[f"{name}.lora_down.weight"], kohya[f"{name}.lora_up.weight"]
    alpha = kohya[f"{name}.alpha"].item()
    a, b = concept.offsets[key]
    assert torch.allclose((up @ down).T * alpha / len(down), a[0] @ b[0], atol=1e-6)
    assert len(kohya) == 3 * len(concept.offsets)


def test_two_concepts_share_a_pipeline(stock, tiny_backbone, tiny_encoder, concept, tmp_path):
    other = replace(concept, v_star=-concept.v_star, offsets={})
    export(concept, tmp_path, "cat", "<cat>")
    export(other, tmp_path, "my-dog", "<dog>")
    names = ["cat.safetensors", "cat_kohya.safetensors", "cat_lora.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "my-dog.safetensors"]
    for name in ("cat", "my-dog"):
        stock.load_textual_inversion(tmp_path / f"{name}.safetensors")
    table, ids = stock.text_encoder.get_input_embeddings().weight, stock.tokenizer.get_vocab()
    assert torch.equal(table[ids["<cat>"]], concept.v_star[0])
    assert torch.equal(table[ids["<dog>"]], -concept.v_star[0])


def test_kohya_file_says_what_it_is(concept, tmp_path):
    export(replace(concept, backbone="sd15", info={"num_steps": 7}), tmp_path, "bus", "<bus>")
    path = tmp_path / "bus_kohya.safetensors"
    with safe_open(path, "pt") as file:
        found = file.metadata()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    rank = str(next(iter(concept.offsets.values()))[0].shape[-1])
    assert found["ss_network_dim"] == found["ss_network_alpha"] == rank
    assert (found["ss_base_model_version"], found["ss_output_name"]) == ("sd_v1", "bus_kohya")
    assert found["modelspec.trigger_phrase"] == "<bus>" and found["ss_steps"] == "7"
    assert origin_of(path) == {"concept": concept.origin, "token": "<bus>"}


@pytest.mark.parametrize("lora", [True, False])
def test_the_printed_recipe_runs(lora, tiny_path, tiny_backbone, tiny_encoder, concept, tmp_path):
    concept = replace(concept, backbone=str(tiny_path), offsets=concept.offsets if lora else {})
    paths = export(concept, tmp_path, "a.b", "<it>")
    lines = recipe(concept, paths, "<it>").splitlines()
    assert "guidance_scale=1.5" in lines[-1] and ("the strength" in lines[-2]) == lora
    found = {}
    exec("\n".join(lines[:-1]), found)
    ours = DTEPipeline(tiny_backbone, tiny_encoder)
    theirs = draw(found["pipe"], ours, "a picture of <it> on the beach")
    own = ours.generate(
        replace(concept, backbone=tiny_backbone.name), PROMPT, seeds=[3], guidance_scale=1.5,
        num_inference_steps=4, alpha_blend=1, progress=False,
    )[0][0]  # fmt: skip
    assert np.abs(theirs - np.asarray(own, float)).max() < 0.6
    exec(lines[-1], found)
    assert found["picture"].size == own.size


def test_the_recipe_of_stable_diffusion_needs_diffusers_alone(concept, tmp_path):
    concept = replace(concept, backbone="sd15")
    text = recipe(concept, export(concept, tmp_path))
    compile(text, "recipe", "exec")
    assert "dte_lab" not in text and "guidance_scale=7.5" in text and SD15 in text
    concept.settings = replace(STABLE_DIFFUSION, guidance_scale=4.25)
    assert "guidance_scale=4.25" in recipe(concept, export(concept, tmp_path))


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "x" * 101])
def test_names_that_no_file_can_have_are_refused(concept, tmp_path, name):
    with pytest.raises(DTEError, match="has to be letters"):
        export(concept, tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", ["", "two words", "a\tb", "a\0"])
def test_a_token_is_one_word(concept, tmp_path, token):
    with pytest.raises(DTEError, match="no single word"):
        export(concept, tmp_path, "name", token)


def test_textual_inversion_has_no_lora_file(concept, tmp_path):
    concept.offsets = {}
    assert [path.name for path in export(concept, tmp_path)] == [EMBEDDING]
    assert torch.equal(load_file(tmp_path / EMBEDDING)["S*"], concept.v_star[0])


def test_offsets_of_the_hard_path_are_refused(concept, tmp_path):
    concept.config = replace(concept.config, offsets_on="hard")
    with pytest.raises(ValueError, match="hard path"):
        export(concept, tmp_path)
