# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: The dual path
#     promise: two prompts and two sets of weights in one model, for little more than one costs
#     minutes: 90
# ---

# %% [markdown]
# # The dual path: keeping the prior
#
# *Two prompts and two sets of weights in one model, for little more than one costs.*
#
# A text-to-image model knows a lot about the world: what a beach looks like, where light falls at
# night. That knowledge is its *prior*. When we fit a word and weights to a single picture, the
# prior may suffer. The model learns the thing, and with it the exact pose, and whatever else of the
# picture the prompt of tuning does not say, and may then draw that under any prompt.
#
# The remedy of [Arar et al. 2023](https://arxiv.org/abs/2307.06925) is to run each attention branch
# twice: once with what was learned (the *soft* path), once with the nearest real word and untouched
# weights (the *hard* path), and to blend the two.
#
# After this notebook you can
#
# - write the attention processor that does this, step by step;
# - show with two lines of algebra why two paths do not cost twice as much, and measure it;
# - see where in the picture a token is looked at, and which tokens carry the concept;
# - use `alpha_blend`, `offsets_on` and `granularity`, and let alpha change during sampling;
# - say what the word brings and what the weights bring, by drawing with either alone;
# - read a measurement of all this with its uncertainty.
#
# Stored numbers that are marked *former model* were measured with the weights before the present
# ones.

# %% [markdown] tags=["no-slide"]
# ## Set up

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from tqdm.auto import tqdm

from dte_lab import checks
from dte_lab.panels import describe_machine, measured_with, picture_grid, quiet_libraries, saw, show

quiet_libraries()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %%
from dte_lab import DTEPipeline
from dte_lab.world import concepts, render_image

NAME = "strawberry"
picture = render_image(NAME, "fluent", "white")
assert concepts()[NAME].split == "val"  # no part of the model has seen it

pipe = DTEPipeline.from_pretrained("small", device=device)
concept = pipe.personalize(picture)
backbone, unet, T = pipe.backbone, pipe.backbone.unet, len(pipe.backbone.alphas_cumprod)
hard_word = pipe.nearest_words(concept.v_star, k=1)[0][0]
print(f"learned in {concept.seconds:.0f} s; the real word nearest to S* is {hard_word!r}")

# %% [markdown]
# ## 1. Why one path is not enough
#
# Each row below uses the same seeds and the same prompts. Only the blend differs: α, in code
# `alpha_blend`, is the share of the soft path. Ask two questions of every picture: is it *this*
# thing, and is it the setting that was asked for? We expect the top row to be best at the first
# question and the bottom row at the second. Is it so? The cell after the pictures counts settings,
# and compares the thing with its true rendering there; likeness is measured in section 9.

# %%
settings = ["S* on the beach", "S* at night", "S* in the snow"]
prompts = [f"a picture of {setting}" for setting in settings]
DEFAULT = concept.config.alpha_blend  # the value that the encoder was trained with
SAMPLING = {"num_inference_steps": 15, "progress": False}

drawn = {alpha: pipe.generate(concept, prompts, alpha_blend=alpha, **SAMPLING)
         for alpha in (1, DEFAULT, 0)}  # fmt: skip
labels = ["soft path alone", f"blend, α = {DEFAULT:g}", "hard path alone"]
show(
    picture_grid(
        [[picture] + [row[0] for row in result] for result in drawn.values()],
        ["the input", *settings],
        labels,
    ),
    f"Three rows of the input and three settings ({', '.join(settings)}): soft path alone, "
    f"blend with alpha {DEFAULT:g}, hard path alone.",
)

# %%
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.edits import object_mask
from dte_lab.world.scenes import OFFSET, SCENES

asked = ["beach", "night", "snow"]
place_of = F.pad(object_mask(NAME, "fluent").float(), (OFFSET,) * 4)  # of the thing, (64, 64)


def settings_and_thing(pictures):
    """How many settings are right, by the border, and the thing's distance from the truth."""
    wanted, drawings = asked[: len(pictures)], pipe.pixels(pictures)
    right = [SCENES[i] for i in classify_scene(drawings)]
    truth = pipe.pixels([render_image(NAME, "fluent", scene) for scene in wanted])
    square = ((drawings - truth).square().mean((0, 1)).cpu() * place_of).sum() / place_of.sum()
    return sum(a == b for a, b in zip(right, wanted, strict=True)), square.sqrt().item() / 2


# %%
found = [settings_and_thing([row[0] for row in result]) for result in drawn.values()]
saw(*(f"{label}: {n} of {len(asked)} settings right, the thing {distance:.3f} from its true "
      "rendering." for label, (n, distance) in zip(labels, found, strict=True)))  # fmt: skip

# %% [markdown]
# ### The word alone, the weights alone
#
# The soft path has two parts, and each can be switched off. `word_alone()` keeps `v*` and leaves
# the model's own weights; `weights_alone(word)` keeps the weights and puts another word in the
# place of `v*`, here the empty word *thing*. Both are drawn with the soft path alone. Below are the
# two parts together, and the hard path, which has neither. First as the encoder predicts them, then
# tuned. Which part alone is nearer to the input, and how does tuning change each of them? (One
# thing is an example. `dte evaluate` asks the same of many: its methods `dte@part=word` and
# `dte@part=weights`.)

# %%
predicted = pipe.personalize(picture, num_steps=0, progress=False)
thing = pipe.prompt_encoder.word("thing")
parts, DRAW = {}, ["a picture of S* on a white background", prompts[0]]
for when, state in (("predicted", predicted), ("tuned", concept)):
    for what, part, alpha in (
        ("word alone", state.word_alone(), 1),
        ("weights alone", state.weights_alone(thing), 1),
        ("both", state, 1),
        ("neither", state, 0),
    ):
        rows = pipe.generate(part, DRAW, alpha_blend=alpha, **SAMPLING)
        parts[when, what] = [row[0] for row in rows]
