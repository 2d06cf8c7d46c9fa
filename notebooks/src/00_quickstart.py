# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: Quickstart
#     promise: from one picture to the concept in six new settings in two minutes
#     minutes: 60
# ---

# %% [markdown]
# # Quickstart: one picture in, new settings out
#
# *From one picture to the concept in six new settings in two minutes.*
#
# You have one picture of a thing. You want to see the same thing on a beach, at night, in the
# snow. A text-to-image model cannot do that by itself: you would have to describe your thing in
# words, and words fit many things. The **tuning-encoder** of
# [Arar et al. 2023](https://arxiv.org/abs/2307.06925) looks at the picture and predicts two things:
# a new *word* for it, written `S*` in prompts, and a change of the model's weights. A few
# optimisation steps then sharpen both.
#
# After this notebook you can
#
# - personalize a small text-to-image model with one picture, in five lines of Python;
# - say what the encoder predicts, and what the twelve tuning steps add;
# - say what the predicted word says alone, and what the weight change adds;
# - read a predicted word through its nearest real words, and the weight change through its size;
# - choose between likeness and freedom with `alpha_blend`;
# - tell by looking when it has failed, and why.

# %% [markdown] tags=["no-slide"]
# ## Set up
#
# The cell installs the package where it is missing, and leaves an installed PyTorch as it is.

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
from pathlib import Path

import torch

from dte_lab import checks
from dte_lab.panels import describe_machine, quiet_libraries, saw, show

quiet_libraries()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %% [markdown]
# **The small backbone** is a complete text-to-image model, built like Stable Diffusion but with
# pictures of 64 × 64 pixels. It knows a small world: drawn things before plain and painted
# backgrounds, emoji in several styles and the icons of many other sets, some 17,000 drawings in
# all. Some things were kept from it during all training. Our picture shows one of those, so
# neither the model nor the encoder has ever seen it.

# %%
from dte_lab.world import SCENES, STYLES, concepts, render_image, split_names

NAME = "cupcake"
picture = render_image(NAME, "fluent", "white")
print(f"emoji: {len(split_names('train'))} things to train on, in {len(STYLES)} styles")
print(f"backgrounds: {len(SCENES)} scenes")
print(f"kept back: {len(split_names('val'))} things to choose with, among them the {NAME}, and")
print(f"{len(split_names('test'))} to test with")
assert concepts()[NAME].split == "val"

# %% [markdown]
# ## The five lines

# %%
import tempfile

prompts = [
    "a picture of S* on the beach",
    "a picture of S* at night",
    "a picture of S* in the snow",
    "a picture of S* under water",
    "a picture of S* in the desert",
    "a picture of S* at sunset",
]
file = Path(tempfile.mkdtemp()) / "concept.safetensors"

# %%
from dte_lab import DTEPipeline

pipe = DTEPipeline.from_pretrained("small", device=device)
concept = pipe.personalize(picture)
images = pipe.generate(concept, prompts, seeds=[0])
concept.save(file)

# %%
from dte_lab.panels import picture_grid

print(
    f"learned in {concept.seconds:.0f} s with {concept.info['num_steps']} tuning steps; "
    f"the concept's file has {file.stat().st_size / 1e6:.1f} MB"
)
settings = [prompt.removeprefix("a picture of ") for prompt in prompts]
show(
    picture_grid([[picture] + [row[0] for row in images]], ["the input"] + settings),
    f"The input picture, a {NAME} on white, then six drawings of it: {', '.join(settings)}.",
)

# %% [markdown]
# The shapes are rough: this model is tiny. Look for outlines, colours and parts: is it *this*
# thing, and is the setting the one asked for?
#
# `S*` stands for your thing and can be anywhere in a prompt. The prompts are made of words that the
# small model has read: *on the beach, on the grass, in the forest, in space, on a wooden table, on
# a red background …* The saved file holds the new word and the weight change. `Concept.load` reads
# it, and so does the command line: `dte generate concept.safetensors --prompt "S* in space"`.

