# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: The hypernetwork
#     promise: a network that looks at a picture and predicts a change of another network's weights
#     minutes: 75
# ---

# %% [markdown]
# # The hypernetwork: a weight change predicted from a picture
#
# *A network that looks at a picture and predicts a change of another network's weights.*
#
# A word embedding is a few hundred numbers: it can say what a thing looks like, roughly, and not
# all of one particular thing. The encoder of [Arar et al. 2023](https://arxiv.org/abs/2307.06925)
# therefore has a second head, a **hypernetwork**: its output is a change of the weights of every
# attention layer of the text-to-image model. Such a change has as many numbers as the layers
# themselves, unless it is written as a product of two thin matrices, as in
# [LoRA](https://arxiv.org/abs/2106.09685) (low-rank adaptation).
#
# After this notebook you can
#
# - write a layer with a low-rank change by hand, and train it;
# - say by counting why the hypernetwork does not predict whole matrices;
# - follow the numbers from the picture's tokens through queries and heads to `A` and `B`;
# - read the singular values of a change, and its effective rank, and say what they do not tell;
# - compare two changes without ever forming them;
# - cut a change to a lower rank and judge what is lost;
# - take a concept to other software as a LoRA file.
#
# Stored numbers that are marked *former model* were measured with the weights before the present
# ones.

# %% [markdown] tags=["no-slide"]
# ## Set up
#
# The cell installs the package where it is missing, and leaves an installed PyTorch as it is.

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
import numpy as np
import torch

from dte_lab import checks
from dte_lab.panels import describe_machine, measured_with, picture_grid, quiet_libraries, saw, show

quiet_libraries()
from dte_lab import DTEPipeline  # noqa: E402

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = DTEPipeline.from_pretrained("small", device=device)
encoder, unet = pipe.encoder, pipe.backbone.unet
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %% [markdown]
# ## 1. LoRA by hand, on one layer
#
# Take one linear layer with weights `W`, and leave them as they are. Beside it put two thin
# matrices, `A` with `Din × r` numbers and `B` with `r × Dout`. The layer then computes
# `x W + x A B`, as if its weights were `W + A B`. Only `A` and `B` are trained; `r` is the
# **rank**.
#
# At first `A` is random and `B` is zero, so the layer does exactly what it did before.
#
# In the package `x A B` is one line, `low_rank_product` in `dte_lab/lora.py`, and `W` is never
# changed: the attention of `dte_lab/dual_path.py` calls the layer as it is, for `x W`, and adds the
# product. Notebook 04 reads that file.


# %%
from dte_lab.lora import attention_layers, projection_layer, projection_shapes

layers = attention_layers(unet)
name = next(name for name in layers if name.endswith("attn2"))  # the first that reads the prompt
linear = projection_layer(layers[name], "to_q").cpu()
Din, Dout = linear.in_features, linear.out_features


