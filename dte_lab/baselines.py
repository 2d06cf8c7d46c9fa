"""What people use instead, on the same base model, the same pictures and the same seeds.

    textual_inversion   a word embedding, optimised (Gal et al. 2022, arXiv 2208.01618)
    dreambooth_lora     "S* cat" with a rare S*: LoRA, optimised; with or without prior preservation
                        (Ruiz et al. 2022, arXiv 2208.12242; Hu et al. 2021, arXiv 2106.09685)
    e4t                 an encoder of v* with multiplicative offsets that all concepts share, then
                        tuning of both (Gal et al. 2023, arXiv 2302.12228)

Each takes a DTEPipeline and the pictures, and returns {number of steps: Concept}: concepts of the
single path, which `pipe.generate` draws like any other. All start from the word that CLIP finds in
the picture, so that nothing is known to them that the tuning encoder does not know.
"""

import time
from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.concept import Concept
from dte_lab.config import MethodConfig
from dte_lab.encoder import EncoderPrediction, TuningEncoder
from dte_lab.lora import attention_layers, projection_layer, projection_shapes
from dte_lab.objective import Batch, objective
from dte_lab.tuning import noise_levels

PROMPT = f"a picture of {placeholder_token}"


@dataclass
class BaselineConfig:
    """Values are ours; the learning rates were the best of a few on val, at 12 steps.

    `token_learning_rate` is in units of a word's typical embedding entry. `batch_size` noise levels
    per step, as in our own tuning. Prior preservation draws `prior_pictures` of the class with the
    base model and adds as many noise levels of them.
    """

    batch_size: int = 8
    token_learning_rate: float = 0.1
    lora_learning_rate: float = 1.6e-2
    multiplicative_learning_rate: float = 6e-3
    prior_pictures: int = 8


def single_path(method):
    """The settings under which a concept is an ordinary embedding with ordinary offsets."""
    return replace(
        method, alpha_blend=1.0, offsets_on="soft", granularity="attention", regulariser="none",
        prediction_interval=0, unconditional_offsets=True,
    )  # fmt: skip


def textual_inversion(pipe, pixels, steps, seed=0, config=None):
    """Optimise v* alone, from the embedding of the class word, on pictures (n, 3, H, W)."""
    config, start = config or BaselineConfig(), time.perf_counter()
    v_star = class_word(pipe, pixels)[1].clone().requires_grad_()
    unit = pipe.prompt_encoder.table.typical_entry
    groups = [{"params": [v_star], "lr": config.token_learning_rate * unit}]
    return _fit(
        pipe, pixels, steps, groups, lambda: EncoderPrediction(v_star, {}), seed, config, start
    )


def dreambooth_lora(pipe, pixels, steps, seed=0, config=None, prior=False):
    """Optimise a LoRA of the encoder's rank, with the prompt "S* word" and a fixed rare S*.

    The rare word of the original is a random vector of a word's length: no vocabulary is sure to
    have a word without a meaning. ("ours") `prior`: with prior preservation, of weight 1.
    """
    config, start = config or BaselineConfig(), time.perf_counter()
    word, embedding = class_word(pipe, pixels)
    generator = torch.Generator().manual_seed(seed)
    rare = torch.randn(embedding.shape, generator=generator).to(embedding)
    rare = rare * pipe.prompt_encoder.table.mean_norm / rare.norm()
    offsets = initial_lora(
        projection_shapes(pipe.backbone.unet), pipe.encoder.settings.rank, generator
    )
    offsets = {
        k: tuple(m.to(rare.device).requires_grad_() for m in ab) for k, ab in offsets.items()
    }
    groups = [{"params": [m for ab in offsets.values() for m in ab]}]
    groups[0]["lr"] = config.lora_learning_rate
    return _fit(
        pipe, pixels, steps, groups, lambda: EncoderPrediction(rare, offsets), seed, config, start,
        phrase=f"{placeholder_token} {word}", prior=embedding if prior else None,
    )  # fmt: skip


def e4t(pipe, pixels, steps, seed=0, config=None):
    """Predict v* with an E4TEncoder, then tune v* and the multiplicative offsets, with L2 to the
    class word. The original tunes the encoder's weights in place of v* itself.
    """
    config, start = config or BaselineConfig(), time.perf_counter()
    encoder, unit = pipe.encoder, pipe.prompt_encoder.table.typical_entry
    if not isinstance(encoder, E4TEncoder):
        raise DTEError("E4T needs a trained E4TEncoder: load one with load_e4t.")
    predicted = encoder.predict(pipe.backbone, pixels, seed, pipe.prompt_encoder)
    v_star = predicted.v_star.clone().requires_grad_()
    deltas = [d.detach().clone().requires_grad_() for d in encoder.hypernetwork.deltas]
    groups = [
        {"params": [v_star], "lr": config.token_learning_rate * unit},
        {"params": deltas, "lr": config.multiplicative_learning_rate},
    ]

    def predict():
        offsets = encoder.hypernetwork.offsets(deltas)
        return EncoderPrediction(v_star, offsets, predicted.class_word)

    method = replace(single_path(encoder.method), regulariser="l2")
    return _fit(pipe, pixels, steps, groups, predict, seed, config, start, method=method)


def class_word(pipe, pixels):
    """The usable word that the backbone's CLIP finds in pictures (n, 3, H, W), and its embedding
    (1, d).
    """
    table = pipe.prompt_encoder.table
    row = pipe.encoder.class_row(pipe.backbone, pixels, table)
    return table.words[row], table.embeddings[row : row + 1]


