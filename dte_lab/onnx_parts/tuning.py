"""One step of tuning as a graph: the loss, its terms and its gradients at v* and the offsets.

`make_fx` writes down what autograd computes, so that the gradient is part of the graph and needs
nothing but ONNX's ordinary operators; Adam's update is left to whoever runs it. Two operators of
the backward pass have no decomposition of their own: `convolution_backward`, here the transposed
convolution, since kernels are frozen; the others are torch's.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._decomp import get_decompositions

from dte_lab import placeholder_token
from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import Batch, objective
from dte_lab.onnx_parts.parts import Layout, Part, example_v_star
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import PromptTokens

TERMS = ("loss", "diffusion", "regulariser")
aten = torch.ops.aten
BACKWARD = (
    aten.native_layer_norm_backward, aten.native_group_norm_backward, aten.silu_backward,
    aten.gelu_backward, aten._softmax_backward_data, aten.select_backward, aten.slice_backward,
    aten.threshold_backward, aten.embedding_dense_backward, aten.mse_loss,
)  # fmt: skip


def gradient_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """What ONNX's exporter has no operator for, in operators that it has."""
    return get_decompositions(BACKWARD) | {
        aten.mse_loss_backward.default: _mse_loss_backward,
        aten.convolution_backward.default: _convolution_backward,
    }


# `TuneConfig.prompts` of the graph: without CLIP's texts, no setting can be named (setting.py).
TUNING_PROMPTS = (f"a picture of {placeholder_token}",)


def tune_part(pipe: DTEPipeline) -> Part:
    """What `tune` computes at each step before its optimiser moves v*, A and B.

    latents are those of the picture, noise and timesteps those of `draw_batch`; ids and slots are
    of the one prompt; weights (1, 1, h, w) say where in the latent the thing is, 1 for everywhere.
    """
    backbone, encoder, layout = pipe.backbone, pipe.encoder, Layout.of(pipe.encoder)
    batch_size = backbone.recommended.batch_size

    def loss(
        v_star: Tensor, offsets: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor,
        ids: Tensor, slots: Tensor, weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch = Batch(
            latents.expand_as(noise), noise, timesteps,
            PromptTokens(ids, slots), weights=weights.expand(len(noise), -1, -1, -1),
        )  # fmt: skip
        prediction = EncoderPrediction(v_star, layout.unpack(offsets))
        bank = encoder.bank, encoder.bank_concepts
        text = one_prompt(pipe, batch_size)
        with objective(backbone, text, prediction, batch, encoder.method, bank) as terms:
            total = terms["loss"]
            return total, torch.stack([terms["diffusion"], total - terms["diffusion"]]).detach()

    def step(
        v_star: Float[Tensor, "1 dim"], offsets: Float[Tensor, " entries"],
        latents: Float[Tensor, "1 channels h w"], noise: Float[Tensor, "batch channels h w"],
        timesteps: Int[Tensor, " batch"], ids: Int[Tensor, "1 length"],
        slots: Int[Tensor, "1 length"], weights: Float[Tensor, "1 1 h w"],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        gradient = torch.func.grad_and_value(loss, argnums=(0, 1), has_aux=True)
        whole = timesteps.long(), ids.long(), slots.long()
        (of_v, of_offsets), (total, rest) = gradient(
            v_star, offsets, latents, noise, *whole, weights
        )
        return torch.cat([total[None], rest]), of_v, of_offsets

    ids, slots = (x.int() for x in pipe.prompt_encoder.tokenize(TUNING_PROMPTS))
    shape = backbone.latent_shape
    inputs = {
        "v_star": example_v_star(pipe),
        "offsets": torch.zeros(sum(layout.sizes)),
        "latents": torch.ones(1, *shape),
        "noise": torch.ones(batch_size, *shape),
        "timesteps": torch.arange(batch_size, dtype=torch.int32),
        "ids": ids,
        "slots": slots,
        "weights": torch.ones(1, 1, *shape[1:]),
    }
    return Part("tune", step, inputs, ("terms", "v_star_gradient", "offsets_gradient"))


def one_prompt(pipe: DTEPipeline, batch_size: int) -> SimpleNamespace:
    """A `PromptEncoder` for `objective` that reads the batch's one prompt once, not 8 times."""
    encode = pipe.prompt_encoder

    def states(tokens: PromptTokens, v_star: Tensor) -> Tensor:
        return encode.encode(tokens, v_star).expand(batch_size, -1, -1)

    return SimpleNamespace(table=encode.table, nearest_hard=encode.nearest_hard, encode=states)


def _mse_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return grad * 2 * (x - target) / (x.numel() if reduction == 1 else 1)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, _: list[int] | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
    groups: int, wanted: list[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    """The gradient of a convolution's input alone: its transposed convolution."""
    assert not transposed and list(wanted) == [True, False, False]
    rest = [
        x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1
        - (grad.shape[2 + i] - 1) * stride[i]
        for i in range(x.ndim - 2)
    ]  # fmt: skip
    back = aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    return back, None, None