kinds = list(dict.fromkeys(what for _, what in parts))
columns = [f"{what},\n{where}" for where in ("white", "beach") for what in kinds]
table = [
    [parts[when, what][i] for i in (0, 1) for what in kinds] for when in ("predicted", "tuned")
]

# %%
show(
    picture_grid(table, columns, ["predicted", "tuned"]),
    f"Two rows, predicted and tuned: {', '.join(kinds)}, on white and on the beach.",
)

# %%
errors = {
    key: (pipe.pixels(row[:1]) - pipe.pixels([picture])).square().mean().sqrt().item() / 2
    for key, row in parts.items()
}
for key, error in errors.items():
    print(f"{', '.join(key):26} {error:.3f} from the input (root mean square, on white)")

# %%
seen = []
for when in ("predicted", "tuned"):
    first, second = sorted(("word alone", "weights alone"), key=lambda what: errors[when, what])
    nothing, weights = errors[when, "neither"], errors[when, "weights alone"]
    seen.append(
        f"Nearest to the input as {when}: {first}, then {second}. The weights alone are "
        f"{'nearer than' if weights < nothing else 'no nearer than'} nothing learned at all, "
        f"{weights:.3f} against {nothing:.3f}."
    )
for what in ("word alone", "weights alone", "both"):
    before, after = (errors[when, what] for when in ("predicted", "tuned"))
    seen.append(
        f"Tuning takes the picture of {what} {'nearer' if after < before else 'further away'}, "
        f"from {before:.3f} to {after:.3f}."
    )
saw(*seen, "What tuning gives to the weights, the word need no longer say.")

# %% [markdown]
# ## 2. One attention layer by hand
#
# The model's UNet holds *self-attention* layers, in which positions of the picture look at each
# other, and *cross-attention* layers, in which they look at the tokens of the prompt. We take one
# cross-attention layer apart. First we need something for it to work on: a picture with noise, and
# the two prompts. The soft prompt has the predicted embedding `v*` where `S*` stands, and the hard
# prompt has the embedding of the nearest real word.

# %%
from dte_lab.backbone import add_noise
from dte_lab.lora import attention_layers

soft_text = pipe.prompt_encoder(prompts[:1], concept.v_star)  # (1, L, d)
hard_text = pipe.prompt_encoder.hard(prompts[:1], concept.v_star)  # (1, L, d)
example = drawn[DEFAULT][0][0]
latents = backbone.encode_images(pipe.pixels([example]))  # (1, C, h, w)
noise = pipe.initial_noise(1).to(latents)
t = torch.tensor([T // 2], device=latents.device)
noisy = add_noise(backbone, latents, noise, t)

layers = attention_layers(unet)
cross = {name: attn for name, attn in layers.items() if name.endswith("attn2")}
print(f"{len(layers)} attention layers, {len(cross)} of them cross-attention")
print(f"a latent has shape {tuple(latents.shape[1:])},")
print(f"a prompt {tuple(soft_text.shape[1:])}: tokens and their width")

# %% [markdown]
# A hook keeps what the first cross-attention layer is given when the UNet runs as usual.

# %%
name, attn = next(iter(cross.items()))
given = {}


def keep(module, args, kwargs):
    given.update(x=args[0], text=kwargs["encoder_hidden_states"])


hook = attn.register_forward_pre_hook(keep, with_kwargs=True)
unet(noisy, t, soft_text)
hook.remove()
x, text = given["x"], given["text"]
print(f"{name}\nx {tuple(x.shape)}: positions of the picture; text {tuple(text.shape)}: tokens")

# %% [markdown]
# Attention has four steps. Project `x` to queries and the text to keys and values; compare each
# query with each key; mix the values by how well they fit; project the result. *Heads* do the
# middle part several times side by side, on slices of the vectors.


# %%
def attend(q, k, v, heads):
    """(B, T, D), (B, L, D), (B, L, D) -> the mixed values (B, T, D)."""
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))  # (B, H, ., D/H)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, L)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


by_hand = attn.to_out[0](attend(attn.to_q(x), attn.to_k(text), attn.to_v(text), attn.heads))
library = attn(x, encoder_hidden_states=text)
print(f"largest difference from the library's layer: {(by_hand - library).abs().max():.1e}")

# %% [markdown]
# ### The soft path
#
# Tuning has left us a thin pair of matrices `A` and `B` for each of the four projections. With them
# the layer works as if its weights were `W + A B`. Since the layer is linear in its weights, there
# is no need to form that sum: `x (W + A B) = x W + x A B`. That has another merit: the samples of a
# batch may each have their own `A` and `B`.


# %%
def projected(linear, z, offset=None):
    """z (B, N, Din) through a linear layer, with weights W + A B where there is an offset."""
    return linear(z) if offset is None else linear(z) + z @ offset[0] @ offset[1]


offsets = {key.rsplit(".", 1)[1]: pair for key, pair in concept.offsets.items() if name in key}
for projection, (a, b) in offsets.items():
    print(f"{projection:<7} A {tuple(a.shape[1:])}, B {tuple(b.shape[1:])}")

# %% [markdown]
# #### Exercise 1: attention with low-rank offsets
#
# Difficulty 3 of 5 · 15 minutes
#
# Write the soft path of a small layer with one head and no output projection. `W["q"]`, `W["k"]`
# and `W["v"]` are weights as PyTorch keeps them, `(D, Din)`; `offsets["q"]` is the pair `(A, B)`
# with shapes `(Din, r)` and `(r, D)`, and likewise for `k` and `v`.
#
# <details>
# <summary>Hint</summary>
#
# Queries come from `x`, keys and values from `text`. `F.linear(z, W)` is `z @ W.T`. The scores are
# `q @ k.T`, divided by the square root of the number of entries of a query; each row of the softmax
# must add up to 1.
#
# </details>