# %% [markdown]
# ## What happened inside
#
# ### 1. A word that says what the thing looks like
#
# The encoder's first head looks at the picture and predicts `v*`, a vector such as every word of
# the vocabulary has one. It was first taught to be the *word of the picture*: as near as a single
# word can come to what the thing looks like on white. The model draws such words. (This is ours;
# the paper does not say where its encoder begins. `dte_lab/world/word_space.py` has it.) Then it
# learned the method's own objective. So `v*` lies among the real words: which are near? And are
# they alike in kind, in outline, or only in colour?

# %%
from dte_lab.panels.quickstart import words_figure

predicted = pipe.personalize(picture, num_steps=0, progress=False)
table = pipe.prompt_encoder.table
words, cosines = zip(*pipe.nearest_words(predicted.v_star, k=8), strict=True)
print(f"{len(table):,} words; {NAME!r} is {'one' if NAME in table.words else 'none'} of them")
show(
    words_figure({"v* as predicted": cosines}, words, picture),
    f"The input picture, and bars of the cosine similarity of the predicted v* with its nearest "
    f"words: {', '.join(f'{w} {c:.2f}' for w, c in zip(words, cosines, strict=True))}.",
)

# %% [markdown]
# A prediction has two parts, and either can draw without the other. `word_alone()` keeps `v*` and
# leaves the model's weights as they are. `weights_alone(word)` keeps the weight change and puts an
# empty word in the place of `v*`; we take *thing*. For comparison, the last row has the nearest
# real word with the model's own weights. Which part knows the outline, which the colours?

# %%
white = "a picture of S* on a white background"
encode, alone = pipe.prompt_encoder, predicted.word_alone()
parts = {
    "word and weights": predicted,
    "word alone": alone,
    "weights alone": predicted.weights_alone(encode.word("thing")),
    f"nearest word, {words[0]}": alone.weights_alone(encode.word(words[0])),
}
by_part = {
    label: [row[0] for row in pipe.generate(part, [white, *prompts[:2]], alpha_blend=1,
                                            progress=False)]
    for label, part in parts.items()
}  # fmt: skip

# %%
show(
    picture_grid(
        [[picture, *row] for row in by_part.values()],
        ["the input", "S* on white", *settings[:2]], list(by_part),
    ),
    f"Rows: {'; '.join(by_part)}. Columns: the input, then the thing on white, on the beach and at "
    "night.",
)  # fmt: skip

# %%
true = pipe.pixels([picture])
errors = {
    label: (pipe.pixels([row[0]]) - true).square().mean().sqrt().item() / 2
    for label, row in by_part.items()
}
for label, error in errors.items():
    print(f"{label:28} {error:.3f} from the input (root mean square, colours from 0 to 1)")
order = sorted(errors, key=errors.get)
saw(f"On white, pixel by pixel, the nearest to the input is: {order[0]}; then {order[1]}; then",
    f"{order[2]}; last {order[3]}.")  # fmt: skip

# %% [markdown]
# ### 2. Predicted only, and tuned
#
# One pass through the encoder turns the picture into the word embedding `v*` and the weight change.
# That is the *prediction*. The twelve tuning steps start from there. With `num_steps=0` we get the
# prediction alone; the seeds are the same in both rows. Is the thing more itself in the lower row?
# And is every setting still the one that was asked for?

# %%
drawn = pipe.generate(predicted, prompts, seeds=[0])
rows = [[picture] + [row[0] for row in result] for result in (drawn, images)]
show(
    picture_grid(rows, ["the input"] + settings, ["predicted only", "tuned"]),
    "Two rows of the same six settings: drawn from the prediction alone, and after tuning.",
)

# %%
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.world.captions import scene_words

asked = [next(s for s in SCENES if prompt.endswith(scene_words(s))) for prompt in prompts]
counts = {}
for label, result in (("predicted", drawn), ("tuned", images)):
    found = [SCENES[i] for i in classify_scene(pipe.pixels([row[0] for row in result]))]
    wrong = [f"{a} ({f})" for a, f in zip(asked, found, strict=True) if a != f]
    counts[label] = f"{len(asked) - len(wrong)} of {len(asked)} settings right"
    counts[label] += f", not {', '.join(wrong)}" if wrong else ""
saw("The border of a picture says which setting it shows.",
    *(f"{label.capitalize()}: {count}." for label, count in counts.items()))  # fmt: skip

