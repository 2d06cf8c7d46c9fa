"""How well a picture keeps the concept, does what the prompt says, and hits the truth.

`small` marks measures by the small world's own CLIP, which took part in training the methods; the
others are by networks and rules that did not.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.backbone import Backbone
from dte_lab.concept import Concept
from dte_lab.encoder import EncoderPrediction
from dte_lab.evaluation.base_model import JUDGE_SIZE, Judge, classify_scene
from dte_lab.evaluation.edits import Edit, Item, object_mask, object_region, truth
from dte_lab.evaluation.judges import ImageJudge, SentenceJudge
from dte_lab.features import image_features
from dte_lab.objective import Batch, objective
from dte_lab.pipeline import DTEPipeline
from dte_lab.setting import picture_prompts
from dte_lab.tokens import TokenTable
from dte_lab.world.captions import caption
from dte_lab.world.latents import border_ratio
from dte_lab.world.scenes import BOX, SCENES

PICTURE_MEASURES = {
    "clip_i_small": "cosine of CLIP embeddings to the input picture",
    "identity": "cosine of EfficientNet-Lite0 features of the object region to the input's",
    "identity_margin": "identity minus the mean of the same to each other held-out concept",
    "nearest": "share of pictures whose region is more like the input's than any other concept's",
    "clip_t_small": "cosine of CLIP embeddings to the prompt, with 'a thing' for S*",
    "scene": "share of pictures whose scene, read from the pixels of the border, is the prompt's",
    "truth_similarity": "as identity, but to the true rendering of the edit",
    "truth_rmse": "root mean squared error to the true rendering in the object region, 0 to 1",
    "borders": "change across the borders of latent cells over change elsewhere, on the thing",
    "diversity": "one minus the mean cosine of the object regions' features between seeds",
}
WORD_MEASURES = {
    "word_similarity_small": "mean CLIP text cosine of the concept's name to v*'s nearest words",
    "word_similarity": "the same by a sentence encoder, all-MiniLM-L6-v2",
    "word_norm": "norm of v* in units of the words' mean norm",
}
LOSSES = {
    "loss": "diffusion loss of the input picture, on noise that is the same for all",
    "loss_elsewhere": "the same of the true renderings of the edits, under the edits' prompts",
}
LEVELS_ELSEWHERE = 8  # noise levels of each edit
TIMES = ("seconds", "seconds_per_picture", "extra_memory_mb")  # what a concept costs


class Measures:
    """The judges, loaded once. Raises ImportError when the outside judges are not installed."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.clip = Judge(backbone)
        self.outside = ImageJudge(size=JUDGE_SIZE)
        self.sentences = SentenceJudge()
        self.mean_norm = TokenTable(backbone).mean_norm
        self._latest: tuple[Item, Tensor] | None = None

    def pictures(
        self, drawn: Float[Tensor, "edits seeds 3 64 64"], item: Item, edits: Sequence[Edit]
    ) -> list[dict[str, float]]:
        """One dict of PICTURE_MEASURES per edit, means over seeds.

        drawn: in [-1, 1], the item's edits as a method drew them.
        """
        E, S = drawn.shape[:2]
        x, given = drawn.flatten(0, 1), item.picture()  # (E*S, 3, 64, 64), (1, 3, 64, 64)
        texts = [edit.prompt.replace(placeholder_token, "a thing") for edit in edits]
        embeds = image_features(self.backbone, torch.cat([given, x])).embeds  # (1 + E*S, p)
        clip_i = (embeds[1:] @ embeds[0]).view(E, S)
        clip_t = (embeds[1:].view(E, S, -1) * self.clip.text(texts)[:, None]).sum(-1)
        asked = np.array([SCENES.index(edit.scene) for edit in edits]).repeat(S)
        scene = torch.from_numpy(classify_scene(x) == asked).double().view(E, S)

        own = object_mask(item.name, item.style)
        features = self._features(object_region(x, own))  # (E*S, 1280)
        identity = (features @ self._features(object_region(given, own)).T).view(E, S)
        to_others = (features @ self._others(item).T).view(E, S, -1)
        margin, nearest = identity - to_others.mean(-1), identity > to_others.amax(-1)
        features = features.view(E, S, -1)
        pairs = (features @ features.mT)[:, ~torch.eye(S, dtype=torch.bool)]  # (E, S * (S - 1))
        borders = border_ratio(x).view(E, S)
        to_truth = [self._to_truth(drawn[i], item, edit) for i, edit in enumerate(edits)]

        rows = []
        for i in range(E):
            similarity, error = to_truth[i]
            values = {
                "clip_i_small": clip_i[i], "identity": identity[i], "identity_margin": margin[i],
                "nearest": nearest[i].double(), "clip_t_small": clip_t[i],
                "scene": scene[i], "truth_similarity": similarity,
                "truth_rmse": error, "borders": borders[i], "diversity": 1 - pairs[i],
            }  # fmt: skip
            rows.append({name: value.mean().item() for name, value in values.items()})
        return rows

    def words(
        self, name: str, words: Sequence[str], v_star: Float[Tensor, "1 dim"]
    ) -> dict[str, float]:
        """WORD_MEASURES of a v* and the words nearest to it; nothing where a method learns none."""
        if not words:
            return {}
        texts = [caption(text, None, None) for text in [name, *words]]
        small, outside = self.clip.text(texts), self.sentences.embed([name, *words])
        return {
            "word_similarity_small": (small[1:] @ small[0]).mean().item(),
            "word_similarity": (outside[1:] @ outside[0]).mean().item(),
            "word_norm": v_star.norm().item() / self.mean_norm,
        }

    def _features(
        self, x: Float[Tensor, "pictures 3 height width"]
    ) -> Float[Tensor, "pictures features"]:
        """Unit features."""
        return F.normalize(self.outside.features(x), dim=-1)

    def _others(self, item: Item) -> Float[Tensor, "others features"]:
        """Features of the other concepts of the item's split, in its style and scene, and in its
        mask, so that the mask's outline does not tell which is the right one.
        """
        if self._latest is None or self._latest[0] != item:
            x = torch.cat([other.picture() for other in item.others])
            x = object_region(x, object_mask(item.name, item.style))
            self._latest = item, self._features(x)
        return self._latest[1]

    def _to_truth(
        self, x: Float[Tensor, "seeds 3 64 64"], item: Item, edit: Edit
    ) -> tuple[Float[Tensor, " seeds"], Float[Tensor, " seeds"]]:
        """Similarity and RMSE of pictures to the true rendering of the edit."""
        mask, true = object_mask(item.name, edit.style), truth(item, edit)[None]
        reference = self._features(object_region(true, mask))[0]
        similarity = self._features(object_region(x, mask)) @ reference
        pixels = true[..., BOX, BOX][..., mask]  # (1, 3, n)
        errors = x[..., BOX, BOX][..., mask] - pixels  # (S, 3, n)
        return similarity, errors.square().mean((1, 2)).sqrt() / 2