# %% tags=["exercise"]
def soft_attention(x, text, W, offsets):
    """x (T, C), text (L, d), weights W and offsets of "q", "k", "v" -> (T, D)."""
    ### BEGIN SOLUTION
    q, k, v = (
        F.linear(z, W[name]) + z @ offsets[name][0] @ offsets[name][1]
        for name, z in (("q", x), ("k", text), ("v", text))
    )
    scores = q @ k.T / q.shape[-1] ** 0.5  # (T, L)
    return scores.softmax(dim=-1) @ v
    ### END SOLUTION


checks.soft_attention(soft_attention)

# %% [markdown]
# ## 3. Two paths, and the algebra that makes them cheap
#
# Here is the dual path as the formula says it: run the whole layer twice, then blend.
#
# $$\text{out} = \alpha \cdot \text{layer}(x;\ W + A B,\ \text{soft text})
#   + (1 - \alpha) \cdot \text{layer}(x;\ W,\ \text{hard text})$$


# %%
def branch(x, text, offsets):
    """The whole layer: three projections, attention, output projection."""
    q = projected(attn.to_q, x, offsets.get("to_q"))
    k, v = (projected(getattr(attn, p), text, offsets.get(p)) for p in ("to_k", "to_v"))
    return projected(attn.to_out[0], attend(q, k, v, attn.heads), offsets.get("to_out"))


def twice(x, soft_text, hard_text, alpha):
    return alpha * branch(x, soft_text, offsets) + (1 - alpha) * branch(x, hard_text, {})


# %% [markdown]
# Now we look for work that is done twice.
#
# 1. **The queries.** Both paths compute `x W_q`; the soft one only adds `x A B`. Compute `x W_q`
#    once. In self-attention, keys and values come from `x` as well, so they are shared, too.
# 2. **The output projection.** It is `P(z) = z W + b`. Because the coefficients add up to 1,
#
# $$\alpha P(s) + (1 - \alpha) P(h)
#   = \big(\alpha s + (1 - \alpha) h\big) W + \big(\alpha + 1 - \alpha\big) b
#   = P\big(\alpha s + (1 - \alpha) h\big).$$
#
# Blend before the projection, and one projection is enough. The soft path's own offset comes on
# top, weighed with α.
#
# What cannot be shared is the softmax, which is not linear, and the keys and values of two
# different prompts. But prompts are short, and the offsets are thin.


# %%
def thrifty(x, soft_text, hard_text, alpha):
    q = attn.to_q(x)  # once
    soft = attend(
        q + x @ offsets["to_q"][0] @ offsets["to_q"][1],
        projected(attn.to_k, soft_text, offsets["to_k"]),
        projected(attn.to_v, soft_text, offsets["to_v"]),
        attn.heads,
    )
    hard = attend(q, attn.to_k(hard_text), attn.to_v(hard_text), attn.heads)
    extra = alpha * soft @ offsets["to_out"][0] @ offsets["to_out"][1]
    return attn.to_out[0](alpha * soft + (1 - alpha) * hard) + extra  # one projection


# %%
from dte_lab.dual_path import DualPathProcessor

for alpha in (0, 0.3, DEFAULT, 1):
    processor = DualPathProcessor(offsets, hard_text, alpha)
    package = processor(attn, x, encoder_hidden_states=soft_text)
    long, short = (f(x, soft_text, hard_text, alpha) for f in (twice, thrifty))
    print(
        f"α = {alpha:<4g} twice and thrifty differ by {(long - short).abs().max():.1e}, "
        f"thrifty and the package by {(short - package).abs().max():.1e}"
    )

# %% [markdown]
# That is the processor of `dte_lab/dual_path.py`; you have now read most of the file.
#
# #### Exercise 2: blend, then project
#
# Difficulty 2 of 5 · 10 minutes
#
# Given the two attention results before the output projection, give the layer's output. `project`
# is the output projection, weights and bias; `A` and `B` are its offset, which only the soft path
# has. The check counts how many rows `project` is given.
#
# <details>
# <summary>Hint</summary>
#
# Write down α · (P(soft) + soft A B) + (1 − α) · P(hard), then gather the terms with P.
#
# </details>


# %% tags=["exercise"]
def dual_output(soft, hard, alpha, project, A, B):
    """soft, hard (T, D), A (D, r), B (r, C), project: (T, D) -> (T, C). Returns (T, C)."""
    ### BEGIN SOLUTION
    return project(alpha * soft + (1 - alpha) * hard) + alpha * (soft @ A @ B)
    ### END SOLUTION


checks.dual_output(dual_output)

# %% [markdown]
# ### Two readings
#
# The paper can be read in two ways in two places, and the package has all four. The first row of
# each table is the default.
#
# | `offsets_on` | soft path | hard path |
# |---|---|---|
# | `"soft"` | `v*` with the learned weights | real word with the model's own weights |
# | `"hard"` | `v*` with the model's own weights | real word with the learned weights |
#
# | `granularity` | what runs twice and is blended |
# |---|---|
# | `"attention"` | every attention branch |
# | `"block"` | every block of the UNet that has cross-attention |
#
# A block holds convolutions and nonlinearities beside its attention. Nothing of that can be shared,
# so `"block"` sends both paths through as one batch of twice the size.
#
# ## 4. What it costs
#
# First we count. PyTorch's `FlopCounterMode` counts the arithmetic of the calls that are really
# made.

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dte_lab.dual_path import dual_path

B = 8
soft8, hard8 = (z.expand(B, -1, -1) for z in (soft_text, hard_text))
noisy8 = torch.cat([pipe.initial_noise(seed) for seed in range(B)]).to(noisy)


