"""The word space and its painter against independent formulas, and that they start as they say."""

import copy

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dte_lab.common.errors import DTEError
from dte_lab.world import drawings as drawings_module
from dte_lab.world import spoken, train_text, train_unet
from dte_lab.world.align import align, cell_blocks
from dte_lab.world.batches import PairBatch, PicturePairs, Shares, wide_words
from dte_lab.world.clip import (
    CELLS,
    MAX_LENGTH,
    WIDTH,
    WORDS,
    build_text_tower,
    build_tokenizer,
    cells,
    tokenize,
)
from dte_lab.world.drawings import Drawings
from dte_lab.world.latents import border_ratio, pictures_of, scaled_latents
from dte_lab.world.painter import TextPainter, low_rank, open_gates
from dte_lab.world.scenes import BOX, SCENES
from dte_lab.world.spoken import Mixture, Spoken, SpokenBatches
from dte_lab.world.sprites import split_names
from dte_lab.world.wide import load
from dte_lab.world.word_space import CODE, ENTRY, NAME, NAME_PENALTY, PictureWords, start_words

NAMES = [*split_names("train")[:56], *split_names("extra")[:4]]


@pytest.fixture(scope="module")
def batches(wide_cache):
    from dte_lab.patch_autoencoder import PatchAutoencoder
    from dte_lab.world.data import random_batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken, "CAPTION_BANK", 300)
        patch.setattr(spoken, "MEASURED_EACH", 20)
        patch.setattr(drawings_module, "BACKGROUNDS", 2)
        drawings = Drawings(NAMES, load(wide_cache))
        vae = PatchAutoencoder(width=16, fine_width=16)
        x, _, _ = random_batch(np.random.default_rng(0), 128)
        vae.initialise_from_pca(x)
        vae.register_to_config(scaling_factor=1 / vae.encode(x).latent_dist.mode().std().item())
        vae = vae.eval().requires_grad_(False)
        tokenizer = build_tokenizer(wide_words(drawings.wide))
        torch.manual_seed(0)
        words = train_text.fit_picture_words(vae, drawings)
        yield SpokenBatches(tokenizer, drawings, vae, words, Mixture(0.4, 0.4))


@pytest.fixture(scope="module")
def started(batches):
    """A painter that has started, the errors on its way, and the examples it was fitted to."""
    real, examples = train_text.start_painter, []
    torch.manual_seed(0)
    painter = TextPainter(build_text_tower(batches.tokenizer), 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_text, "start_painter", lambda *args: (examples.extend(args[1:]), real(*args))[1]
        )
        errors = train_text.start_text(painter, batches)
    return painter, errors, Spoken(*examples, None)


def test_words_of_pictures_are_half_whitened_principal_components():
    torch.manual_seed(0)
    latents = torch.randn(300, 96, 4, 4) * torch.rand(96, 4, 4) + torch.randn(96, 4, 4)
    latents = latents.double()  # close components mix in single precision
    words = PictureWords.fit(latents)
    pca = PCA(CODE, svd_solver="full").fit(latents.flatten(1).numpy())
    scores = pca.transform(latents.flatten(1).numpy())
    expected = scores / scores.std(0) ** 0.5
    expected *= ENTRY / np.sqrt((expected**2).mean())
    v = words(latents)
    assert v.shape == (300, WIDTH)
    found = v[:, :CODE].numpy()
    signs = np.sign((found * expected).sum(0))  # a component's sign is free
    np.testing.assert_allclose(found * signs, expected, atol=1e-8)
    assert (v[:, -1] == NAME).all() and not v[:, CODE:-1].any()
    other = torch.randn(5, 96, 4, 4).double()
    expected = words(latents.mean(0, keepdim=True))[:, :CODE]
    assert expected.abs().max() < 1e-4
    mixed = words(0.3 * other[:1] + 0.7 * other[1:2])  # a linear map
    torch.testing.assert_close(mixed, 0.3 * words(other[:1]) + 0.7 * words(other[1:2]))


def test_words_of_pictures_are_saved_and_need_enough_drawings(tmp_path):
    words = PictureWords(torch.randn(1536), torch.randn(CODE, 1536))
    words.save(tmp_path / "words")
    again = PictureWords.load(tmp_path / "words").to("cpu")
    assert torch.equal(again.mean, words.mean.half().float()) and again.basis.shape == (CODE, 1536)
    (tmp_path / "words").write_bytes(b"no such file")
    with pytest.raises(DTEError, match="words cannot be read .*: dte world train text writes"):
        PictureWords.load(tmp_path / "words")
    with pytest.raises(DTEError, match="160 drawings at least, not 20"):
        PictureWords.fit(torch.randn(20, 96, 4, 4))


