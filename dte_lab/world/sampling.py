"""Draw captions with the base model alone, through diffusers' stock pipeline."""

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
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

    def states(texts: list[str]) -> Float[Tensor, "texts tokens dim"]:
        # the pipeline would take the projected embedding
        return text_encoder(tokenize(tokenizer, texts).to(unet.device)).last_hidden_state

    pipe = stock_pipeline(vae, text_encoder, tokenizer, unet, scheduler)
    told = torch.cat([states(captions[k : k + batch]) for k in range(0, len(captions), batch)])
    return draw_states(pipe, told, states([""]), seed, batch)


@torch.no_grad()
def draw_states(
    pipe: StableDiffusionPipeline,
    told: Float[Tensor, "captions tokens dim"],
    nothing: Float[Tensor, "1 tokens dim"],
    seed: int,
    batch: int = 50,
) -> Float[Tensor, "captions 3 height width"]:
    """The same of states of captions; nothing: of the empty one."""
    generator = torch.Generator().manual_seed(seed)
    pictures, parts = [], told.split(batch)
    for states in tqdm(parts, desc="pictures", disable=len(parts) < 2):
        pictures.append(
            pipe(
                prompt_embeds=states,
                negative_prompt_embeds=nothing.expand_as(states),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(pictures) * 2 - 1