def call(**paths):
    """One call of the UNet: as it is, or inside the dual path."""
    if not paths:
        return unet(noisy8, t, soft8)
    with dual_path(unet, concept.offsets, hard8, **paths):
        return unet(noisy8, t, soft8)


# %%
WAYS = {
    "without offsets": {},
    "single path": {"alpha_blend": 1.0},
    "dual, attention": {"alpha_blend": DEFAULT},
    "dual, block": {"alpha_blend": DEFAULT, "granularity": "block"},
}
counted = {}
with sdpa_kernel(SDPBackend.MATH):  # the form of attention that the counter knows
    for way, paths in WAYS.items():
        with FlopCounterMode(display=False) as counter:
            call(**paths)
        counted[way] = counter.get_total_flops()
counted["two whole calls"] = counted["without offsets"] + counted["single path"]
for way, flops in counted.items():
    times_single = flops / counted["single path"]
    print(f"{way:<16}{flops / B / 1e6:8.0f} million per picture{times_single:8.2f} x single path")

# %% [markdown]
# Then we measure. Small operations cost more time than their arithmetic says, since each has to be
# started. All ways are timed in turn, round after round, so that a machine that slows down slows
# all of them. The bar is the median over the rounds of the ratio within a round, and the thin line
# shows the quartiles. Where the repository holds the result of `benchmarks/dual_path.py`, made on
# an idle machine with more rounds, it stands beside.

# %%
# of the repository that this notebook lies in
RESULTS = next(p / "results" for p in Path.cwd().parents if (p / "results").is_dir())
ROUNDS = 15

seconds = {way: [] for way in WAYS}
for round_ in tqdm(range(ROUNDS + 2), desc="rounds"):
    for way, paths in WAYS.items():
        start = time.perf_counter()
        call(**paths)
        if device == "cuda":
            torch.cuda.synchronize()
        if round_ >= 2:  # the first calls allocate memory
            seconds[way].append(time.perf_counter() - start)

# %%
costs = {}
for way, times in seconds.items():
    low, median, high = np.percentile(np.divide(times, seconds["single path"]), (25, 50, 75))
    costs[way] = {f"here, {ROUNDS} rounds": (median, low, high)}
if (file := RESULTS / "dual_path.json").is_file():
    stored = json.loads(file.read_text())
    KEYS = ("vanilla", "single", "dual attention figure", "dual block figure")  # as WAYS
    for way, key in zip(WAYS, KEYS, strict=True):
        row = stored["ways"][key]
        source = f"benchmark, rank {stored['rank']}, {stored['rounds']} rounds"
        costs[way][source] = (row["over_single"], *row["quartiles"])

# %%
from dte_lab.panels.dual_path import cost_figure

show(
    cost_figure(costs),
    "Bars of the time of one UNet call over that of the single path: "
    + "; ".join(f"{way} {next(iter(row.values()))[0]:.2f}" for way, row in costs.items())
    + ".",
)

# %% [markdown]
# Compare the bar of *dual, attention* with the two landmarks: 1 is a single path, and two whole
# calls would be about 2. *dual, block* does the work of its blocks twice, so expect it nearer to 2.
# It is one call with twice the rows, which some machines do faster than two calls.
#
# ## 5. Where the tokens are looked at
#
# The attention probabilities say how much each position of the picture looks at each token. The
# layers throw them away, so we need a processor that keeps them. Ours wraps the one that is there,
# works out the probabilities of both paths for itself, and then lets the other do the work.


# %%
class Recorder:
    """Keeps what each path of a DualPathProcessor looks at: shares (B, T, L), mean over heads."""

    def __init__(self, processor):
        self.processor, self.shares = processor, {}

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None):
        dual = self.processor
        for path, text, offsets in (
            ("soft", encoder_hidden_states, dual.offsets),
            ("hard", dual.hard, {}),
        ):
            q = projected(attn.to_q, x, offsets.get("to_q"))
            k = projected(attn.to_k, text, offsets.get("to_k"))
            q, k = (z.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for z in (q, k))
            scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, L)
            self.shares[path] = scores.softmax(-1).mean(1)
        return dual(attn, x, encoder_hidden_states, attention_mask)


# %% [markdown]
# We take the picture that the model drew on the beach, add noise of several strengths, and let the
# UNet look at each. Inside the `with` block every cross-attention layer gets a recorder around its
# dual-path processor; when the block is left, the original processors come back.

# %%
times = torch.tensor([round(f * (T - 1)) for f in (0.95, 0.7, 0.4, 0.1)]).to(t)
n = len(times)
noisy = add_noise(backbone, latents.expand(n, -1, -1, -1), noise.expand(n, -1, -1, -1), times)
texts = [z.expand(n, -1, -1) for z in (soft_text, hard_text)]
with dual_path(unet, concept.offsets, texts[1], DEFAULT):
    recorders = [Recorder(attn.processor) for attn in cross.values()]
    for attn_layer, recorder in zip(cross.values(), recorders, strict=True):
        attn_layer.set_processor(recorder)
    unet(noisy, times, texts[0])

# %%
h, w = latents.shape[-2:]


def maps_of(path):
    """Shares (n, L, h, w) of a path, mean over the layers, on the grid of the latent."""
    layers = []
    for recorder in recorders:
        share = recorder.shares[path].mT  # (n, L, positions)
        side = round(share.shape[-1] ** 0.5)
        layers.append(F.interpolate(share.unflatten(-1, (side, side)), (h, w), mode="nearest"))
    return torch.stack(layers).mean(0)


maps = {path: maps_of(path) for path in ("soft", "hard")}
print({f"{r.shares['soft'].shape[1]} positions" for r in recorders}, f"on a grid of {h} x {w}")

