"""The tuning encoder: one picture (and a noisy latent) -> v* and the low-rank offsets.

    v*      = zero_shot_weight * zero-shot guess + token_scale * token head    (paper: head 1)
    A, B    = LoRA hypernetwork                            (paper: head 2, W' = W + A B)

The zero-shot guess is ours: CLIP's similarity between the picture and "a picture of a WORD" mixes
the embeddings of the few best words. A fresh encoder is therefore an exact no-op on the UNet's
weights, and its v* already names the picture. Its share of the guess is 1 and is learned; on the
small world the token head starts with a better guess of its own (world/first_words.py).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from tqdm.auto import tqdm

from dte_lab.backbone import WEIGHTS, add_noise
from dte_lab.config import EncoderConfig, MethodConfig
from dte_lab.features import (
    FeatureFusion,
    ImageFeatures,
    image_features,
    unet_feature_dim,
    unet_features,
)
from dte_lab.hypernetwork import TokenHead, build_hypernetwork
from dte_lab.lora import projection_shapes
from dte_lab.tokens import PromptEncoder, TokenTable

ABLATIONS = ("contrastive", "none")  # shipped for "small", by their regulariser


@dataclass
class EncoderPrediction:
    """v_star (B, d) and offsets {"layer.projection": (A (B, Din, r), B (B, r, Dout))}.

    class_word (B, d): the embedding of the word that CLIP finds first in the picture.
    """

    v_star: torch.Tensor
    offsets: dict[str, tuple[torch.Tensor, torch.Tensor]]
    class_word: torch.Tensor | None = None


class TuningEncoder(ModelMixin, ConfigMixin):
    """Predicts v* and offsets from features; make one with `from_backbone` or `load_encoder`.

    Buffers: `word_clip` (n, p) CLIP text embeddings of the n usable words, `word_embeddings` (n, d)
    their input embeddings (taken from the backbone, not saved), and the negative bank.
    """

    @register_to_config
    def __init__(
        self,
        projections: dict,
        clip_dim: int,
        embed_dim: int,
        unet_dim: int,
        token_dim: int,
        num_words: int,
        settings: dict | None = None,
        method: dict | None = None,
    ):
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
            projections,
            settings.rank,
            settings.width,
            settings.num_heads,
            settings.trunk_depth,
            settings.offset_scale,
        )
        self.register_buffer("word_clip", torch.zeros(num_words, embed_dim))
        self.register_buffer("word_embeddings", torch.zeros(num_words, token_dim), persistent=False)
        self.register_buffer("bank", torch.zeros(settings.negative_bank_size, token_dim))
        empty = torch.full((settings.negative_bank_size,), -1)
        self.register_buffer("bank_concepts", empty)  # concept of each row, -1 for an empty row
        self.register_buffer("bank_position", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_backbone(cls, backbone, settings=None, method=None, table=None, seed=0):
        """A fresh encoder for a backbone, of an EncoderConfig and a MethodConfig.

        Raises ValueError when the backbone's text encoder has no projection to CLIP space.
        """
        table = table or TokenTable(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings, method = settings or EncoderConfig(), method or MethodConfig()
            dimensions = encoder_dimensions(backbone, table, settings)
            encoder = cls(**dimensions, settings=asdict(settings), method=asdict(method))
        encoder.word_clip.copy_(word_clip_embeddings(backbone, table))
        encoder.word_embeddings.copy_(table.embeddings)
        return encoder.to(backbone.device)

    def forward(self, image_features: ImageFeatures, unet_features, timesteps):
        """image_features: see features.py. unet_features: (B, C, g, g). timesteps: (B,)."""
        tokens = self.fusion(image_features, unet_features, timesteps)  # (B, g*g, width)
        guess = self.zero_shot(image_features.embeds)  # (B, d)
        residual = self.residual_unit * self.token_head(tokens, image_features.patches)
        v_star = self.zero_shot_weight * guess + residual
        best = (image_features.embeds @ self.word_clip.T).argmax(dim=-1)  # (B,)
        return EncoderPrediction(v_star, self.hypernetwork(tokens), self.word_embeddings[best])

    @property
    def residual_unit(self):
        """What the token head's outputs count in: `token_scale` of a word's typical entry."""
        return self.settings.token_scale * self.word_embeddings.square().mean().sqrt()

    def zero_shot(self, embeds):
        """Mixture of the words that CLIP finds in pictures: unit (B, p) -> (B, d).

        A mixture of vectors is shorter than they are; its norm is set to their mean norm.
        """
        k = min(self.settings.zero_shot_words, len(self.word_clip))
        similarity, rows = (embeds @ self.word_clip.T).topk(k, dim=-1)  # (B, k)
        weight = (similarity / self.settings.zero_shot_temperature).softmax(dim=-1)[..., None]
        words = self.word_embeddings[rows]  # (B, k, d)
        norm = (weight * words.norm(dim=-1, keepdim=True)).sum(dim=1)  # (B, 1)
        return F.normalize((weight * words).sum(dim=1), dim=-1) * norm

    @torch.no_grad()
    def enqueue(self, v_star, concepts):
        """Write embeddings (B, d) of concepts (B,) over the oldest rows of the negative bank."""
        size = len(self.bank)
        v_star, concepts = v_star[:size], concepts[:size]
        rows = (self.bank_position + torch.arange(len(v_star), device=v_star.device)) % size
        self.bank[rows] = v_star.detach().to(self.bank.dtype)
        self.bank_concepts[rows] = concepts.to(self.bank_concepts)
        self.bank_position.copy_((self.bank_position + len(v_star)) % size)

    def image_features(self, backbone, images):
        """CLIP features of pictures (B, 3, H, W), with the layer that this encoder reads."""
        return image_features(backbone, images, self.settings.clip_layer)

    def unet_features(self, backbone, noisy_latents, timesteps, prompt):
        """UNet features (B, C, g, g) of latents (B, c, h, w) at (B,), with the layers it reads.

        prompt: (1, L, d), the encoded `feature_prompt`.
        """
        grid, layers = self.settings.grid, self.settings.unet_layers
        return unet_features(backbone, noisy_latents, timesteps, prompt, grid, layers)

    @torch.no_grad()
    def static_features(self, backbone, images, seed=0, prompt_encoder=None):
        """What the static prediction is made from: the three arguments of `forward`.

        The features need a noisy latent: each of the B pictures is noised to each of the n
        `feature_timesteps`, so there are B * n rows. ("ours")
        """
        prompt_encoder = prompt_encoder or PromptEncoder(backbone)
        T = len(backbone.alphas_cumprod)
        steps = [round(f * (T - 1)) for f in self.settings.feature_timesteps]
        n = len(steps)
        timesteps = torch.tensor(steps, device=backbone.device).repeat(len(images))  # (B*n,)
        latents = backbone.encode_images(images).float().repeat_interleave(n, dim=0)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(backbone, latents, noise, timesteps)
        clip = self.image_features(backbone, images)
        clip = ImageFeatures(*(f.repeat_interleave(n, dim=0) for f in clip))
        prompt = prompt_encoder.plain([self.settings.feature_prompt])
        return clip, self.unet_features(backbone, noisy, timesteps, prompt), timesteps

    @torch.no_grad()
    def predict(self, backbone, images, seed=0, prompt_encoder=None):
        """Static prediction from pictures (B, 3, H, W) of *one* concept in [-1, 1].

        The mean of the predictions from `static_features`. A mean of A and a mean of B is not the
        mean of A B; but one A is shared by most pictures. ("ours")
        Returns an EncoderPrediction with batch size 1.
        """
        features = self.static_features(backbone, images, seed, prompt_encoder)
        return mean_prediction(self(*features), len(features[-1]))


def mean_prediction(prediction, n):
    """Mean over each n neighbouring rows of an EncoderPrediction: batch B * n -> B."""

    def mean(x):
        return x.unflatten(0, (-1, n)).mean(dim=1)

    offsets = {key: (mean(a), mean(b)) for key, (a, b) in prediction.offsets.items()}
    return EncoderPrediction(mean(prediction.v_star), offsets, mean(prediction.class_word))


@torch.no_grad()
def word_clip_embeddings(backbone, table, batch_size=256):
    """Unit CLIP embeddings of "a picture of a WORD" for the table's n words: (n, p).

    Raises ValueError when the text encoder has no projection.
    """
    if not backbone.has_projection:
        raise ValueError(
            f"The text encoder of backbone {backbone.name} has no projection to CLIP space; "
            "save it as CLIPTextModelWithProjection."
        )
    embeddings = []
    starts = range(0, len(table), batch_size)
    for i in tqdm(starts, desc="words", disable=len(starts) < 50):  # a large vocabulary takes time
        texts = [f"a picture of a {word}" for word in table.words[i : i + batch_size]]
        # Attention is causal, so padding behind the end token would change nothing.
        batch = backbone.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        ids = batch.input_ids
        embeds = backbone.text_encoder(input_ids=ids.to(backbone.device)).text_embeds
        embeddings.append(F.normalize(embeds.float(), dim=-1))
    return torch.cat(embeddings)


def encoder_folder(name_or_path) -> Path:
    """Where an encoder lies: "small", an ablation of it such as "small/none", or a directory."""
    path = Path(name_or_path)
    if path == Path("small"):
        return WEIGHTS / "small" / "encoder"
    if path.parent == Path("small") and path.name in ABLATIONS:
        return WEIGHTS / "small" / "ablations" / path.name
    return path


def load_encoder(name_or_path, backbone, table=None):
    """Load a TuningEncoder by its `encoder_folder`, one that `save_pretrained` wrote.

    Raises ValueError when there is none, or when it was trained for another backbone.
    """
    path = encoder_folder(name_or_path)
    if not (path / "config.json").is_file():
        names = ", ".join(["small", *(f"small/{name}" for name in ABLATIONS)])
        raise ValueError(f"No encoder at {path}: give a folder that holds one, or one of {names}.")
    encoder = TuningEncoder.from_pretrained(path, low_cpu_mem_usage=False)
    table = table or TokenTable(backbone)
    for key, value in encoder_dimensions(backbone, table, encoder.settings).items():
        saved = encoder.config[key]
        if key == "projections":
            saved = {name: list(shape) for name, shape in saved.items()}
        if saved != value:
            raise ValueError(
                f"The encoder at {path} belongs to another backbone than {backbone.name} "
                f"(mismatch in {key})."
            )
    encoder.word_embeddings.copy_(table.embeddings)
    return encoder.to(backbone.device).eval().requires_grad_(False)


def encoder_dimensions(backbone, table, settings):
    """What an encoder must know of its backbone."""
    return {
        "projections": {key: list(s) for key, s in projection_shapes(backbone.unet).items()},
        "clip_dim": backbone.image_encoder.config.hidden_size,
        "embed_dim": backbone.image_encoder.config.projection_dim,
        "unet_dim": unet_feature_dim(backbone.unet, settings.unet_layers),
        "token_dim": table.embeddings.shape[1],
        "num_words": len(table),
    }
