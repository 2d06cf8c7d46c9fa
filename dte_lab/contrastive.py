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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dte_lab.config import MethodConfig
from dte_lab.tokens import TokenTable

Bank = tuple[Float[Tensor, "rows dim"], Int[Tensor, " rows"]]


def regularise(
    v_star: Float[Tensor, "batch dim"],
    table: TokenTable,
    method: MethodConfig,
    concepts: Int[Tensor, " batch"] | None = None,
    bank: Bank | None = None,
    class_word: Float[Tensor, "batch dim"] | None = None,
) -> dict[str, tuple[float | int, Float[Tensor, ""]]]:
    """The terms of `method.regulariser`: {name: (weight, scalar)}.

    concepts: ids that tell which samples of the batch are negatives of each other. bank: more
    negatives, embeddings and their concept ids, -1 for empty rows. class_word: for "l2"; without
    one, the nearest word is taken.
    """
    kind, terms, count = method.regulariser, {}, method.num_positives
    if kind == "contrastive":
        negatives, mask = _negatives(v_star, concepts, bank)
        near = _nearest(v_star, table, count)
        value = contrastive_loss(v_star, near, negatives, mask, method.temperature)
        terms[kind] = method.contrastive_weight, value
    elif kind == "hinge":
        margin = table.neighbour_cosine(count)
        value = hinge_loss(v_star, _nearest(v_star, table, count), margin)
        terms[kind] = method.regulariser_weight, value
    elif kind == "gaussian":
        value = gaussian_loss(v_star, *(x.to(v_star.device) for x in table.gaussian))
        terms[kind] = method.regulariser_weight, value
    elif kind in ("l2", "nearest"):
        given = kind == "l2" and class_word is not None
        word = class_word if given else _nearest(v_star, table)[:, 0]
        terms[kind] = method.regulariser_weight, norm_loss(v_star - word, table.mean_norm)
    if kind in ("contrastive", "hinge", "norm"):
        value = norm_loss(v_star, table.mean_norm, method.norm_free)
        terms["norm"] = method.norm_weight, value
    return terms


def prompt_embedding(
    v_star: Float[Tensor, "batch dim"], table: TokenTable, method: MethodConfig
) -> Float[Tensor, "batch dim"]:
    """The embedding that goes into prompts: v* itself, or its nearest word for "nearest".

    The gradient passes the projection as if it were not there (straight-through); the "nearest"
    term then keeps v* beside its word, as in VQ-VAE. ("ours": the paper gives no formula)
    """
    if method.regulariser != "nearest":
        return v_star
    return v_star + (_nearest(v_star, table)[:, 0] - v_star).detach()


def contrastive_loss(
    v_star: Float[Tensor, "batch dim"],
    positives: Float[Tensor, "batch near dim"],
    negatives: Float[Tensor, "far dim"],
    mask: Bool[Tensor, "batch far"] | None = None,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """-log( sum_i exp(cos(v*, v_i)/tau) / (that + sum_m exp(cos(v*, v_m)/tau)) ), mean over B.

    positives: the N nearest words v_i. negatives: M embeddings v_m of concepts. mask: true where a
    negative counts, i.e. is another concept.
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


def norm_loss(
    v_star: Float[Tensor, "batch dim"], mean_norm: float, free: float = 0.0
) -> Float[Tensor, ""]:
    """max(0, ||v*|| / mean norm of the words - free)^2, mean over B.

    With free = 0 it is the paper's L2 term in units of a word's norm, so that the weight means the
    same for every text encoder. That pulls v* to zero for thousands of steps, until nothing is left
    to hear; the paper wants it for embeddings that grow. With free = 1 only they are held. ("ours")
    """
    return F.relu(v_star.norm(dim=-1) / mean_norm - free).square().mean()


def hinge_loss(
    v_star: Float[Tensor, "batch dim"], positives: Float[Tensor, "batch near dim"], margin: float
) -> Float[Tensor, ""]:
    """max(0, margin - cos(v*, v_i)), mean over B and the N positives. ("ours")

    With a word's own mean cosine to its N nearest words as the margin, v* may move freely where a
    word could be.
    """
    cosine = F.cosine_similarity(v_star[:, None], positives, dim=-1)  # (B, N)
    return F.relu(margin - cosine).mean()


def gaussian_loss(
    v_star: Float[Tensor, "batch dim"],
    mean: Float[Tensor, " dim"],
    precision: Float[Tensor, "dim dim"],
) -> Float[Tensor, ""]:
    """(v* - mu)^T Sigma^-1 (v* - mu) / d, mean over B: about 1 for a word. ("ours")

    Up to constants twice the negative log density per dimension.
    """
    centred = v_star - mean
    return (centred @ precision * centred).mean()


def _nearest(
    v_star: Float[Tensor, "batch dim"], table: TokenTable, k: int = 1
) -> Float[Tensor, "batch near dim"]:
    """Embeddings of the k words nearest to v_star (fewer where the table has fewer)."""
    return table.embeddings.to(v_star.device)[table.nearest_rows(v_star, k)[1]]


def _negatives(
    v_star: Float[Tensor, "batch dim"], concepts: Int[Tensor, " batch"] | None, bank: Bank | None
) -> tuple[Float[Tensor, "far dim"], Bool[Tensor, "batch far"]]:
    """Embeddings (B + M, d) from the batch (with gradient) and the bank; mask (B, B + M)."""
    own = v_star.new_full((len(v_star),), -2, dtype=torch.long) if concepts is None else concepts
    negatives, ids = [v_star], [own]
    if bank is not None:
        negatives.append(bank[0])
        ids.append(bank[1])
    ids = torch.cat(ids)
    return torch.cat(negatives), (ids != own[:, None]) & (ids != -1)