def test_words_of_names_start_at_a_ridge_regression_of_their_codes(batches):
    tokenizer = batches.tokenizer
    text = build_text_tower(tokenizer)
    names = ["war axe", "axe", "steel axe", "toy lamp of axe"]
    ids = tokenizer(names, add_special_tokens=False).input_ids
    of, axe = tokenizer("of axe", add_special_tokens=False).input_ids
    torch.manual_seed(0)
    codes, weights = torch.randn(4, CODE), torch.tensor([4.0, 1, 1, 2])
    start_words(text, ids, codes, weights, {of})
    table = text.get_input_embeddings().weight.detach()
    columns = sorted({i for row in ids for i in row} - {of})
    counts = np.array([[row.count(i) for i in columns] for row in ids], float)
    # (X' W X + penalty) B = X' W Y, as least squares with rows for the penalty
    root = np.sqrt(weights.numpy())[:, None]
    x = np.concatenate([root * counts, NAME_PENALTY**0.5 * np.eye(len(columns))])
    y = np.concatenate([root * codes.numpy(), np.zeros((len(columns), CODE))])
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(table[columns, :CODE].numpy(), expected, atol=1e-4)
    assert (table[columns, -1] == NAME).all() and not table[columns, CODE:-1].any()
    others = [i for i in range(len(table)) if i not in columns]
    assert not table[others, :CODE].any() and (table[others, -1] == -NAME).all()
    assert table[others, CODE:-1].std().item() == pytest.approx(ENTRY, rel=0.02)


