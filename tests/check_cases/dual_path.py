"""Answers to the exercises of 04_dual_path."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from dte_lab.dual_path import DualPathProcessor, alpha_at


def package_soft_attention(x, text, W, offsets):
    """The processor on a layer with one head, whose output projection is the identity."""
    d = x.shape[-1]
    attention = Attention(
        query_dim=d, heads=1, dim_head=d, cross_attention_dim=text.shape[-1], out_bias=False
    )
    torch.nn.init.eye_(attention.to_out[0].weight)
    for name in "qkv":
        getattr(attention, f"to_{name}").weight.data.copy_(W[name])
    pairs = {f"to_{name}": (a[None], b[None]) for name, (a, b) in offsets.items()}
    attention.set_processor(DualPathProcessor(pairs))
    with torch.no_grad():
        return attention(x[None], encoder_hidden_states=text[None])[0]


def other_soft_attention(x, text, W, offsets):
    q, k, v = (
        F.linear(z, W[name] + (offsets[name][0] @ offsets[name][1]).T)
        for name, z in (("q", x), ("k", text), ("v", text))
    )
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def attention(x, text, W, offsets, changed="qkv", axis=-1, scale=None):
    z = {}
    for name, source in (("q", x), ("k", text), ("v", text)):
        z[name] = F.linear(source, W[name])
        if name in changed:
            z[name] = z[name] + source @ offsets[name][0] @ offsets[name][1]
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    return (scale * z["q"] @ z["k"].T).softmax(axis) @ z["v"]


def not_turned(x, text, W, offsets):
    W = W | {"q": W["q"] + offsets["q"][0] @ offsets["q"][1]}
    return attention(x, text, W, offsets, "kv")


def dense(x, text, W, offsets):
    """W + A B without the transpose for all three: shapes clash."""
    W = {name: W[name] + offsets[name][0] @ offsets[name][1] for name in W}
    return attention(x, text, W, offsets, "")


def self_attention(x, text, W, offsets):
    return attention(x, x, W, offsets)


def on_the_result(x, text, W, offsets):
    out = attention(x, text, W, offsets, "")
    return out + out @ offsets["q"][0] @ offsets["q"][1]


def package_dual_output(soft, hard, alpha, project, a, b):
    """The processor on a layer that passes its only key's value on unchanged."""
    d = soft.shape[-1]
    layer = Attention(query_dim=d, heads=1, dim_head=d, cross_attention_dim=d, out_bias=False)
    torch.nn.init.eye_(layer.to_v.weight)
    layer.to_out = torch.nn.ModuleList([Rows(project), torch.nn.Identity()])
    pairs = {"to_out": (a[None], b[None])}
    layer.set_processor(DualPathProcessor(pairs, hard[:, None], alpha))
    with torch.no_grad():
        out = layer(torch.zeros_like(soft)[:, None], encoder_hidden_states=soft[:, None])
    return out[:, 0]


class Rows(torch.nn.Module):
    """A projection of (T, D), called with (T, 1, D)."""

    def __init__(self, project):
        super().__init__()
        self.project = project

    def forward(self, z):
        return self.project(z[:, 0])[:, None]


OWN = {
    "soft_attention": package_soft_attention,
    "dual_output": package_dual_output,
    "alpha_schedule": lambda t, T, first, last: alpha_at((first, last), t, T),
}
OTHER_RIGHT = {
    "soft_attention": other_soft_attention,
    "dual_output": lambda s, h, alpha, project, a, b: (
        project(torch.lerp(h, s, alpha)) + (alpha * s) @ (a @ b)
    ),
    "alpha_schedule": lambda t, T, first, last: first * t / T + last * (1 - t / T),
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "soft_attention": [
        ("offsets are missing", lambda *args: attention(*args, changed="")),
        ("Only q", lambda *args: attention(*args, changed="q")),
        ("v lacks", lambda *args: attention(*args, changed="qk")),
        ("k lacks", lambda *args: attention(*args, changed="qv")),
        ("q lacks", lambda *args: attention(*args, changed="kv")),
        ("not scaled", lambda *args: attention(*args, scale=1)),
        ("square root", lambda *args: attention(*args, scale=1 / 6)),
        ("width of the text", lambda *args: attention(*args, scale=0.5)),
        ("wrong axis", lambda *args: attention(*args, axis=0)),
        ("transpose", not_turned),
        ("RuntimeError", dense),
        ("RuntimeError", self_attention),
        ("not right yet", on_the_result),
        ("Return a tensor", lambda *args: None),
    ],
    "dual_output": [
        ("offset A B is missing", lambda s, h, alpha, p, a, b: p(alpha * s + (1 - alpha) * h)),
        ("in full", lambda s, h, alpha, p, a, b: p(alpha * s + (1 - alpha) * h) + s @ a @ b),
        (
            "hard path as well",
            lambda s, h, alpha, p, a, b: p(z := alpha * s + (1 - alpha) * h) + z @ a @ b,
        ),
        (
            "bias is counted twice",
            lambda s, h, alpha, p, a, b: p(alpha * s) + p((1 - alpha) * h) + alpha * s @ a @ b,
        ),
        ("Both paths count in full", lambda s, h, alpha, p, a, b: p(s) + s @ a @ b + p(h)),
        (
            "swapped",
            lambda s, h, alpha, p, a, b: p((1 - alpha) * s + alpha * h) + (1 - alpha) * s @ a @ b,
        ),
        (
            "8 rows",
            lambda s, h, alpha, p, a, b: alpha * (p(s) + s @ a @ b) + (1 - alpha) * p(h),
        ),
        ("RuntimeError", lambda s, h, alpha, p, a, b: p(s) + s @ b @ a),
        ("not right yet", lambda s, h, alpha, p, a, b: alpha * p(s) + s @ a @ b),
        ("Return a tensor", lambda s, h, alpha, p, a, b: None),
    ],
    "alpha_schedule": [
        ("swapped", lambda t, T, first, last: alpha_at((last, first), t, T)),
        ("not by T - 1", lambda t, T, first, last: last + (first - last) * t / (T - 1)),
        ("`last` is missing", lambda t, T, first, last: first * t / T),
        ("Divide t by T", lambda t, T, first, last: last + (first - last) * t),
        ("a step", lambda t, T, first, last: torch.where(t > T / 2, first, last)),
        ("mean", lambda t, T, first, last: torch.full_like(t, (first + last) / 2)),
        ("bent", lambda t, T, first, last: last + (first - last) * (t / T) ** 2),
        ("Return a tensor", lambda t, T, first, last: first),
        ("shape", lambda t, T, first, last: torch.linspace(last, first, T + 1)),
    ],
}
