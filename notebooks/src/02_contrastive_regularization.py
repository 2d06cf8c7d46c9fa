# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: Contrastive regularisation
#     promise: why a predicted word should stay among real words, and what holds it there
#     minutes: 80
# ---

# %% [markdown]
# # Contrastive regularisation: why words keep an embedding editable
#
# *Why a predicted word should stay among real words, and what holds it there.*
#
# The encoder turns a picture into a word embedding `v*`, which stands in a prompt as `S*`. It may
# choose any vector. Most vectors are no word at all, and a text encoder that has only ever read
# words need not cope with them. So the method adds a term to the loss that pulls `v*` towards its
# nearest words and away from other things. This notebook takes that term apart.
#
# After this notebook you can
#
# - read an embedding through its nearest words, and say what "near" is worth;
# - show what happens to a prompt when `S*` leaves the words;
# - write the contrastive loss, its mask of negatives and its gradient yourself;
# - say what N, the temperature and the weight do, and why a norm term is needed beside the cosine;
# - judge whether the term helps from an experiment with intervals and an outside judge;
# - read a two-dimensional map of words, and distrust it in the right places.

# %% [markdown] tags=["no-slide"]
# ## Set up
#
# The cell installs the package where it is missing, and leaves an installed PyTorch as it is.

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # one thread, and so one map for one seed

import numpy as np
import torch
import torch.nn.functional as F

from dte_lab import checks
from dte_lab.panels import describe_machine, measured_with, picture_grid, quiet_libraries, saw, show

quiet_libraries()
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %%
from dte_lab import DTEPipeline

pipe = DTEPipeline.from_pretrained("small", device=device)
encoder, table = pipe.encoder, pipe.prompt_encoder.table
results = next(p / "results" for p in Path.cwd().parents if (p / "results").is_dir())

# %% [markdown]
# ## The token table
#
# A text encoder begins with a table: one row of numbers for every token of its vocabulary. Tokens
# are pieces of words, so we keep those that are whole words, made of letters, at least three of
# them (`dte_lab/tokens.py`). Everything below measures against this table.
#
# For each word of the list the cell prints its nearest other words by cosine. Are they alike in
# meaning, alike in looks, or neither? This model has seen pictures of things, so looks count for
# more than they would in a language model. Its words began as pictures, too: the word of a thing
# started at what its drawings look like on white (`dte_lab/world/word_space.py`). Words that stand
# in few captions have neighbours that mean little.

# %%
n, d = table.embeddings.shape
norms = table.embeddings.norm(dim=-1)
print(f"{n:,} words of {d} numbers; norm {table.mean_norm:.2f} ± {norms.std():.2f} (mean ± s.d.)\n")
known = ["cat", "dog", "red", "tree", "car", "beach", "apple", "night", "picture"]
for word in [word for word in known if word in table.words]:
    row = table.embeddings[[table.words.index(word)]]
    _, [names], cosines = table.nearest(row, 6)
    near = ", ".join(f"{w} {c:.2f}" for w, c in zip(names[1:], cosines[0, 1:], strict=True))
    print(f"{word:8} {near}")

# %% [markdown]
# ## The words nearest to predictions
#
# Now the encoder. These things were kept from all training, in every drawing style. So the
# prediction has to say with a vector of its own what no learned word says. Below each picture stand
# the words nearest to its `v*`, with their cosines.

# %%
from dte_lab.world import render_image
from dte_lab.world.sprites import SAMPLE_CONCEPTS

pictures = [render_image(name, "fluent", "white") for name in SAMPLE_CONCEPTS]
predicted = [pipe.personalize(picture, num_steps=0, progress=False) for picture in pictures]
v_stars = torch.cat([concept.v_star for concept in predicted])  # (4, d)

# %%
from dte_lab.panels.contrastive import neighbours_figure

nearest = [pipe.nearest_words(concept.v_star) for concept in predicted]
show(
    neighbours_figure(pictures, SAMPLE_CONCEPTS, nearest),
    "Pictures with the words nearest to their predicted embeddings: "
    + "; ".join(
        f"{name}: {', '.join(word for word, _ in words)}"
        for name, words in zip(SAMPLE_CONCEPTS, nearest, strict=True)
    )
    + ".",
)

# %% [markdown]
# A word of this model can be drawn. Here is each `v*` alone, without any change of weights, beside
# the three real words nearest to it. Are the neighbours things of one kind, of one outline, or of
# one colour? And does `v*` say more than the best of them?

# %%
encode = pipe.prompt_encoder


def drawn_word(concept, word=None):
    """What v* draws on white by itself, or the named word in its place."""
    alone = concept.word_alone()
    alone = alone.weights_alone(encode.word(word)) if word else alone
    options = {"alpha_blend": 1, "num_inference_steps": 12, "progress": False}
    return pipe.generate(alone, "a picture of S* on a white background", **options)[0][0]


rows = [[picture, drawn_word(concept), *(drawn_word(concept, word) for word, _ in words[:3])]
        for picture, concept, words in zip(pictures, predicted, nearest, strict=True)]  # fmt: skip
beside = [f"{name}: {', '.join(word for word, _ in words[:3])}"
          for name, words in zip(SAMPLE_CONCEPTS, nearest, strict=True)]  # fmt: skip
show(
    picture_grid(rows, ["the input", "v* alone", "nearest word", "second", "third"], beside),
    f"Rows: the input, v* alone, and its three nearest words, drawn on white. {'; '.join(beside)}.",
)

# %%
far = torch.stack(
    [
        (pipe.pixels(row[1:]) - pipe.pixels(row[:1])).square().mean((1, 2, 3)).sqrt() / 2
        for row in rows
    ]
)  # (things, v* and three words)
best = far[:, 1:].min(dim=1).values
saw("How far the drawings are from the input (root mean square): "
    + "; ".join(f"{name}, v* {own:.3f}, the best of its words {word:.3f}" for name, own, word
                in zip(SAMPLE_CONCEPTS, far[:, 0].tolist(), best.tolist(), strict=True))
    + f". v* is nearer than each of its words for {int((far[:, 0] < best).sum())} of {len(far)}.",
)  # fmt: skip

# %% [markdown]
# The encoder was taught first to say the *word of the picture*: a linear map of what the thing
# looks like. That word can be computed, since the small world can draw the thing on white. How near
# to it is the prediction still, now that the method's own objective has shaped it, and how near is
# the best real word?

# %%
from dte_lab.backbone import backbone_folder
from dte_lab.world.word_space import PICTURE_WORDS, PictureWords