def test_the_first_attention_looks_for_names(batches, started):
    """Of the words of a caption, the heads of the code give names nearly all of their attention."""
    painter, _, _ = started
    text, tokenizer = painter.text.text_model, batches.tokenizer
    ids = tokenize(tokenizer, ["a picture of a war axe on the beach"])
    layer = text.encoder.layers[0]
    with torch.no_grad():
        x = layer.layer_norm1(text.embeddings(ids))[0]
        attention = layer.self_attn
        heads = x.shape[1] // attention.head_dim
        query, key = (
            projection(x).unflatten(1, (heads, -1)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj)
        )
        scores = query @ key.mT * attention.head_dim**-0.5
    place = [i for i, t in enumerate(ids[0]) if tokenizer.decode(t).strip() in ("war", "axe")]
    share = scores[:, -1].softmax(-1)[:, place].sum(1)
    assert len(place) == 2 and (share[: CODE // attention.head_dim] > 0.9).all()


def test_states_have_the_picture_word_in_its_slot(batches):
    painter = TextPainter(build_text_tower(batches.tokenizer), 96)
    ids = tokenize(batches.tokenizer, ["a picture of a thing at night", "a red apple", "thing"])
    slots = torch.zeros_like(ids, dtype=torch.bool)
    slots[0, 5] = slots[2, 1] = True
    assert (ids[slots] == batches.tokenizer.encode("thing")[1]).all()
    v = torch.randn(3, WIDTH)
    with torch.no_grad():
        states = painter.states(ids, slots, v)
        for k, slot in ((0, 5), (1, None), (2, 1)):  # the vector as the word's own embedding
            tower = copy.deepcopy(painter.text)
            if slot:
                tower.get_input_embeddings().weight[ids[k, slot]] = v[k]
            expected = tower(ids[k : k + 1]).last_hidden_state[0]
            torch.testing.assert_close(states[k], expected, atol=1e-5, rtol=1e-4)
        plain = painter.text(ids).last_hidden_state
    assert not torch.allclose(states[0], plain[0], atol=1e-2)
    assert torch.equal(states[1], plain[1]), "nothing is left behind"


def test_cells_are_painted_by_their_end_tokens(batches):
    painter = TextPainter(build_text_tower(batches.tokenizer), 96)
    states = torch.randn(2, MAX_LENGTH, WIDTH)
    painted = painter.paint(states)
    weight, bias = painter.cell.weight, painter.cell.bias
    torch.testing.assert_close(painted[1, :, 2, 3], weight @ states[1, WORDS + 11] + bias)
    assert not painter.text.text_projection.weight.requires_grad


def test_low_rank_is_the_best_of_its_rank():
    torch.manual_seed(0)
    x, y = torch.randn(400, 12).double(), torch.randn(400, 7).double()
    y += x @ torch.randn(12, 7).double()
    a, b = low_rank(x, y, 3, 1e-9 * torch.eye(12).double())
    assert a.shape == (12, 3) and b.shape == (3, 7)
    full = torch.linalg.lstsq(x, y).solution
    u, s, v = torch.linalg.svd(x @ full, full_matrices=False)
    best = u[:, :3] * s[:3] @ v[:3]  # Eckart and Young, of the fitted values
    torch.testing.assert_close(x @ a @ b, best, atol=1e-5, rtol=1e-4)
    shy = low_rank(x, y, 7, 1e9 * torch.eye(12).double())
    assert (x @ shy[0] @ shy[1]).abs().max() < 1e-3


def test_gates_open_at_their_own_position_alone_and_add_what_is_missing(batches):
    torch.manual_seed(0)
    layer = build_text_tower(batches.tokenizer).text_model.encoder.layers[0]
    where = 3 * torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:CELLS]
    seen = where + 0.1 * torch.randn(600, CELLS, WIDTH)
    maps = torch.randn(CELLS, WIDTH, 5) @ torch.randn(5, 60) / 4
    residual = torch.einsum("nkd,kdc->nkc", seen, maps)
    write = torch.linalg.qr(torch.randn(WIDTH, 60))[0]
    open_gates(layer, seen, residual, write)
    with torch.no_grad():
        hidden = layer.mlp.activation_fn(layer.mlp.fc1(seen))
        added = layer.mlp.fc2(hidden) @ write
    share = hidden.shape[-1] // CELLS
    strength = hidden.abs().unflatten(-1, (CELLS, share)).mean((0, 3))  # (position, gate)
    assert (strength.diag() > 3).all() and (strength - strength.diag().diag()).max() < 0.1
    unexplained = (residual - added).square().sum() / residual.square().sum()
    assert unexplained < 0.05
    centred = residual - residual.mean(0)
    left = (residual - added) - (residual - added).mean(0)
    assert left.square().sum() / centred.square().sum() < 0.3  # and what differs between examples


def test_the_start_paints_better_than_a_random_tower_with_a_fitted_reader(batches, started):
    painter, errors, examples = started
    # What the last layer norm does is in no layer's fit: one may overshoot a little.
    assert len(errors) == 5 and errors[-1] < errors[1] / 3 < errors[0] / 30, errors
    training = train_text.TextTraining(batches, None, 0, None)
    assert examples.is_slot.any(1).sum() == len(batches.pairs.drawings)  # and captions
    y = cells(examples.latents).flatten(0, 1)
    with torch.no_grad():
        error = training.errors(painter, examples).mean().item()
        random = TextPainter(build_text_tower(batches.tokenizer), 96)
        states = random.states(examples.ids, examples.is_slot, examples.v)[:, WORDS:]
    x = torch.cat([states.flatten(0, 1), torch.ones(len(y), 1)], 1)
    fitted = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).square().mean().item()
    assert error == pytest.approx(errors[-1], rel=1e-3)
    assert error < 0.8 * fitted, (error, fitted)


def test_what_the_start_is_fitted_to_is_not_kept_to_measure_with(batches, monkeypatch):
    drawings, examples = batches.pairs.drawings, []
    monkeypatch.setattr(drawings, "next_allowed", torch.full((len(drawings), 20), 3))
    monkeypatch.setattr(train_text, "start_painter", lambda *args: examples.extend(args[1:]))
    train_text.start_text(TextPainter(build_text_tower(batches.tokenizer), 96), batches)
    ids, is_slot = examples[:2]
    said = {batches.tokenizer.decode(x, skip_special_tokens=True) for x in ids[is_slot.any(1)]}
    assert {text.strip() for text in said} == {f"a picture of thing on a {SCENES[3]} background"}


def test_what_is_said_of_a_batch_is_what_it_shows(batches, monkeypatch):
    """Captions first; words made of the thing on white, latents of the target."""
    torch.manual_seed(2)
    batch = batches(10)
    told = 4  # 0.4 of them
    assert batches.told(10) == told and batches.told(2) == 1 and batches.told(1000) == 400
    assert not batch.is_slot[:told].any() and (batch.is_slot[told:].sum(1) == 1).all()
    assert not batch.v[:told].any()
    torch.manual_seed(2)
    pairs = batches.pairs(10 - told)
    ids, pictures = batches.captions(told)
    assert torch.equal(batch.ids, torch.cat([ids, pairs.ids]))
    vae = batches.vae
    z = vae.encode(torch.cat([pictures, pairs.target])).latent_dist.mode()
    torch.testing.assert_close(batch.latents, z * vae.config.scaling_factor, rtol=1e-3, atol=1e-4)
    white = vae.encode(pairs.white).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(batch.v[told:], batches.picture_words(white), rtol=1e-3, atol=1e-4)
    assert batches.pairs.shares == Shares(on_white=True)


