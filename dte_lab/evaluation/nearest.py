"""Which of many drawings is nearest to a picture that should show one of them.

The measure of things that have no name: EfficientNet-Lite0 features of the region that the asked
drawing covers, compared with those of the true renderings of all drawings in the same scene, cut
out with the same mask, so that its outline does not tell which is the right one.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dte_lab.evaluation.edits import object_region
from dte_lab.evaluation.judges import ImageJudge
from dte_lab.world.data import to_tensor
from dte_lab.evaluation.base_model import JUDGE_SIZE
from dte_lab.world.pairs import behind
from dte_lab.world.scenes import compose


def rendered_drawings(rgba: Tensor, scene: str, seed: int = 0) -> Tensor:
    """Drawings (N, 48, 48, 4) uint8, premultiplied, in a scene: (N, 3, 64, 64) in [-1, 1]."""
    room = behind(scene, seed)
    return to_tensor(np.stack([compose(x.numpy() / np.float32(255), scene, room) for x in rgba]))


class NearestDrawing:
    """Cosines of pictures to the true renderings of N drawings in a scene.

    cache: folder for the N x N features' cosines, which take N * N / 300 seconds of one core.
    """

    def __init__(self, rgba: Tensor, scene: str, cache: Path | None = None, judge=None):
        self.masks = rgba[..., 3] > 25  # (N, 48, 48)
        self.judge = judge or ImageJudge(size=JUDGE_SIZE)
        key = hashlib.sha256(rgba.numpy().tobytes() + scene.encode()).hexdigest()[:12]
        path = cache and Path(cache) / f"nearest-{key}.npy"
        if path and path.exists():
            self.references = torch.from_numpy(np.load(path)).float()  # (N, N, 1280)
            return
        true = rendered_drawings(rgba, scene)
        parts = [self.features(true, mask.expand(len(true), -1, -1)) for mask in self.masks]
        self.references = torch.stack(parts)  # row i: all drawings, cut out with mask i
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, self.references.half().numpy())

    @torch.no_grad()
    def features(self, x: Tensor, masks: Tensor) -> Tensor:
        """Unit features (B, 1280) of the regions of pictures (B, 3, 64, 64)."""
        regions = torch.cat([object_region(p[None], m) for p, m in zip(x, masks, strict=True)])
        return F.normalize(self.judge.features(regions), dim=-1)

    def cosines(self, pictures: Tensor) -> Tensor:
        """(N, N) of pictures (N, 3, 64, 64) in [-1, 1], one per drawing, to all drawings."""
        x = self.features(pictures, self.masks)
        return torch.einsum("nd,nkd->nk", x, self.references)

    def measures(self, pictures: Tensor) -> dict[str, np.ndarray]:
        """Per picture: `own` (is the asked drawing the nearest), `top5`, `identity` (its cosine)
        and `margin` (identity minus the mean cosine to the others)."""
        c = self.cosines(pictures)
        own = c.diag()
        rank = (c > own[:, None]).sum(1)
        others = (c.sum(1) - own) / (len(c) - 1)
        values = {"own": rank == 0, "top5": rank < 5, "identity": own, "margin": own - others}
        return {k: v.float().numpy() for k, v in values.items()}
