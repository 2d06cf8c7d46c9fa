"""Regularisers of the predicted word embedding v*.

The contrastive term (paper, "contrastive-based regularization") pulls v* towards its N(v*) nearest
words by cosine and away from the embeddings of other concepts; the norm term keeps ||v*|| down.
"""

import torch
import torch.nn.functional as F


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