def test_the_unseen_are_unseen(batches, wide_cache, monkeypatch):
    asked = []
    real = PicturePairs.__init__
    monkeypatch.setattr(
        PicturePairs, "__init__",
        lambda self, *args: (asked.append(args), real(self, *args))[1],
    )  # fmt: skip
    first, again = (batches.unseen(wide_cache) for _ in range(2))
    assert torch.equal(first.latents, again.latents) and torch.equal(first.v, again.v)
    assert len(first.ids) == 40 and not first.is_slot[:20].any() and first.is_slot[20:].any(1).all()
    drawings = asked[0][1]
    assert drawings.names == split_names("val")
    assert not set(drawings.names) & set(batches.pairs.drawings.names)
    assert isinstance(PicturePairs(*asked[0])(3), PairBatch)


def test_scaled_latents_are_undone(batches):
    x = torch.rand(2, 3, 64, 64) - 0.5
    vae = batches.vae
    z = scaled_latents(vae, x)
    torch.testing.assert_close(z / vae.config.scaling_factor, vae.encode(x).latent_dist.mode())
    torch.testing.assert_close(
        pictures_of(vae, z), vae.decode(vae.encode(x).latent_dist.mode()).sample
    )


def test_borders_of_cells_against_loops():
    x = torch.rand(2, 3, 64, 64)
    picture = x[1].double().numpy()
    across, elsewhere = [[], []], [[], []]
    for a in range(BOX.start, BOX.stop):
        for b in range(BOX.start, BOX.stop - 1):
            at = (b + 1) % 16 == 0
            for k, step in enumerate(
                (picture[:, a, b + 1] - picture[:, a, b], picture[:, b + 1, a] - picture[:, b, a])
            ):
                (across if at else elsewhere)[k].append(np.abs(step).mean())
    expected = sum(map(np.mean, across)) / sum(map(np.mean, elsewhere))
    assert border_ratio(x)[1].item() == pytest.approx(expected, rel=1e-4)
    tiles = torch.rand(1, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert border_ratio(tiles + 0.001 * torch.rand(1, 3, 64, 64)).item() > 50


def centred(x):
    return (x - x.mean((0, 1))).flatten(0, 1)


def test_aligned_heads_look_at_their_cell_and_read_it():
    torch.manual_seed(0)
    unet = train_unet.build_unet().eval()
    shown = torch.randn(64, 96, 4, 4)
    latents = shown + 2 * torch.randn(96, 1, 1)  # of a mean that no caption tells
    basis = torch.linalg.qr(torch.randn(192, 192))[0]
    states = torch.randn(64, MAX_LENGTH, 192)  # words are noise; a cell says which and what it is
    states[:, WORDS:] = 4 * basis[:16] + cells(shown) @ basis[16:112]
    x_t, t = torch.randn_like(latents), torch.randint(1000, (64,))
    align(unet, x_t, t, states, latents)
    for block in cell_blocks(unet):
        seen = []
        hook = block.norm2.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with torch.no_grad():
            unet(x_t, t, states)
        hook.remove()
        attention = block.attn2
        query, key, value = (
            layer(x).unflatten(2, (4, 48))[:, :, :2]  # the first two heads
            for layer, x in (
                (attention.to_q, seen[0]), (attention.to_k, states), (attention.to_v, states),
            )
        )  # fmt: skip
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 48**0.5
        share = scores.softmax(-1)[..., WORDS:].diagonal(dim1=2, dim2=3)
        assert share.mean() > 0.3  # of 32 tokens
        for head, part in ((0, slice(0, 48)), (1, slice(48, 96))):
            truth = centred(cells(latents)[..., part])
            read = centred(value[:, WORDS:, head])
            assert torch.corrcoef(torch.stack([read.flatten(), truth.flatten()]))[0, 1] > 0.98
            least_squares = torch.linalg.lstsq(centred(states[:, WORDS:]), truth, driver="gelsd")
            rows = slice(48 * head, 48 * head + 48)
            torch.testing.assert_close(
                attention.to_v.weight[rows].T, least_squares.solution, rtol=0, atol=3e-3
            )
        assert not attention.to_out[0].weight[:, :96].any()