words_of = PictureWords.load(backbone_folder("small") / PICTURE_WORDS).to(device)
latents = pipe.backbone.encode_images(pipe.pixels(pictures)).float()
taught = words_of(latents)  # (4, d)
to_taught = F.cosine_similarity(v_stars, taught, dim=-1).tolist()
to_real = table.nearest_rows(taught, 1)[0][:, 0].tolist()
lengths = (v_stars.norm(dim=-1) / table.mean_norm).tolist()
for i, name in enumerate(SAMPLE_CONCEPTS):
    print(
        f"{name:12} word of its picture: cosine {to_taught[i]:.2f} to v*, {to_real[i]:.2f} to the"
    )
    print(f"{'':12} nearest real word; v* has {lengths[i]:.2f} times a word's mean length")
closer = sum(a > b for a, b in zip(to_taught, to_real, strict=True))
saw(f"For {closer} of {len(pictures)} things v* is nearer to the word of the picture than any real",
    "word is.")  # fmt: skip

# %% [markdown]
# Are cosines like those above near? Only a comparison can say. The histogram shows how near real
# words are to each other: each word and its nearest other word, and pairs taken at random. The
# marks below the axis are our predictions. A mark within the right-hand hill is as near to a word
# as words are to each other; a mark further right is nearly that word itself; a mark in the
# left-hand hill is as far from every word as two words that have nothing to do with each other. A
# peak close to 1, where there is one, is made of *twins*: words that training only ever saw side by
# side, such as the two parts of a name, so that nothing told them apart.

# %%
from dte_lab.panels.contrastive import nearness_figure

unit = table.embeddings / table.norms[:, None]
cosines = (unit @ unit.T).fill_diagonal_(-1).cpu()
of_nearest = cosines.max(dim=1).values.numpy()
pairs = np.random.default_rng(0).integers(n, size=(2, 5000))
at_random = cosines[pairs[0], pairs[1]].numpy()[pairs[0] != pairs[1]]
print(f"words with a twin (cosine above 0.95): {np.mean(of_nearest > 0.95):.0%}")
marks = {"v* and its nearest word": [words[0][1] for words in nearest]}
print(
    f"nearest other word: median {np.median(of_nearest):.2f} (n = {n:,}); random pairs: "
    f"{np.median(at_random):.2f} (n = {len(at_random):,}); "
    f"v*: {', '.join(f'{c:.2f}' for words in nearest for _, c in words[:1])}"
)
show(
    nearness_figure(of_nearest, at_random, marks),
    f"Histograms of cosines: of words to their nearest other word, median "
    f"{np.median(of_nearest):.2f}; of two random words, median {np.median(at_random):.2f}; and the "
    "predictions as marks below the axis.",
)

# %%
ranks = [np.mean(of_nearest < words[0][1]) for words in nearest]
by_chance = np.mean([np.mean(at_random < words[0][1]) for words in nearest])
of_things = table.embeddings[:, -1].cpu().numpy() > 0  # or of anything else
mixed = (of_things[pairs[0]] != of_things[pairs[1]])[pairs[0] != pairs[1]]
saw(
    "Share of the words that are further from their nearest other word than v* is from a word:",
    ", ".join(f"{rank:.0%} ({name})" for name, rank in zip(SAMPLE_CONCEPTS, ranks, strict=True))
    + f". Random pairs: {by_chance:.0%}. The small hill on the far left are pairs of a word for a "
    f"thing and one for something else: {mixed.mean():.0%} of the pairs, median "
    f"{np.median(at_random[mixed]):.2f}; of the others, {np.median(at_random[~mixed]):.2f}.",
)

# %% [markdown]
# ## What happens far from the words
#
# Why should we care where `v*` lies, as long as it draws the thing? We take one prediction away
# from the words in two ways and ask for four settings each time:
#
# - **longer**: the same direction, multiplied by 8 and by 64;
# - **turned**: the same length, turned by an angle into a random direction, in which no word lies.
#
# Only the soft path draws (`alpha_blend=1`, no weight change), so nothing but the embedding speaks.
# We measure three things. The text encoder turns the prompt into one vector per token, and what
# stands at `S*` leaves its mark on the *other* tokens too. Different real words there make them
# scatter around a mean. How far from that mean does our vector take them? Call it **influence**,
# with 1 for a real word: above 1 it shouts the others down, below 1 it says less than a word does.
# And does the picture obey? The background of the small world can be read exactly from the pixels,
# so the share of right settings needs no judge. And last, how far is the drawing from that of the
# prediction itself, pixel by pixel?

# %%
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.evaluation.edits import SCENE_EDITS
from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES

scenes = SCENE_EDITS[:4]
prompts = [caption("S*", None, scene) for scene in scenes]
concept = predicted[SAMPLE_CONCEPTS.index("cupcake")]
alone = concept.word_alone()
generator = torch.Generator().manual_seed(0)
aside = torch.randn(concept.v_star.shape, generator=generator).to(concept.v_star)
unit = F.normalize(concept.v_star, dim=-1)
aside = F.normalize(aside - (aside * unit).sum() * unit, dim=-1) * concept.v_star.norm()


def turned(degrees):
    angle = torch.tensor(degrees).deg2rad()
    return angle.cos() * concept.v_star + angle.sin() * aside


# %%
moved = {f"length × {factor}": factor * concept.v_star for factor in (1, 8, 64)}
moved |= {f"turned {degrees}°": turned(float(degrees)) for degrees in (45, 90)}


@torch.no_grad()
def other_tokens(v):
    """What the encoder makes of the prompts' tokens other than S*: (prompts * tokens, d)."""
    slots = pipe.prompt_encoder.tokenize(prompts)[1]  # (prompts, L), -1 at other tokens
    return pipe.prompt_encoder(prompts, v)[slots < 0]


some = torch.randperm(n, generator=generator)[:40]
with_words = torch.stack([other_tokens(table.embeddings[[i]]) for i in some.tolist()])
centre = with_words.mean(0)
scatter = (with_words - centre).square().mean().sqrt()


def influence(v):
    """How far v at S* takes the other tokens from their mean over real words; 1 for a word."""
    return ((other_tokens(v) - centre).square().mean().sqrt() / scatter).item()


