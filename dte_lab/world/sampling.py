"""Draw captions with the base model alone, through diffusers' stock pipeline."""

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dte_lab.backbone import stock_pipeline
from dte_lab.world.clip import tokenize

GUIDANCE_SCALE = 3.0  # of captions alone; a concept is drawn with a lower one
STEPS = 25


@torch.no_grad()
def draw(
    vae: nn.Module,
    text_encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    captions: list[str],
    seed: int,
    batch: int = 50,
) -> Float[Tensor, "captions 3 height width"]:
    """A picture in [-1, 1] of each caption: 25 steps, guidance 3, fixed noise."""
    pipe = stock_pipeline(vae, text_encoder, tokenizer, unet, scheduler)

    def states(texts: list[str]) -> Float[Tensor, "texts tokens dim"]:
        # the pipeline would take the projected embedding
        return text_encoder(tokenize(tokenizer, texts).to(unet.device)).last_hidden_state

    generator = torch.Generator().manual_seed(seed)
    pictures = []
    starts = range(0, len(captions), batch)
    for start in tqdm(starts, desc="pictures", disable=len(starts) < 2):
        texts = captions[start : start + batch]
        pictures.append(
            pipe(
                prompt_embeds=states(texts),
                negative_prompt_embeds=states([""] * len(texts)),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(pictures) * 2 - 1