# %% [markdown]
# ### Which tokens carry the concept
#
# The text encoder reads from left to right: what it says at a token depends on that token and those
# before it. So the two prompts are the same up to `S*`, and differ from there on. The upper chart
# shows by how much. The lower chart shows how much the picture looks at each token. A token matters
# to the concept when it is high in *both*.
#
# Two groups deserve a look. The *end tokens*, with which every prompt is filled up, come after
# `S*`, so they have read it. And the *start token* says the same in every prompt. Where a token
# that is changed little is looked at much, the heads may park attention there that they have no use
# for.

# %%
from dte_lab.panels.dual_path import tokens_figure

ids, slots = (row[0] for row in pipe.prompt_encoder.tokenize(prompts[:1]))
position = slots.tolist().index(0)  # of S*
end = ids.tolist().index(backbone.tokenizer.eos_token_id)  # the first end token
tokens = [word.removesuffix("</w>") for word in backbone.tokenizer.convert_ids_to_tokens(ids)]
tokens[0], tokens[position] = "start", "S*"
tokens[end:] = [f"end {i + 1}" for i in range(len(tokens) - end)]

# %%
changed = ((soft_text - hard_text).norm(dim=-1) / hard_text.norm(dim=-1))[0].tolist()
share = {f"{path} path": m.mean((0, 2, 3)).tolist() for path, m in maps.items()}
sums = {
    path: (values[position], sum(values[end:]), sum(values[position:]))
    for path, values in share.items()
}
for path, (own, ends, behind) in sums.items():
    print(
        f"{path}: {own:.1%} of the attention falls on S* itself, {ends:.1%} on the end tokens, "
        f"{behind:.1%} on what has read S*"
    )
show(
    tokens_figure(tokens, changed, share),
    f"Two bar charts over the {len(tokens)} tokens of the prompt. Above, the change of their "
    f"hidden states between the prompts: 0 before S*, {changed[position]:.2f} at S*. Below, the "
    "share of the attention in the soft and the hard path: "
    + "; ".join(f"{p}, {own:.1%} on S*, {e:.1%} on end tokens" for p, (own, e, _) in sums.items())
    + ".",
)

# %% [markdown]
# ### The maps
#
# Now where. Time runs from left to right, as in sampling: much noise first. Each row has its own
# colour scale, since some tokens get far more attention than others. The maps are coarse, because
# the model works on a coarse grid of latents.
#
# The fourth row of maps is one of the end tokens: the one with the largest product of the two bars
# above. If a token is looked at from the thing's place, its map is brightest in the middle. Does
# the word of the setting light up around it, as its meaning suggests? Where the differences within
# a map are small against its scale, do not read shapes into them.

# %%
from dte_lab.panels import to_pil
from dte_lab.panels.dual_path import maps_figure

place = tokens[end - 1]
weight = np.multiply(changed, share["soft path"])  # high where a token says much and is heard
told = end + int(weight[end:].argmax())  # the end token that tells most of the concept
rows = {
    "S*,\nsoft path": maps["soft"][:, position],
    f"{hard_word},\nhard path": maps["hard"][:, position],
    f"{place},\nsoft path": maps["soft"][:, end - 1],
    f"{tokens[told]},\nsoft path": maps["soft"][:, told],
    "all end tokens,\nsoft path": maps["soft"][:, end:].sum(1),
}
noisy_pictures = to_pil(backbone.decode_latents(noisy).clamp(-1, 1))

# %%
show(
    maps_figure(
        noisy_pictures,
        {label: list(row.cpu().numpy()) for label, row in rows.items()},
        [f"t = {step}" for step in times.tolist()],
    ),
    f"Noisy pictures at {n} times, and below each the attention to S* in the soft path, to the "
    f"word {hard_word} in the hard path, to {place}, to {tokens[told]} and to all end tokens in "
    "the soft path.",
)

# %% [markdown]
# A number says it better than an eye. We know where the thing is, since the small world puts it
# into the middle: how much more is a token looked at from the thing's place than from around it?

# %%
inside = F.adaptive_avg_pool2d(place_of[None], (h, w))[0].to(latents)
ratios = {}
print("attention from the thing's place over that from around it; 1: no preference")
print(f"{'t':<26}" + "".join(f"{step:7}" for step in times.tolist()))
for label, row in rows.items():
    name_of = label.replace("\n", " ")
    ratio = (row * inside).sum((1, 2)) / inside.sum()
    ratio = ratio / ((row * (1 - inside)).sum((1, 2)) / (1 - inside).sum())
    ratios[name_of] = ratio.tolist()
    print(f"{name_of:<26}" + "".join(f"{r:7.2f}" for r in ratio.tolist()))

# %%
within = [name for name, r in ratios.items() if r[-1] > 1.1]
of_place = ratios[f"{place}, soft path"][-1]
side = "from the thing" if of_place > 1.1 else "from around the thing" if of_place < 0.9 else (
    "from either about as much")  # fmt: skip
saw(f"At t = {times[-1]}, looked at by a tenth more from the thing's place: "
    f"{'; '.join(within) or 'none'}. The word of the setting, {place}, has a ratio of "
    f"{of_place:.2f}: it is looked at {side}{', too' if of_place > 1.1 else ''}. Where a map is "
    "bright says where a token is read, and not what is drawn there.")  # fmt: skip

# %% [markdown]
# ## 6. Try it: blend, path of the offsets, granularity
#
# All pictures on the panel's left are drawn here, so that it answers at once; on its right a prompt
# of your own is drawn live, with the same settings. At α = 0 and α = 1 only one path counts, and
# then both granularities are the same UNet: those pictures are drawn once.