# %%
class LoRALinear(torch.nn.Module):
    """A frozen linear layer and a trainable change A B of its weights."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = torch.nn.Parameter(
            torch.randn(linear.in_features, rank) * linear.in_features**-0.5
        )
        self.B = torch.nn.Parameter(torch.zeros(rank, linear.out_features))

    def forward(self, x):  # (T, Din) -> (T, Dout)
        return self.linear(x) + x @ self.A @ self.B


# %%
x = torch.randn(5, Din)
layer = LoRALinear(linear, rank=4)
assert torch.equal(layer(x), linear(x))
layer(x).square().sum().backward()
print(f"layer: {name}.to_q, Din = {Din}, Dout = {Dout}")
print(f"numbers in W: {Din * Dout:,}; in A and B of rank 4: {4 * (Din + Dout):,}")
print(f"first gradient: of A {layer.A.grad.norm():.2f}, of B {layer.B.grad.norm():.2f}")

# %% [markdown]
# The first gradient of `A` is zero, because `A` acts through `B`, and `B` is zero. That of `B` is
# not, so the first step moves `B`, and from then on both learn. Were both zero at first, neither
# would ever move.
#
# How much can a low rank do? We make up a change `M` of this layer whose singular values halve from
# one to the next, and train `A B` to match it, at several ranks. No matrix of rank `r` can come
# closer to `M` than the one that keeps the `r` largest singular values (Eckart and Young 1936).

# %%
from dte_lab.panels.hypernetwork import fit_figure

U, V = (torch.linalg.qr(torch.randn(d, 8)).Q for d in (Din, Dout))
sigma = 0.5 ** torch.arange(8)
M = (U * sigma) @ V.T  # (Din, Dout)
ranks = [1, 2, 3, 4, 6, 8]
left = []
for rank in ranks:
    layer = LoRALinear(linear, rank)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=500)
    inputs = torch.eye(Din)  # one row for each input, so that every column of the change counts
    target = linear(inputs) + M
    for _ in range(500):
        loss = (layer(inputs) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    left.append((loss.sqrt() / M.norm()).item())

# %%
bound = [(sigma[rank:].norm() / sigma.norm()).item() for rank in ranks]
pipe.backbone.to(device)  # the layer goes back to where the others are
show(
    fit_figure(ranks, left, bound),
    "What a trained change of rank r misses of a given one, as a share of its norm: "
    + ", ".join(f"rank {r} {e:.2f}" for r, e in zip(ranks, left, strict=True))
    + "; a line shows the best possible.",
)
worst = max(np.subtract(left, bound))
saw(f"The trained changes are at most {worst:.3f} of the norm above the best possible.")

# %% [markdown]
# Do the points lie on the line? Then training found the best change of each rank. How quickly the
# line falls depends on `M` alone: here its singular values halve. With equal singular values the
# same ranks would miss far more. So "low rank is enough" is a statement about the change that is
# wanted, and no law.

# %% [markdown]
# #### Exercise 1: up to which rank is it worth it?
#
# Difficulty 1 of 5 · 5 minutes
#
# `W` has `Din × Dout` numbers. Write a function for the largest rank at which `A` and `B` together
# still have *fewer* numbers than `W`.
#
# <details>
# <summary>Hint</summary>
#
# How many numbers does one more unit of rank cost? Divide, and mind the case in which the division
# leaves no remainder: equal is not fewer.
#
# </details>


# %% tags=["exercise"]
def largest_useful_rank(d_in, d_out):
    """Widths of a layer -> the largest rank at which A and B have fewer numbers than W."""
    ### BEGIN SOLUTION
    return (d_in * d_out - 1) // (d_in + d_out)
    ### END SOLUTION


checks.largest_useful_rank(largest_useful_rank)

# %% [markdown]
# ## 2. Why not whole matrices
#
# A hypernetwork ends in linear heads. A head that turns an answer of width `d` into a whole matrix
# has `d · Din · Dout` weights; one that gives an `A` has `d · Din · r`. We count for the small
# backbone and for Stable Diffusion 1.5. No weight of the large model is needed: PyTorch's *meta*
# device builds modules that have shapes and no memory.

# %%
from diffusers import UNet2DConditionModel

from dte_lab.hypernetwork import count_parameters
from dte_lab.panels.hypernetwork import counts_figure, short_number
from dte_lab.sd15 import UNET

with torch.device("meta"):
    large = UNet2DConditionModel(**UNET)
unets = {"small": unet, "sd15": large}
settings = encoder.settings
sizes = {}
print(f"{'':6} {'rank':>6} {'predicted per concept':>22} {'heads':>9} {'whole network':>14}")
for backbone, model in unets.items():
    shapes = projection_shapes(model)
    for rank in (1, 4, 16, "full"):
        n = count_parameters(shapes, rank, settings.width, settings.num_heads, settings.trunk_depth)
        sizes[backbone, rank] = n
        row = [short_number(n[part]) for part in ("offsets", "heads", "hypernetwork")]
        print(f"{backbone:6} {rank:>6} {row[0]:>22} {row[1]:>9} {row[2]:>14}")

# %%
reference = {name: sum(p.numel() for p in model.parameters()) for name, model in unets.items()}
counts = {
    backbone: {rank: n["hypernetwork"] for (b, rank), n in sizes.items() if b == backbone}
    for backbone in unets
}

# %%
show(
    counts_figure(counts, reference),
    "Points on a log scale: parameters of the hypernetwork. "
    + "; ".join(
        f"{backbone}: "
        + ", ".join(f"{rank} {short_number(value)}" for rank, value in values.items())
        + f", its UNet {short_number(reference[backbone])}"
        for backbone, values in counts.items()
    )
    + ".",
)
for backbone, values in counts.items():
    print(
        f"{backbone}: whole matrices need {values['full'] / values[4]:.0f} times the parameters of "
        f"rank 4, and {values['full'] / reference[backbone]:.2f} times those of the UNet itself;"
    )
    separate = settings.width * sizes[backbone, "full"]["offsets"]
    print(f"    with a head for every matrix, the heads alone would have {short_number(separate)}")

# %% [markdown]
# Look at the dashed line, the UNet that is to be changed. Training needs several numbers of memory
# for each parameter (its gradient, and two more that Adam keeps). Besides, every head for whole
# matrices here is shared by all layers of one shape. The last number is for what one might think of
# first, a head of its own for every matrix.

# %% [markdown]
# ## 3. Queries and heads
#
# How does one network make so many matrices of different shapes? The hypernetwork keeps one learned
# **query** for each matrix: one for the `A` and one for the `B` of every projection in every layer.
# The queries read the picture's tokens by cross-attention, and so each gets an **answer**. A linear
# **head** makes the answer into a matrix, and all matrices of one shape share it. What tells two
# layers of the same shape apart is their query alone.
#
# Here is the hypernetwork of the small backbone, and below it one for sd15, whose UNet has more
# layers and more widths.

# %%
from dte_lab.hypernetwork import LoRAHypernetwork
from dte_lab.panels.hypernetwork import heads_figure
from dte_lab.world import render_image, split_names

names = split_names("val")  # things that neither the model nor the encoder has seen
NAMES = [names[i * len(names) // 12] for i in range(12)]
SHOWN = [NAMES[i] for i in (0, 1, 6, 10)]  # for figures with a row for each
picture = render_image(NAMES[0], "fluent", "white")
features = encoder.static_features(pipe.backbone, pipe.pixels([picture]))
with torch.no_grad():
    tokens = encoder.fusion(*features)  # (n, tokens, width): one row per noise level

# %%
net = encoder.hypernetwork
with torch.device("meta"):
    net_large = LoRAHypernetwork(
        projection_shapes(large), settings.rank, settings.width, settings.num_heads,
        settings.trunk_depth, 1,
    )  # fmt: skip
for hypernetwork in (net, net_large):
    groups = hypernetwork.groups.items()
    queries = ", ".join(f"{len(group.numbers)} for head {head}" for head, group in groups)
    show(
        heads_figure(hypernetwork, tokens.shape[1]),
        f"A diagram: {tokens.shape[1]} tokens and {len(hypernetwork.queries)} queries go into "
        f"{len(hypernetwork.blocks)} blocks of cross-attention; the answers go to the heads: "
        f"{queries}.",
    )

# %% [markdown]
# Step by step, and then the same by the network itself:

# %%
with torch.no_grad():
    answers = net.answers(tokens)
    print(f"tokens {tuple(tokens.shape)}, answers {tuple(answers.shape)}")
    for head, group in net.groups.items():
        out = net.heads[head](answers[:, group.numbers])
        weights, count = net.heads[head].weight.numel(), len(group.numbers)
        print(f"head {head:5}: {weights:9,} weights, {count:3} answers -> {tuple(out.shape)}")
    offsets = net(tokens)

head, group = next((h, g) for h, g in net.groups.items() if g.side == "A")
number = group.numbers[0]
key = net.keys[number // 2]  # matrix 2i is the A of key i
with torch.no_grad():
    A = net.heads[head](answers[:, number]).unflatten(-1, group.shape)  # (n, Din, r)
print(f"A of {key}: {tuple(A.shape)}")
assert torch.allclose(A, offsets[key][0], atol=1e-5)

# %% [markdown]
# An untrained hypernetwork must leave the model as it is. As in part 1, the heads of `A` start at
# random, those of `B` at zero.

# %%
fresh = LoRAHypernetwork(
    projection_shapes(unet), net.rank, settings.width, settings.num_heads, settings.trunk_depth,
    settings.offset_scale,
).to(device)  # fmt: skip
with torch.no_grad():
    largest = {
        "untrained": max((a @ b).abs().max().item() for a, b in fresh(tokens).values()),
        "trained": max((a @ b).abs().max().item() for a, b in offsets.values()),
    }
assert largest["untrained"] == 0
print("largest entry of any A B:", ", ".join(f"{k} {v:.2f}" for k, v in largest.items()))

# %% [markdown]
# ## 4. The singular values of a change
#
# The **singular values** of `A B` say how strongly it acts along each of its `r` independent
# directions, and they do not depend on how the product is written: `2A` and `B/2` are the same
# change. They can be had from the thin matrices. With the QR decompositions `A = Q R` and
# `Bᵀ = P S` the product is `Q (R Sᵀ) Pᵀ`, and its singular values are those of the small `R Sᵀ`.
#
# We predict the changes for a few things that were kept from all training, and then tune each with
# the usual number of steps.

# %%
from tqdm.auto import tqdm

inputs = {name: render_image(name, "fluent", "white") for name in NAMES}
predicted, tuned = {}, {}
for name, image in tqdm(inputs.items(), desc="concepts"):
    predicted[name] = pipe.personalize(image, num_steps=0, progress=False)
    tuned[name] = pipe.personalize(image, progress=False)
STEPS = tuned[name].info["num_steps"]
print(f"{len(NAMES)} things: {', '.join(NAMES)}; {STEPS} tuning steps each")

# %%
from dte_lab.lora import effective_rank, singular_values
from dte_lab.panels.hypernetwork import spectra_figure


def stacked(concepts):
    """The offsets of n concepts as one batch: {key: (A (n, Din, r), B (n, r, Dout))}."""
    everything = [concept.offsets for concept in concepts]
    return {
        key: tuple(torch.cat([offsets[key][side] for offsets in everything]) for side in (0, 1))
        for key in everything[0]
    }


# %%
largest = {  # the largest singular value of each weight
    f"{name}.{p}": torch.linalg.matrix_norm(projection_layer(attn, p).weight, 2).item()
    for name, attn in layers.items()
    for p in ("to_q", "to_k", "to_v", "to_out")
}
values = {
    label: singular_values(stacked(concepts.values()))
    for label, concepts in (("predicted", predicted), ("tuned", tuned))
}
percent = {
    label: {key: 100 * v.cpu().numpy() / largest[key] for key, v in by_key.items()}
    for label, by_key in values.items()
}
first = {
    label: sum(v[:, 0].mean() for v in by_key.values()) / len(by_key)
    for label, by_key in percent.items()
}

# %%
show(
    spectra_figure(percent),
    "Eight charts, one per kind of projection, of the singular values of the change. The first one "
    f"is on average {first['predicted']:.1f} % of the weight's largest as predicted and "
    f"{first['tuned']:.1f} % once tuned.",
)
print(
    f"n = {len(NAMES)} concepts; first singular value, mean over {len(largest)} matrices: "
    f"{first['predicted']:.1f} % of the weight's largest as predicted, {first['tuned']:.1f} % tuned"
)

# %%
last = {
    label: np.mean([v[:, -1].mean() / v[:, 0].mean() for v in by_key.values()])
    for label, by_key in percent.items()
}
saw(f"Tuning makes the first singular value {first['tuned'] / first['predicted']:.2f} times as",
    "large; the last one has", f"{last['predicted']:.0%} of the first as predicted and",
    f"{last['tuned']:.0%} once tuned.",
    "On average the change acts more strongly than the weights do."
    if first["tuned"] > 100 else "On average the change stays below the weights.")  # fmt: skip

# %% [markdown]
# Compare the height of the two curves: how much do the tuning steps add to what was predicted? Then
# their slope. A steep curve means that the last directions do little, and could be left out. A flat
# one means that the rank is used to the full. A value above 100 % means that the change acts more
# strongly along one direction than the weights themselves do along any.
#
# The **effective rank** ([Roy and Vetterli 2007](https://ieeexplore.ieee.org/document/7098875))
# puts the slope into one number. Divide the singular values by their sum, take the entropy of these
# shares, and its exponential: it is 1 when one value is alone, and `r` when all are equal. A number
# needs something to be compared with, so we add random `A` and `B` of the same shapes.

# %%
from dte_lab.panels.hypernetwork import effective_rank_figure

noise = {
    key: (torch.randn(len(NAMES), i, net.rank), torch.randn(len(NAMES), net.rank, o))
    for key, (i, o) in projection_shapes(unet).items()
}
used = {
    label: {key: effective_rank(v) for key, v in by_key.items()}
    for label, by_key in (*values.items(), ("random", singular_values(noise)))
}
for label, by_key in used.items():
    per_concept = torch.stack(list(by_key.values())).mean(dim=0)  # (n,)
    print(
        f"effective rank, {label:9}: {per_concept.mean():.2f} ± {per_concept.std():.2f} "
        f"(mean and standard deviation over n = {len(per_concept)}, at most {net.rank})"
    )
maps = {label: {key: v.mean().item() for key, v in used[label].items()} for label in values}
low, high = (f(v for by_key in maps.values() for v in by_key.values()) for f in (min, max))

# %%
show(
    effective_rank_figure(maps, net.rank),
    "Two heat maps of the effective rank, predicted and tuned, layers by projections: between "
    f"{low:.2f} and {high:.2f} of at most {net.rank}.",
)

# %% [markdown]
# Mind the line of the random matrices. Two random thin matrices use their rank almost to the full,
# and say nothing about any picture. So a high effective rank alone is no sign that all directions
# are *needed*; part 6 tries that out. A low one would be a sign that a smaller rank could do.

# %% [markdown]
# #### Exercise 2: how large is a change that you never form?
#
# Difficulty 3 of 5 · 15 minutes
#
# Compute the Frobenius norm of `A B`, the root of the sum of its squared entries, from `A` and `B`.
# In Stable Diffusion the product can have millions of entries, so do not form it: no tensor on the
# way may be as large.
#
# <details>
# <summary>Hint</summary>
#
# The square of the norm is tr((A B)ᵀ A B) = tr(Bᵀ Aᵀ A B). A trace stays the same when the factors
# are moved round in a circle: tr(X Y) = tr(Y X). Move `Bᵀ` to the end, and look for two `r × r`
# matrices. And tr(X Y) of two symmetric matrices is the sum of all entries of `X * Y`.
#
# </details>


# %% tags=["exercise"]
def low_rank_norm(A, B):
    """A (Din, r), B (r, Dout) -> the Frobenius norm of A B."""
    ### BEGIN SOLUTION
    return ((A.T @ A) * (B @ B.T)).sum().sqrt()
    ### END SOLUTION


checks.low_rank_norm(low_rank_norm)

# %% [markdown]
# ## 5. Same thing, other scene: are the changes alike?
#
# The encoder is to see the *thing* in a picture. So one thing before four backgrounds should give
# four similar changes, and different things different ones. We measure how alike two changes are
# by their cosine, taken over all entries of all matrices together, as if each change were one long
# vector.
#
# `A` and `B` themselves must not be compared, since the same product can be written in many ways.
# Nor need the products be formed. Their inner product is
#
# $$\langle A_1B_1, A_2B_2\rangle = \mathrm{tr}\,(A_1B_1)^\top A_2B_2
# = \mathrm{tr}\,(A_1^\top A_2)(B_2B_1^\top)$$
#
# with two `r × r` matrices on the right. `inner_products` does this for all pairs in a batch.

# %%
from dte_lab.encoder import mean_prediction
from dte_lab.lora import inner_products
from dte_lab.panels.hypernetwork import centred, cosine_figure, cosines

SEEN = ["white", "blue", "grass", "night"]
pictures = [render_image(name, "fluent", scene) for name in NAMES for scene in SEEN]
with torch.no_grad():
    features = encoder.static_features(pipe.backbone, pipe.pixels(pictures))
    prediction = mean_prediction(encoder(*features), len(settings.feature_timesteps))
gram = inner_products(prediction.offsets).cpu().double().numpy()  # (48, 48)
norm = checks.yours("low_rank_norm", otherwise=lambda a, b: torch.linalg.matrix_norm(a @ b))
of_first = [norm(a[0], b[0]).item() ** 2 for a, b in prediction.offsets.values()]
print(f"size of the first change: {sum(of_first) ** 0.5:.3f} by low_rank_norm, "
      f"{gram[0, 0] ** 0.5:.3f} as its inner product with itself")  # fmt: skip
show(
    picture_grid([pictures[: len(SEEN)], pictures[-len(SEEN) :]], SEEN, [NAMES[0], NAMES[-1]]),
    f"Two of the {len(NAMES)} things, {NAMES[0]} and {NAMES[-1]}, before {', '.join(SEEN)}.",
)

# %% tags=["expected:offset_cosine"]
raw, own = cosines(gram), cosines(centred(gram))
show(
    cosine_figure({"as predicted": raw, "without the common part": own}, NAMES),
    f"Two maps of the cosine between {len(pictures)} changes, in runs of {len(SEEN)} scenes for "
    f"each of {len(NAMES)} things. Smallest of any pair: {raw.min():.2f} as predicted, "
    f"{own.min():.2f} without the common part.",
)
common = gram.mean() / np.diag(gram).mean()  # |mean change|^2 over the mean of |change|^2
print(f"the mean of all {len(pictures)} changes has {common:.0%} of their squared norm")

# %% [markdown]
# Bright squares of four along the diagonal are what we hope for: one thing, four scenes. In the
# left map look at everything outside the squares as well. If it is far above zero, then all changes
# have a part in common, a change that is made for *every* picture. It says nothing about the thing,
# and could as well have been built into the weights. In the right map the mean of all changes is
# taken off each. That too needs the inner products alone: if $G$ holds those, the ones after
# centring are $G$ minus its row means, minus its column means, plus its overall mean. A chequered
# pattern there, the same in square after square, is the scenes.
#
# Three kinds of pairs tell thing and scene apart. For each thing we average its pairs of each kind.
# Mind the scales: each column of the figure has its own.
#
# The intervals come from drawing the things anew with replacement: the pairs that share a picture
# are not independent, and counting them all would make the intervals too short.

# %%
from dte_lab.panels import interval
from dte_lab.panels.ranks import pairs_figure

thing = np.repeat(np.arange(len(NAMES)), len(SEEN))
scene = np.tile(np.arange(len(SEEN)), len(NAMES))
same_thing, same_scene = thing[:, None] == thing, scene[:, None] == scene
kinds = {
    "same thing, other scene": same_thing & ~same_scene,
    "other thing, same scene": ~same_thing & same_scene,
    "other thing, other scene": ~same_thing & ~same_scene,
}

# %%
groups, intervals = {}, {}
for label, matrix in (("as predicted", raw), ("without the common part", own)):
    groups[label] = {
        kind: np.array([matrix[thing == i][mask[thing == i]].mean() for i in range(len(NAMES))])
        for kind, mask in kinds.items()
    }
    intervals[label] = {kind: interval(values) for kind, values in groups[label].items()}
    for kind, r in intervals[label].items():
        print(
            f"{label:23} {kind:25} {r['mean']:5.2f} [{r['low']:5.2f}, {r['high']:5.2f}]  "
            f"n = {r['n']} things, {kinds[kind].sum() // 2} pairs"
        )
show(
    pairs_figure(groups, intervals),
    "Cosines for three kinds of pairs, one point per thing. "
    + " ".join(
        f"{label}: " + ", ".join(f"{kind} {r['mean']:.2f}" for kind, r in by_kind.items()) + "."
        for label, by_kind in intervals.items()
    ),
)

# %%
same, other, neither = groups["without the common part"].values()
thing_or_scene, trace = interval(same - other), interval(other - neither)
if thing_or_scene["low"] > 0:
    said = "the thing decides more than the scene"
elif thing_or_scene["high"] < 0:
    said = "the scene decides more than the thing"
else:
    said = "which of the two decides more is not clear"
print(f"sharing the thing against sharing the scene: {thing_or_scene['mean']:+.2f}, 95 % interval")
print(f"[{thing_or_scene['low']:+.2f}, {thing_or_scene['high']:+.2f}], so {said}")
said = "the change carries" if trace["low"] > 0 else "it is not clear that the change carries"
print(f"sharing the scene against sharing nothing: {trace['mean']:+.2f}, 95 % interval")
print(f"[{trace['low']:+.2f}, {trace['high']:+.2f}], so {said} the scene")

# %% [markdown]
# The scene in the change is not what one wants: it may be drawn again under a prompt that asks for
# another scene. (Notebook 04 counts how often.) The encoder sees one picture and cannot be certain
# what belongs to the thing. And where the word says the thing, the change need not: part 6 draws
# the word alone.

# %% [markdown]
# #### Exercise 3: how alike are two changes?
#
# Difficulty 3 of 5 · 10 minutes
#
# Write the cosine of one pair of changes, again without forming either product.
#
# <details>
# <summary>Hint</summary>
#
# A small function for the inner product of two products helps: you need it three times. Keep the
# order in both `r × r` matrices the same. If `A1` gives the rows of the first, `B1` must give the
# rows of the second; then multiply entry by entry and add up.
#
# </details>


# %% tags=["exercise"]
def offset_cosine(A1, B1, A2, B2):
    """A1, A2 (Din, r), B1, B2 (r, Dout) -> the cosine of A1 B1 and A2 B2 as long vectors."""

    ### BEGIN SOLUTION
    def inner(A, B, C, D):
        return ((A.T @ C) * (B @ D.T)).sum()

    return inner(A1, B1, A2, B2) / (inner(A1, B1, A1, B1) * inner(A2, B2, A2, B2)).sqrt()
    ### END SOLUTION


checks.offset_cosine(offset_cosine)

# %% [markdown]
# ## 6. How much rank does a concept need?
#
# We cut the tuned changes to lower ranks. `truncate` keeps the largest singular values of each
# matrix, which is the best one can do with fewer (part 1). With rank 0 only the word `v*` is left.
# The prompt asks for the input's own white background, and the soft path draws alone
# (`alpha_blend=1`), so a perfect concept would draw the input itself. The distance is the root mean
# squared error to the input, colours from 0 to 1, at the pixels of the thing only.
#
# What this does not show: how good an encoder is that was *trained* with a lower rank. It can put
# all it knows into fewer directions. We only cut; trained ones follow below.

# %%
from dataclasses import replace

from dte_lab.evaluation.edits import object_mask
from dte_lab.lora import truncate
from dte_lab.world.captions import caption
from dte_lab.world.scenes import BOX

PROMPT, SEED = caption("S*", None, "white"), 0
RANKS = [r for r in (0, 1, 2, 4, 8) if r < net.rank] + [net.rank]


# %%
def distance(name, pixels):
    """RMSE of pictures (n, 3, H, W) in [-1, 1] to the input, where the thing is."""
    target = pipe.pixels([inputs[name]])
    mask = object_mask(name, "fluent")
    errors = (pixels - target)[..., BOX, BOX][..., mask]  # (n, 3, pixels)
    return errors.square().mean().sqrt().item() / 2


drawn, distances = {}, {name: {} for name in NAMES}
for name in tqdm(NAMES, desc="concepts"):
    for rank in RANKS:
        concept = tuned[name]
        cut = replace(concept, offsets=truncate(concept.offsets, rank) if rank else {})
        (images,) = pipe.generate(
            cut, PROMPT, seeds=[SEED], alpha_blend=1, num_inference_steps=12, progress=False
        )
        drawn[name, rank] = images[0]
        distances[name][rank] = distance(name, pipe.pixels(images))

# %%
from dte_lab.panels.ranks import distances_figure

floor = []
for name in NAMES:
    pixels = pipe.backbone.decode_latents(pipe.backbone.encode_images(pipe.pixels([inputs[name]])))
    floor.append(distance(name, pixels.float().cpu()))
by_rank = np.array([[distances[n][r] for r in RANKS] for n in NAMES])  # (n, ranks)
gain = interval(by_rank[:, 0] - by_rank[:, -1])

# %%
show(
    distances_figure(distances, float(np.mean(floor))),
    "Distance to the input by rank: "
    + ", ".join(f"rank {r} {d:.3f}" for r, d in zip(RANKS, by_rank.mean(axis=0), strict=True))
    + f"; the autoencoder alone {np.mean(floor):.3f}.",
)
print(f"n = {len(NAMES)} things, seed {SEED}; v* alone minus the whole change: distance")
print(f"{gain['mean']:+.3f}, 95 % interval [{gain['low']:+.3f}, {gain['high']:+.3f}]")
if gain["low"] > 0:
    for i, rank in enumerate(RANKS[1:-1], start=1):
        share = (by_rank[:, 0] - by_rank[:, i]).mean() / gain["mean"]
        print(f"rank {rank} alone gains {share:.0%} of that")
else:
    print("No clear gain, so we do not ask which rank brings how much of it.")

# %% [markdown]
# How far does `v*` alone come already? Compare it with the first unit of rank, and that with the
# rest. Where the curve is flat, the further directions do little for likeness, whatever their
# effective rank was. Look at the thin lines too: the mean of a few things can hide that some gain
# and others lose. The dashed line is how near the drawing could come at best: the autoencoder loses
# something in any picture.

# %%
enough = next(r for i, r in enumerate(RANKS) if by_rank[:, i].mean() < 1.05 * by_rank[:, -1].mean())
losers = [n for n in NAMES if distances[n][RANKS[-1]] > distances[n][0]]
saw(
    f"v* alone is {by_rank[:, 0].mean():.3f} from the input on average, the whole change",
    f"{by_rank[:, -1].mean():.3f}, the autoencoder {np.mean(floor):.3f}. Rank {enough} is within",
    f"5 % of the whole change. Further away with it than with v* alone: {', '.join(losers) or 0}.",
)

# %% [markdown]
# #### Try it: thing and rank
#
# The pictures on the left were drawn in the cell above. On the right write a prompt of your own,
# with `S*` in it: *Run it live* draws it with the change cut to the same rank. On a page that has
# no notebook running behind it, the table below shows all pictures of the left side.

# %%
from IPython.display import display

from dte_lab.panels.live import with_live
from dte_lab.panels.ranks import rank_panel

spectra = {
    name: torch.stack([v[i] for v in values["tuned"].values()]).mean(dim=0).tolist()
    for i, name in enumerate(NAMES)
}


def draw_cut(prompt, name, rank):
    """One picture of a tuned concept, its change cut to the rank."""
    offsets = truncate(tuned[name].offsets, rank) if rank else {}
    cut = replace(tuned[name], offsets=offsets)
    return pipe.generate(cut, prompt, [SEED], alpha_blend=1, progress=False)[0][0]


panel = rank_panel({name: inputs[name] for name in SHOWN}, drawn, spectra, distances)
display(with_live(panel, draw_cut, "a picture of S* at night", lambda name, rank: inputs[name]))

# %%
labels = ["the input", "v* alone", *(f"rank {rank}" for rank in RANKS[1:])]
show(
    picture_grid([[inputs[n]] + [drawn[n, rank] for rank in RANKS] for n in SHOWN], labels, SHOWN),
    f"All pictures of the panel: {len(SHOWN)} things, each as the input, with v* alone, and with "
    f"ranks {', '.join(map(str, RANKS[1:]))}.",
)

# %% [markdown]
# #### Encoders trained with other ranks, and on less
#
# `python -m dte_lab.evaluation.encoders` pre-trains encoders that differ in one thing: one per
# rank, one for whole matrices, some that see fewer drawings. Their error is the diffusion loss on
# pairs of `val` things, which none of them has seen; things, pairs and noise are the same for all.
# The encoder that the others are compared with has rank 4; yours has the rank that part 3 printed.
# It was done twice: with more time on a GPU, every encoder once (`results/encoders.json`), and with
# less time on a CPU, some of them from three seeds each (`results/encoders_seeds.json`). A seed
# changes the first weights, and all that training draws.
#
# A single run cannot tell a better encoder from a luckier one. So look at the seeds (dots) before
# you believe a difference. The bars are 95 % intervals over the things, paired: the error on every
# thing minus the error of the rank 4 encoder on the same thing, both means over the seeds.

# %%
import json
from pathlib import Path

from dte_lab.panels import bracketed, show_table
from dte_lab.panels.ranks import encoders_figure

# %%
RESULTS = next(p / "results" for p in Path.cwd().parents if (p / "results").is_dir())
documents = [
    json.loads((RESULTS / f"{n}.json").read_text()) for n in ("encoders", "encoders_seeds")
]
longer, repeated = {r["name"]: r for r in documents[0]["variants"]}, documents[1]
summary, shorter = repeated["summary"], repeated["variants"][0]
n_seeds, n_things = len(summary["base"]["by_seed"]), summary["base"]["mean"]["n"]
of_rank = {1: "rank-1", 2: "rank-2", 4: "base", 8: "rank-8", 16: "rank-16"}
of_rank = {rank: name for rank, name in of_rank.items() if name in longer}
former = "concepts-50" in longer  # the former model's encoders saw things, in three styles
ITEMS, ALL = ("things", 702) if former else ("drawings", 16_765)
of_count = {
    int(name.split("-")[1]): name for name in longer if name.startswith(("concepts-", "drawings-"))
}
of_count = {n: of_count[n] for n in sorted(of_count)} | {ALL: "base"}
LAST = longer["base"]["unseen"][-1][0]  # the last step; whole matrices ran out of time before

print("; ".join(measured_with(document["versions"]) for document in documents))

# %%
pairs = repeated["settings"]["batch_size"]
named = [(f"rank {rank}", name) for rank, name in of_rank.items()] + [("whole", "rank-full")]
named += [(f"{n} {ITEMS}", name) for n, name in of_count.items() if name != "base"]
lines = []
for label, name in named:
    row, found = longer[name], summary.get(name)
    error = dict(row["unseen"]).get(LAST)
    once = "" if error is None else f"{error:.4f}"
    seeds = " ".join(f"{e:.4f}" for e in found["by_seed"]) if found else ""
    minus = bracketed(found["minus_base"], 4, "+") if found else ""
    seconds = f"{60 * row['minutes'] / row['steps']:.2f}"
    numbers = f"{row['offsets']:,}", f"{row['hypernetwork']:,}", seconds
    lines.append((label, *numbers, once, seeds, minus))
heads = ["Encoder", "Numbers predicted", "Hypernetwork", "Seconds per step", "Loss, A", "Loss, B"]
show_table(
    lines, [*heads, f"B minus rank 4 with {ALL} {ITEMS}"],
    f"A: {LAST} steps of {documents[0]['settings']['batch_size']} pairs, once; "
    f"B: {shorter['steps']} steps of {pairs} pairs, {n_seeds} seeds (n = {n_things})",
)  # fmt: skip


# %%
def differences(name):
    """For the figure: how far the errors of an encoder are from those of rank 4."""
    once = dict(longer[name]["unseen"])[LAST] - dict(longer["base"]["unseen"])[LAST]
    if name not in summary:
        return {"once": once}
    seeds = zip(summary[name]["by_seed"], summary["base"]["by_seed"], strict=True)
    by_seed = [ours - base for ours, base in seeds]
    return {"once": once, "by_seed": by_seed, "minus_base": summary[name]["minus_base"]}


# %%
show(
    encoders_figure(
        {
            "rank": {rank: differences(name) for rank, name in of_rank.items()},
            f"{ITEMS} seen in training": {n: differences(name) for n, name in of_count.items()},
        },
        f"rank 4, {ALL} {ITEMS}",
    ),
    f"Loss on unseen things minus that of the encoder of rank 4 that saw {ALL} {ITEMS}, over the "
    "rank and over what was seen in training; the numbers are in the table above.",
)

# %%
twice = [name for name in summary if name in longer and LAST in dict(longer[name]["unseen"])]
orders = [tuple(sorted(twice, key=lambda n: summary[n]["by_seed"][k])) for k in range(n_seeds)]
once = tuple(sorted(twice, key=lambda name: dict(longer[name]["unseen"])[LAST]))
name_of = {name: label for label, name in named}
saw(f"{'; '.join(measured_with(document['versions']) for document in documents).capitalize()}.",
    f"From the least loss, with the larger budget: {', '.join(name_of[n] for n in once)}.",
    f"{orders.count(once)} of {n_seeds} seeds have that order with the smaller one, and",
    f"{'all seeds agree' if len(set(orders)) == 1 else 'the seeds do not agree'}.")  # fmt: skip

# %% [markdown]
# Read both panels with the budget in mind. A higher rank costs numbers, and the table says how
# many; whole matrices cost the most, in numbers and in seconds per step. An empty cell was not
# measured: with whole matrices the time was over before the last step of the others. Is the order
# the same in every seed, and with both budgets? And which is worth more: another rank, or more to
# learn from? (The pairs also mix halves of things, mirror and recolour them, so that few are more
# than they seem.)
#
# A lower loss should show in pictures. The same encoders draw held-out `test` things, from the
# prediction alone and after 12 steps of tuning (`results/encoders`; how, is in its `run.json`).
# *Identity* is read by a network that took no part in training here, *scenes* are the share of
# pictures with the scene that was asked for. Remember that tuning has the encoder's rank too: at
# 12 steps a difference can come from what was predicted, or from what can be changed.

# %%
from dte_lab.evaluation.encoders import compare_pictures
from dte_lab.evaluation.records import read_csv

# %%
run = json.loads((RESULTS / "encoders" / "run.json").read_text())
print(measured_with(run["versions"]))
rows = read_csv(RESULTS / "encoders" / "measures.csv")
labels = {"base": f"rank 4, {ALL} {ITEMS}"} | {
    name: f"rank {rank}" for rank, name in of_rank.items() if name != "base"
} | {name: f"{n} {ITEMS}" for n, name in of_count.items() if name != "base"}  # fmt: skip
MEASURED = {"identity_scaled": "identity", "scene": "scenes", "fidelity": "harmonic mean"}
compared = {measure: compare_pictures(rows, measure) for measure in MEASURED}
lines = []
for steps, found in compared["fidelity"].items():
    for name in found:
        cells = []
        for measure in MEASURED:
            r = compared[measure][steps][name]
            minus = "" if name == "base" else f" ({bracketed(r['minus_base'], sign='+')})"
            cells.append(f"{r['mean']['mean']:.3f}{minus}")
        lines.append((steps, labels[name], *cells))
n = compared["fidelity"][0]["base"]["mean"]["n"]
heads = ["Steps", "Encoder", *(title.capitalize() for title in MEASURED.values())]
show_table(lines, heads, f"n = {n} things, {n_seeds} seeds; in brackets: minus rank 4")

# %%
seen = []
for steps, found in compared["fidelity"].items():
    best = max(found, key=lambda name: found[name]["mean"]["mean"])
    differ = [
        labels[name]
        for name, r in found.items()
        if name != "base" and r["minus_base"]["low"] * r["minus_base"]["high"] > 0
    ]
    seen.append(f"After {steps} steps the best harmonic mean has {labels[best]}; told apart from "
                f"rank 4: {', '.join(differ) or 'none'}.")  # fmt: skip
saw(f"{measured_with(run['versions']).capitalize()}.", *seen,
    "Wider matrices change more in 12 steps at the same rate of learning, so a lead after",
    "tuning need not come from the prediction.")  # fmt: skip

# %% [markdown]
# ## 7. To other software
#
# `export` writes the change as a LoRA file, in the layout of
# [PEFT](https://huggingface.co/docs/peft) and in that of kohya (A1111, ComfyUI), and `v*` as a
# textual-inversion file. PEFT keeps both matrices transposed: its `lora_A` is our `A`ᵀ.

# %%
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from dte_lab.export import EMBEDDING, LORA, export

concept = tuned[NAMES[0]]
folder = Path(tempfile.mkdtemp())
for path in export(concept, folder):
    tensors = load_file(path)
    key, tensor = next(iter(tensors.items()))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {len(tensors)} tensors, such as")
    print(f"    {key} {tuple(tensor.shape)}")

# %% [markdown]
# The proof is in another program. Here is a stock `StableDiffusionPipeline` of diffusers, which
# knows nothing of this package's encoder. It loads the two files with its own methods. On the other
# side our pipeline draws with the soft path alone, from the same initial noise.

# %%
import copy

from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from dte_lab.backbone import backbone_folder

backbone = pipe.backbone
scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config, steps_offset=1)
stock = StableDiffusionPipeline(
    vae=backbone.vae,
    text_encoder=CLIPTextModel.from_pretrained(backbone_folder(backbone.name) / "text_encoder"),
    tokenizer=copy.deepcopy(backbone.tokenizer),  # it will learn the token S*
    unet=copy.deepcopy(unet),  # it will get adapters
    scheduler=scheduler,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).to(device)

# %%
stock.set_progress_bar_config(disable=True)
question = "a picture of S* on the beach"
latents = pipe.initial_noise(0).to(device)


def draw():
    return stock(
        question,
        latents=latents,
        guidance_scale=pipe.backbone.guidance_scale,
        num_inference_steps=25,
    ).images[0]


stock.load_textual_inversion(folder / EMBEDDING)
word_only = draw()
stock.load_lora_weights(folder, weight_name=LORA)
theirs = draw()

# %%
((ours,),) = pipe.generate(concept, question, seeds=[0], alpha_blend=1, progress=False)
((blended,),) = pipe.generate(concept, question, seeds=[0], progress=False)


def apart(a, b):
    """Largest difference of two pictures in grey levels, of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


