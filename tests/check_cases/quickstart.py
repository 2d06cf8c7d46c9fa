"""Answers to the exercises of 00_quickstart."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from dte_lab import TokenTable
from dte_lab.dual_path import DualPathProcessor


def package_nearest_words(v, embeddings, words, k):
    table = object.__new__(TokenTable)  # without a backbone
    table.words, table.embeddings = words, embeddings
    table.ids, table.norms = torch.arange(len(words)), embeddings.norm(dim=-1)
    return table.nearest(v[None], k)[1][0]


def package_low_rank_offset(x, weight, a, b):
    offset = DualPathProcessor({"to_q": (a[None], b[None])})._offset("to_q", x[None])
    return F.linear(x, weight) + offset[0]


def package_blend(soft, hard, alpha):
    """The processor on a layer that passes its only key's value on unchanged."""
    d = soft.shape[-1]
    attention = Attention(query_dim=d, heads=1, dim_head=d, cross_attention_dim=d, out_bias=False)
    for linear in (attention.to_v, attention.to_out[0]):
        torch.nn.init.eye_(linear.weight)
    soft_text, hard_text = soft.reshape(-1, 1, d), hard.reshape(-1, 1, d)
    attention.set_processor(DualPathProcessor({}, hard_text, alpha))
    with torch.no_grad():
        out = attention(torch.zeros_like(soft_text), encoder_hidden_states=soft_text)
    return out.reshape(soft.shape)


def cosines(v, embeddings):
    return F.normalize(embeddings, dim=-1) @ F.normalize(v, dim=-1)


def pick(scores, words, k):
    return [words[i] for i in scores.topk(k).indices.tolist()]


OWN = {
    "nearest_words": package_nearest_words,
    "low_rank_offset": package_low_rank_offset,
    "blend": package_blend,
}
OTHER_RIGHT = {
    "nearest_words": lambda v, e, w, k: sorted(
        w, key=lambda word: -F.cosine_similarity(e[w.index(word)], v, dim=0).item()
    )[:k],
    "low_rank_offset": lambda x, w, a, b: x @ w.T + torch.einsum("ti,ir,ro->to", x, a, b),
    "blend": lambda soft, hard, alpha: torch.lerp(hard, soft, alpha),
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "nearest_words": [
        ("norm", lambda v, e, w, k: pick(e @ v, w, k)),
        ("Euclidean", lambda v, e, w, k: pick(-(e - v).norm(dim=1), w, k)),
        ("axis", lambda v, e, w, k: pick(F.normalize(e, dim=0) @ F.normalize(v, dim=0), w, k)),
        ("least alike", lambda v, e, w, k: pick(-cosines(v, e), w, k)),
        ("least alike", lambda v, e, w, k: [w[i] for i in cosines(v, e).argsort()[:k].tolist()]),
        ("upside down", lambda v, e, w, k: pick(cosines(v, e), w, k)[::-1]),
        ("sign", lambda v, e, w, k: pick(cosines(v, e).abs(), w, k)),
        ("list of k words", lambda v, e, w, k: cosines(v, e).topk(k).indices.tolist()),
        ("list of k words", lambda v, e, w, k: pick(cosines(v, e), w, 1)[0]),
        ("list of k words", lambda v, e, w, k: [[word] for word in pick(cosines(v, e), w, k)]),
        ("TypeError", lambda v, e, w, k: pick(cosines(v, e), w, k=str(k))),
    ],
    "low_rank_offset": [
        ("The layer itself", lambda x, w, a, b: x @ a @ b),
        ("offset is missing", lambda x, w, a, b: F.linear(x, w)),
        ("sign", lambda x, w, a, b: F.linear(x, w) - x @ a @ b),
        ("rank", lambda x, w, a, b: F.linear(x, w) + x @ a @ b / a.shape[1]),
        ("multiplied", lambda x, w, a, b: F.linear(x, w) * (x @ a @ b)),
        ("RuntimeError", lambda x, w, a, b: x @ w + x @ a @ b),  # W not transposed
        ("RuntimeError", lambda x, w, a, b: F.linear(x, w) + x @ b @ a),  # A and B swapped
        ("RuntimeError", lambda x, w, a, b: F.linear(x, w) + x @ a.T @ b.T),  # transposed
        ("not right yet", lambda x, w, a, b: F.linear(x, w) + 2 * x @ a @ b),
        ("with 20 numbers", lambda x, w, a, b: F.linear(x, w + (a @ b).T)),
        ("with 20 numbers", lambda x, w, a, b: x @ (w.T + a @ b)),
        ("with 20 numbers", lambda x, w, a, b: F.linear(x, w) + x @ (a @ b)),
        ("Return a tensor", lambda x, w, a, b: None),
    ],
    "blend": [
        ("swapped", lambda soft, hard, alpha: (1 - alpha) * soft + alpha * hard),
        ("add up to 1", lambda soft, hard, alpha: alpha * soft + hard),
        ("Both paths count", lambda soft, hard, alpha: soft + hard),
        ("weighed with alpha", lambda soft, hard, alpha: alpha * (soft + hard)),
        ("mean", lambda soft, hard, alpha: (soft + hard) / 2),
        ("hard path is missing", lambda soft, hard, alpha: alpha * soft),
        ("alpha = 0.8", lambda soft, hard, alpha: soft if alpha > 0.5 else hard),
        ("shape", lambda soft, hard, alpha: (alpha * soft + (1 - alpha) * hard).mean(dim=-1)),
    ],
}
