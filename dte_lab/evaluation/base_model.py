"""Measure the base model: autoencoder, CLIP, and whether pictures show what their caption says.

dte world evaluate --out results/world.json

Everything is drawn from fixed seeds, and no judge took part in training the base model: the scene
of a picture is read by an exact pixel classifier, its concept and style by linear discriminant
analysis of EfficientNet-Lite0 features, fitted on true renderings, sharp and blurred; how these do
on other true renderings, and on the autoencoder's reconstruction of them, stands beside. Words are
compared by a sentence encoder.
"""

import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone, load_backbone
from dte_lab.common.errors import DTEError
from dte_lab.common.files import prepare_folder, write_atomically
from dte_lab.common.settings import check_whole
from dte_lab.common.stats import interval, kernel_distance, psnr
from dte_lab.evaluation.base_model_tables import measures_table
from dte_lab.evaluation.judges import ImageJudge, SentenceJudge
from dte_lab.tokens import TokenTable
from dte_lab.world.captions import caption, held_out
from dte_lab.world.clip import tokenize
from dte_lab.world.data import random_batch, rendered
from dte_lab.world.sampling import GUIDANCE_SCALE, STEPS, draw
from dte_lab.world.scenes import BOX, SCENES, SIZE, background
from dte_lab.world.sprites import STYLES, concepts, split_names

Scene = tuple[str, str, str]  # concept, style, scene; what follows them is not read
JUDGE_SIZE = 96  # px to which the sprite's box is enlarged for EfficientNet: twice its own size
RENDERINGS = 4  # per concept and style, to fit the classifiers; each sharp and blurred
BLUR, NOISE = (0.3, 1.2), (0.0, 0.06)  # std in px and in [-1, 1]: sharpness is the KID's business


@cache
def _border() -> Bool[np.ndarray, "64 64"]:
    """Where no sprite covers the picture."""
    mask = np.ones((SIZE, SIZE), bool)
    mask[BOX, BOX] = False
    return mask


@cache
def _border_means(samples: int = 32) -> Float[np.ndarray, "scenes pixels 3"]:
    """The mean border of every scene."""
    return np.stack(
        [
            np.mean([background(s, np.random.default_rng(i)) for i in range(samples)], 0)[_border()]
            for s in SCENES
        ]
    )


def classify_scene(x: Float[Tensor, "pictures 3 64 64"]) -> Int[np.ndarray, " pictures"]:
    """Index into SCENES for pictures in [-1, 1]: the nearest mean border."""
    borders = (x.permute(0, 2, 3, 1).numpy() / 2 + 0.5)[:, _border()]  # (B, N, 3)
    return np.array([np.abs(_border_means() - b).mean((1, 2)).argmin() for b in borders])


def scene_hits(
    x: Float[Tensor, "pictures 3 64 64"], items: Sequence[Scene]
) -> Bool[np.ndarray, " pictures"]:
    """Whether pictures in [-1, 1] show the scenes of their items."""
    return classify_scene(x) == [SCENES.index(item[2]) for item in items]


class Judge:
    """Zero-shot CLIP over texts of the small world."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @torch.no_grad()
    def text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit embeddings."""
        ids = tokenize(self.backbone.tokenizer, texts)
        return nn.functional.normalize(self.backbone.text_encoder(ids).text_embeds, dim=-1)

    @torch.no_grad()
    def ranks(
        self, x: Float[Tensor, "pictures ..."], texts: list[str]
    ) -> Int[np.ndarray, "pictures texts"]:
        """Indices of the texts, best first, for pictures in [-1, 1]."""
        pixels = self.backbone.clip_pixels(x)
        image = nn.functional.normalize(self.backbone.image_encoder(pixels).image_embeds, dim=-1)
        return (image @ self.text(texts).T).argsort(dim=1, descending=True).numpy()

    def concept_hits(
        self, x: Float[Tensor, "pictures ..."], truth: list[str]
    ) -> tuple[Bool[np.ndarray, " pictures"], Bool[np.ndarray, " pictures"]]:
        """Top-1 and top-5 hits among all train concepts."""
        names = split_names("train")
        ranks = self.ranks(x, [caption(n, None, None) for n in names])
        hit = ranks == np.array([names.index(n) for n in truth])[:, None]
        return hit[:, 0], hit[:, :5].any(1)

    def nearest_concepts(self, x: Float[Tensor, "pictures ..."]) -> list[str]:
        """The train concept that CLIP finds in each picture."""
        names = split_names("train")
        return [names[i] for i in self.ranks(x, [caption(n, None, None) for n in names])[:, 0]]