# %%
ALPHAS, SEEDS = [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 1, 2]
WAYS_TO_BLEND = [(p, g) for p in ("soft", "hard") for g in ("attention", "block")]
blended = {}
for offsets_on, granularity in tqdm(WAYS_TO_BLEND, desc="ways to blend"):
    config = replace(concept.config, offsets_on=offsets_on, granularity=granularity)
    for alpha in ALPHAS:
        if alpha in (0, 1) and granularity == "block":
            result = [blended[offsets_on, "attention", alpha, seed] for seed in SEEDS]
        else:
            [result] = pipe.generate(
                replace(concept, config=config), prompts[0], SEEDS, alpha_blend=alpha, **SAMPLING
            )
        keys = [(offsets_on, granularity, alpha, seed) for seed in SEEDS]
        blended |= dict(zip(keys, result, strict=True))

# %%
from dte_lab.panels.dual_path import dual_path_panel
from dte_lab.panels.live import with_live


def draw(prompt, offsets_on, granularity, alpha, seed):
    """One picture of the tuned concept, blended in this way."""
    config = replace(concept.config, offsets_on=offsets_on, granularity=granularity)
    asked = replace(concept, config=config)
    return pipe.generate(asked, prompt, [seed], alpha_blend=alpha, **SAMPLING)[0][0]


display(with_live(dual_path_panel(blended), draw, "a picture of S* in space", picture))

# %% [markdown]
# On a page that has no notebook running behind it, this table shows one seed of each setting. Read
# the rows from left to right. With the offsets on the soft path, α = 1 has everything that was
# learned and α = 0 nothing. With the offsets on the hard path each end has *half*: at α = 0 the
# learned weights with the nearest real word, at α = 1 the learned word with the model's own
# weights, as in section 1.

# %% tags=["expected:dual_output"]
show(
    picture_grid(
        [[blended[*way, alpha, 0] for alpha in ALPHAS] for way in WAYS_TO_BLEND],
        [f"α = {alpha:g}" for alpha in ALPHAS],
        [", ".join(way) for way in WAYS_TO_BLEND],
    ),
    f"Pictures on the beach with seed 0: rows are the paths with offsets and granularities "
    f"{'; '.join(', '.join(way) for way in WAYS_TO_BLEND)}; columns are alpha from 0 to 1.",
)

# %% [markdown]
# ## 7. What the UNet is given at each step
#
# Sampling starts from pure noise, at t = T, and removes noise until t = 0. `Conditioning` in
# `dte_lab/sampling.py` decides what the UNet gets at each step. With *classifier-free guidance* the
# batch doubles: first the unconditional half with an empty prompt, then the one with the prompt.
# The hard prompts and the offsets must double with it.

# %%
from dte_lab.sampling import Conditioning

steps = torch.linspace(T - 1, 0, 8).long()
varied = replace(concept, config=replace(concept.config, alpha_blend=(1.0, 0.2)))
condition = Conditioning(pipe.prompt_encoder, varied, prompts[:2], steps, T)
inputs = [condition(step, noise.expand(2, -1, -1, -1)) for step in range(len(steps))]
first = inputs[0]
print(f"prompts {len(condition.prompts)}; rows of the batch {first.prompt_embeds.shape[0]}")
print(f"hard states of the batch: {tuple(first.hard.shape)}")
same = torch.equal(first.prompt_embeds[:2], first.hard[:2])
print(f"in the unconditional half both paths read the same empty prompt: {same}")
print("alpha at each step:", ", ".join(f"{each.alpha:.2f}" for each in inputs))

# %% [markdown]
# The last line shows that α need not be constant. `alpha_blend` may be a pair, the value at the
# start of sampling and the value at its end, with a straight line in `t` between them. (This is
# ours; the paper has one number.) Early steps settle layout and background, late ones the details.
#
# #### Exercise 3: a schedule
#
# Difficulty 2 of 5 · 10 minutes
#
# Write the line. `t` is a tensor of timesteps of which the model has `num_timesteps`.
#
# <details>
# <summary>Hint</summary>
#
# `t / num_timesteps` is 1 at the start of sampling and 0 at its end. What must the result be at
# each of the two?
#
# </details>


# %% tags=["exercise"]
def alpha_schedule(t, num_timesteps, first, last):
    """t (B,) -> alpha (B,): `first` at t = num_timesteps, `last` at t = 0, a line between."""
    ### BEGIN SOLUTION
    return last + (first - last) * t / num_timesteps
    ### END SOLUTION


checks.alpha_schedule(alpha_schedule)

# %% [markdown]
# Some more freedom at sampling time, all with the same seed and the same tuned concept:
#
# - α falling, so that what was learned decides first and the prior has the last word; α rising, the
#   other way round. Which keeps the setting, which the thing?
# - `unconditional_offsets=False`: the unconditional half of guidance keeps the model's own weights.
# - `prediction_interval`: the encoder's features depend on the noisy picture, so its prediction
#   changes with `t`. By default it is made once. With `prediction_interval=5` it is made anew every
#   five steps.

# %%
line = checks.yours("alpha_schedule", lambda t, T, first, last: last + (first - last) * t / T)
at = line(steps.float(), T, 1.0, 0.4)
print("α of the second column:", ", ".join(f"{alpha:.2f}" for alpha in at.tolist()))

# %%
from dte_lab.panels import to_bytes

variants = {
    f"α = {DEFAULT:g}": {},
    "α falls, 1 to 0.4": {"alpha_blend": (1.0, 0.4)},
    "α rises, 0.4 to 1": {"alpha_blend": (0.4, 1.0)},
    "own weights in the\nunconditional half": {"unconditional_offsets": False},
    "prediction anew\nevery 5 steps": {"prediction_interval": 5},
}
columns = []
# To predict anew takes the picture, which stays in a concept only where its config asks for that.
pictured = replace(concept, pictures=to_bytes(pipe.pixels([picture])))
for changes in variants.values():
    varied = replace(pictured, config=replace(concept.config, **changes))
    columns.append(pipe.generate(varied, prompts[:2], **SAMPLING))

