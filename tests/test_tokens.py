import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dte_lab import PromptEncoder, TokenTable, load_backbone
from dte_lab.tokens import PromptTokens


@pytest.fixture(scope="module")
def table(tiny_backbone):
    return TokenTable(tiny_backbone)


@pytest.fixture(scope="module")
def encode(tiny_backbone, table):
    return PromptEncoder(tiny_backbone, table)


def reference(backbone, prompt):
    """The stock way: the tokenizer's own padding, no hooks."""
    ids = backbone.tokenizer(
        prompt, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return backbone.text_encoder(input_ids=ids).last_hidden_state


def test_usable_words(table, tiny_backbone):
    assert {"apple", "picture", "the"} <= set(table.words)
    assert not {"ab", "x9y", "123", "of", "a", "<|endoftext|>"} & set(table.words)
    for i, word in zip(table.ids.tolist(), table.words, strict=True):
        assert tiny_backbone.tokenizer.convert_ids_to_tokens(i) == word + "</w>"


def test_nearest_against_brute_force(table):
    v = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    ids, words, similarities = table.nearest(v, k=4)
    for i in range(3):
        cosine = [F.cosine_similarity(v[i], e, dim=0).item() for e in table.embeddings]
        best = sorted(range(len(cosine)), key=lambda j: -cosine[j])[:4]
        assert words[i] == [table.words[j] for j in best]
        assert ids[i].tolist() == [table.ids[j].item() for j in best]
        torch.testing.assert_close(similarities[i], torch.tensor([cosine[j] for j in best]))


def test_plain_prompts_match_the_stock_encoder(encode, tiny_backbone):
    for prompt in ["", "a picture of the cat", "red green blue " * 9]:
        ours = encode.plain([prompt])
        torch.testing.assert_close(ours, reference(tiny_backbone, prompt))


def test_a_words_own_embedding_gives_the_words_prompt(encode, table, tiny_backbone):
    row = table.words.index("apple")
    ours = encode(["a red S* on the beach, S*"], table.embeddings[row][None])
    torch.testing.assert_close(ours, reference(tiny_backbone, "a red apple on the beach, apple"))


def test_several_vectors(encode, table, tiny_backbone):
    rows = [table.words.index(word) for word in ("red", "apple")]
    ours = encode(["the S* at night"], table.embeddings[rows][None])
    torch.testing.assert_close(ours, reference(tiny_backbone, "the red apple at night"))


def test_hard_prompt_takes_the_nearest_word(encode, table, tiny_backbone):
    v = table.embeddings[table.words.index("dog")] * 3 + 1e-3
    ours = encode.hard(["a S* on the beach"], v[None])
    torch.testing.assert_close(ours, reference(tiny_backbone, "a dog on the beach"))


def test_each_prompt_gets_its_own_vector_with_gradients(encode):
    v = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = encode(["a S*", "S* at night"], v)
    grad = torch.autograd.grad(out[0].square().sum(), v)[0]
    assert grad[0].abs().max() > 0 and grad[1].abs().max() == 0
    alone = encode(["S* at night"], v[1:])
    torch.testing.assert_close(out[1:], alone)


def test_the_hook_is_gone_even_after_an_exception(encode, tiny_backbone):
    embedding = tiny_backbone.text_encoder.get_input_embeddings()
    encode(["S*"], torch.zeros(1, 24))
    with pytest.raises(RuntimeError):
        encode(["S*"], torch.zeros(1, 23))  # the wrong width fails inside the hook
    assert not embedding._forward_hooks


def test_bad_prompts(encode):
    v = torch.zeros(1, 24)
    with pytest.raises(ValueError, match=r"does not contain S\*"):
        encode(["a cat"], v)
    with pytest.raises(ValueError, match="too long"):
        encode(["red " * 14 + "S*"], v)
    with pytest.raises(ValueError, match="2 prompts but 3"):
        encode(["S*", "S*"], torch.zeros(3, 24))


def test_a_list_of_words_restricts_the_usable_ones(tiny_path, tmp_path):
    shutil.copytree(tiny_path, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "words.json"
    file.write_text(json.dumps(["dog", "apple", "ab", "never-seen"]))
    backbone = load_backbone(tmp_path)
    table = TokenTable(backbone)
    assert sorted(table.words) == ["apple", "dog"]
    similarities, rows = table.nearest_rows(torch.randn(2, 24), k=5)
    assert rows.shape == similarities.shape == (2, 2)
    for bad in ('{"dog": 1}', "[1, 2]", "no json"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="JSON list of words"):
            TokenTable(backbone)
    file.write_text("[]")
    with pytest.raises(ValueError, match="no usable word"):
        TokenTable(backbone)


def test_gaussian_against_numpy(table):
    mean, precision = (x.double().numpy() for x in table.gaussian)
    words = table.embeddings.double().numpy()
    np.testing.assert_allclose(mean, words.mean(0), atol=1e-6)
    covariance = np.cov(words.T, bias=True)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / 24 * np.eye(24)
    np.testing.assert_allclose(precision @ shrunk, np.eye(24), atol=1e-3)


def test_neighbour_cosine_against_a_loop(table):
    values = []
    for i, word in enumerate(table.embeddings):
        others = [F.cosine_similarity(word, w, dim=0) for j, w in enumerate(table.embeddings)]
        others.pop(i)
        values += sorted(others)[-3:]
    assert table.neighbour_cosine(3) == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)


def test_a_table_dies_with_its_pipeline(tiny_backbone):
    table = TokenTable(tiny_backbone)
    assert table.neighbour_cosine(2) != table.neighbour_cosine(3)
    encode, alive = PromptEncoder(tiny_backbone, table), weakref.ref(table)
    assert encode.hard(["S*"], table.embeddings[:1]).isfinite().all()
    _ = table.gaussian
    del table, encode
    gc.collect()
    assert alive() is None


def test_tokens_are_encoded_as_their_prompts(encode):
    prompts, v = ["a S* on the beach", "S* at night"], torch.randn(2, 24)
    tokens = encode.tokenize(prompts)
    assert (tokens.slots == 0).sum(dim=1).tolist() == [1, 1] and tokens.slots[0, 2] == 0
    assert torch.equal(encode.encode(tokens, v), encode(prompts, v))
    swapped = PromptTokens(tokens.ids.flip(0), tokens.slots.flip(0))
    assert torch.equal(encode.encode(swapped, v.flip(0)), encode(prompts, v).flip(0))
    two = encode.tokenize(["a S*"], 2)
    assert two.slots[0, :4].tolist() == [-1, -1, 0, 1]


def test_a_word_is_the_mean_of_its_tokens(tiny_backbone):
    encoder = PromptEncoder(tiny_backbone)
    rows = tiny_backbone.text_encoder.get_input_embeddings().weight
    ids = tiny_backbone.tokenizer("blue cat").input_ids[1:-1]
    assert len(ids) > 1
    expected = sum(rows[i] for i in ids) / len(ids)
    torch.testing.assert_close(encoder.word("blue cat"), expected[None].detach())
