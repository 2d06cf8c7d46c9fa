"""Answers to the exercises of 03_lora_hypernetwork."""

from bisect import bisect_left

import torch
import torch.nn.functional as F

from dte_lab.hypernetwork import count_parameters
from dte_lab.lora import inner_products, singular_values


def package_largest_useful_rank(d_in, d_out):
    def numbers(rank):
        return count_parameters({"layer.to_q": (d_in, d_out)}, rank, 8, 1, 1)["offsets"]

    return bisect_left(range(1, d_in + 1), numbers("full"), key=numbers)


def package_low_rank_norm(a, b):
    return singular_values({"": (a[None], b[None])})[""].norm()


def package_offset_cosine(a1, b1, a2, b2):
    gram = inner_products({"": (torch.stack([a1, a2]), torch.stack([b1, b2]))})
    return gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()


def inner(a, b, c, d):
    return ((a.T @ c) * (b @ d.T)).sum()


def cosine(a, b, c, d):
    return inner(a, b, c, d) / (inner(a, b, a, b) * inner(c, d, c, d)).sqrt()


def flat(x, y):
    return F.cosine_similarity(x.flatten(), y.flatten(), dim=0)


OWN = {
    "largest_useful_rank": package_largest_useful_rank,
    "low_rank_norm": package_low_rank_norm,
    "offset_cosine": package_offset_cosine,
}
OTHER_RIGHT = {
    "largest_useful_rank": lambda i, o: -(-i * o // (i + o)) - 1,
    "low_rank_norm": lambda a, b: (torch.linalg.qr(a).R @ b).norm().item(),
    "offset_cosine": lambda a, b, c, d: (
        torch.trace(b @ d.T @ c.T @ a)
        / (torch.trace(b @ b.T @ a.T @ a) * torch.trace(d @ d.T @ c.T @ c)).sqrt()
    ),
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "largest_useful_rank": [
        ("whole number", lambda i, o: i * o / (i + o) - 1e-9),
        ("exactly as many", lambda i, o: i * o // (i + o)),
        ("can have at all", lambda i, o: min(i, o)),
        ("B has r Dout", lambda i, o: (i * o - 1) // i),
        ("A has Din r", lambda i, o: (i * o - 1) // o),
        ("one too many", lambda i, o: (i * o - 1) // (i + o) + 1),
        ("each unit of rank", lambda i, o: min(i, o) // 4),
        ("whole number", lambda i, o: None),
    ],
    "low_rank_norm": [
        ("square of the norm", lambda a, b: inner(a, b, a, b)),
        ("upper bound", lambda a, b: a.norm() * b.norm()),
        ("diagonals", lambda a, b: ((a.norm(dim=0) * b.norm(dim=1)) ** 2).sum().sqrt()),
        ("entry by entry", lambda a, b: (a.T @ a @ b @ b.T).norm()),
        ("adds up the norms", lambda a, b: a.norm() + b.norm()),
        ("without their squares", lambda a, b: (a.sum(dim=0) @ b.sum(dim=1))),
        ("numbers was made", lambda a, b: (a @ b).norm()),
        ("one number", lambda a, b: a.T @ a),
        ("moved round in a circle", lambda a, b: (a.T @ a).norm()),
        ("RuntimeError", lambda a, b: ((a.T @ a) * (b.T @ b)).sum().sqrt()),
    ],
    "offset_cosine": [
        ("divide it by the two norms", inner),
        ("squared", lambda a, b, c, d: inner(a, b, c, d) / inner(a, b, a, b) / inner(c, d, c, d)),
        ("sign", lambda a, b, c, d: cosine(a, b, c, d).abs()),
        ("exercise 2", lambda a, b, c, d: (
            inner(a, b, c, d) / (a.norm() * b.norm() * c.norm() * d.norm())
        )),
        ("do not match", lambda a, b, c, d: (
            ((a.T @ c) * (d @ b.T)).sum() / (inner(a, b, a, b) * inner(c, d, c, d)).sqrt()
        )),
        ("A1 with A2", lambda a, b, c, d: flat(a, c)),
        ("B1 with B2", lambda a, b, c, d: flat(b, d)),
        ("averages", lambda a, b, c, d: (flat(a, c) + flat(b, d)) / 2),
        ("numbers was made", lambda a, b, c, d: flat(a @ b, c @ d)),
        ("one number", lambda a, b, c, d: (a.T @ c) * (b @ d.T)),
        ("root of", lambda a, b, c, d: flat(a, c) * flat(b, d)),
    ],
}  # fmt: skip