# %% [markdown]
# ### 3. The nearest real words, before and after
#
# `v*` is a vector in the same space as the embeddings of all words, so we can ask which words it
# lies close to. The method *wants* it close to some. The paper's reason: a vector far from every
# word can still draw the thing, but gets on badly with the other words of a prompt. So a
# contrastive term in the loss pulls `v*` towards its nearest words and away from the embeddings of
# other things. How far do the tuning steps move it?

# %%
import torch.nn.functional as F

both = [word for c in (predicted, concept) for word, _ in pipe.nearest_words(c.v_star, k=6)]
words = list(dict.fromkeys(both))
rows = table.embeddings[[table.words.index(word) for word in words]]  # (n, d)
cosines = {
    name: F.cosine_similarity(rows, c.v_star).tolist()
    for name, c in (("predicted", predicted), ("tuned", concept))
}
moved = F.cosine_similarity(predicted.v_star, concept.v_star).item()

# %% tags=["expected:nearest_words"]
print(f"cosine between the predicted and the tuned v*: {moved:.3f}")
for c, label in ((predicted, "predicted"), (concept, "tuned")):
    print(f"length of v* {label}: {c.v_star.norm() / table.mean_norm:.2f} of a word's")
show(
    words_figure(cosines, words),
    "Bars of the cosine similarity with real words, predicted and tuned: "
    + "; ".join(
        f"{word} {before:.2f}, {after:.2f}"
        for word, before, after in zip(words, *cosines.values(), strict=True)
    )
    + ".",
)

# %%
near = [{word for word, _ in pipe.nearest_words(c.v_star, k=6)} for c in (predicted, concept)]
best = [c.nearest_words[0] for c in (predicted, concept)]
saw(f"{len(near[0] & near[1])} of the six nearest words stay. Nearest: {best[0][0]}",
    f"({best[0][1]:.2f}) as predicted, {best[1][0]} ({best[1][1]:.2f}) once tuned.")  # fmt: skip

# %% [markdown]
# #### Exercise 1: the nearest words
#
# Difficulty 2 of 5 · 10 minutes
#
# Write the function behind the chart. `v` is one embedding with `d` numbers, `embeddings` has one
# row per word, and the result is a list of the `k` words with the largest cosine similarity, best
# first.
#
# <details>
# <summary>Hint</summary>
#
# The cosine of two vectors is the dot product of the vectors after each is divided by its length.
# `F.normalize(x, dim=-1)` divides every row by its length; `scores.topk(k).indices` says where the
# largest are.
#
# </details>


# %% tags=["exercise"]
def nearest_words(v, embeddings, words, k=5):
    """v (d,), embeddings (n, d), n words -> the k words nearest to v by cosine, best first."""
    ### BEGIN SOLUTION
    cosine = F.normalize(embeddings, dim=-1) @ F.normalize(v, dim=-1)  # (n,)
    return [words[i] for i in cosine.topk(k).indices.tolist()]
    ### END SOLUTION


checks.nearest_words(nearest_words)

# %% [markdown]
# ### 4. Twelve steps, one by one
#
# Each tuning step adds noise to the input picture, asks the model to take it out again, and moves
# `v*` and the weight change a little, down the loss. The prompt says what the picture
# shows besides the thing, such as "a picture of S* on a white background"; CLIP names the setting
# (`picture_prompts` in `dte_lab/setting.py`). What the prompt says, `S*` need not say.
#
# We tune once more with a callback that keeps every state. The seed is the same, and so is the
# result. Each picture is drawn from the same initial noise.
#
# The loss that tuning sees is noisy: every step draws new noise, some noise is easier to remove
# than other, and so the dotted curve jumps about. To see progress we need the same noises at every
# step; the solid curve is the mean over 32 of them.
#
# The pictures are drawn under "a picture of S*", which leaves the setting open. Watch the
# background as well as the thing: how much of the input's own comes along all the same?

# %%
from dataclasses import replace

from dte_lab.encoder import EncoderPrediction
from dte_lab.objective import Batch, objective
from dte_lab.setting import picture_prompts

(prompt,) = picture_prompts(pipe.backbone, pipe.pixels([picture]))
print(f"tuning's prompt: {prompt!r}")
record = []
again = pipe.personalize(picture, callback=record.append)
assert torch.equal(again.v_star, concept.v_star)
states = [replace(concept, v_star=r["v_star"], offsets=r["offsets"]) for r in record] + [concept]