# %%
drawn, right, away = {}, {}, {}
for label, v_star in moved.items():
    images = pipe.generate(
        replace(alone, v_star=v_star), prompts, seeds=[0], alpha_blend=1,
        num_inference_steps=12, progress=False,
    )  # fmt: skip
    drawn[label] = [row[0] for row in images]
    found = classify_scene(pipe.pixels(drawn[label]))
    right[label] = np.mean(found == [SCENES.index(scene) for scene in scenes])
    start, now = (pipe.pixels(drawn[k]) for k in (next(iter(moved)), label))
    away[label] = (now - start).square().mean().sqrt().item() / 2
    word, cosine = pipe.nearest_words(v_star, 1)[0]
    print(
        f"{label:12} influence {influence(v_star):4.1f}; right settings {right[label]:4.0%} of "
        f"{len(scenes)}; {away[label]:.3f} from the first; nearest word {word} {cosine:.2f}"
    )
of_words = [influence(row[None]) for row in table.embeddings[some]]

# %%
print(f"{len(some)} real words: influence from {min(of_words):.1f} to {max(of_words):.1f}")
show(
    picture_grid([drawn[label] for label in moved], list(scenes), list(moved)),
    "A grid of drawings: rows are the prediction at several lengths and turned by several angles, "
    f"columns the settings {', '.join(scenes)}.",
)

# %%
loud = [label for label, v in moved.items() if influence(v) > max(of_words)]
quiet = [label for label, v in moved.items() if influence(v) < min(of_words)]
lost = [label for label in moved if right[label] < 1]
farthest = max(away, key=away.get)
saw(f"Louder than all {len(some)} real words: {', '.join(loud) or 'none'}; quieter than all of",
    f"them: {', '.join(quiet) or 'none'}. Settings are lost at: {', '.join(lost) or 'none'}.",
    f"The drawing changes most at {farthest} ({away[farthest]:.3f}).")  # fmt: skip

# %% [markdown]
# A vector can fail in two ways. If its influence lies beyond that of every real word, it pushes the
# other tokens where the model was never trained, and settings can be lost. If its influence falls
# below that of real words, nobody is shouted down, but `S*` has stopped saying anything: the
# settings are right and the *thing* dissolves. Which of the two do you see, and in which rows? The
# answer above names them. Settings fill the whole background of this world and are about the
# easiest thing that a prompt can ask for, so do not expect them to break first.
#
# What length does is to drown the position code that is added to every token. Once it is drowned,
# still more length changes little, because the text encoder normalises its inputs in every layer
# (CLIP in Stable Diffusion does so too). Four settings with one seed are few: take the direction
# from this table, not the number.
#
# ## The loss
#
# Let $v_1 … v_N$ be the $N$ words nearest to $v^*$, and $u_1 … u_M$ the embeddings of *other*
# concepts: the rest of the batch, and a bank of recent ones. With $\cos$ for the cosine similarity
# and a temperature $\tau$ the contrastive term is
#
# $$L = -\log \frac{\sum_i e^{\cos(v^*, v_i) / \tau}}
# {\sum_i e^{\cos(v^*, v_i) / \tau} + \sum_m e^{\cos(v^*, u_m) / \tau}}$$
#
# It is small when the words win over the other concepts, and it cares most about what is nearest:
# the smaller $\tau$, the more a single neighbour outweighs the rest. The paper gives neither $N$
# nor $\tau$; ours are in `MethodConfig`.
#
# #### Exercise 1: the contrastive loss
#
# Difficulty 3 of 5 · 15 minutes
#
# Write it for one embedding. The exponential of a number above 88 is more than a 32-bit float can
# hold, and cosines divided by a small temperature get there: the check tries one.
#
# <details>
# <summary>Hint</summary>
#
# The logarithm of a quotient is a difference of logarithms, and `torch.logsumexp(x, dim=0)` is the
# logarithm of the sum of exponentials, computed safely. `torch.cat` puts positives and negatives in
# one row.
#
# </details>


# %% tags=["exercise"]
def contrastive_loss(v, positives, negatives, temperature=0.1):
    """v (d,), positives (N, d), negatives (M, d) -> the contrastive term, a scalar tensor."""
    ### BEGIN SOLUTION
    v = F.normalize(v, dim=-1)
    near = F.normalize(positives, dim=-1) @ v / temperature  # (N,)
    far = F.normalize(negatives, dim=-1) @ v / temperature  # (M,)
    return torch.cat([near, far]).logsumexp(dim=0) - near.logsumexp(dim=0)
    ### END SOLUTION


checks.contrastive_loss(contrastive_loss)

# %% [markdown]
# ### Who is a negative?
#
# Other pictures in the batch may show the same thing, and the bank begins with empty rows, marked
# with the concept −1. Pushing `v*` away from another picture of its own concept would undo what
# the encoder learns; pushing it away from rows of zeros means nothing.
#
# #### Exercise 2: the mask of negatives
#
# Difficulty 2 of 5 · 10 minutes
#
# `concepts` has the concept of each of the B samples of a batch, `bank_concepts` those of the M
# rows of the bank. Return a table of booleans, one row per sample and one column per candidate,
# first the batch and then the bank: true where the candidate is another concept.
#
# <details>
# <summary>Hint</summary>
#
# `a != b[:, None]` compares every element of `a` with every element of `b` and has a row for each
# of `b`. Where must the −1 be looked for, in rows or in columns?
#
# </details>


# %% tags=["exercise"]
def negatives_mask(concepts, bank_concepts):
    """concepts (B,), bank_concepts (M,), -1 for empty rows -> bool (B, B + M)."""
    ### BEGIN SOLUTION
    ids = torch.cat([concepts, bank_concepts])
    return (ids != concepts[:, None]) & (ids != -1)
    ### END SOLUTION


checks.negatives_mask(negatives_mask)

# %% [markdown]
# The package's own function does the same for a whole batch. Here yours, if it is right, is put to
# our predictions, each with its nearest words as positives and the encoder's bank of training
# concepts as negatives. The last line is a random direction for comparison. With all cosines equal
# the term would be the logarithm of 1 + M / N.

# %%
from dte_lab import contrastive

method = encoder.method
bank = encoder.bank[encoder.bank_concepts >= 0]
loss = contrastive.contrastive_loss
one_term = checks.yours(
    "contrastive_loss", lambda v, near, far, t: loss(v[None], near[None], far, temperature=t)
)


def term(v, num_positives=method.num_positives, temperature=method.temperature):
    """The contrastive term of v (1, d) against the bank."""
    (near,) = table.embeddings[table.nearest_rows(v, num_positives)[1]]  # (N, d)
    return one_term(v[0], near, bank, temperature)