def group_hits(nearest: list[str], truth: list[str]) -> Bool[np.ndarray, " pictures"]:
    """Whether the train concepts nearest to pictures belong to the groups of what they show."""
    pairs = zip(nearest, truth, strict=True)
    return np.array([concepts()[a].group == concepts()[b].group for a, b in pairs])


def generate(
    backbone: Backbone, captions: list[str], seed: int
) -> Float[Tensor, "captions 3 64 64"]:
    """Pictures, about in [-1, 1], drawn by a backbone; see `draw`."""
    b = backbone
    return draw(b.vae, b.text_encoder, b.tokenizer, b.unet, b.scheduler, captions, seed)


def evaluation_items(count: int, seed: int, novel: bool) -> list[Scene]:
    """Random (concept, style, scene) of train concepts, all seen or all held out together."""
    rng = np.random.default_rng(seed)
    names, items = split_names("train"), []
    while len(items) < count:
        item = names[rng.integers(len(names))], STYLES[rng.integers(3)], SCENES[rng.integers(20)]
        if held_out(*item) == novel:
            items.append(item)
    return items


def soften(
    x: Float[Tensor, "pictures 3 height width"], seed: int
) -> Float[Tensor, "pictures 3 height width"]:
    """Blur and grain pictures in [-1, 1], each differently."""
    from skimage.filters import gaussian  # extra: evaluate

    rng = np.random.default_rng(seed)
    blurred = [gaussian(p, rng.uniform(*BLUR), channel_axis=0) for p in x.numpy()]
    grain = [rng.normal(0, rng.uniform(*NOISE), p.shape) for p in blurred]
    return torch.from_numpy(np.stack(blurred) + np.stack(grain)).float().clamp(-1, 1)


class Classifier:
    """Concept and style of a picture's sprite by outside features (see the module's docstring)."""

    def __init__(self, names: list[str], renderings: int = RENDERINGS, seed: int = 30_000) -> None:
        self.names, self.judge = names, ImageJudge(size=JUDGE_SIZE)
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # extra: evaluate

        rng = np.random.default_rng(seed)
        items = [(name, style) for name in names for style in STYLES for _ in range(renderings)]
        scenes = rng.integers(len(SCENES), size=len(items))
        x = rendered(
            [
                (*item, SCENES[scene], int(rng.integers(1 << 31)))
                for item, scene in zip(items, scenes, strict=True)
            ]
        )
        # A class per concept and style, so that what varies within one is the background alone.
        classes = np.arange(len(names) * len(STYLES)).repeat(renderings)
        self.analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        features = [self.features(part) for part in (x, soften(x, seed))]
        self.analysis.fit(np.concatenate(features), np.tile(classes, 2))

    def features(
        self, x: Float[Tensor, "pictures 3 64 64"]
    ) -> Float[np.ndarray, "pictures features"]:
        """Features of the box that the sprite fills."""
        box = x[..., BOX, BOX]
        parts = tqdm(box.split(50), desc="judging", disable=len(box) < 500)
        return torch.cat([self.judge.features(part) for part in parts]).double().numpy()

    def scores(
        self, features: Float[np.ndarray, "pictures features"]
    ) -> Float[np.ndarray, "pictures names styles"]:
        """Of every name and style; the largest is the most likely."""
        scores = self.analysis.decision_function(features)
        return scores.reshape(len(features), len(self.names), len(STYLES))

    def nearest_concepts(self, x: Float[Tensor, "pictures 3 64 64"]) -> list[str]:
        """The most likely concept of each picture."""
        return [self.names[i] for i in self.scores(self.features(x)).max(2).argmax(1)]

    def hits(
        self, features: Float[np.ndarray, "pictures features"], items: Sequence[Scene]
    ) -> dict[str, Bool[np.ndarray, " pictures"]]:
        """Whether pictures with these features show the concept and style of their items."""
        scores = self.scores(features)
        true = np.array([self.names.index(item[0]) for item in items])
        top = scores.max(2).argsort(axis=1)[:, ::-1][:, :5] == true[:, None]
        style = scores.max(1).argmax(1) == [STYLES.index(item[1]) for item in items]
        return {"concept_top1": top[:, 0], "concept_top5": top.any(1), "style": style}


