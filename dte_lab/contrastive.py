"""Regularisers of the predicted word embedding v*.

The paper's contrastive term ("contrastive-based regularization") pulls v* towards its N(v*) nearest
words by cosine and away from the embeddings of other concepts; its norm term keeps ||v*|| down,
which cosines do not see. `regularise` picks one of `REGULARISERS`:

    contrastive  the paper's: contrastive and norm term
    none         nothing                                                    (compared in the paper)
    norm         the norm term alone                                        (compared in the paper)
    l2           squared distance to the class word, as in E4T              (compared in the paper)
    nearest      v* becomes its nearest word; see `prompt_embedding`        (compared in the paper)
    hinge        every near word at least as near as words are to each other, and norm term  (ours)
    gaussian     minus log density of a Gaussian fitted to all words                         (ours)
"""

import torch
import torch.nn.functional as F

REGULARISERS = ("contrastive", "none", "norm", "l2", "nearest", "hinge", "gaussian")


def regularise(v_star, table, config, concepts=None, bank=None, class_word=None):
    """The terms of `config.regulariser` for v_star (B, d): {name: (weight, scalar)}.

    table: TokenTable. config: MethodConfig. concepts: (B,) ids that tell which samples of the batch
    are negatives of each other. bank: more negatives, as (embeddings (M, d), their concept ids
    (M,), -1 for empty rows). class_word: (B, d) for "l2"; without one, the nearest word is taken.
    """
    kind, terms, count = config.regulariser, {}, config.num_positives
    if kind == "contrastive":
        negatives, mask = _negatives(v_star, concepts, bank)
        near = _nearest(v_star, table, count)
        value = contrastive_loss(v_star, near, negatives, mask, config.temperature)
        terms[kind] = config.contrastive_weight, value
    elif kind == "hinge":
        margin = table.neighbour_cosine(count)
        value = hinge_loss(v_star, _nearest(v_star, table, count), margin)
        terms[kind] = config.regulariser_weight, value
    elif kind == "gaussian":
        value = gaussian_loss(v_star, *(x.to(v_star.device) for x in table.gaussian))
        terms[kind] = config.regulariser_weight, value
    elif kind in ("l2", "nearest"):
        given = kind == "l2" and class_word is not None
        word = class_word if given else _nearest(v_star, table)[:, 0]
        terms[kind] = config.regulariser_weight, norm_loss(v_star - word, table.mean_norm)
    if kind in ("contrastive", "hinge", "norm"):
        terms["norm"] = config.norm_weight, norm_loss(v_star, table.mean_norm)
    return terms


def prompt_embedding(v_star, table, config):
    """The embedding (B, d) that goes into prompts: v* itself, or its nearest word for "nearest".

    The gradient passes the projection as if it were not there (straight-through); the "nearest"
    term then keeps v* beside its word, as in VQ-VAE. ("ours": the paper gives no formula)
    """
    if config.regulariser != "nearest":
        return v_star
    return v_star + (_nearest(v_star, table)[:, 0] - v_star).detach()


def contrastive_loss(v_star, positives, negatives, mask=None, temperature=0.1):
    """-log( sum_i exp(cos(v*, v_i)/tau) / (that + sum_m exp(cos(v*, v_m)/tau)) ), mean over B.

    v_star: (B, d). positives: (B, N, d), the nearest words v_i. negatives: (M, d), embeddings v_m
    of concepts. mask: (B, M) bool, true where a negative counts, i.e. is another concept.
    Returns a scalar; with no negatives it is 0. Not known from the paper: N and tau.
    """
    v = F.normalize(v_star, dim=-1)
    near = torch.einsum("bd,bnd->bn", v, F.normalize(positives, dim=-1)) / temperature  # (B, N)
    far = v @ F.normalize(negatives, dim=-1).T / temperature  # (B, M)
    if mask is not None:
        far = far.masked_fill(~mask, -torch.inf)
    pull = near.logsumexp(dim=-1)  # (B,)
    both = torch.cat([near, far], dim=-1).logsumexp(dim=-1)  # (B,)
    return (both - pull).mean()


def norm_loss(v_star, mean_norm):
    """(||v*|| / mean norm of the words)^2, mean over B: the paper's L2 term in relative units.

    v_star: (B, d). Dividing by the words' mean norm makes the weight mean the same for every text
    encoder. ("ours")
    """
    return (v_star / mean_norm).square().sum(dim=-1).mean()


def hinge_loss(v_star, positives, margin):
    """max(0, margin - cos(v*, v_i)), mean over B and the N positives (B, N, d). ("ours")

    With a word's own mean cosine to its N nearest words as the margin, v* may move freely where a
    word could be.
    """
    cosine = F.cosine_similarity(v_star[:, None], positives, dim=-1)  # (B, N)
    return F.relu(margin - cosine).mean()


def gaussian_loss(v_star, mean, precision):
    """(v* - mu)^T Sigma^-1 (v* - mu) / d, mean over B: about 1 for a word. ("ours")

    Up to constants twice the negative log density per dimension. mean: (d,). precision: (d, d).
    """
    centred = v_star - mean
    return (centred @ precision * centred).mean()


def _nearest(v_star, table, k=1):
    """Embeddings (B, k, d) of the words nearest to v_star (B, d)."""
    return table.embeddings.to(v_star.device)[table.nearest_rows(v_star, k)[1]]


def _negatives(v_star, concepts, bank):
    """Embeddings (B + M, d) from the batch (with gradient) and the bank; mask (B, B + M)."""
    own = v_star.new_full((len(v_star),), -2, dtype=torch.long) if concepts is None else concepts
    negatives, ids = [v_star], [own]
    if bank is not None:
        negatives.append(bank[0])
        ids.append(bank[1])
    ids = torch.cat(ids)
    return torch.cat(negatives), (ids != own[:, None]) & (ids != -1)
