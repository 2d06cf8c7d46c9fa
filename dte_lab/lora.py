"""Low-rank weight offsets, W' = W + A B: where they act in a UNet, and what they are.

(paper: the hypernetwork predicts A and B for every projection of self- and cross-attention.)
"""

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from dte_lab.common.errors import DTEError

# {"layer.projection": (A (B, Din, r), B (B, r, Dout))}, each with its own widths; B may be 1.
Offsets = dict[str, tuple[Float[Tensor, "_ _ _"], Float[Tensor, "_ _ _"]]]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """{name: Attention} of the UNet's transformer blocks, in the order of their names.

    attn1 is self-attention, attn2 cross-attention with the text.
    """
    return {
        name: module
        for name, module in sorted(unet.named_modules())
        if name.endswith((".attn1", ".attn2")) and hasattr(module, "to_q")
    }


def projection_layer(attn: Attention, projection: str) -> nn.Linear:
    """The linear layer of one of PROJECTIONS in an Attention."""
    return attn.to_out[0] if projection == "to_out" else getattr(attn, projection)


def projection_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """{"layer.projection": (Din, Dout)} of everything that offsets can change."""
    shapes = {}
    for name, attn in attention_layers(unet).items():
        for projection in PROJECTIONS:
            linear = projection_layer(attn, projection)
            shapes[f"{name}.{projection}"] = (linear.in_features, linear.out_features)
    return shapes


def low_rank_product(
    x: Float[Tensor, "batch tokens d_in"],
    a: Float[Tensor, "one_or_batch d_in rank"],
    b: Float[Tensor, "one_or_batch_too rank d_out"],
) -> Float[Tensor, "batch tokens d_out"]:
    """x A B, what offsets add to x W.

    A and B of batch size 1 serve every sample of x. They are cast to x's dtype and device.
    """
    a, b = a.to(x), b.to(x)
    if len(a) == len(b) == 1:  # one product for the whole batch
        a, b = a[0], b[0]
    return x @ a @ b


def check_offsets(offsets: Offsets, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise DTEError where offsets {key: (A, B)} do not fit the UNet's {key: (Din, Dout)}."""
    for key, (a, b) in offsets.items():
        if key not in shapes:
            raise DTEError(f"The UNet has no projection {key}: the offsets are of another model.")
        if (a.shape[-2], b.shape[-1]) != shapes[key] or a.shape[-1] != b.shape[-2]:
            raise DTEError(
                f"The offsets of {key} have shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                f"expected (B, {shapes[key][0]}, r) and (B, r, {shapes[key][1]})."
            )


def is_whole(b: Float[Tensor, "_ rank d_out"]) -> bool:
    """Whether B is the identity, and A thus the whole change of a weight matrix, not a factor.

    Whole matrices (rank "full", E4T) go through the same code as pairs A, B. Their B is no
    parameter: were it tuned, W_delta would get a second factor of full size.
    """
    rank, d_out = b.shape[1:]
    return rank == d_out and bool((b == torch.eye(rank, dtype=b.dtype, device=b.device)).all())


@torch.no_grad()
def singular_values(offsets: Offsets) -> dict[str, Float[Tensor, "_ _"]]:
    """{key: singular values (B, r)} of A B, largest first, from two thin QR decompositions.

    A = Q R and B^T = P S give A B = Q (R S^T) P^T, whose singular values are those of R S^T.
    """
    values = {}
    for key, (a, b) in offsets.items():
        r = torch.linalg.qr(a.float()).R  # (B, min(Din, r), r)
        s = torch.linalg.qr(b.float().mT).R  # (B, min(Dout, r), r)
        values[key] = torch.linalg.svdvals(r @ s.mT)
    return values


def effective_rank(values: Float[Tensor, "*any r"]) -> Float[Tensor, "*any"]:
    """exp of the entropy of the normalised singular values (..., r): 1 to r, 0 for no offset.

    (Roy and Vetterli 2007, "The effective rank".)
    """
    share = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum(dim=-1).exp()
    return torch.where(values.sum(dim=-1) > 0, rank, torch.zeros_like(rank))


@torch.no_grad()
def inner_products(offsets: Offsets) -> Float[Tensor, "batch batch"]:
    """Frobenius inner products of the samples' A B, summed over all keys: (B, B).

    <A1 B1, A2 B2> = tr((A1 B1)^T A2 B2) is the sum over the entries of (A1^T A2) * (B1 B2^T), two
    r x r matrices: no product A B is formed.
    """
    total = 0
    for a, b in offsets.values():
        left = torch.einsum("mir,nis->mnrs", a.float(), a.float())  # (B, B, r, r)
        right = torch.einsum("mro,nso->mnrs", b.float(), b.float())  # (B, B, r, r)
        total = total + (left * right).sum(dim=(-2, -1))  # (B, B)
    return total


@torch.no_grad()
def truncate(offsets: Offsets, rank: int) -> Offsets:
    """Offsets with the best approximation of A B of a lower rank (Eckart and Young).

    Returns {key: (A (B, Din, rank), B (B, rank, Dout))}; the singular values are split evenly.
    Whole matrices can be cut as well; a rank above min(Din, Dout) is cut to that.
    """
    short = {}
    for key, (a, b) in offsets.items():
        q, r = torch.linalg.qr(a.float())
        p, s = torch.linalg.qr(b.float().mT)
        u, sigma, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
        root = sigma[..., None, :rank].sqrt()  # (B, 1, rank)
        short[key] = (q @ u[..., :rank] * root, root.mT * (vh[..., :rank, :] @ p.mT))
    return short