# %%
print(f"{method.num_positives} positives, {len(bank)} negatives, temperature {method.temperature}")
for name, v in [*zip(SAMPLE_CONCEPTS, v_stars, strict=True), ("random", aside[0])]:
    print(f"{name:12} contrastive term {term(v[None]).item():.3f}")

# %% [markdown]
# ## The gradient as arrows
#
# A loss acts through its gradient. In a plane we can see all of it. The blue dots are words with
# made-up places, the orange crosses other concepts, the white plus is the origin. Colour shows the
# loss, from dark (low) to yellow (high) on a scale of its own in each map; arrows show the way
# downhill: where `v*` is pushed from there.
#
# - With norm weight 0 every arrow is perpendicular to the line from the origin: a cosine does not
#   see length, so the contrastive term only *turns* `v*`. Nothing keeps it from growing.
# - The norm term $\lVert v^* \rVert^2$ points straight to the origin, and stops the growth. (That
#   is the paper's. Left alone for thousands of steps it would pull `v*` to zero, until the word
#   says nothing. So ours begins only beyond the mean length of a word: `norm_free` in
#   `MethodConfig` is 1, and 0 is the paper's term. The maps show the paper's.)
# - $N$ decides how many words pull. With $N = 1$ each sector of the plane has its own word. The
#   borders between sectors are sharp, because the nearest words change there.
# - A small $\tau$ makes the nearest negative matter alone, with strong arrows close to it and
#   little elsewhere.

# %% tags=["expected:contrastive_loss"]
from dte_lab.panels.contrastive import field_figure, field_row, sliders_panel

toy_words = {
    "cat": (1.0, 0.3), "dog": (0.95, 0.62), "fox": (0.6, 0.9), "bus": (-0.8, 0.75),
    "van": (-1.05, 0.4), "moon": (-0.35, -1.0), "soup": (0.65, -0.85),
}  # fmt: skip
others = [(0.1, 1.05), (-1.0, -0.35), (1.1, -0.25)]
settings = [(1, 0.3, 0), (3, 0.3, 0), (3, 0.05, 0), (3, 0.3, 0.2)]
show(
    field_row(toy_words, others, settings),
    "Four maps of the loss over a plane with seven words and three other concepts: N 1; N 3; N 3 "
    "at a small temperature; N 3 with the norm term. Without it all arrows run around the origin; "
    "with it they turn inwards.",
)

# %% [markdown]
# #### Try it: N, temperature and the norm term
#
# The sliders redraw the map. Find a setting in which `v*` would be pushed away from all words.
#
# <details>
# <summary>One answer</summary>
#
# N 5, τ 1 and norm weight 0.5: among the words every arrow points inwards, to the origin, where no
# word lies. A warm term hardly turns `v*`, and the norm term does the rest. Such a `v*` ends by
# saying nothing.
#
# </details>

# %%
from IPython.display import HTML, display

display(
    sliders_panel(
        {"N": range(1, 6), "τ": (0.03, 0.05, 0.1, 0.3, 1.0), "norm weight": (0, 0.05, 0.2, 0.5)},
        (3, 0.1, 0.05),
        lambda *values: field_figure(toy_words, others, *values),
        lambda n, tau, weight: (
            f"The loss in a plane with N {n}, tau {tau:g}, norm weight {weight:g}"
        ),
    )
)

# %% [markdown]
# #### Exercise 3: the gradient of a cosine
#
# Difficulty 4 of 5 · 15 minutes
#
# Every arrow above is a sum of gradients of cosines. Derive and write the gradient of
# $\cos(v, u) = v \cdot u / (\lVert v \rVert \lVert u \rVert)$ with respect to $v$. Before you
# compute anything: in which direction must it *not* have any part?
#
# <details>
# <summary>Hint</summary>
#
# The derivative of $\lVert v \rVert$ is $v / \lVert v \rVert$. By the quotient rule two parts come
# out: one along the unit vector of $u$ and one along that of $v$. With $\hat v$ and $\hat u$ for
# the unit vectors, it is $\hat u$ minus a multiple of $\hat v$, all divided by the norm of $v$; the
# multiple is what makes it perpendicular to $v$.
#
# </details>


# %% tags=["exercise"]
def cosine_gradient(v, u):
    """v (d,), u (d,) -> gradient of their cosine similarity with respect to v, (d,)."""
    ### BEGIN SOLUTION
    unit, target = v / v.norm(), u / u.norm()
    return (target - (unit @ target) * unit) / v.norm()
    ### END SOLUTION


checks.cosine_gradient(cosine_gradient)

# %% [markdown]
# ### The same for a real prediction
#
# In training, two forces act on `v*`. The diffusion loss wants the picture back; the regulariser
# wants a word. Here are both gradients at a prediction, turned downhill, as arrows in the plane
# that the first two span. The diffusion gradient is a mean over many noises, under the prompt of
# tuning. Which arrow is the longer? If that of the weighted regulariser is much shorter, the term
# is a gentle reminder; if much longer, it decides where `v*` goes. And if they point apart, fitting
# the picture and staying among words are at odds.

# %%
from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import objective
from dte_lab.panels import stream
from dte_lab.panels.contrastive import pulls_figure
from dte_lab.setting import picture_prompts
from dte_lab.tuning import draw_batch

picture = pictures[SAMPLE_CONCEPTS.index("cupcake")]
latents = pipe.backbone.encode_images(pipe.pixels([picture])).float()
COUNT = 32
own_prompts = picture_prompts(pipe.backbone, pipe.pixels([picture]))
batch = draw_batch(pipe.backbone, latents, own_prompts, 0, COUNT, stream(0, "tuning"))
v_star = concept.v_star.clone().requires_grad_()
prediction = EncoderPrediction(v_star, concept.offsets)
with objective(
    pipe.backbone, pipe.prompt_encoder, prediction, batch,
    replace(method, regulariser="none"),
) as terms:  # fmt: skip
    (of_diffusion,) = torch.autograd.grad(terms["diffusion"], v_star)
(of_term,) = torch.autograd.grad(term(v_star), v_star)