def initial_lora(shapes, rank, generator):
    """PEFT's start: A (1, Din, r) uniform within +-1/sqrt(Din), B (1, r, Dout) zero."""
    return {
        key: (
            (2 * torch.rand(1, d_in, rank, generator=generator) - 1) * d_in**-0.5,
            torch.zeros(1, rank, d_out),
        )
        for key, (d_in, d_out) in shapes.items()
    }


def _fit(
    pipe, pixels, steps, groups, predict, seed, config, start, phrase=placeholder_token,
    prior=None, method=None,
):  # fmt: skip
    """AdamW on the diffusion loss; a Concept after each number of `steps`, 0 included.

    groups: parameter groups. predict: gives the EncoderPrediction of the moment. start: when the
    method began, for its seconds. phrase: what stands for the concept in prompts. prior: (1, d),
    the class word whose pictures are to stay as the base model draws them. method:
    MethodConfig.
    """
    backbone, steps = pipe.backbone, sorted(set(steps))
    method = method or single_path(pipe.encoder.method)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    latents = backbone.encode_images(pixels).float()  # (n, C, h, w)
    if prior is not None and steps[-1] > 0:
        drawn = pipe.generate(
            Concept(prior, {}, backbone.name, method), [PROMPT], range(config.prior_pictures),
            num_inference_steps=20, batch_size=config.prior_pictures, progress=False,
        )[0]  # fmt: skip
        prior_latents = backbone.encode_images(pipe.pixels(drawn)).float()
    B, T = config.batch_size, len(backbone.alphas_cumprod)

    concepts, losses = {}, []
    for step in range(steps[-1] + 1):
        if step in steps:
            state = predict()
            concepts[step] = Concept(
                state.v_star.detach().clone(),
                {
                    k: (a.detach().clone(), b.detach().clone())
                    for k, (a, b) in state.offsets.items()
                },
                backbone.name,
                method,
                {
                    "num_steps": step,
                    "seed": seed,
                    "phrase": phrase,
                    "losses": list(losses),
                    "words_after": pipe.nearest_words(state.v_star)
                    if _learns_v(groups, state)
                    else [],
                    "seconds": time.perf_counter() - start,
                },
            )
        if step == steps[-1]:
            break
        sample, state = noise_levels(latents, step, B, T, generator), predict()
        prompts = [PROMPT.replace(placeholder_token, phrase)] * B
        if prior is not None:
            more = noise_levels(prior_latents, step, B, T, generator)
            sample = [torch.cat(pair) for pair in zip(sample, more, strict=True)]
            v_star = torch.cat([state.v_star.expand(B, -1), prior.expand(B, -1)])
            state, prompts = replace(state, v_star=v_star), prompts + [PROMPT] * B
        optimizer.zero_grad()
        batch = Batch(*sample, prompts)
        with objective(backbone, pipe.prompt_encoder, state, batch, method) as terms:
            terms["loss"].backward()
        if not terms["loss"].isfinite():
            raise ValueError(
                f"The loss of a baseline is not finite at step {step}: lower its learning rate."
            )
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})
    return concepts


def _learns_v(groups, state):
    return any(p is state.v_star for group in groups for p in group["params"])


class MultiplicativeOffsets(nn.Module):
    """W' = W * (1 + D) with one full matrix D per projection, the same for all pictures.

    In the form of the other offsets: A is W * D and B the identity. The original composes D of
    a few linear maps; here D itself is the parameter, which can be all that they can be. ("ours")
    """

    def __init__(self, projections):
        super().__init__()
        self.keys = sorted(projections)
        self.deltas = nn.ParameterList(torch.zeros(*projections[key]) for key in self.keys)
        self.weights = None  # the backbone's own, see `attach`

    def attach(self, unet):
        """Take the weights W (Din, Dout) of the projections from the UNet."""
        layers, self.weights = attention_layers(unet), []
        for key in self.keys:
            name, projection = key.rsplit(".", 1)
            linear = projection_layer(layers[name], projection)
            self.weights.append(linear.weight.detach().float().T)

    def offsets(self, deltas):
        """{key: (W * D (1, Din, Dout), identity (1, Dout, Dout))}"""
        return {
            key: ((w.to(d) * d)[None], torch.eye(w.shape[1], dtype=d.dtype, device=d.device)[None])
            for key, w, d in zip(self.keys, self.weights, deltas, strict=True)
        }

    def forward(self, tokens):
        offsets = self.offsets(self.deltas).items()
        return {k: tuple(m.expand(len(tokens), -1, -1) for m in ab) for k, ab in offsets}


class E4TEncoder(TuningEncoder):
    """The tuning encoder's features, fusion and token head, with E4T's kind of weight offsets.

    `pretrain` trains it as it trains any encoder; see `e4t_config` for its settings.
    """

    @register_to_config
    def __init__(
        self, projections: dict, clip_dim: int, embed_dim: int, unet_dim: int, token_dim: int,
        num_words: int, settings: dict | None = None, method: dict | None = None,
    ):  # fmt: skip
        super().__init__(
            projections, clip_dim, embed_dim, unet_dim, token_dim, num_words, settings, method
        )
        self.hypernetwork = MultiplicativeOffsets(projections)

    def bind(self, backbone, table):
        super().bind(backbone, table)
        self.hypernetwork.attach(backbone.unet)

    @classmethod
    def from_backbone(cls, backbone, settings=None, method=None, table=None, seed=0):
        return super().from_backbone(backbone, settings, method or e4t_config(), table, seed)


def e4t_config():
    """L2 to the class word, one path."""
    return replace(single_path(MethodConfig()), regulariser="l2")


def load_e4t(path, backbone):
    """Load an E4TEncoder that `pretrain` wrote for this backbone.

    Raises DTEError when there is none, or when it belongs to another backbone.
    """
    return E4TEncoder.from_pretrained(path, backbone)
