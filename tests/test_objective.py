import copy
import dataclasses

import pytest
import torch

from dte_lab import MethodConfig, PromptEncoder
from dte_lab.contrastive import contrastive_loss
from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import Batch, objective

PROMPTS = ["a picture of S*", "S* on the beach", "the S*"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def setting(tiny_backbone, tiny_offsets):
    v_star = randn(3, 24) * 0.02
    leaves = EncoderPrediction(
        v_star.requires_grad_(),
        {k: tuple(m.requires_grad_() for m in pair) for k, pair in tiny_offsets(3).items()},
    )
    latents, noise = randn(3, 4, 8, 8, seed=1), randn(3, 4, 8, 8, seed=2)
    return PromptEncoder(tiny_backbone), leaves, latents, noise, torch.tensor([50, 400, 900])


def test_diffusion_term_against_merged_weights(tiny_backbone, setting, merged_unet):
    """Soft path alone: each sample's loss comes from its own merged UNet and the DDPM scheduler."""
    from diffusers import DDPMScheduler

    encode, leaves, latents, noise, t = setting
    config = MethodConfig(alpha_blend=1.0)
    with objective(
        tiny_backbone, encode, leaves, Batch(latents, noise, t, PROMPTS), config
    ) as losses:
        ours = losses["diffusion"]
    scheduler = DDPMScheduler.from_config(tiny_backbone.scheduler.config)
    errors = []
    for i in range(3):
        row = slice(i, i + 1)
        unet = merged_unet({k: (a[row], b[row]) for k, (a, b) in leaves.offsets.items()})
        noisy = scheduler.add_noise(latents[row], noise[row], t[row])
        target = scheduler.get_velocity(latents[row], noise[row], t[row])
        text = encode(PROMPTS[row], leaves.v_star[row])
        errors.append((unet(noisy, t[row], text).sample - target).square().mean())
    torch.testing.assert_close(ours, torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_and_without_checkpointing(tiny_backbone, setting, checkpointing):
    """Directional derivative by finite differences, along the gradient's own direction."""
    encode, leaves, latents, noise, t = setting
    unet = copy.deepcopy(tiny_backbone.unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    backbone = dataclasses.replace(tiny_backbone, unet=unet)
    config = MethodConfig(alpha_blend=0.6, contrastive_weight=0.0, norm_weight=0.0)
    tensors = [leaves.v_star, *(m for pair in leaves.offsets.values() for m in pair)]

    def loss(backward=False):
        with objective(
            backbone, encode, leaves, Batch(latents, noise, t, PROMPTS), config
        ) as losses:
            if backward:
                losses["loss"].backward()
            return losses["loss"].item()

    loss(backward=True)
    squared = sum(x.grad.square().sum() for x in tensors).item()
    step = 2e-3 / squared**0.5

    def shifted(sign):
        with torch.no_grad():
            for x in tensors:
                x += sign * step * x.grad
            value = loss()
            for x in tensors:
                x -= sign * step * x.grad
        return value

    numeric = (shifted(1) - shifted(-1)) / (2 * step)
    assert abs(numeric - squared) < 0.02 * squared


def test_contrastive_negatives_are_other_concepts_and_the_bank(tiny_backbone, setting):
    encode, leaves, latents, noise, t = setting
    v = leaves.v_star
    concepts, config = torch.tensor([7, 7, 8]), MethodConfig()
    bank = (randn(4, 24, seed=5), torch.tensor([8, 9, -1, 7]))
    with objective(
        tiny_backbone, encode, leaves, Batch(latents, noise, t, PROMPTS, concepts), config, bank
    ) as losses:
        ours = losses["contrastive"]
    negatives = [[v[2], bank[0][0], bank[0][1]]] * 2 + [[v[0], v[1], bank[0][1], bank[0][3]]]
    table, expected = encode.table, []
    for i in range(3):
        rows = table.nearest_rows(v[i : i + 1], config.num_positives)[1]
        expected.append(
            contrastive_loss(v[i : i + 1], table.embeddings[rows], torch.stack(negatives[i]))
        )
    torch.testing.assert_close(ours, torch.stack(expected).mean())
    total = losses["diffusion"] + 0.01 * losses["contrastive"] + 0.01 * losses["norm"]
    torch.testing.assert_close(losses["loss"], total)


def test_prompts_that_are_alike_are_encoded_once(tiny_backbone, setting, monkeypatch):
    """For one prediction; loss and gradient are those of all rows encoded."""
    encode, leaves, latents, noise, t = setting
    prompts, rows = ["S* at night", "the S*", "S* at night"], []
    real = PromptEncoder.encode
    monkeypatch.setattr(PromptEncoder, "encode", lambda *a: rows.append(len(a[1].ids)) or real(*a))
    found = []
    for said in (prompts, encode.tokenize(prompts)):
        v_star = leaves.v_star[:1].detach().requires_grad_()
        one = EncoderPrediction(v_star, {k: (a[:1], b[:1]) for k, (a, b) in leaves.offsets.items()})
        with objective(
            tiny_backbone, encode, one, Batch(latents, noise, t, said), MethodConfig()
        ) as losses:
            losses["loss"].backward()
        found.append((losses["loss"].detach(), v_star.grad))
    torch.testing.assert_close(*found)
    assert rows == [2, 2, 3, 3]  # text with v*, and with the nearest word
    rows.clear()
    with objective(
        tiny_backbone, encode, leaves, Batch(latents, noise, t, prompts), MethodConfig()
    ):
        assert rows == [3, 3], "each sample has a v* of its own"


@pytest.mark.parametrize("regulariser", ["l2", "nearest"])
def test_a_word_pulls_at_v_star_itself(tiny_backbone, setting, regulariser):
    """With "l2" it is the class word, with "nearest" the nearest word, which prompts then use."""
    encode, leaves, latents, noise, t = setting
    table = encode.table
    row = table.nearest_rows(leaves.v_star, 3)[1]
    class_word = table.embeddings[row[:, 2]]  # neither the nearest word nor the next
    prediction = dataclasses.replace(leaves, class_word=class_word)
    config = MethodConfig(regulariser=regulariser, regulariser_weight=0.3)
    with objective(
        tiny_backbone, encode, prediction, Batch(latents, noise, t, PROMPTS), config
    ) as losses:
        pass
    word = class_word if regulariser == "l2" else table.embeddings[row[:, 0]]
    unit = table.embeddings.norm(dim=1).mean()
    expected = sum((v - w).norm() ** 2 for v, w in zip(leaves.v_star, word, strict=True)) / 3
    torch.testing.assert_close(losses[regulariser], expected / unit**2)
    assert losses[regulariser] > 0.01
    torch.testing.assert_close(losses["loss"], losses["diffusion"] + 0.3 * losses[regulariser])


def test_epsilon_and_unknown_predictions(tiny_backbone, setting):
    from dte_lab.objective import diffusion_target

    _, _, latents, noise, t = setting
    backbone = copy.copy(tiny_backbone)
    backbone.scheduler = copy.deepcopy(tiny_backbone.scheduler)
    backbone.scheduler.register_to_config(prediction_type="epsilon")
    assert diffusion_target(backbone, latents, noise, t) is noise
    backbone.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        diffusion_target(backbone, latents, noise, t)