# %% tags=["expected:cosine_gradient"]
norm_term = contrastive.norm_loss(v_star, table.mean_norm, method.norm_free)
(of_norm,) = torch.autograd.grad(norm_term, v_star)
pulls = {
    "diffusion loss": -of_diffusion[0].cpu(),
    f"{method.contrastive_weight:g} × contrastive": -method.contrastive_weight * of_term[0].cpu(),
    f"{method.norm_weight:g} × norm": -method.norm_weight * of_norm[0].cpu(),
}
pulls = {name: pull for name, pull in pulls.items() if pull.norm() > 0}  # a short v* has none
pulls["sum"] = torch.stack(list(pulls.values())).sum(0)
lengths = [pull.norm() for pull in pulls.values()]
between = F.cosine_similarity(*list(pulls.values())[:2], dim=0)
print(f"cosine between the diffusion and the contrastive pull: {between:+.2f}")
print(f"the weighted contrastive pull is {lengths[1] / lengths[0]:.2f} times the diffusion pull")
radial = F.cosine_similarity(of_term, v_star, dim=-1).item()
print(f"cosine between the contrastive gradient and v* itself: {radial:+.4f} (exercise 3: 0)")
show(
    pulls_figure(pulls),
    f"Arrows from v* in a plane: diffusion loss, contrastive and norm term with their weights, and "
    f"the sum. The contrastive arrow is {lengths[1] / lengths[0]:.2f} times as long as the first.",
)

# %%
chance = 2 / v_star.numel() ** 0.5  # two standard deviations of random directions
saw(f"The weighted regulariser pulls {lengths[1] / lengths[0]:.2f} times as hard as the picture;",
    "the two", "agree." if between > chance else "are at odds." if between < -chance else
    "are nearly at right angles: one hardly helps or hinders the other.",
    f"v* has {v_star.norm() / table.mean_norm:.2f} times a word's length; beyond",
    f"{method.norm_free:g} the norm term pulls.")  # fmt: skip

# %% [markdown]
# ## Experiment 1: with the term and without
#
# Does it matter in the end? `python -m dte_lab.evaluation.regularisation` tuned `v*` for concepts
# that no training has seen, from the same prediction, with the same pictures and seeds: once with
# the paper's regulariser (contrastive and norm term), once with none. We load what it measured.
#
# An outside judge says whether the nearest words still mean the thing: all-MiniLM-L6-v2, a
# sentence encoder that took no part in any training here, compares them with the concept's true
# name. The intervals are bootstrap 95 % intervals over concepts; the differences are paired, with
# minus without for each concept.

# %%
from dte_lab.evaluation.records import fingerprint
from dte_lab.panels import show_table

experiment = json.loads((results / "regularisation.json").read_text())
made_with = experiment["settings"]
same_encoder = made_with["encoders"]["shipped"] == fingerprint(encoder)
steps, tuning = made_with["tuning"]["num_steps"], made_with["tuning"]
rows = [row for row in experiment["rows"] if row["start"] == "shipped"]
kinds = {"predicted": ("contrastive", 0), "with the term": ("contrastive", steps)}
kinds |= {"without": ("none", steps)}

# %%
of_kind = {(r["concept"], r["regulariser"], r["steps"]): r for r in rows}
lines = []
for name in list(dict.fromkeys(row["concept"] for row in rows))[:6]:
    for label, key in kinds.items():
        row = of_kind[name, *key]
        lines.append((name, label, f"{row['word_similarity']:.2f}", ", ".join(row["words"])))
show_table(
    lines, ["Thing", "v*", "Similarity", "Nearest words"],
    f"{made_with['concepts']} concepts of {made_with['split']}, {steps} steps of "
    f"{tuning['batch_size']} noises; {measured_with(experiment['versions'])}",
)  # fmt: skip

# %% [markdown]
# The number is the judge's similarity between the true name and these words. It has a scale of its
# own: words taken at random are not at 0, and even the judge's favourites are not at 1. The next
# cell prints both ends. Then come the means: above, each measure before and after tuning; below,
# what the term changes. An interval that touches the zero line leaves open whether the term does
# anything to that measure.

# %%
from dte_lab.panels import bracketed, verdict
from dte_lab.panels.regularisation import comparison_figure

# %%
titles = {
    "word_similarity": "similarity of the\nnearest words (MiniLM)",
    "nearest_cosine": "cosine of v*\nto its nearest word",
    "norm": "norm of v*,\nin mean norms of a word",
    "diffusion": "diffusion loss\non fixed noise",
}
own = "own" in {line["start"] for line in experiment["differences"]}
begins = {"shipped": "both from the shipped encoder's prediction"}
begins |= {"own": "each from an encoder pre-trained that way"} if own else {}
scale = experiment["scale"]
print(f"MiniLM similarity of a name to random words {bracketed(scale['random'])}, ", end="")
print(f"to the words that it likes best {bracketed(scale['best'])} (n = {scale['best']['n']})")
low, high = scale["random"]["mean"], scale["best"]["mean"]
found = experiment["means"][0]["word_similarity"]
print(f"the words nearest to the predictions {bracketed(found)}: ", end="")
print(f"{(found['mean'] - low) / (high - low):.0%} of the way from random to best")


# %%
def of_start(key, start):
    return [line for line in experiment[key] if line["start"] == start]


names_of = {measure: title.replace("\n", " ") for measure, title in titles.items()}
for start, label in begins.items():
    after = of_start("differences", start)[-1]
    show_table(
        [(names_of[m], bracketed(after[m], sign="+"), verdict(after[m])) for m in titles],
        ["Measure", "With the term minus without", "With the term it is"],
        f"{label}, after {steps} steps (n = {after['norm']['n']})",
    )

# %%
means, differences = (of_start(key, "shipped") for key in ("means", "differences"))
after = differences[-1]
show(
    comparison_figure(means, differences, titles),
    f"Four measures before and after tuning, {begins['shipped']}, with the contrastive term and "
    "without, and the paired differences: "
    + "; ".join(f"{name} {bracketed(after[m])}" for m, name in names_of.items()) + ".",
)  # fmt: skip

# %% [markdown]
# How to read it. The term acts on the two measures in the middle, so a difference there says only
# that it does what it is told. Whether words near `v*` *mean* more is the first measure, and the
# term may well not reach it: it pulls towards whatever words are nearest, be they right or wrong.
# The last measure may show a price, but mind its prompt: it is "a picture of S*", without the
# scene, which the prompt of tuning names. So a larger diffusion loss with the term can mean a worse
# fit of the thing, or an `S*` that carries less of the scene. The tables above have the verdicts.
#
# ### Four encoders
#
# The paper sets the term against three others: no term at all, L2 to the word of the thing's class,
# and `v*` replaced by its nearest word. `python -m dte_lab.evaluation.encoders` trains one encoder
# of each kind, alike but for this. Two come with the package: the one that you have used so far,
# with the contrastive term, and `small/none`. Here is what they predict. Whose words are nearer to
# `v*`, and whose fit the thing better? The cell says the first; the second is the last column of
# the last table below, by the outside judge.