# %% tags=["expected:alpha_schedule"]
show(
    picture_grid(
        [[column[i][0] for column in columns] for i in range(2)], list(variants), settings[:2]
    ),
    f"Two settings, {settings[0]} and {settings[1]}, drawn in {len(variants)} ways: "
    + "; ".join(variants).replace("\n", " ")
    + ".",
)

# %%
seen = []
for label, column in zip(variants, columns, strict=True):
    right, distance = settings_and_thing([row[0] for row in column])
    here, first = (pipe.pixels([row[0] for row in c]) for c in (column, columns[0]))
    moved = (here - first).square().mean().sqrt().item() / 2
    seen.append(f"{label.replace(chr(10), ' ')}: {right} of 2 settings right, the thing "
                f"{distance:.3f} from its true rendering, the picture {moved:.3f} from the first "
                "way.")  # fmt: skip
saw(*seen)

# %% [markdown]
# ## 8. Without an encoder
#
# Where no encoder has been trained, as for Stable Diffusion 1.5, `dte_lab/zero_shot.py` takes its
# place: `v*` starts as a mixture of the words that CLIP finds in the picture, and the offsets start
# with `B = 0`.
# What does α do then? Think before you run the cell: which word is nearest to `v*`, and how large
# is `A B`?

# %%
from dte_lab.zero_shot import ZeroShotStart

STEPS = 40
without = DTEPipeline(backbone, ZeroShotStart(backbone))
start = without.personalize(picture, num_steps=0)
tuned = without.personalize(picture, num_steps=STEPS)

# %%
rows, few = {}, [0, 0.5, 1]
for label, state in (
    ("no encoder, 0 steps", start),
    (f"no encoder, {STEPS} steps", tuned),
    (f"encoder, {concept.info['num_steps']} steps", concept),
):
    rows[label] = [
        pipe.generate(state, prompts[0], alpha_blend=alpha, **SAMPLING)[0][0] for alpha in few
    ]
    first, *_, last = (np.asarray(image, float) for image in rows[label])
    spread = np.abs(first - last).mean()
    print(f"{label:<22} α = 0 and α = 1 differ by {spread:5.1f} of 255 per pixel")
show(
    picture_grid(list(rows.values()), [f"α = {alpha:g}" for alpha in few], list(rows)),
    f"Three rows of pictures on the beach at alpha {', '.join(map(str, few))}: no encoder before "
    f"any step, no encoder after {STEPS} steps, and the encoder's tuned concept.",
)

# %% [markdown]
# Before the first step both paths have the same weights, and differ in the word alone: a mixture of
# words, and the real word nearest to it. The first number above is all that α can change there.
# Tuning starts near the prior, and what it learns can then be turned up and down with α. An
# encoder's prediction is away from the prior before the first step.
#
# ## 9. Experiment: what does the blend buy?
#
# Single pictures convince nobody. `python -m dte_lab.evaluation.blending` draws all settings on
# many concepts that no training has seen. Each concept is tuned once, so that the settings differ
# in sampling alone. Measured are
#
# - **identity**: how much more the thing's region resembles the input than it resembles other
#   things, by a network that had no part in training (EfficientNet). In units of the true
#   rendering, so 0 is no more than any thing and 1 is as much as the truth; and **CLIP-I**, the
#   cosine between the pictures' CLIP embeddings, background and all, by the small model's own CLIP;
# - **prompt fidelity**, also called editability: whether the border of the picture shows the right
#   scene, by an exact rule; and **CLIP-T**, the cosine between picture and prompt.
#
# Lines and marks are means over concepts. Bars are bootstrap 95 % intervals, which say how far the
# mean might move with other concepts of the same kind.

# %%
from dte_lab.evaluation.blending import by_setting
from dte_lab.panels.dual_path import alpha_figure

document = json.loads((RESULTS / "blending.json").read_text())
table, run = by_setting(document["rows"]), document["settings"]
count = len({row["concept"] for row in document["rows"]})
print(measured_with(document["versions"]))
print(
    f"n = {count} concepts of the split {run['split']}, {len(run['scenes'])} prompts x "
    f"{run['seeds']} seeds each, {run['num_steps']} tuning steps, {len(table)} settings"
)


# %%
NAMED = {
    "identity_scaled": "identity", "clip_i_small": "CLIP-I", "scene": "right scenes",
    "clip_t_small": "CLIP-T",
}  # fmt: skip


# %%
def mean_of(setting, measure):
    return table[setting][measure].mean()


ends = [("soft", "attention", alpha) for alpha in (0, 1)]
show(
    alpha_figure(table),
    "Four charts over alpha, one line per path with offsets and granularity. On the soft path, per "
    "attention, from alpha 0 to 1: "
    + "; ".join(
        f"{name} from {mean_of(ends[0], key):.2f} to {mean_of(ends[1], key):.2f}"
        for key, name in NAMED.items()
    )
    + ".",
)

# %% [markdown]
# ### The plane
#
# One measure alone is easy to win: draw the input again, or ignore it. What counts is the pair. So
# we plot identity over prompt fidelity; up and to the right is better. The numbers beside the marks
# are α. Each mean has a 95 % confidence *ellipse* (Hotelling's), since both measures come from the
# same concepts and may rise and fall together: a tilted ellipse shows that they do. If two ellipses
# overlap widely, the figure does not tell the settings apart. Where one measure is the same for all
# concepts, as right scenes are at their ceiling, a mark has no ellipse.

# %%
from scipy.stats import spearmanr

from dte_lab.panels.dual_path import plane_figure


