"""A map of words: embeddings in the plane, and where other embeddings stand among them.

UMAP lays out the words alone. `UMAP.transform` places new points badly once they leave the cloud,
and a fit together with whole paths makes each path its own island, since its points are each
other's nearest neighbours. So `place` puts an embedding at the weighted mean of its nearest words'
places: what it says is "between these words", and never "far from all of them". ("ours")
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def word_positions(
    embeddings: Float[Tensor, "words dim"], seed: int = 0
) -> Float[np.ndarray, "words 2"]:
    """UMAP of embeddings by cosine, scaled to the unit square.

    The same seed gives the same map on the same machine. Fewer neighbours, or UMAP's own start,
    spectral, put a small group of words so far away that the rest is squeezed into a corner.
    """
    from umap import UMAP

    layout = UMAP(
        n_neighbors=30, min_dist=0.3, metric="cosine", init="pca", random_state=seed, n_jobs=1
    )
    plane = layout.fit_transform(np.asarray(embeddings, dtype=np.float32))
    low, high = plane.min(axis=0), plane.max(axis=0)
    return (plane - low) / (high - low)


def place(
    v: Float[Tensor, "n dim"],
    embeddings: Float[Tensor, "words dim"],
    positions: Float[np.ndarray, "words 2"],
    k: int = 8,
    temperature: float = 0.05,
) -> Float[np.ndarray, "n 2"]:
    """Where embeddings v stand on a map of words.

    embeddings, positions: the words', and their places. The weights of the k nearest words are a
    softmax of cosine / temperature, so that a small step of v is a small step here.
    """
    cosine, rows = _cosines(v, embeddings).topk(min(k, len(embeddings)), dim=-1)  # (m, k)
    weight = (cosine / temperature).softmax(dim=-1)[..., None]
    return (weight * torch.as_tensor(positions)[rows]).sum(dim=1).numpy()


def neighbours_kept(
    v: Float[Tensor, "n dim"],
    at: Float[np.ndarray | Tensor, "n 2"],
    embeddings: Float[Tensor, "words dim"],
    positions: Float[np.ndarray | Tensor, "words 2"],
    k: int = 10,
) -> float:
    """Mean share of the k nearest words of v that are the k nearest to the places `at` as well.

    Where v are the words themselves (the same tensor as `embeddings`), no word counts as its own
    neighbour.
    """
    own = int(v is embeddings)
    near = _cosines(v, embeddings).topk(k + own, dim=-1).indices[:, own:]
    at, positions = (torch.as_tensor(x, dtype=torch.float32) for x in (at, positions))
    seen = torch.cdist(at, positions).topk(k + own, dim=-1, largest=False).indices[:, own:]
    return (near[:, :, None] == seen[:, None]).any(dim=-1).float().mean().item()


def _cosines(
    v: Float[Tensor, "n dim"], embeddings: Float[Tensor, "words dim"]
) -> Float[Tensor, "n words"]:
    return F.normalize(v, dim=-1) @ F.normalize(embeddings, dim=-1).T