# %%
print(f"stock pipeline with both files, against our soft path: {apart(theirs, ours)} grey levels")
print(f"without the LoRA file: {apart(word_only, ours)} grey levels; against our blend with")
print(f"alpha = {concept.config.alpha_blend}: {apart(theirs, blended)} grey levels")
assert apart(theirs, ours) <= 1, "the files should draw the same picture, but for rounding"
show(
    picture_grid(
        [[inputs[NAMES[0]], word_only, theirs, ours, blended]],
        ["the input", "stock: v* alone", "stock: both files", "ours: soft path", "ours: blended"],
    ),
    "Five pictures: the input; the stock pipeline with the word file alone; with both files; our "
    "soft path, the same picture; our blend of soft and hard path.",
)

# %% [markdown]
# The third and fourth pictures are the same. The last one differs: the blend with the hard path
# runs every attention layer twice, and no LoRA file can say that. Whoever uses the exported files
# draws with the soft path alone, with its likeness and with its freedom; notebook 04 measures both.

# %% [markdown]
# ## When it misleads
#
# - **A high effective rank.** Random matrices have one too. Cut the rank and look before you
#   believe that all directions are needed.
# - **Comparing `A` with `A`.** The same change can be written with `2A` and `B/2`: compare
#   products.
# - **A high cosine.** If all changes share a large part, any two look alike. Take the mean off.
# - **Counting pairs as if each were new evidence.** Twelve things in four scenes give more than a
#   thousand pairs, and still only twelve things.
# - **A cut is not a training.** Part 6 says how much of *these* changes sits in few directions, and
#   not how well a smaller encoder would do.

# %% [markdown]
# ## To take along
#
# - A weight change as `A B` makes the hypernetwork small enough to train; whole matrices would make
#   it about as large as the model itself.
# - One query for each matrix, one head for each shape: the heads grow with the number of different
#   widths, not with the number of layers.
# - Norms, cosines and singular values of a change come from `r × r` matrices.
# - The export is an ordinary LoRA and an ordinary textual-inversion file. It carries the soft path.

# %%
from dte_lab.panels import take_along

take_along(
    f"Without their common part, two predicted changes that share the scene are alike by "
    f"{interval(other)['mean']:.2f}, two that share the thing by {interval(same)['mean']:.2f}.",
    f"Drawn on white, the tuned change takes {gain['mean']:.3f} [{gain['low']:.3f}, "
    f"{gain['high']:.3f}] off the distance that v* alone leaves; rank {enough} is enough for that.",
    f"A stock pipeline draws our picture from the exported files, to {apart(theirs, ours)} grey "
    "levels.",
)

# %% [markdown]
# Everything here is in short files: `dte_lab/hypernetwork.py` has the network, `dte_lab/lora.py`
# the product `x A B` and the measures, `dte_lab/export.py` the files.