def word_neighbours(backbone: Backbone, count: int = 100, seed: int = 0) -> dict:
    """How alike in meaning nouns and their nearest tokens are, against random pairs of words.

    The nouns are names of train concepts that are one word of the token table.
    """
    table, judge = TokenTable(backbone), SentenceJudge()
    rng = np.random.default_rng(seed)
    nouns = [name for name in split_names("train") if name in table.words]
    nouns = [nouns[i] for i in rng.permutation(len(nouns))[:count]]
    unit = nn.functional.normalize(table.embeddings, dim=-1)
    rows = [table.words.index(noun) for noun in nouns]
    similar = unit[rows] @ unit.T
    similar[torch.arange(len(rows)), rows] = -1  # not itself
    meaning = judge.embed(list(table.words)).numpy()
    near = similar.argmax(1).tolist()
    far = [rng.choice([w for w in range(len(unit)) if w != row]) for row in rows]
    return {
        "nearest": interval([meaning[a] @ meaning[b] for a, b in zip(rows, near, strict=True)]),
        "random": interval([meaning[a] @ meaning[b] for a, b in zip(rows, far, strict=True)]),
        "examples": {noun: table.words[n] for noun, n in zip(nouns[:12], near, strict=False)},
    }


def check_asked(out: Path, n: int) -> None:
    """Raise DTEError for what `main` cannot do, before it begins."""
    check_whole("captions", n, 4)
    if out.is_dir():
        raise DTEError(f"{out} is a folder: the measures need a file.")
    prepare_folder(out.parent)


def main(out: Path, backbone: str = "small", n: int = 500) -> dict:
    """Write, print and return the measures (see `results/world.json`).

    n: captions, seen and novel each. Raises DTEError for less than the 4 of which the time is taken
    and where `out` cannot be written, ImportError when the outside judges are not installed.
    """
    check_asked(Path(out), n)
    b = load_backbone(backbone)
    judge, classifier = Judge(b), Classifier(split_names("train"))
    results: dict = {"guidance_scale": GUIDANCE_SCALE, "steps": STEPS}

    x, _, items = random_batch(np.random.default_rng(20_000), 240, "val")
    y = b.decode_latents(b.encode_images(x))
    results["autoencoder_psnr_val_db"] = {"mean": psnr(y, x), "n": len(x)}
    for key, names in (
        ("clip", judge.nearest_concepts(x)),
        ("outside", classifier.nearest_concepts(x)),
    ):
        results[f"{key}_group_of_val_concepts"] = interval(group_hits(names, [i[0] for i in items]))

    x, _, items = random_batch(np.random.default_rng(20_001), 1000)
    top1, top5 = judge.concept_hits(x, [i[0] for i in items])
    results["clip_concept_top1"], results["clip_concept_top5"] = interval(top1), interval(top5)
    style = judge.ranks(x, [f"a {s} picture of a thing" for s in STYLES])[:, 0]
    scene = judge.ranks(x, [caption("thing", None, s) for s in SCENES])[:, 0]
    true_scene = np.array([SCENES.index(i[2]) for i in items])
    results["clip_style"] = interval(style == [STYLES.index(i[1]) for i in items])
    results["clip_scene"] = interval(scene == true_scene)

    for key, novel in (("seen", False), ("novel", True)):
        items = evaluation_items(n, 20_002 + novel, novel)
        pictures = generate(b, [caption(*i) for i in items], seed=0).clamp(-1, 1)
        true = rendered([(*i, k) for k, i in enumerate(items)])
        rebuilt = b.decode_latents(b.encode_images(true)).clamp(-1, 1)
        features = {}
        for kind, x in (("generated", pictures), ("autoencoder", rebuilt), ("true", true)):
            features[kind] = classifier.features(x)
            hits = classifier.hits(features[kind], items) | {"scene": scene_hits(x, items)}
            results[f"{kind}_{key}"] = {name: interval(h) for name, h in hits.items()}
        if not novel:
            others = rendered([(*i, k + n) for k, i in enumerate(items)])
            rebuilt = b.decode_latents(b.encode_images(others)).clamp(-1, 1)
            distances = {
                "generated": features["generated"],
                "autoencoder": classifier.features(rebuilt),
                "true": classifier.features(others),
            }
            results["kernel_distance"] = {
                kind: kernel_distance(f, features["true"]) for kind, f in distances.items()
            } | {"n": n}
    results["words"] = word_neighbours(b)
    start = time.perf_counter()
    generate(b, [caption(*i) for i in items[:4]], seed=1)
    results["seconds_for_four_pictures"] = time.perf_counter() - start
    write_atomically(Path(out), json.dumps(results, indent=1).encode())
    print(measures_table(results))
    return results