def plane_alt(x, y):
    points = (
        f"alpha {key[2]:g}: {row[x].mean():.2f}, {row[y].mean():.2f}"
        for key, row in table.items()
        if key[:2] == ("soft", "attention")
    )
    spread = all(np.ptp(row[m]) > 0 for row in table.values() for m in (x, y))
    said = f"{NAMED[y]} over {NAMED[x]}{' with ellipses' if spread else ''}"
    return f"{said}; soft, attention at (x, y): {'; '.join(points)}."


print(measured_with(document["versions"]))
show(plane_figure(table), plane_alt("scene", "identity_scaled"))

# %% [markdown]
# The same plane by the small model's own CLIP. Is the order of the settings the same? Where the two
# planes disagree, trust neither blindly: CLIP-I also rewards a copied background, and this CLIP had
# a part in training the model that it judges.

# %%
print(measured_with(document["versions"]))
show(plane_figure(table, "clip_t_small", "clip_i_small"), plane_alt("clip_t_small", "clip_i_small"))

# %%
orders = {}
for one, other in (("identity_scaled", "clip_i_small"), ("scene", "clip_t_small")):
    means = [[row[m].mean() for row in table.values()] for m in (one, other)]
    same = next((NAMED[m] for m, v in zip((one, other), means, strict=True) if np.ptp(v) == 0), "")
    order = f"none, since for {same} all are level" if same else (
        f"{spearmanr(*means).statistic:+.2f}")  # fmt: skip
    orders[f"{NAMED[one]} and {NAMED[other]}"] = order
said = "; ".join(f"{pair} {order}" for pair, order in orders.items())
saw(f"{measured_with(document['versions']).capitalize()}.",
    f"Rank correlation of the settings' means: {said}. 1 is the same order.")  # fmt: skip

# %% [markdown]
# ### The differences
#
# Concepts differ more than settings do: some things are just easy. So we compare settings *within*
# each concept and look at the mean of the differences. If its interval lies on one side of 0, the
# settings differ. With many comparisons at 95 %, about one in twenty will do so by luck.

# %%
from dte_lab.panels import bracketed, interval, show_table, verdict

soft, hard, dual = (("soft", "attention", alpha) for alpha in (1, 0, 0.7))
compared = (
    ("blend 0.7 against soft path alone", dual, soft),
    ("blend 0.7 against hard path alone", dual, hard),
    ("offsets on the soft path against the hard one, at 0.7", dual, ("hard", "attention", 0.7)),
    ("granularity attention against block, at 0.7", dual, ("soft", "block", 0.7)),
    ("learned word alone against learned weights alone", ("hard", "attention", 1),
     ("hard", "attention", 0)),
)  # fmt: skip
lines = []
for title, one, other in compared:
    for measure, label in (("identity_scaled", "identity"), ("scene", "right scenes")):
        d = interval(table[one][measure] - table[other][measure])
        lines.append((title, label, bracketed(d, sign="+"), verdict(d)))
heads = ["First against second", "Measure", "Difference", "The first is"]
show_table(lines, heads, f"n = {count}; {measured_with(document['versions'])}")

# %%
told = []
for measure, label in (("identity_scaled", "likeness"), ("scene", "right scenes")):
    d = interval(table[dual][measure] - table[soft][measure])
    told.append(f"in {label} it is {verdict(d)} ({bracketed(d, sign='+')})")
saw(f"The blend at 0.7 against the soft path alone, on {count} things: {' and '.join(told)}. The",
    f"soft path alone keeps {mean_of(soft, 'scene'):.0%} of the scenes, the blend",
    f"{mean_of(dual, 'scene'):.0%}.")  # fmt: skip

# %% [markdown]
# ## When it fails, and why
#
# - **A wrong hard word.** The hard path draws the nearest real word. If that word means another
#   thing, the blend draws a mixture of two things. Print the word before you choose α.
# - **Ghosts.** Two paths that disagree about the layout are averaged inside the network. Middle
#   values of α can show parts of both.
# - **The input's background in every picture.** Tuning did not know of it, or α is too large for
#   how long you tuned. Look at the prompt of tuning (`dte_lab/setting.py`), then lower α before you
#   tune less.
# - **A blend that does nothing.** Then both paths are nearly the same: the offsets are small and
#   `v*` lies near a word. Section 8 starts without offsets, and says what the word alone still
#   changes.
# - **A saturated measure.** When nearly every scene is right, its share cannot tell settings apart;
#   look at the other one. Where the soft path alone gets every setting right, there is no prior to
#   save, and the hard path can only cost likeness.
#
# ## To take along
#
# - Soft path: `v*` and changed weights. Hard path: the nearest word and the model's own weights.
#   `alpha_blend` goes from the prior, 0, to what was learned, 1.
# - Word and weights can be drawn apart. What one says, the other need not say.
# - Because the output projection is affine and the coefficients add up to 1, it is needed once.
# - Every token after `S*` has read it, so the concept does not enter through one token alone.
# - Identity and editability belong on one plane, with their uncertainty.

# %%
from dte_lab.panels import take_along

soft_sums = sums["soft path"]
take_along(
    f"Word alone and weights alone, tuned: {errors['tuned', 'word alone']:.3f} and "
    f"{errors['tuned', 'weights alone']:.3f} from the input; both {errors['tuned', 'both']:.3f}.",
    f"{soft_sums[0]:.1%} of the attention falls on S* itself, {soft_sums[2]:.0%} on tokens that "
    "have read it.",
    f"The blend at 0.7 against the soft path alone, {count} things: {' and '.join(told)}.",
)

# %% [markdown]
# The code is in `dte_lab/dual_path.py` (processor, blocks, schedule), `dte_lab/sampling.py` (what
# happens at each step) and `dte_lab/zero_shot.py`; the experiment in
# `dte_lab/evaluation/blending.py`, and the timing in `benchmarks/dual_path.py`.
