"""How much a drawing depends on v*, on drawings that say what they were given."""

from types import SimpleNamespace

import pytest
import torch

from dte_lab import Concept, DTEPipeline
from dte_lab.evaluation import word_voice
from dte_lab.evaluation.edits import edits, items
from dte_lab.evaluation.trials import Sampling


def test_changes_are_root_mean_squares_of_what_differs(tiny_backbone, tiny_encoder, monkeypatch):
    """Each drawing is the sum of its v* everywhere: changes are differences of sums."""
    pipe = DTEPipeline(tiny_backbone, tiny_encoder)
    table = pipe.prompt_encoder.table
    v = 2 * table.embeddings[:1] + 0.1
    concept, seen = Concept(v, {}, tiny_backbone.name), []

    def draw(pipe, concept, asked, sampling):
        seen.append(concept)
        return concept.v_star.sum() * torch.ones(len(asked), sampling.seeds, 3, 4, 4)

    monkeypatch.setattr(word_voice, "draw_concept", draw)
    found = word_voice.of_concept(pipe, concept, [SimpleNamespace()] * 3, Sampling(seeds=2))
    unlike = torch.nn.functional.cosine_similarity(v, table.embeddings).argmin()
    other = table.embeddings[unlike]
    assert found["zeroed"] == pytest.approx(v.sum().abs().item(), rel=1e-5)
    assert found["other_word"] == pytest.approx((v.sum() - other.sum()).abs().item(), rel=1e-5)
    assert found["share"] == pytest.approx(found["zeroed"] / found["other_word"])
    norms = table.embeddings.norm(dim=-1)
    assert found["norm"] == pytest.approx((v.norm() / norms.mean()).item(), rel=1e-5)
    assert [c.config.alpha_blend for c in seen] == [1.0] * 3, "the soft path alone"


def test_means_are_over_concepts(small_pipe):
    found = word_voice.word_voice(small_pipe, 2, "val", Sampling(1, num_inference_steps=2))
    one, two = items(2, "val")
    assert {value["n"] for value in found.values()} == {2}
    assert one.name != two.name and edits(one, word_voice.ASKED_IN)
    assert 0 < found["zeroed"]["mean"] and 0.5 < found["norm"]["mean"] < 2