def phrase_of(concept: Concept) -> str:
    """What stands for the concept in prompts: "S*", or the words a baseline was tuned with."""
    return concept.info.get("phrase", placeholder_token)


def prompts_of(concept: Concept, edits: Sequence[Edit]) -> list[str]:
    """What is asked of a concept: the edits' prompts with its phrase."""
    return [edit.prompt.replace(placeholder_token, phrase_of(concept)) for edit in edits]


@torch.no_grad()
def diffusion_loss(
    pipe: DTEPipeline,
    concept: Concept,
    pictures: Float[Tensor, "pictures 3 height width"],
    prompts: Sequence[str],
    count: int = 32,
    seed: int = 1,
) -> float:
    """Diffusion loss of a concept: mean over `count` noise levels of each picture.

    pictures: in [-1, 1]. prompts: one for each of them, with the concept's phrase. The levels are
    spread evenly over the timesteps and the same for all pictures; the noise depends on `seed`
    alone. Tuning's own loss has new noise at every step, which hides small changes.
    """
    backbone, generator = pipe.backbone, torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(0, len(backbone.alphas_cumprod) - 1, count).long()
    prediction = EncoderPrediction(concept.v_star, concept.offsets)
    method, losses = replace(concept.config, regulariser="none"), []
    for picture, prompt in zip(pictures, prompts, strict=True):
        latents = backbone.encode_images(picture[None]).float().expand(count, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        batch = Batch(latents, noise, timesteps.to(latents.device), [prompt] * count)
        with objective(backbone, pipe.prompt_encoder, prediction, batch, method) as terms:
            losses.append(terms["diffusion"].item())
    return fmean(losses)


def concept_losses(
    pipe: DTEPipeline, concept: Concept, item: Item, edits: Sequence[Edit]
) -> dict[str, float]:
    """LOSSES of a concept."""
    own = picture_prompts(pipe.backbone, item.picture(), phrase_of(concept))  # as in tuning
    true = torch.stack([truth(item, edit) for edit in edits])
    return {
        "loss": diffusion_loss(pipe, concept, item.picture(), own),
        "loss_elsewhere": diffusion_loss(
            pipe, concept, true, prompts_of(concept, edits), count=LEVELS_ELSEWHERE
        ),
    }
