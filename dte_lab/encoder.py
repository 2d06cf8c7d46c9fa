"""The tuning encoder: one picture (and a noisy latent) -> v* and the low-rank offsets.

    v*      = zero_shot_weight * zero-shot guess + token_scale * token head    (paper: head 1)
    A, B    = LoRA hypernetwork                            (paper: head 2, W' = W + A B)

The zero-shot guess is ours: CLIP's similarity between the picture and "a picture of a WORD" mixes
the embeddings of the few best words. A fresh encoder changes no weight of the UNet, and its v*
already names the picture. The guess' share is 1 and is learned; on the small world v* starts as
what the picture looks like instead (training/small_world.py).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from dte_lab.backbone import Backbone, add_noise
from dte_lab.backbone_parts import ABLATIONS, encoder_folder
from dte_lab.clip_words import (
    forget_words,
    mix_words,
    word_clip_embeddings,
    word_of_pictures,
    words_of_folder,
)
from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path, told_of
from dte_lab.common.random import stream
from dte_lab.common.weights import load_weights, read_config
from dte_lab.config import EncoderConfig, MethodConfig, settings_of
from dte_lab.features import (
    FeatureFusion,
    ImageFeatures,
    image_features,
    unet_feature_dim,
    unet_features,
)
from dte_lab.hypernetwork import TokenHead, build_hypernetwork
from dte_lab.lora import projection_shapes
from dte_lab.prediction import EncoderPrediction, Predictor, mean_prediction
from dte_lab.tokens import PromptEncoder, TokenTable


class TuningEncoder(ModelMixin, ConfigMixin):
    """Predicts v* and offsets from features; make one with `from_backbone` or `load_encoder`.

    Buffers: `word_clip` (n, p) CLIP text embeddings of the n usable words, `word_embeddings` (n, d)
    their input embeddings and `typical_entry` (), the root of the mean of their squares (of the
    backbone's words, not saved), and the negative bank.
    """

    _keys_to_ignore_on_load_unexpected = ["word_clip"]  # see `words_of_folder`

    @register_to_config
    def __init__(
        self,
        projections: dict, clip_dim: int, embed_dim: int, unet_dim: int, token_dim: int,
        num_words: int, settings: dict | None = None, method: dict | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        settings = self.settings = EncoderConfig(**(settings or {}))
        self.method = MethodConfig(**(method or {}))
        self.fusion = FeatureFusion(
            clip_dim, embed_dim, unet_dim, settings.width, settings.grid, settings.fusion_depth
        )
        self.token_head = TokenHead(
            settings.width, token_dim, clip_dim, settings.grid, settings.patch_channels
        )
        self.zero_shot_weight = nn.Parameter(torch.ones(()))
        self.hypernetwork = build_hypernetwork(
            projections, settings.rank, settings.width, settings.num_heads,
            settings.trunk_depth, settings.offset_scale,
        )  # fmt: skip
        self.register_buffer("word_clip", torch.zeros(num_words, embed_dim), persistent=False)
        self.register_load_state_dict_pre_hook(forget_words)
        # NaN until `bind`: an encoder without words shall not predict anything.
        unknown = torch.full((num_words, token_dim), torch.nan)
        self.register_buffer("word_embeddings", unknown, persistent=False)
        self.register_buffer("typical_entry", torch.tensor(torch.nan), persistent=False)
        self.register_buffer("bank", torch.zeros(settings.negative_bank_size, token_dim))
        self.register_buffer("bank_concepts", torch.full((settings.negative_bank_size,), -1))
        self.register_buffer("bank_position", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_backbone(
        cls, backbone: Backbone, settings: EncoderConfig | None = None,
        method: MethodConfig | None = None, table: TokenTable | None = None, seed: int = 0,
    ) -> Self:  # fmt: skip
        """A fresh encoder for a backbone.

        Raises DTEError when the backbone's text encoder has no projection to CLIP space.
        """
        table = table or TokenTable(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = settings or EncoderConfig.of(backbone.recommended)
            method = method or MethodConfig()
            dimensions = encoder_dimensions(backbone, table, settings)
            encoder = cls(**dimensions, settings=asdict(settings), method=asdict(method))
        encoder.word_clip.copy_(word_clip_embeddings(backbone, table))
        encoder.bind(backbone, table)
        return encoder.to(backbone.device)

    @classmethod
    def from_pretrained(
        cls, path: Path | str, backbone: Backbone | None = None, table: TokenTable | None = None
    ) -> Self:
        """What `save_pretrained` wrote, for the backbone that it was trained with; frozen.

        Not as in diffusers, the backbone must be given: its words are not in the file. Raises
        DTEError without one, with another one, and for a folder that holds no whole encoder.
        """
        if backbone is None:
            raise DTEError(
                f"A {cls.__name__} needs the words of the backbone it was trained with: call "
                f"{cls.__name__}.from_pretrained(path, backbone), or dte_lab.load_encoder."
            )
        path, table = Path(path), table or TokenTable(backbone)
        if not (path / "config.json").exists():
            raise DTEError(f"There is no {cls.__name__} at {path}: give a folder that holds one.")
        config = read_config(path)
        settings = settings_of(path, config, "settings", EncoderConfig)
        settings_of(path, config, "method", MethodConfig)
        with told_of(path / "config.json"):
            dimensions = encoder_dimensions(backbone, table, settings)
        for key, value in dimensions.items():
            if config.get(key) != value:
                raise DTEError(
                    f"The encoder at {path} belongs to another backbone than {backbone.name} "
                    f"(mismatch in {key})."
                )
        encoder = load_weights(super().from_pretrained, path, low_cpu_mem_usage=False)
        encoder.word_clip.copy_(words_of_folder(path, backbone, table))
        encoder.bind(backbone, table)
        return encoder.to(backbone.device).eval().requires_grad_(False)

    @torch.no_grad()
    def bind(self, backbone: Backbone, table: TokenTable) -> None:
        """Take from the backbone what is not saved: the embeddings of its words."""
        self.word_embeddings.copy_(table.embeddings)
        self.typical_entry.copy_(table.embeddings.square().mean().sqrt())

    def forward(
        self,
        image_features: ImageFeatures,
        unet_features: Float[Tensor, "batch features grid grid"],
        timesteps: Int[Tensor, " batch"],
    ) -> EncoderPrediction:
        """One prediction per row of the features, see features.py."""
        tokens = self.fusion(image_features, unet_features, timesteps)  # (B, grid^2, width)
        v_star, class_word = self.word(image_features, tokens)  # (B, d) each
        offsets = self.hypernetwork(tokens)  # {key: (A (B, Din, r), B (B, r, Dout))}
        return EncoderPrediction(v_star, offsets, class_word)

    def word(
        self, image_features: ImageFeatures, tokens: Float[Tensor, "batch n width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """v*, and the word that CLIP finds in the picture."""
        with torch.autocast(tokens.device.type, enabled=False):  # in bf16 the best would tie
            similarity = image_features.embeds @ self.word_clip.T  # (B, n), cosines to the words
        guess = self.mix_words(similarity)  # (B, d)
        residual = self.residual_unit * self.token_head(tokens, image_features.patches)  # (B, d)
        class_word = self.word_embeddings[similarity.argmax(dim=-1)]  # (B, d)
        return self.zero_shot_weight * guess + residual, class_word

    @property
    def residual_unit(self) -> Float[Tensor, ""]:
        """What the token head's outputs count in: `token_scale` of a word's typical entry."""
        return self.settings.token_scale * self.typical_entry

    def zero_shot(self, embeds: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch dim"]:
        """The guess without any training, from CLIP's unit embeddings of pictures."""
        return self.mix_words(embeds @ self.word_clip.T)

    def mix_words(self, similarity: Float[Tensor, "batch words"]) -> Float[Tensor, "batch dim"]:
        """Mixture of the `zero_shot_words` most similar words."""
        k, temperature = self.settings.zero_shot_words, self.settings.zero_shot_temperature
        return mix_words(similarity, self.word_embeddings, k, temperature)

    @torch.no_grad()
    def enqueue(self, v_star: Float[Tensor, "batch dim"], concepts: Int[Tensor, " batch"]) -> None:
        """Write the embeddings of concepts over the oldest rows of the negative bank."""
        size = len(self.bank)
        v_star, concepts = v_star[:size], concepts[:size]
        rows = (self.bank_position + torch.arange(len(v_star), device=v_star.device)) % size
        self.bank[rows] = v_star.detach().to(self.bank.dtype)
        self.bank_concepts[rows] = concepts.to(self.bank_concepts)
        self.bank_position.copy_((self.bank_position + len(v_star)) % size)

    def image_features(
        self, backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
    ) -> ImageFeatures:
        """CLIP features of pictures in [-1, 1], with the layer that this encoder reads."""
        return image_features(backbone, images, self.settings.clip_layer)

    def unet_features(
        self, backbone: Backbone, noisy_latents: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"], prompt: Float[Tensor, "1 length dim"],
    ) -> Float[Tensor, "batch features grid grid"]:  # fmt: skip
        """UNet features with the layers that this encoder reads.

        prompt: the encoded `feature_prompt`.
        """
        grid, layers = self.settings.grid, self.settings.unet_layers
        return unet_features(backbone, noisy_latents, timesteps, prompt, grid, layers)

    @torch.no_grad()
    def static_features(
        self,
        backbone: Backbone,
        images: Float[Tensor, "pictures 3 height width"],
        seed: int = 0,
        prompt_encoder: PromptEncoder | None = None,
    ) -> tuple[ImageFeatures, Float[Tensor, "batch features grid grid"], Int[Tensor, " batch"]]:
        """What the static prediction is made from: the three arguments of `forward`.

        Each of the B pictures is noised to each of the n `feature_timesteps`: B * n rows. ("ours")
        """
        prompt_encoder = prompt_encoder or PromptEncoder(backbone)
        T = len(backbone.alphas_cumprod)
        steps = [round(f * (T - 1)) for f in self.settings.feature_timesteps]
        n = len(steps)
        timesteps = torch.tensor(steps, device=backbone.device).repeat(len(images))  # (B*n,)
        latents = backbone.encode_images(images).float().repeat_interleave(n, dim=0)
        noise = torch.randn(latents.shape, generator=stream(seed, "static features")).to(latents)
        noisy = add_noise(backbone, latents, noise, timesteps)
        clip = self.image_features(backbone, images)
        clip = ImageFeatures(*(f.repeat_interleave(n, dim=0) for f in clip))
        prompt = prompt_encoder.plain([self.settings.feature_prompt])
        return clip, self.unet_features(backbone, noisy, timesteps, prompt), timesteps

    @torch.no_grad()
    def predict(
        self, backbone: Backbone, images: Float[Tensor, "pictures 3 height width"],
        seed: int = 0, prompt_encoder: PromptEncoder | None = None,
    ) -> EncoderPrediction:  # fmt: skip
        """Static prediction (batch 1) from pictures of *one* concept in [-1, 1].

        The mean of those from `static_features`. ("ours": the mean of A times the mean of B is not
        the mean of A B, but most pictures share one A.)
        """
        features = self.static_features(backbone, images, seed, prompt_encoder)
        return mean_prediction(self(*features), len(features[-1]))

    @torch.no_grad()
    def class_row(
        self, backbone: Backbone, images: Float[Tensor, "pictures 3 height width"],
        table: TokenTable,
    ) -> int:  # fmt: skip
        """Row of the table with the word that CLIP finds in pictures of one concept."""
        return word_of_pictures(image_features(backbone, images).embeds, self.word_clip)


def trained_encoder(predictor: Predictor, purpose: str) -> TuningEncoder:
    """`predictor` where it is an encoder.

    Raises DTEError where it is none: there is nothing that `purpose` could work with.
    """
    if isinstance(predictor, TuningEncoder):
        return predictor
    raise DTEError(
        f"{purpose} needs a trained encoder, and this backbone comes without one: train one with "
        "dte pretrain, or name its folder."
    )


def load_encoder(
    name_or_path: str | Path, backbone: Backbone, table: TokenTable | None = None
) -> TuningEncoder:
    """Load a TuningEncoder by its `encoder_folder`, for the backbone that it was trained with.

    Raises DTEError as `TuningEncoder.from_pretrained` does.
    """
    check_path("the encoder", name_or_path)
    path = encoder_folder(name_or_path)
    check_path("the encoder", path / "config.json")
    if not (path / "config.json").exists():
        names = ", ".join(["small", *(f"small/{name}" for name in ABLATIONS)])
        raise DTEError(f"No encoder at {path}: give a folder that holds one, or one of {names}.")
    return TuningEncoder.from_pretrained(path, backbone, table)


def encoder_dimensions(
    backbone: Backbone, table: TokenTable, settings: EncoderConfig
) -> dict[str, int | dict[str, list[int]]]:
    """What an encoder must know of its backbone."""
    return {
        "projections": {key: list(s) for key, s in projection_shapes(backbone.unet).items()},
        "clip_dim": backbone.image_encoder.config.hidden_size,
        "embed_dim": backbone.image_encoder.config.projection_dim,
        "unet_dim": unet_feature_dim(backbone.unet, settings.unet_layers),
        "token_dim": table.embeddings.shape[1],
        "num_words": len(table),
    }
