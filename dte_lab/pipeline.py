"""One picture in, the concept in new settings out.

>>> pipe = DTEPipeline.from_pretrained("small")
>>> concept = pipe.personalize("my_concept.png")
>>> images = pipe.generate(concept, ["S* on the beach", "S* at night"], seeds=[0, 1])
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dte_lab.backbone import load_backbone, stock_pipeline
from dte_lab.common.errors import DTEError
from dte_lab.common.images import read_image, to_bytes, to_pil, to_square_tensor
from dte_lab.concept import Concept
from dte_lab.contrastive import prompt_embedding
from dte_lab.dual_path import dual_path
from dte_lab.encoder import load_encoder
from dte_lab.sampling import GUIDANCE_SCALE, Conditioning, Refresher
from dte_lab.tokens import PromptEncoder
from dte_lab.tuning import TuneConfig, tune
from dte_lab.zero_shot import ZeroShotStart


class DTEPipeline:
    """A backbone and a pre-trained tuning encoder."""

    def __init__(self, backbone, encoder):
        self.backbone = backbone
        self.encoder = encoder.eval()
        self.prompt_encoder = PromptEncoder(backbone)

    @classmethod
    def from_pretrained(cls, backbone="small", encoder=None, device="cpu", dtype=None, **options):
        """Load a backbone ("small", "sd15" or a directory) and its encoder.

        encoder: as `load_encoder` takes it; by default the folder `encoder` of the backbone. Where
        there is none, as for "sd15", tuning starts from the nearest word, see zero_shot.py.
        dtype and options: see `load_backbone`.
        Raises DTEError when one is missing or they do not fit together.
        """
        folder = encoder or ("small" if backbone == "small" else Path(backbone) / "encoder")
        backbone = load_backbone(backbone, device, dtype, **options)
        if encoder is None and folder != "small" and not folder.is_dir():
            return cls(backbone, ZeroShotStart(backbone))
        return cls(backbone, load_encoder(folder, backbone))

    def to(self, device):
        self.backbone.to(device)
        self.encoder.to(device)
        self.prompt_encoder = PromptEncoder(self.backbone)
        return self

    def personalize(
        self, image, num_steps=12, seed=0, callback=None, progress=True, config=None, method=None,
        prediction=None,
    ):  # fmt: skip
        """Predict v* and the offsets from pictures of one concept, then tune them.

        image: a path, a PIL image, or a list of them. num_steps: 0 (prediction only), 12 as in the
        paper, or any other number. callback: see `tune`. config: TuneConfig, whose num_steps is
        overridden. method: MethodConfig, by default the one that the encoder was trained with.
        prediction: an EncoderPrediction to tune in place of the encoder's own.
        Raises DTEError for pictures that cannot be read, see images.py. Returns a Concept.
        """
        start = time.perf_counter()
        images = image if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise DTEError("personalize needs at least one picture of the concept.")
        pixels = self.pixels(images)
        backbone, encoder, method = self.backbone, self.encoder, method or self.encoder.method
        config = replace(config or TuneConfig(), num_steps=num_steps)
        if backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(backbone.device)

        if prediction is None:
            prediction = encoder.predict(backbone, pixels, seed, self.prompt_encoder)
        result = tune(
            backbone, self.prompt_encoder, prediction, pixels, method, config,
            bank=(encoder.bank, encoder.bank_concepts), seed=seed, callback=callback,
            progress=progress, encoder=encoder,
        )  # fmt: skip
        tuned = result.prediction
        v_star = prompt_embedding(tuned.v_star, self.prompt_encoder.table, method)
        info = {
            "num_steps": num_steps,
            "tuned": config.what,
            "seed": seed,
            "losses": result.losses,
            "stopped_early": result.stopped_early,
            "words_before": self.nearest_words(prediction.v_star),
            "words_after": self.nearest_words(v_star),
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": peak_memory_mb(backbone.device),
        }
        return Concept(v_star, tuned.offsets, backbone.name, method, info, to_bytes(pixels))

    @torch.no_grad()
    def generate(
        self, concept, prompts, seeds=(0,), guidance_scale=GUIDANCE_SCALE, num_inference_steps=25,
        negative_prompt="", alpha_blend=None, batch_size=8, progress=True,
        prediction_interval=None,
    ):  # fmt: skip
        """Sample every prompt with every seed: a list per prompt of a list per seed of PIL images.

        prompts: a string or a list, each with "S*". alpha_blend and prediction_interval: see
        MethodConfig; None takes the concept's. batch_size: pictures per UNet call, before
        guidance doubles them. The initial noise depends on the seed alone, so a picture does not
        depend on what else is in its batch.
        Raises DTEError for a prompt without "S*", for a concept of another backbone, and for
        `prediction_interval` with a concept that holds no pictures.
        """
        backbone, encode, config = self.backbone, self.prompt_encoder, concept.config
        prompts, seeds = [prompts] if isinstance(prompts, str) else list(prompts), list(seeds)
        concept.check(backbone)
        given = {"alpha_blend": alpha_blend, "prediction_interval": prediction_interval}
        config = replace(config, **{k: v for k, v in given.items() if v is not None})
        concept = replace(concept, config=config)
        encode.tokenize(prompts)  # complain before any work is done
        refresher = None
        if config.prediction_interval:
            refresher = Refresher(backbone, self.encoder, encode, concept)

        jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        images, b = [], backbone
        sampler = stock_pipeline(b.vae, b.text_encoder, b.tokenizer, b.unet, b.scheduler)
        sampler.scheduler.set_timesteps(num_inference_steps)
        timesteps, T = sampler.scheduler.timesteps, len(backbone.alphas_cumprod)
        with (
            tqdm(total=len(batches) * len(timesteps), desc="sampling", disable=not progress) as bar,
            backbone.loaded(backbone.vae),  # the stock pipeline goes by the device of all its parts
            dual_path(
                backbone.unet, {}, offsets_on=config.offsets_on, granularity=config.granularity
            ) as path,
        ):
            for batch in batches:
                texts = [prompt for prompt, _ in batch]
                condition = Conditioning(
                    encode, concept, texts, timesteps, T, negative_prompt, guidance_scale > 1,
                    refresher,
                )  # fmt: skip
                noise = torch.cat([self.initial_noise(seed) for _, seed in batch])
                noise = noise.to(condition.soft)

                def next_step(sampler, step, timestep, state, condition=condition):
                    bar.update()
                    if step + 1 < len(timesteps):
                        condition(path, step + 1, state["latents"])
                        state["prompt_embeds"] = condition.prompt_embeds
                    return state

                condition(path, 0, noise)
                latents = sampler(
                    prompt_embeds=condition.soft,
                    negative_prompt_embeds=condition.negative,
                    latents=noise,
                    guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps,
                    output_type="latent",
                    callback_on_step_end=next_step,
                    callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                ).images
                images += to_pil(backbone.decode_latents(latents))
        n = len(seeds)
        return [images[i * n : (i + 1) * n] for i in range(len(prompts))]

    def initial_noise(self, seed):
        """Standard normal latent (1, C, h, w), from a CPU generator: the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((1, *self.backbone.latent_shape), generator=generator)

    def pixels(self, images):
        """Paths or PIL images -> (n, 3, H, W) in [-1, 1], centre-cropped to the backbone's size."""
        size = self.backbone.resolution
        return torch.stack([to_square_tensor(read_image(image), size) for image in images])

    def nearest_words(self, v_star, k=5):
        """[[word, cosine similarity], ...] of the k nearest words to v_star (1, d)."""
        _, words, similarities = self.prompt_encoder.table.nearest(v_star, k)
        return [[w, s] for w, s in zip(words[0], similarities[0].tolist(), strict=True)]


def peak_memory_mb(device):
    """Peak memory in MB: of the CUDA allocator since `personalize` began, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KB on Linux