# %%
from dte_lab.encoder import load_encoder

shipped = {
    "contrastive": pipe,
    "none": DTEPipeline(pipe.backbone, load_encoder("small/none", pipe.backbone)),
}
near, lines = {kind: [] for kind in shipped}, []
for name, picture in zip(SAMPLE_CONCEPTS, pictures, strict=True):
    for kind, of_kind in shipped.items():
        words = of_kind.personalize(picture, num_steps=0, progress=False).nearest_words
        near[kind].append(words[0][1])
        lines.append((name, kind, f"{words[0][1]:.2f}", ", ".join(word for word, _ in words)))
show_table(lines, ["Thing", "Trained with", "Cosine", "Nearest words"])
saw("Mean cosine to the nearest word:",
    "; ".join(f"{np.mean(cosines):.2f} ({kind})" for kind, cosines in near.items()) + ".",
)  # fmt: skip

# %% [markdown]
# ### In pictures
#
# Words are a means. What we want is a thing that is itself *and* does as the prompt says. So these
# encoders drew the things of the `test` split in ten scenes: from their prediction and after tuning
# (`dte evaluate`; how, is in `results/editability/run.json`). *Identity* is 0 for any other thing
# and 1 for true pictures, as an outside network sees it. The differences are paired again. An
# editable word that costs no identity would be a difference above zero in the second column and
# none below it in the first.
#
# The dual path (notebook 04) holds the prompt whatever `v*` does. So there are two figures: with
# it, as the method draws, and with the soft path alone, where `v*` has to be editable by itself.

# %%
from dte_lab.evaluation.records import read_csv
from dte_lab.evaluation.report import paired, summarise

editability = json.loads((results / "editability" / "run.json").read_text())
print(measured_with(editability["versions"]))
rows = read_csv(results / "editability" / "measures.csv")
summary = summarise(rows)
titles = {
    "identity_scaled": "identity",
    "scene": "share of pictures\nwith the right scene",
    "fidelity": "harmonic mean\nof the two",
    "clip_t_small": "CLIP-T (small):\npicture and prompt",
}


# %%
def with_and_without(label):
    """Means of both encoders, and their paired differences, drawn as `label` says."""
    kinds = {label: "contrastive", f"{label}@encoder=small/none": "none"}
    means = [m | {"regulariser": kinds[m["method"]]} for m in summary if m["method"] in kinds]
    return [[line | {"after": line["steps"] > 0} for line in lines]
            for lines in (means, paired(rows, *kinds))]  # fmt: skip


# %%
names_of = {measure: title.replace("\n", " ") for measure, title in titles.items()}
for path, label in {"dual path": "dte", "soft path alone": "dte@alpha_blend=1"}.items():
    means, differences = with_and_without(label)
    show_table(
        [(d["steps"], *(bracketed(d[m], sign="+") for m in titles)) for d in differences],
        ["Steps", *names_of.values()],
        f"{path}: with the term minus without (n = {differences[0]['scene']['n']})",
    )
    after = "; ".join(f"{name} {bracketed(differences[-1][m])}" for m, name in names_of.items())
    show(
        comparison_figure(means, differences, titles),
        "Identity, right scenes, their harmonic mean and CLIP-T before and after tuning, for "
        f"encoders trained with the contrastive term and without, {path}; and the paired "
        f"differences: {after}",
    )

# %%
scenes_of = {label: [line for line in summary if line["method"] == label]
             for label in ("dte", "dte@alpha_blend=1")}  # fmt: skip
kept = "; ".join(
    f"{path} {', '.join(format(line['scene']['mean'], '.3f') for line in scenes_of[label])}"
    for path, label in (("dual path", "dte"), ("soft path alone", "dte@alpha_blend=1"))
)
at = ", ".join(str(line["steps"]) for line in scenes_of["dte"])
saw(f"Right scenes with the term, at {at} steps: {kept}. 1 is the ceiling, where no",
    "regulariser has anything to save.")  # fmt: skip

# %% [markdown]
# How to read it. Look at the scale of the second column first. Where a measure stands at its
# ceiling, as right scenes may with the dual path, the term has nothing to give, and what holds `v*`
# beside the words leaves it less free to be this one thing. The term can show what it is for where
# tuning costs scenes: with the soft path alone, if anywhere. If right scenes stand at the ceiling
# there as well, these settings are too easily kept for the term to have anything to save.
#
# And the other two? The tables below have the same differences from the encoder without a term,
# dual path, for each kind that has been trained for the present model; where L2 and nearest word
# are missing, that is still to be done. The last number is the outside judge's: how much nearer the
# words near `v*` come to the thing's name. First: how many different words stand nearest to the
# predictions?

# %%
labels = {"contrastive": "dte", "none": "dte@encoder=small/none"}
labels |= {
    kind: label
    for kind in ("l2", "nearest")
    for label in sorted({row.method for row in rows})
    if label.endswith(f"regulariser-{kind}/encoder")
}
lines = []
for kind, label in labels.items():
    first = {
        row.concept: row.nearest_words.split()[0]
        for row in rows
        if (row.method, row.steps) == (label, 0)
    }
    lines.append((kind, len(set(first.values())), len(first)))
show_table(lines, ["Trained with", "Different nearest words", "Things"])

# %%
measured = {"identity_scaled": "identity", "scene": "scene", "fidelity": "harmonic mean"}
measured |= {"word_similarity": "words (MiniLM)"}
lines = [
    (kind, line["steps"], *(bracketed(line[m], sign="+") for m in measured))
    for kind in labels if kind != "none"
    for line in paired(rows, labels[kind], labels["none"])
]  # fmt: skip
show_table(lines, ["Trained with", "Steps", *measured.values()], "Minus the encoder without a term")

