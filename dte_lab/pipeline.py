"""One picture in, the concept in new settings out.

>>> pipe = DTEPipeline.from_pretrained("small")
>>> concept = pipe.personalize("my_concept.png")
>>> images = pipe.generate(concept, ["S* on the beach", "S* at night"], seeds=[0, 1])
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.backbone import DTYPES, Backbone, checked_dtype, load_backbone, new_scheduler
from dte_lab.common.device import checked_device
from dte_lab.common.files import check_path
from dte_lab.common.images import (
    Picture,
    read_image,
    read_pictures,
    square_mask,
    to_bytes,
    to_mask_tensor,
    to_pil,
    to_square_tensor,
)
from dte_lab.common.origin import pictures_digest
from dte_lab.common.random import stream
from dte_lab.common.settings import check_kind, check_whole
from dte_lab.common.sources import PictureSource
from dte_lab.concept import Concept
from dte_lab.config import MethodConfig
from dte_lab.contrastive import prompt_embedding
from dte_lab.dual_path import dual_path
from dte_lab.encoder import EncoderPrediction, Predictor, load_encoder
from dte_lab.memory_needs import Setting, check_room, out_of_memory_advised
from dte_lab.prompts import check_drawing
from dte_lab.sampling import Conditioning, StepPredictor, guided_sampling
from dte_lab.tokens import PromptEncoder
from dte_lab.tuning import TuneConfig, tune
from dte_lab.zero_shot import ZeroShotStart


class DTEPipeline:
    """A backbone and a pre-trained tuning encoder."""

    def __init__(self, backbone: Backbone, encoder: Predictor) -> None:
        self.backbone = backbone
        self.encoder = encoder.eval()
        self.prompt_encoder = PromptEncoder(backbone)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path = "small",
        encoder: str | Path | None = None,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> Self:
        """Load a backbone ("small", "sd15" or a directory) and its encoder.

        encoder: as `load_encoder` takes it; by default the folder `encoder` of the backbone. Where
        there is none, as for "sd15", tuning starts from the nearest word, see zero_shot.py.
        device, dtype and options: see `load_backbone`.
        Raises DTEError when one is missing or they do not fit together, and when a GPU is too small
        for Stable Diffusion 1.5 to draw a single picture.
        """
        check_path("the backbone", backbone)
        device, dtype = checked_device(device), dtype if dtype is None else checked_dtype(dtype)
        if backbone == "sd15":
            name = next((n for n, d in DTYPES.items() if d == dtype), "fp16")
            asked = Setting(batch=1, dtype=name, offload=options.get("offload", False))
            check_room(asked, "sampling", device)
        own = "small" if backbone == "small" else Path(backbone) / "encoder"
        folder = own if encoder is None else encoder
        backbone = load_backbone(backbone, device, dtype, **options)
        if encoder is None and folder != "small" and not folder.is_dir():
            return cls(backbone, ZeroShotStart(backbone))
        return cls(backbone, load_encoder(folder, backbone))

    def to(self, device: torch.device | str) -> Self:
        self.backbone.to(device)
        self.encoder.to(self.backbone.device)
        self.prompt_encoder = PromptEncoder(self.backbone)
        return self

    @property
    def recommended_steps(self) -> int:
        """Of tuning, where no number is asked for."""
        recommended = self.backbone.recommended
        if self.has_trained_encoder:
            return recommended.num_steps
        return recommended.num_steps_without_encoder

    @property
    def has_trained_encoder(self) -> bool:
        return not isinstance(self.encoder, ZeroShotStart)

    def personalize(
        self,
        image: PictureSource | Sequence[PictureSource] | list[Picture],
        num_steps: int | None = None,
        seed: int = 0,
        callback: Callable[[dict], object] | None = None,
        progress: bool = True,
        config: TuneConfig | None = None,
        method: MethodConfig | None = None,
        prediction: EncoderPrediction | None = None,
        mask: PictureSource | Sequence[PictureSource | None] | None = None,
        fit: str = "crop",
    ) -> Concept:
        """Predict v* and the offsets from pictures of one concept, then tune them.

        image: any picture that sources.py knows, a list of them, or what an upload widget or
        `read_pictures` gives. mask: a picture of the same size, white where the thing is, or one
        (or None) for each; by default a picture's own transparency. The rest becomes white and
        does not count in tuning. fit: see `square`. num_steps: 0 (prediction only), 12 as in the
        paper, or another number; None for what the backbone recommends. callback: see `tune`.
        config: by default as the backbone recommends; its num_steps is overridden. method: by
        default the encoder's own; the pictures stay in the concept, and in its file, only where its
        `prediction_interval` needs them. prediction: what to tune in place of the encoder's own.
        Raises DTEError for what cannot be read or means nothing, and when the memory is used up.
        """
        start = time.perf_counter()
        check_learning(seed, config, method, prediction)
        pictures = read_pictures(image, mask, fit)
        images = [picture.image for picture in pictures]
        pixels = self.pixels(images, fit)
        backbone, encoder, method = self.backbone, self.encoder, method or self.encoder.method
        num_steps = self.recommended_steps if num_steps is None else num_steps
        config = replace(config or TuneConfig.of(backbone.recommended), num_steps=num_steps)
        forget_peak_memory(backbone.device)
        with out_of_memory_advised(backbone, "tuning", config.batch_size):
            if prediction is None:
                prediction = encoder.predict(backbone, pixels, seed, self.prompt_encoder)
            result = tune(
                backbone, self.prompt_encoder, prediction, pixels, method, config,
                bank=(encoder.bank, encoder.bank_concepts), seed=seed, callback=callback,
                progress=progress, encoder=encoder, masks=self.masks(pictures, fit),
            )  # fmt: skip
        v_star = prompt_embedding(result.prediction.v_star, self.prompt_encoder.table, method)
        info = {
            "origin": pictures_digest(images),
            "num_steps": config.num_steps,
            "tuned": config.trainable,
            "seed": seed,
            "losses": result.losses,
            "stopped_early": result.stopped_early,
            "words_before": self.nearest_words(prediction.v_star),
            "words_after": self.nearest_words(v_star),
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": peak_memory_mb(backbone.device),
        }
        pictures = to_bytes(pixels) if method.prediction_interval else None
        settings = config.kept_in(backbone.recommended)
        return Concept(
            v_star, result.prediction.offsets, backbone.name, method, info, pictures, settings
        )

    @torch.no_grad()
    def generate(
        self,
        concept: Concept,
        prompts: str | Sequence[str],
        seeds: Iterable[int] = (0,),
        guidance_scale: float | None = None,
        num_inference_steps: int = 25,
        negative_prompt: str = "",
        alpha_blend: float | tuple[float, float] | None = None,
        batch_size: int = 8,
        progress: bool = True,
        prediction_interval: int | None = None,
        callback: Callable[[], object] = lambda: None,
    ) -> list[list[Image]]:
        """Sample every prompt with every seed: a list per prompt of a list per seed of pictures.

        prompts: each with "S*". guidance_scale: above 1 for guidance; None takes the concept's, or
        the backbone's. alpha_blend and prediction_interval: see MethodConfig; None takes the
        concept's. batch_size: pictures per UNet call, before guidance doubles them; a picture does
        not depend on it. callback: called after each step. Raises DTEError for what means nothing,
        a concept of another backbone or without pictures to predict from, and full memory.
        """
        backbone, encode = self.backbone, self.prompt_encoder
        prompts, seeds = as_list(prompts), as_list(seeds)
        check_drawing(
            prompts, seeds, guidance_scale, num_inference_steps, negative_prompt, alpha_blend,
            batch_size,
        )  # fmt: skip
        check_kind("the concept", concept, Concept)
        concept.check(backbone)
        config = changed(concept.config, alpha_blend, prediction_interval)
        concept = replace(concept, config=config)
        settings = concept.settings or backbone.recommended
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        encode.tokenize(prompts)  # complain before any work is done
        anew = config.prediction_interval
        predict = StepPredictor(backbone, self.encoder, encode, concept) if anew else None
        scheduler, T, images = new_scheduler(backbone.scheduler), len(backbone.alphas_cumprod), []
        jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        with (
            out_of_memory_advised(backbone, "sampling", batch_size),
            tqdm(None, "sampling", len(batches) * num_inference_steps, disable=not progress) as bar,
            dual_path(
                backbone.unet, {}, offsets_on=config.offsets_on, granularity=config.granularity
            ) as path,
        ):
            for batch in batches:
                scheduler.set_timesteps(num_inference_steps, device=backbone.device)
                condition = Conditioning(
                    encode, concept, [prompt for prompt, _ in batch], scheduler.timesteps, T,
                    negative_prompt, scale > 1, predict,
                )  # fmt: skip
                noise = torch.cat([self.initial_noise(seed) for _, seed in batch])
                noise = noise.to(backbone.device, backbone.dtype)
                latents = guided_sampling(
                    path, condition, scheduler, noise, scale, lambda: (bar.update(), callback())
                )
                images += to_pil(backbone.decode_latents(latents))
        return [images[i : i + len(seeds)] for i in range(0, len(images), len(seeds))]

    def initial_noise(self, seed: int) -> Float[Tensor, "1 channels height width"]:
        """Standard normal latent on the CPU: it depends on the seed alone, not on the device."""
        shape = (1, *self.backbone.latent_shape)
        return torch.randn(shape, generator=stream(seed, "initial noise"))

    def pixels(
        self, images: Sequence[PictureSource], fit: str = "crop"
    ) -> Float[Tensor, "pictures 3 height width"]:
        """Pictures in [-1, 1], cropped or padded to a square of the backbone's size."""
        size = self.backbone.resolution
        return torch.stack([to_square_tensor(read_image(image), size, fit) for image in images])

    def masks(
        self, pictures: Sequence[Picture], fit: str = "crop"
    ) -> Float[Tensor, "pictures 1 height width"] | None:
        """Where in `pixels` the things are, from 0 to 1; None where no picture says."""
        size = self.backbone.resolution
        masks = [square_mask(picture, size, fit) for picture in pictures]
        if not any(masks):
            return None
        return torch.stack([to_mask_tensor(mask, size) for mask in masks])

    def nearest_words(self, v_star: Float[Tensor, "1 dim"], k: int = 5) -> list[list]:
        """[[word, cosine similarity], ...] of the k nearest words."""
        _, words, similarities = self.prompt_encoder.table.nearest(v_star, k)
        return [[w, s] for w, s in zip(words[0], similarities[0].tolist(), strict=True)]


def check_learning(
    seed: int,
    config: TuneConfig | None,
    method: MethodConfig | None,
    prediction: EncoderPrediction | None,
) -> None:
    """Raise DTEError for arguments of `DTEPipeline.personalize` that are of another kind."""
    check_whole("seed", seed)
    check_kind("config", config, TuneConfig, optional=True)
    check_kind("method", method, MethodConfig, optional=True)
    check_kind("prediction", prediction, EncoderPrediction, optional=True)


def as_list(value: object) -> list:
    """What is several things as a list; one thing as a list of it."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def changed(
    method: MethodConfig, alpha: float | tuple[float, float] | None, interval: int | None
) -> MethodConfig:
    """The settings with what is given in their place."""
    given = {"alpha_blend": alpha, "prediction_interval": interval}
    return replace(method, **{name: x for name, x in given.items() if x is not None})


def forget_peak_memory(device: torch.device) -> None:
    """From here on the CUDA allocator notes its peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device | str) -> float | None:
    """Peak memory in MB: of the CUDA allocator since `personalize` began, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KB on Linux
