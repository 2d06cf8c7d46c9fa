"""Answers to the exercises of 05_tuning."""

from types import SimpleNamespace

import torch

from dte_lab.common.muon import MuonAdamW
from dte_lab.evaluation.steps import steps_needed
from dte_lab.objective import diffusion_target


def package_velocity_target(latents, noise, alpha_bar):
    backbone = SimpleNamespace(prediction_type="v_prediction", alphas_cumprod=alpha_bar)
    return diffusion_target(backbone, latents, noise, torch.arange(len(latents)))


def counted_tuning_bytes(trained, frozen, frozen_bytes):
    """What torch really keeps after a step of the optimizer that tuning uses."""
    free = torch.nn.Parameter(torch.zeros(trained // 10, 10))
    still = torch.zeros(frozen, dtype={2: torch.float16, 4: torch.float32}[frozen_bytes])
    optimizer = MuonAdamW([{"params": [free], "muon": True}])
    free.sum().backward()
    optimizer.step()
    averages = [v for v in optimizer.state[free].values() if v.shape == free.shape]
    return sum(x.numel() * x.element_size() for x in (free, free.grad, still, *averages))


def shaped(alpha_bar):
    return alpha_bar[:, None, None, None]


def crossing(curve, level, patience):
    return next((s for s in sorted(curve) if curve[s] >= level), None)


def scan(curve, level, patience, order=sorted, good=float.__ge__, missing=None, ends=True):
    steps = order(curve)
    for i, s in enumerate(steps):
        window = steps[i : i + patience + 1]
        if all(good(curve[w], level) for w in window) and (ends or len(window) > patience):
            return s
    return missing


def by_steps(curve, level, patience):
    """Patience in steps rather than in measured points."""
    steps = sorted(curve)
    for s in steps:
        if all(curve[w] >= level for w in steps if s <= w <= s + patience):
            return s
    return None


OWN = {
    "velocity_target": package_velocity_target,
    "steps_needed": steps_needed,
    "tuning_bytes": counted_tuning_bytes,
}
OTHER_RIGHT = {
    "velocity_target": lambda x, e, a: (
        torch.einsum("b,bchw->bchw", a**0.5, e) - torch.einsum("b,bchw->bchw", (1 - a) ** 0.5, x)
    ),
    "steps_needed": scan,
    "tuning_bytes": lambda trained, frozen, each: 12.0 * trained + frozen * each,
}
WRONG = {
    "velocity_target": [
        (
            "noisy latent",
            lambda x, e, a: shaped(a).sqrt() * x + (1 - shaped(a)).sqrt() * e,
        ),
        ("sign", lambda x, e, a: (1 - shaped(a)).sqrt() * x - shaped(a).sqrt() * e),
        (
            "subtracted, not added",
            lambda x, e, a: shaped(a) ** 0.5 * e + (1 - shaped(a)) ** 0.5 * x,
        ),
        ("swapped", lambda x, e, a: shaped(a).sqrt() * x - (1 - shaped(a)).sqrt() * e),
        ("square roots are missing", lambda x, e, a: shaped(a) * e - (1 - shaped(a)) * x),
        (
            "square roots are swapped",
            lambda x, e, a: (1 - shaped(a)) ** 0.5 * e - shaped(a) ** 0.5 * x,
        ),
        ("predicts the noise", lambda x, e, a: e),
        ("per picture", lambda x, e, a: a.mean().sqrt() * e - (1 - a.mean()).sqrt() * x),
        ("RuntimeError", lambda x, e, a: a.sqrt() * e - (1 - a).sqrt() * x),
        ("shape", lambda x, e, a: (shaped(a).sqrt() * e - (1 - shaped(a)).sqrt() * x).mean(0)),
        ("Return a tensor", lambda x, e, a: None),
    ],
    "steps_needed": [
        ("look ahead", crossing),
        ("highest", lambda curve, level, patience: max(curve, key=curve.get)),
        ("sort", lambda c, level, p: scan(c, level, p, order=list)),
        ("how many", lambda c, level, p: scan(c, level, 1)),
        ("look ahead", lambda c, level, p: scan(c, level, 0)),
        ("measured points", by_steps),
        ("curve ends", lambda c, level, p: scan(c, level, p, ends=False)),
        (">=", lambda c, level, p: scan(c, level, p, good=float.__gt__)),
        ("last number of steps", lambda c, level, p: scan(c, level, p, missing=max(c))),
        ("no tuning is needed", lambda c, level, p: scan(c, level, p, missing=0)),
        ("position", lambda c, level, p: sorted(c).index(scan(c, level, p))),
        ("TypeError", lambda c, level, p: c > level),
    ],
    "tuning_bytes": [
        ("Four numbers", lambda trained, frozen, each: 16 * trained + frozen * each),
        ("average have 4 bytes each", lambda trained, frozen, each: 8 * trained + frozen * each),
        ("Only the values", lambda trained, frozen, each: 4 * trained + frozen * each),
        ("frozen weights are missing", lambda trained, frozen, each: 12 * trained),
        ("counts once", lambda trained, frozen, each: 12 * trained + 3 * frozen * each),
        ("not in fp32", lambda trained, frozen, each: each * 4 * trained + frozen * each),
        ("each has 4 bytes", lambda trained, frozen, each: 3 * trained + frozen),
        ("not megabytes", lambda t, frozen, each: (12 * t + frozen * each) / 1e9),
        ("not right yet", lambda trained, frozen, each: 12 * trained + 2 * frozen),
        ("not right yet", lambda trained, frozen, each: None),
    ],
}