N = 32
generator = torch.Generator().manual_seed(1)
latents = pipe.backbone.encode_images(pipe.pixels([picture])).expand(N, -1, -1, -1)
noise = torch.randn(latents.shape, generator=generator).to(latents)
timesteps = torch.linspace(0, len(pipe.backbone.alphas_cumprod) - 1, N).long().to(latents.device)


# %%
@torch.no_grad()
def loss_on_fixed_noise(state):
    """Diffusion loss of a state, mean over N noises that are the same for every state."""
    prediction = EncoderPrediction(state.v_star, state.offsets)
    with objective(
        pipe.backbone, pipe.prompt_encoder, prediction,
        Batch(latents, noise, timesteps, [prompt] * N), state.config,
    ) as terms:  # fmt: skip
        return terms["diffusion"].item()


fixed = [loss_on_fixed_noise(state) for state in states]
losses = [r["diffusion"] for r in record]
strip = [
    pipe.generate(state, "a picture of S*", seeds=[0], progress=False)[0][0] for state in states
]

# %%
from statistics import stdev

from dte_lab.panels.quickstart import steps_figure

print(
    f"loss that tuning saw: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last, "
    f"standard deviation over the {len(losses)} steps {stdev(losses):.3f}"
)
print(f"loss on fixed noise (n = {N}): {fixed[0]:.3f} before tuning, {fixed[-1]:.3f} after")
show(
    steps_figure(strip, losses, fixed),
    f"{len(strip)} pictures, one after each tuning step, above the loss. The loss on fixed noise "
    f"goes from {fixed[0]:.3f} to {fixed[-1]:.3f}; the loss that tuning saw jumps about.",
)

# %%
highest = max(range(len(fixed)), key=fixed.__getitem__)
hurt = fixed[highest] > 1.05 * fixed[0]
why = " The first steps hurt: they are as long as the later ones, and know less." if hurt else ""
saw(f"On fixed noise the loss is highest after {highest} steps ({fixed[highest]:.3f}), and ends",
    f"{'below' if fixed[-1] < fixed[0] else 'above'} where it began.{why}")  # fmt: skip

# %% [markdown]
# ### 5. How large the weight change is
#
# The other prediction is a change of the attention layers' weights. For each projection matrix `W`
# the encoder predicts two thin matrices, `A` with `Din × r` and `B` with `r × Dout` numbers, and
# the layer uses `W + A B`. The map shows the size of `A B` as a share of the size of `W` (Frobenius
# norms), layer by layer. *Self* layers mix positions of the picture, *cross* layers read the
# prompt. Is the change small beside the weights? And how much of it does tuning add?

# %%
from dte_lab.panels.quickstart import offset_sizes, offsets_figure

layers, before = offset_sizes(pipe.backbone.unet, predicted.offsets)
layers, after = offset_sizes(pipe.backbone.unet, concept.offsets)
count = sum(a.numel() + b.numel() for a, b in concept.offsets.values())
full = sum(a.shape[1] * b.shape[2] for a, b in concept.offsets.values())
print(
    f"{count:,} numbers of rank {pipe.encoder.settings.rank} change {full:,} weights "
    f"({count / full:.0%}), by {100 * before.mean():.1f} % of their size as predicted and "
    f"{100 * after.mean():.1f} % once tuned (mean over {after.size} matrices)"
)
show(
    offsets_figure(layers, {"predicted": before, "tuned": after}),
    f"Two heat maps of the size of the weight change, {len(layers)} layers by four projections. "
    f"Predicted: {100 * before.min():.1f} to {100 * before.max():.1f} percent; "
    f"tuned: {100 * after.min():.1f} to {100 * after.max():.1f} percent.",
)

# %%
growth = after.mean() / before.mean()
saw(f"{count / full:.0%} as many numbers change the weights by {100 * before.mean():.0f} % of",
    f"their size as predicted; tuning makes that {growth:.1f} times as much. The largest has",
    f"{100 * after.max():.0f} % of its weight's size.")  # fmt: skip

