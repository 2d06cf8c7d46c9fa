"""An exported concept works in a stock pipeline, and draws what our own soft path draws."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from dte_lab import Concept, DTEPipeline, MethodConfig
from dte_lab.export import EMBEDDING, KOHYA, LORA, export

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


def draw(stock, ours):
    image = stock(
        PROMPT, latents=ours.initial_noise(3), guidance_scale=1.5,
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


def test_textual_inversion_has_no_lora_file(concept, tmp_path):
    concept.offsets = {}
    assert [path.name for path in export(concept, tmp_path)] == [EMBEDDING]
    assert torch.equal(load_file(tmp_path / EMBEDDING)["S*"], concept.v_star[0])


def test_offsets_of_the_hard_path_are_refused(concept, tmp_path):
    concept.config = replace(concept.config, offsets_on="hard")
    with pytest.raises(ValueError, match="hard path"):
        export(concept, tmp_path)
