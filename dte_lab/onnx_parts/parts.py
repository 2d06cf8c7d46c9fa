"""The parts of the method as plain functions of tensors, of which graphs.py makes ONNX graphs.

    encoder    picture, noise                                  -> v_star, offsets
    words      v_star                                          -> similarity, v_hard
    text       ids, slots, v_star                              -> states
    unet       latents, timestep, soft, hard, offsets, alpha   -> output
    encode     picture                                         -> latents
    decode     latents                                         -> picture
    tune       see tuning.py

All offsets are one vector: for each key in `Layout` A, then B, row by row. Each graph has fixed
shapes: one picture, and in the UNet its two halves of guidance, [unconditional, conditional].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dte_lab.backbone import add_noise
from dte_lab.dual_path import dual_path
from dte_lab.encoder import TuningEncoder, trained_encoder
from dte_lab.features import ImageFeatures
from dte_lab.lora import Offsets
from dte_lab.pipeline import DTEPipeline
from dte_lab.prediction import mean_prediction
from dte_lab.tokens import PromptTokens


class Part(NamedTuple):
    """A function of tensors, with examples of what goes in, by name, and the names of its results.

    Whole numbers go in as int32, which JavaScript has arrays of.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How offsets of one concept lie in one vector.

    pairs: ((key, Din, r, Dout), ...).
    """

    pairs: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, encoder: TuningEncoder) -> "Layout":
        rank, shapes = encoder.settings.rank, encoder.config["projections"]
        keys = sorted(shapes)
        return cls(tuple((key, shapes[key][0], rank, shapes[key][1]) for key in keys))

    @property
    def sizes(self) -> list[int]:
        """Entries of A and of B, in turn."""
        return [n for _, d_in, rank, d_out in self.pairs for n in (d_in * rank, rank * d_out)]

    def pack(self, offsets: Offsets) -> Float[Tensor, " entries"]:
        """One vector of offsets of batch 1."""
        return torch.cat([m.reshape(-1) for key, *_ in self.pairs for m in offsets[key]])

    def unpack(self, packed: Float[Tensor, " entries"]) -> Offsets:
        """Offsets of batch 1 of a vector."""
        pieces = iter(packed.split(self.sizes))
        return {
            key: (next(pieces).view(1, d_in, rank), next(pieces).view(1, rank, d_out))
            for key, d_in, rank, d_out in self.pairs
        }


def encoder_part(pipe: DTEPipeline) -> Part:
    """`TuningEncoder.predict` of one picture; its noise, of `static_features`, goes in."""
    backbone, layout = pipe.backbone, Layout.of(pipe.encoder)
    encoder = trained_encoder(pipe.encoder, "An export to ONNX")
    T, fractions = len(backbone.alphas_cumprod), encoder.settings.feature_timesteps
    timesteps, n = torch.tensor([round(f * (T - 1)) for f in fractions]), len(fractions)
    prompt = pipe.prompt_encoder.plain([encoder.settings.feature_prompt])

    def predict(
        picture: Float[Tensor, "1 3 height width"], noise: Float[Tensor, "n channels h w"]
    ) -> tuple[Tensor, Tensor]:
        latents = backbone.encode_images(picture).expand(n, -1, -1, -1)
        noisy = add_noise(backbone, latents, noise, timesteps)
        seen = encoder.image_features(backbone, picture)
        seen = ImageFeatures(*(x.expand(n, *x.shape[1:]) for x in seen))
        features = encoder.unet_features(backbone, noisy, timesteps, prompt)
        prediction = mean_prediction(encoder(seen, features, timesteps), n)
        return prediction.v_star, layout.pack(prediction.offsets)

    inputs = {"picture": example_picture(pipe), "noise": torch.ones(n, *backbone.latent_shape)}
    return Part("encoder", predict, inputs, ("v_star", "offsets"))


def words_part(pipe: DTEPipeline) -> Part:
    """Cosines of v* to all words of the table, and the embedding v_h of the nearest."""
    encode = pipe.prompt_encoder

    def nearest(v_star: Float[Tensor, "1 dim"]) -> tuple[Tensor, Tensor]:
        similarity = encode.table.cosines(v_star)
        return similarity[0], encode.table.embeddings[similarity.argmax(dim=-1)]

    return Part("words", nearest, {"v_star": example_v_star(pipe)}, ("similarity", "v_hard"))


def text_part(pipe: DTEPipeline) -> Part:
    """`PromptEncoder.encode` of one prompt; plain text where all slots are -1."""
    encode = pipe.prompt_encoder

    def states(
        ids: Int[Tensor, "1 length"], slots: Int[Tensor, "1 length"],
        v_star: Float[Tensor, "1 dim"],
    ) -> tuple[Tensor]:  # fmt: skip
        return (encode.encode(PromptTokens(ids.long(), slots.long()), v_star),)

    ids, slots = (x.int() for x in encode.tokenize(["a picture of S*"]))
    inputs = {"ids": ids, "slots": slots, "v_star": example_v_star(pipe)}
    return Part("text", states, inputs, ("states",))


def unet_part(pipe: DTEPipeline) -> Part:
    """The UNet in its dual path, on the two halves of guidance at one timestep.

    alpha is the blend of each half, 1 for the soft path alone.
    """
    backbone, layout, method = pipe.backbone, Layout.of(pipe.encoder), pipe.encoder.method

    def denoise(
        latents: Float[Tensor, "2 channels h w"], timestep: Int[Tensor, " 1"],
        soft: Float[Tensor, "2 length dim"], hard: Float[Tensor, "2 length dim"],
        offsets: Float[Tensor, " entries"], alpha: Float[Tensor, " 2"],
    ) -> tuple[Tensor]:  # fmt: skip
        pairs = layout.unpack(offsets)
        if not method.unconditional_offsets:
            pairs = {k: (a.expand(2, -1, -1), torch.cat([0 * b, b])) for k, (a, b) in pairs.items()}
        with dual_path(backbone.unet, pairs, hard, alpha, method.offsets_on, method.granularity):
            return (backbone.unet(latents, timestep.long().expand(2), soft).sample,)

    text = pipe.prompt_encoder.plain([""]).expand(2, -1, -1).clone()
    inputs = {
        "latents": torch.ones(2, *backbone.latent_shape),
        "timestep": torch.tensor([1], dtype=torch.int32),
        "soft": text,
        "hard": text.clone(),
        "offsets": torch.zeros(sum(layout.sizes)),
        "alpha": torch.full((2,), 0.5),
    }
    return Part("unet", denoise, inputs, ("output",))


def autoencoder_parts(pipe: DTEPipeline) -> list[Part]:
    """Pictures in [-1, 1] to scaled latents, and back."""
    backbone = pipe.backbone
    picture, latents = example_picture(pipe), torch.ones(1, *backbone.latent_shape)
    return [
        Part("encode", lambda x: (backbone.encode_images(x),), {"picture": picture}, ("latents",)),
        Part("decode", lambda z: (backbone.decode_latents(z),), {"latents": latents}, ("picture",)),
    ]


def example_picture(pipe: DTEPipeline) -> Float[Tensor, "1 3 height width"]:
    size = pipe.backbone.resolution
    return torch.linspace(-1, 1, 3 * size**2).reshape(1, 3, size, size)


def example_v_star(pipe: DTEPipeline) -> Float[Tensor, "1 dim"]:
    return pipe.prompt_encoder.table.embeddings[:1].clone()