# %% [markdown]
# #### Exercise 2: a layer with a low-rank offset
#
# Difficulty 2 of 5 · 10 minutes
#
# Compute what a layer with weights `W + A B` gives for the inputs `x`, without ever forming `A B`.
# PyTorch keeps the weight of a linear layer as `(Dout, Din)`, so the layer alone is
# `F.linear(x, W)`, which is `x @ W.T`. The offset follows the paper: `A` has `Din` rows and `B` has
# `Dout` columns.
#
# <details>
# <summary>Hint</summary>
#
# The layer is linear, so the offset's part is simply added: (W + change) applied to x is W applied
# to x plus the change applied to x. Which of `A` and `B` has as many rows as `x` has columns?
#
# </details>


# %% tags=["exercise"]
def low_rank_offset(x, W, A, B):
    """x (T, Din), W (Dout, Din), A (Din, r), B (r, Dout) -> (T, Dout), with weights W + A B."""
    ### BEGIN SOLUTION
    return F.linear(x, W) + (x @ A) @ B
    ### END SOLUTION


checks.low_rank_offset(low_rank_offset)

# %% [markdown]
# ### 6. Two paths, one slider
#
# A word and weights fitted to a single picture tend to draw that picture again, whatever the prompt
# says. So every attention layer runs twice. The *soft* path uses `v*` and the changed weights; the
# *hard* path uses the nearest real word and the model's own weights. The results are blended:
#
# $$\text{out} = \alpha \cdot \text{soft} + (1 - \alpha) \cdot \text{hard}$$
#
# Your function of exercise 1 names the word below, once its check calls it right.
#
# At α = 0 the model draws its own idea of the nearest word and your picture plays no further part.
# At α = 1 only what was learned counts. From where on is it your thing, and does the beach last?

# %% tags=["expected:blend"]
ALPHAS, SEEDS = [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 1, 2, 3]
blended = {}
for alpha in ALPHAS:
    result = pipe.generate(concept, prompts[0], seeds=SEEDS, alpha_blend=alpha, progress=False)
    blended |= {(alpha, seed): image for seed, image in zip(SEEDS, result[0], strict=True)}

nearest = checks.yours("nearest_words", lambda v, *_: [w for w, _ in pipe.nearest_words(v, k=1)])
(hard_word,) = nearest(concept.v_star.flatten(), table.embeddings, table.words, 1)
print(f"nearest real word: {hard_word}; blend used so far: {concept.config.alpha_blend}")
show(
    picture_grid(
        [[blended[alpha, 0] for alpha in ALPHAS] + [picture]],
        [f"α = {alpha:g}" for alpha in ALPHAS] + ["the input"],
    ),
    f"{len(ALPHAS)} pictures on the beach with the same seed: at alpha 0 the model's own "
    f"{hard_word}, at alpha 1 the soft path alone; then the input.",
)

# %%
beaches = {
    alpha: (classify_scene(pipe.pixels([blended[alpha, s] for s in SEEDS]))
            == SCENES.index("beach")).sum()
    for alpha in ALPHAS
}  # fmt: skip
saw("Beaches by the picture's border, of the", f"{len(SEEDS)} seeds drawn at each α:",
    ", ".join(f"{n} at {alpha:g}" for alpha, n in beaches.items()) + ".")  # fmt: skip

# %% [markdown]
# #### Exercise 3: the blend
#
# Difficulty 1 of 5 · 5 minutes
#
# Write the rule above. What should come out when both paths agree? A check for yourself: the
# coefficients add up to 1.
#
# <details>
# <summary>Hint</summary>
#
# `soft` and `hard` have the same shape and `alpha` is a number; no loop is needed.
#
# </details>


# %% tags=["exercise"]
def blend(soft, hard, alpha):
    """Two results of one attention layer, same shape -> their blend; alpha = 1 is soft alone."""
    ### BEGIN SOLUTION
    return alpha * soft + (1 - alpha) * hard
    ### END SOLUTION


checks.blend(blend)

# %% [markdown]
# #### Try it: α and seed
#
# The pictures on the left were computed in the cell above. On the right write a prompt of your own,
# with `S*` in it: *Run it live* draws it with the same α and seed. On a page that has no notebook
# running behind it, the table below shows all pictures of the left side.