# %% [markdown]
# The first table shows what became of the words: an encoder that says few different ones leaves the
# thing to the offsets. An interval that lies on one side of 0 is a difference; most may well not be
# told apart here.
#
# ### On the map
#
# A path of `v*` has as many dimensions as the embedding. To look at it we need a plane. **UMAP**
# lays out the words so that neighbours stay neighbours as far as a plane allows.
#
# How the paths got onto the map: UMAP's own `transform` misplaces points that leave the cloud, and
# when whole paths take part in the fit, each becomes an island, because the steps of a path are
# each other's nearest neighbours. So the map is made of words alone, and each `v*` stands at the
# weighted mean of its eight nearest words, with weights from a softmax of cosines
# (`dte_lab/evaluation/word_map.py`). Words whose nearest word is no nearer than random pairs
# get are left out: they have no neighbourhood that a map could show. So are words that name no
# thing. In this model they live apart, by the sign of the last entry of their embedding
# (`dte_lab/world/word_space.py`), and would be an island far away from everything else. Do the
# words for settings live among the things? The cell says it. Of the others every third is shown.
#
# What a map like this **cannot show**:
#
# - distance from the words: `v*` is always drawn between its neighbours, however far it is from
#   all of them. The curves further down are there for that;
# - length: the map knows cosines only;
# - most neighbourhoods: the cell prints which share of the ten nearest words survives the flight to
#   the plane, for words and for predictions. Distances between groups, and the empty space, mean
#   nothing.

# %%
from dte_lab.evaluation.v_star_paths import VStarPath, read_paths
from dte_lab.evaluation.word_map import neighbours_kept, place, word_positions

for word in ("beach", "night", "red", "the", "cat"):
    if word in table.words:
        own = of_things[table.words.index(word)]
        print(f"{word:8} {'among the words of things' if own else 'among the others'}")
has_neighbours = np.flatnonzero((of_nearest > np.quantile(at_random, 0.995)) & of_things)
has_neighbours = has_neighbours[::3]  # so that the map can be read
words = [table.words[i] for i in has_neighbours]
embeddings = table.embeddings[has_neighbours].cpu()
positions = word_positions(embeddings)


# %%
def tuning_path(picture, kind, num_steps=12):
    """Where v* goes in tuning from the encoder's prediction, with a regulariser of this kind."""
    states = []
    last = pipe.personalize(
        picture, num_steps, progress=False, method=replace(method, regulariser=kind),
        callback=lambda state: states.append(state["v_star"]),
    )  # fmt: skip
    return VStarPath(list(range(num_steps + 1)), torch.cat([*states, last.v_star]))


watched = made_with["watched"]
if same_encoder:  # longer ones, and those of pre-training
    stored = read_paths(results / "regularisation.safetensors")
    vectors = {tuple(key.split(".")): path for key, path in stored.items()}
else:  # what is stored lies in another model's space of words
    vectors = {
        ("tuning", kind, name): tuning_path(picture, kind)
        for kind in ("contrastive", "none")
        for name, picture in zip(SAMPLE_CONCEPTS, pictures, strict=True)
    }

# %%
vectors = dict(sorted(vectors.items(), key=lambda item: SAMPLE_CONCEPTS.index(item[0][2])))
vectors = {key: path for key, path in vectors.items() if key[2] in watched}
paths = {key: place(v, embeddings, positions) for key, (_, v) in vectors.items()}
everything = torch.cat([v for _, v in vectors.values()])
ends = F.normalize(torch.cat([v[[0, -1]] for _, v in vectors.values()]), dim=-1)
named = (ends @ F.normalize(embeddings, dim=-1).T).topk(3).indices.flatten().tolist()
kept = neighbours_kept(embeddings, positions, embeddings, positions)
kept_of_paths = neighbours_kept(
    everything, np.concatenate(list(paths.values())), embeddings, positions
)
print(f"{len(embeddings):,} of {n:,} words; {len(paths)} paths with {len(everything)} points")
print(f"of ten nearest words the map keeps {kept:.0%} for words, {kept_of_paths:.0%} on the paths")

# %%
from dte_lab.panels.word_map import hover_view, map_figure, v_star_figure, zoom_figure

phases = sorted({phase for phase, _, _ in paths})
show(
    map_figure(positions, words, paths, named),
    f"Two maps of {len(embeddings)} words as grey dots with the paths of {len(watched)} predicted "
    f"embeddings ({', '.join(phases)}), left with the contrastive term, right without. The words "
    "nearest to the ends of the paths are named.",
)

# %% [markdown]
# Each path begins at the open mark and ends at the filled one. Solid lines are tuning; dotted ones,
# where they were stored for this encoder, are pre-training, in which its prediction for these
# held-out pictures moves. How far does tuning move a word on the whole map? (In cosines, which mean
# more than distances on a map, it is said below.) Named are the words that are truly nearest to the
# ends of the paths; they are where the map put them, and that need not be beside the mark. From
# close by, tuning alone, with more words:

# %%
show(
    zoom_figure(positions, words, paths, "tuning", named),
    f"The paths of {', '.join(watched)} during tuning from close by, above with the contrastive "
    "term and below without, among the words around them.",
)

# %% [markdown]
# And here is what the map leaves out. The dashed line without the term is free to leave the words
# and to grow. Do the two part, and by which step?

# %%
for phase in phases:
    curves = {}
    for (of, kind, name), (at, v) in vectors.items():
        if of == phase:
            cosine = table.nearest_rows(v.to(device))[0][:, 0].cpu()
            norm = v.norm(dim=-1) / table.mean_norm
            curves[kind, name] = at, {"cosine": cosine.tolist(), "norm": norm.tolist()}
    last = {key: values["cosine"][-1] for key, (_, values) in curves.items()}
    show(
        v_star_figure(
            curves,
            {"cosine": "cosine to the\nnearest word", "norm": "norm, in mean\nnorms of a word"},
            f"step of {phase}",
        ),
        f"Cosine to the nearest word and norm of v* over {phase}, with the term and without. At "
        f"the end the cosine is "
        + ", ".join(f"{cosine:.2f} ({name}, {kind})" for (kind, name), cosine in last.items())
        + ".",
    )

# %%
gaps = [last["contrastive", name] - last["none", name] for name in watched]
drift = {
    (kind, name): F.cosine_similarity(v[[0]], v[[-1]]).item()
    for (of, kind, name), (_, v) in vectors.items() if of == "tuning"
}  # fmt: skip
nearer = sum(gap > 0 for gap in gaps)
parted = []
for name in watched:
    (at, cosines), (_, others) = ((a, v["cosine"]) for a, v in (
        curves["contrastive", name], curves["none", name]))  # fmt: skip
    apart = (step for step, one, two in zip(at, cosines, others, strict=True) if one - two > 0.05)
    parted.append(f"{name} {next(apart, 'never')}")
saw(f"By more than 0.05 in cosine they part at step: {', '.join(parted)}.",
    f"With the term v* ends nearer to a word for {nearer} of {len(gaps)} things,",
    f"by {np.mean(gaps):+.3f} in cosine on average. From its start v* turned to a cosine of",
    f"{min(drift.values()):.2f} at least, {max(drift.values()):.2f} at most.")  # fmt: skip

