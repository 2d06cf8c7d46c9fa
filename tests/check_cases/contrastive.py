"""Answers to the exercises of 02_contrastive_regularization."""

import torch
import torch.nn.functional as F

from dte_lab import contrastive


def package_loss(v, positives, negatives, temperature):
    return contrastive.contrastive_loss(
        v[None], positives[None], negatives, temperature=temperature
    )


def package_mask(concepts, bank_concepts):
    bank = torch.zeros(len(bank_concepts), 2), bank_concepts
    return contrastive._negatives(torch.zeros(len(concepts), 2), concepts, bank)[1]


def package_gradient(v, u):
    """Through the hinge term: max(0, margin - cosine), whose gradient is minus the cosine's."""
    v = v.clone().requires_grad_()
    contrastive.hinge_loss(v[None], u.clone()[None, None], margin=2).backward()
    return -v.grad


def cosines(v, x, temperature=1.0):
    return F.normalize(x, dim=-1) @ F.normalize(v, dim=-1) / temperature


def stable(near, far):
    return torch.cat([near, far]).logsumexp(0) - near.logsumexp(0)


def naive(v, p, n, tau):
    near, far = cosines(v, p, tau).exp().sum(), cosines(v, n, tau).exp().sum()
    return -torch.log(near / (near + far))


def log_shares(v, p, n, tau):
    return cosines(v, torch.cat([p, n]), tau).log_softmax(0)[: len(p)]


def by_log_softmax(v, p, n, tau):
    return -log_shares(v, p, n, tau).logsumexp(0)


def one_by_one(v, p, n, tau):
    far = cosines(v, n, tau)
    return torch.stack([stable(x[None], far) for x in cosines(v, p, tau)]).mean()


def mask_by_loops(concepts, bank):
    ids = concepts.tolist() + bank.tolist()
    return torch.tensor([[i not in (own, -1) for i in ids] for own in concepts.tolist()])


def both(concepts, bank):
    return torch.cat([concepts, bank])


def gradient_by_projection(v, u):
    unit = v / v.norm()
    across = torch.eye(len(v)) - torch.outer(unit, unit)
    return across @ u / (u.norm() * v.norm())


def unit(x):
    return F.normalize(x, dim=0)


def across(v, u):
    return unit(u) - (unit(u) @ unit(v)) * unit(v)


OWN = {
    "contrastive_loss": package_loss,
    "negatives_mask": package_mask,
    "cosine_gradient": package_gradient,
}
OTHER_RIGHT = {
    "contrastive_loss": by_log_softmax,
    "negatives_mask": mask_by_loops,
    "cosine_gradient": gradient_by_projection,
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "contrastive_loss": [
        ("overflow", naive),
        ("always 0.1", lambda v, p, n, tau: stable(cosines(v, p) / 0.1, cosines(v, n) / 0.1)),
        ("mean over the positives", lambda v, p, n, tau: -log_shares(v, p, n, tau).mean()),
        ("sum over the positives", lambda v, p, n, tau: -log_shares(v, p, n, tau).sum()),
        ("temperature is not used", lambda v, p, n, tau: stable(cosines(v, p), cosines(v, n))),
        (
            "multiplied by the temperature",
            lambda v, p, n, tau: stable(cosines(v, p) * tau, cosines(v, n) * tau),
        ),
        ("dot products", lambda v, p, n, tau: stable(p @ v / tau, n @ v / tau)),
        ("sign", lambda v, p, n, tau: -stable(cosines(v, p, tau), cosines(v, n, tau))),
        (
            "lacks the positives",
            lambda v, p, n, tau: cosines(v, n, tau).logsumexp(0) - cosines(v, p, tau).logsumexp(0),
        ),
        (
            "probability itself",
            lambda v, p, n, tau: (-stable(cosines(v, p, tau), cosines(v, n, tau))).exp(),
        ),
        ("a loss of its own", one_by_one),
        ("swapped", lambda v, p, n, tau: stable(cosines(v, n, tau), cosines(v, p, tau))),
        ("Return a tensor", lambda v, p, n, tau: 0.5),
        ("should be", lambda v, p, n, tau: 1 - cosines(v, p, tau).mean()),
        ("RuntimeError", lambda v, p, n, tau: stable(cosines(p, v, tau), cosines(n, v, tau))),
    ],
    "negatives_mask": [
        ("Empty rows", lambda c, b: both(c, b) != c[:, None]),
        ("upside down", lambda c, b: ~mask_by_loops(c, b)),
        (
            "Only the sample itself",
            lambda c, b: ~torch.eye(len(c), len(c) + len(b)).bool() & (both(c, b) != -1),
        ),
        ("batch is missing", lambda c, b: (b != c[:, None]) & (b != -1)),
        ("bank is missing", lambda c, b: c != c[:, None]),
        ("swapped", lambda c, b: mask_by_loops(c, b).T),
        ("another one", lambda c, b: both(c, b) == c[:, None]),
        ("bank comes first", lambda c, b: mask_by_loops(c, b).roll(len(b), dims=1)),
        ("booleans", lambda c, b: mask_by_loops(c, b).float()),
        ("RuntimeError", lambda c, b: both(c, b) != c),
        ("not right yet", lambda c, b: torch.ones(len(c), len(c) + len(b), dtype=torch.bool)),
    ],
    "cosine_gradient": [
        ("divide by the norm of v", across),
        ("divides once", lambda v, u: across(v, u) / v.norm() ** 2),
        ("does not multiply", lambda v, u: across(v, u) * v.norm()),
        ("changes the length alone", lambda v, u: unit(u) / v.norm()),
        ("whole and unscaled", lambda v, u: u),
        ("unit vector towards u", lambda v, u: unit(u)),
        ("sign", lambda v, u: -across(v, u) / v.norm()),
        ("not the whole", lambda v, u: (unit(u) - unit(v)) / v.norm()),
        ("not a unit vector", lambda v, u: (u - (unit(u) @ unit(v)) * unit(v)) / v.norm()),
        ("Return a tensor", lambda v, u: F.cosine_similarity(v, u, dim=0).item()),
        ("perpendicular", lambda v, u: u - v),
    ],
}