# %%
from IPython.display import display

from dte_lab.panels.live import with_live
from dte_lab.panels.quickstart import blend_panel


def draw(prompt, alpha, seed):
    """One picture of the tuned concept."""
    return pipe.generate(concept, prompt, [seed], alpha_blend=alpha, progress=False)[0][0]


display(with_live(blend_panel(blended), draw, "a picture of S* in space", picture))

# %%
rows = [[blended[alpha, seed] for alpha in ALPHAS] for seed in SEEDS]
show(
    picture_grid(rows, [f"α = {alpha:g}" for alpha in ALPHAS], [f"seed {seed}" for seed in SEEDS]),
    f"All {len(blended)} pictures of the panel: one row per seed, one column per alpha.",
)

# %% [markdown]
# ## When it fails, and why

# %%
from PIL import Image
from skimage.data import chelsea

from dte_lab.panels import read_image, square

photograph = square(Image.fromarray(chelsea()), pipe.backbone.resolution)
cat = pipe.personalize(photograph)
failures = {
    "a photograph": photograph,
    "… on the beach": pipe.generate(cat, prompts[0], progress=False)[0][0],
    "S* on a bicycle": pipe.generate(concept, "S* on a bicycle", progress=False)[0][0],
    "α = 0": blended[0, 0],
    "no setting": strip[-1],
}
show(
    picture_grid([list(failures.values())], list(failures)),
    "Five pictures: a photograph of a cat's face; what it becomes on the beach; our concept on a "
    "bicycle; our concept with alpha 0; our concept without a setting in the prompt.",
)

# %% [markdown]
# - **A thing from another world** (the first two). The small model has only seen drawings, and a
#   photograph is squeezed into what it knows. The paper says the same of its own encoder: what the
#   training data rarely show is hard to encode.
# - **A setting that the model has never read** (*on a bicycle*). Tuning teaches the model your
#   thing, and no new scenes.
# - **Lost likeness** (α = 0, or small). You get the model's own idea of the nearest real word.
# - **Overfitting** (*no setting*). Where the prompt leaves the background open, the model shows how
#   much of the input's own has become a part of `S*`. With more tuning or a larger α the input can
#   win over the prompt as well.
# - **An unlucky seed.** Compare the rows of the table above before you judge by one picture.

# %% [markdown]
# ## Your own picture
#
# Put a file beside this notebook and write its name below. A single thing in the middle, on a plain
# background and in drawing style comes closest to what the small model knows.

# %%
MY_PICTURE = None  # for example "my_concept.png"

if MY_PICTURE:
    mine = pipe.personalize(MY_PICTURE)
    results = pipe.generate(mine, prompts, seeds=[0])
    own = square(read_image(MY_PICTURE), pipe.backbone.resolution)
    grid = picture_grid([[own] + [r[0] for r in results]], ["the input"] + settings)
    show(grid, "Your picture, then six drawings of it.")

# %% [markdown]
# ## To take along
#
# - One picture gives a word embedding `v*` and a low-rank weight change; tuning refines both.
# - The word says what the thing looks like, the weights add to it; each can be drawn alone.
# - `v*` has neighbours among the real words, and staying near them keeps a prompt's other words in
#   force.
# - `alpha_blend` trades likeness for freedom. Look at several seeds before you choose.
# - The loss of a single tuning step is too noisy to judge by; look at pictures.

# %%
from dte_lab.panels import take_along

take_along(
    f"Twelve steps took {concept.seconds:.0f} s, and took the loss on fixed noise from "
    f"{fixed[0]:.3f} to {fixed[-1]:.3f}.",
    f"The weight change is {100 * before.mean():.0f} % of the weights' size as predicted, "
    f"{100 * after.mean():.0f} % once tuned.",
    f"Of {len(SEEDS)} seeds, beaches at α = 0, 0.6 and 1: "
    f"{', '.join(str(beaches[a]) for a in (0, 0.6, 1))}.",
)

# %% [markdown]
# Everything here is in short files: `personalize` and `generate` are in `dte_lab/pipeline.py`, the
# two paths in `dte_lab/dual_path.py`, the twelve steps in `dte_lab/tuning.py`.
# `docs/architecture.md` follows a picture through all of them.