# %% [markdown]
# #### Try it: hover over the words
#
# Move the pointer over a grey dot to read the word, and over a coloured one to read the step and
# the words nearest to `v*` there. The view works without a network, but needs Jupyter or Colab: a
# page that shows stored notebooks may leave it out, and the figures above stand in for it.

# %%
notes = {}
for (phase, kind, name), (at, v) in vectors.items():
    _, near, cosine = table.nearest(v.to(device), 3)
    notes[phase, kind, name] = [
        f"{name}, {phase} step {step}: {', '.join(names)} ({best:.2f})"
        for step, names, best in zip(at, near, cosine[:, 0].tolist(), strict=True)
    ]
display(HTML(hover_view(positions, words, paths, notes)))

# %% [markdown]
# ## N, temperature and weight, for real
#
# The toy had no picture to fit. Here are real tunings, each with another N, temperature and weight
# of the contrastive term, from the same predictions, of things on white; the script measured them
# all beforehand. Each dot is one setting, a mean over a few concepts. To the right, `v*` is nearer
# to a word; further down, it fits the picture better. The circle marks the setting of the sliders.
# On the right *run it live*: it tunes a thing with that setting and draws it under a prompt of your
# own.
#
# With N = 1 the term pulls at the nearest word and nothing else. With a large N and a large
# temperature all N words pull alike, and their mean need not be nearer to any one of them: the
# cosine to the nearest word may even fall.

# %%
from dte_lab.panels.live import with_live
from dte_lab.panels.regularisation import sweep_figure, sweep_means

sweep = experiment["sweep"]
axes = {"nearest_cosine": "cosine of v* to its nearest word", "diffusion": "diffusion loss"}
table_of = sweep_means(sweep, [*axes, "word_similarity"])
options = [sorted({key[i] for key in table_of}) for i in range(3)]
print(measured_with(experiment["versions"]))
print(f"{len(table_of)} settings, means over {len({row['concept'] for row in sweep})} concepts")


# %%
def describe(*setting):
    cell = table_of[setting]
    return (
        f"N {setting[0]}, temperature {setting[1]:g}, weight {setting[2]:g}: cosine to the nearest "
        f"word {cell['nearest_cosine']:.3f}, diffusion loss {cell['diffusion']:.3f}"
    )


# %%
def draw(prompt, n, temperature, weight):
    """Tune word and weights of the first picture anew with these settings, and draw it."""
    method = replace(
        encoder.method, num_positives=n, temperature=temperature, contrastive_weight=weight
    )
    tuned = pipe.personalize(pictures[0], method=method, progress=False)
    return pipe.generate(tuned, prompt, progress=False)[0][0]


panel = sliders_panel(
    dict(zip(("N", "τ", "weight"), options, strict=True)),
    (options[0][1], options[1][1], options[2][-1]),
    lambda *setting: sweep_figure(table_of, setting, axes),
    describe,
)
display(with_live(panel, draw, "a picture of S* at night", pictures[0]))

# %% [markdown]
# The same for a page without sliders: two of the measures as maps, and how far all three range.

# %%
from dte_lab.panels.regularisation import sweep_grid

measures = {"nearest_cosine": "cosine to the nearest word", "diffusion": "diffusion loss"}
show(
    sweep_grid(table_of, measures),
    "Heat maps over N and temperature, one column per weight: "
    + "; ".join(describe(*setting) for setting in list(table_of)[:: len(table_of) // 4])
    + ".",
)
spread = {m: [cell[m] for cell in table_of.values()] for m in (*measures, "word_similarity")}
named = measures | {"word_similarity": "words alike to the name (MiniLM)"}
lines = [(named[m], f"{min(found):.3f}", f"{max(found):.3f}") for m, found in spread.items()]
show_table(lines, ["Measure", "Least", "Most"], "Over all settings")

# %%
top = {
    m: max(table_of, key=lambda s: table_of[s][m]) for m in ("nearest_cosine", "word_similarity")
}
saw(f"{measured_with(experiment['versions']).capitalize()}. Nearest to a word:",
    describe(*top["nearest_cosine"]) + ". Words most alike to the name by the outside judge:",
    describe(*top["word_similarity"]) + ".")  # fmt: skip

# %% [markdown]
# ## Where it fails
#
# - **Wrong neighbours.** The term trusts the nearest words. Where the prediction lies beside words
#   for other things, it holds `v*` there, and more firmly the larger the weight.
# - **No word near.** Even a vocabulary of thousands may have nothing near a new thing. Look at the
#   marks under the histogram: one on the left would have no neighbour worth the name.
# - **A weight that hides in the optimiser.** AdamW, which moves `v*`, divides every gradient by its
#   own size. A term that is small beside the diffusion loss stays small; one that is the only one
#   acts in full.
# - **One encoder of each kind.** Others, trained from another seed, would differ from these by
#   chance, and the intervals, over concepts, do not know of it. `dte evaluate --experiment
#   regulariser` draws edits with every regulariser of `dte_lab/contrastive.py`, all from the same
#   prediction.
#
# ## To take along
#
# - An embedding is near or far only in comparison: know how near real words are to each other.
# - A word can be drawn: look at what `v*` says alone, beside what its neighbours say.
# - The contrastive term turns `v*` towards its nearest words and away from other things. It does
#   not see length; the norm term does.
# - Computing log and sum of exponentials together keeps a small temperature safe.
# - A map of words is a drawing. Ask how many neighbours it keeps, and put the measured distance
#   beside it.

# %%
from dte_lab.panels import take_along

with_term = of_start("differences", "shipped")[-1]
take_along(
    f"v* alone draws nearer to the input than all its nearest words for "
    f"{int((far[:, 0] < best).sum())} of {len(far)} things.",
    f"In {steps} steps the term takes v* nearer to a word, by "
    f"{bracketed(with_term['nearest_cosine'], sign='+')} in cosine; what the words mean is "
    f"{verdict(with_term['word_similarity'])}, {bracketed(with_term['word_similarity'], sign='+')} "
    "(MiniLM).",
    f"An encoder trained with it, against one without, harmonic mean after tuning: "
    f"{bracketed(paired(rows, labels['contrastive'], labels['none'])[-1]['fidelity'], sign='+')}.",
    f"The map keeps {kept:.0%} of the ten nearest words.",
)

# %% [markdown]
# The code is short: `dte_lab/contrastive.py` has the terms, `dte_lab/tokens.py` the words,
# `dte_lab/evaluation/regularisation.py` the experiment.
