# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: Tuning
#     promise: what the twelve steps change, when to stop, and what they cost
#     minutes: 75
# ---

# %% [markdown]
# # Tuning: twelve steps, and when to stop
#
# *What the twelve steps change, when to stop, and what they cost.*
#
# The encoder predicts a word `v*` and weight offsets from one picture. That is a good start and no
# more, so the paper lets an optimiser refine the prediction for "up to 12 steps". This notebook
# takes those steps apart: on a laptop with the small model, and, where there is a GPU, with Stable
# Diffusion 1.5.
#
# After this notebook you can
#
# - say which numbers are tuned, which are frozen, and what the loss asks of them;
# - show that the loss goes on falling while the pictures get worse;
# - find the least number of steps that satisfies, and say how sure you are of it;
# - predict how much memory tuning takes before you run it, and make it fit a card of 15 GB;
# - compare methods fairly: by the clock, not by the number of steps.
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
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dte_lab import checks
from dte_lab.panels import describe_machine, measured_with, picture_grid, quiet_libraries, saw, show

quiet_libraries()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %% [markdown]
# Our thing is the cupcake of the quickstart, which neither the base model nor the encoder has seen.
# The small world can draw it in any scene. So we have what nobody has with a photograph: the
# *true* pictures of our thing in other settings, to compare with. Tuning never sees those.

# %%
from dte_lab import DTEPipeline
from dte_lab.evaluation.edits import Item, edits, truth
from dte_lab.panels import to_pil

pipe = DTEPipeline.from_pretrained("small", device=device)
item = Item("cupcake", "fluent", "white")
pixels = item.picture()  # (1, 3, 64, 64) in [-1, 1]
picture = to_pil(pixels)[0]

SCENES = ("beach", "night", "forest")
asked = edits(item, SCENES)[: len(SCENES)]
prompts = {"no setting": "a picture of S*"} | {edit.name: edit.prompt for edit in asked}
true = torch.stack([truth(item, edit) for edit in asked])  # (3, 3, 64, 64)
show(
    picture_grid([[picture, *to_pil(true)]], ["the input", *(edit.name for edit in asked)]),
    "The input picture, a cupcake on white, and its true pictures in three scenes.",
)

# %% [markdown]
# ## 1. What is tuned
#
# Everything that the model knows stays frozen: UNet, text encoder, autoencoder, image encoder. What
# moves can be one of three things (`TuneConfig.trainable`):
#
# - `predictions`: the word `v*` and the offsets `A` and `B` themselves, as free numbers;
# - `heads`: the weights of the two heads that predict them;
# - `encoder`: the heads and the layers before them.
#
# The paper does not say which it uses. The first is the default here: what it changes
# belongs to this one concept. We give each twelve steps, and count the numbers that they move.

# %%
from dte_lab.evaluation.measures import diffusion_loss
from dte_lab.setting import picture_prompts
from dte_lab.tuning import TRAINABLE, TuneConfig

predicted = pipe.personalize(picture, num_steps=0)
offsets = [m for pair in predicted.offsets.values() for m in pair]
heads = [pipe.encoder.token_head, pipe.encoder.hypernetwork]


def count(tensors):
    return sum(t.numel() for t in tensors)


trained = {"predictions": count([predicted.v_star, *offsets])}
trained["heads"] = sum(count(part.parameters()) for part in heads)
trained["encoder"] = trained["heads"] + count(pipe.encoder.fusion.parameters())
frozen = sum(count(part.parameters()) for part in pipe.backbone.modules)

# %%
own_prompts = picture_prompts(pipe.backbone, pixels)  # what tuning says of the picture
drawn = [pipe.generate(predicted, prompts["beach"], progress=False)[0][0]]
print(f"frozen numbers: {frozen:,}; tuning's prompt: {own_prompts[0]!r}")
losses = {"before tuning": diffusion_loss(pipe, predicted, pixels, own_prompts)}
print(f"loss on fixed noise before tuning: {losses['before tuning']:.3f}")
for part in TRAINABLE:
    concept = pipe.personalize(picture, config=TuneConfig(trainable=part), progress=False)
    drawn += pipe.generate(concept, prompts["beach"], progress=False)[0]
    losses[part] = diffusion_loss(pipe, concept, pixels, own_prompts)
    print(
        f"{part:<12}{trained[part]:>12,} numbers tuned, {concept.seconds:5.1f} s, "
        f"loss after 12 steps {losses[part]:.3f}"
    )
show(
    picture_grid([drawn], ["predicted", *TRAINABLE]),
    f"The concept on the beach as predicted, and after tuning {', '.join(TRAINABLE)}.",
)

# %% [markdown]
# Compare the losses, then the seconds, then the pictures: do they tell the same story? AdamW moves
# `v*` and the weights of the encoder, without weight decay. `A` and `B` are moved by
# [Muon](https://kellerjordan.github.io/posts/muon/), which makes every update orthogonal: all its
# directions are equally long, so that none waits for many steps to count. Each has a learning rate
# of its own; these are our choices, in one place, `TuneConfig`.
#
# The prompt of tuning says what else the picture shows, in words that CLIP finds (`picture_prompts`
# in `dte_lab/setting.py`; ours, not the paper's). We measure the loss under the same prompt, for
# what the prompt says is not asked of `S*`. Section 3 tries what happens without.

# %%
start = losses.pop("before tuning")
saw(*(f"Tuning the {part} changes the loss by {loss - start:+.3f}." for part, loss in
      losses.items()), f"The lowest loss has: {min(losses, key=losses.get)}.")  # fmt: skip

# %% [markdown]
# ## 2. What the loss asks
#
# Every step adds noise to the input picture's latent `x0`, with the weights `alpha_bar` that belong
# to a random timestep:
#
# $$x_t = \sqrt{\bar\alpha_t}\; x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon$$
#
# The UNet reads $x_t$ and a prompt with `S*`, and the loss is the mean squared error of its answer.
# What it should answer depends on the model. Stable Diffusion 1.5 predicts the noise $\epsilon$.
# Our small model predicts the *velocity*
# ([Salimans and Ho 2022](https://arxiv.org/abs/2202.00512)):
#
# $$v = \sqrt{\bar\alpha_t}\; \epsilon - \sqrt{1 - \bar\alpha_t}\; x_0$$
#
# With little noise that asks for the noise, with much noise for the picture: at both ends for what
# is hard to see. The contrastive term of the method comes on top (`dte_lab/objective.py`).

# %% [markdown]
# #### Exercise 1: the target
#
# Difficulty 2 of 5 · 10 minutes
#
# Write the velocity for a batch. Every picture of the batch has a noise level of its own, so
# `alpha_bar` has one number per picture.
#
# <details>
# <summary>Hint</summary>
#
# Numbers of shape `(B,)` do not multiply tensors of shape `(B, C, h, w)` picture by picture:
# `x[:, None]` adds an axis of length 1 at the end. How many are missing?
#
# </details>


# %% tags=["exercise"]
def velocity_target(latents, noise, alpha_bar):
    """latents and noise (B, C, h, w), alpha_bar (B,) -> the velocity, (B, C, h, w)."""
    ### BEGIN SOLUTION
    alpha_bar = alpha_bar[:, None, None, None]  # (B, 1, 1, 1)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    ### END SOLUTION


checks.velocity_target(velocity_target)

# %% [markdown]
# ### Some noise is easier to remove
#
# The loss depends on the timestep: how does that compare with what tuning changes? It is why the
# numbers of a progress bar jump about. Averaging helps, and so does how we choose the timesteps of
# one step: we cut the range into as many bins as the batch has noise levels and draw one from each
# (`draw_batch` in `dte_lab/tuning.py`). The hairlines below are the bins.

# %%
from dte_lab.objective import Batch, objective
from dte_lab.panels.tuning import timestep_figure

N, B = 4, TuneConfig().batch_size
T = len(pipe.backbone.alphas_cumprod)
generator = torch.Generator().manual_seed(0)
prediction = pipe.encoder.predict(pipe.backbone, pixels, 0, pipe.prompt_encoder)
latents = pipe.backbone.encode_images(pixels).expand(N, -1, -1, -1)
noise = torch.randn(latents.shape, generator=generator).to(latents)


@torch.no_grad()
def loss_at(t):
    """Diffusion loss of the prediction at timestep t, mean over N noises."""
    timesteps = torch.full((N,), t, device=latents.device)
    with objective(
        pipe.backbone, pipe.prompt_encoder, prediction,
        Batch(latents, noise, timesteps, [own_prompts[0]] * N), pipe.encoder.method,
    ) as terms:  # fmt: skip
        return terms["diffusion"].item()


# %%
grid = [int(t) for t in np.linspace(0, T - 1, 24)]
by_timestep = [loss_at(t) for t in grid]
rng = np.random.default_rng(0)
draws = rng.random((5000, B))
independent = np.interp(draws * (T - 1), grid, by_timestep).mean(1)
one_per_bin = np.interp((draws + np.arange(B)) / B * (T - 1), grid, by_timestep).mean(1)
print(
    f"spread of the loss of one step from its {B} timesteps alone (standard deviation): "
    f"{independent.std():.3f} drawn freely, {one_per_bin.std():.3f} with one per bin"
)
show(
    timestep_figure(grid, by_timestep, B),
    f"The diffusion loss of the prediction over the timestep: {by_timestep[0]:.2f} at the lowest "
    f"noise, {max(by_timestep):.2f} at most, {by_timestep[-1]:.2f} at the highest noise.",
)
apart, tuned = max(by_timestep) - min(by_timestep), abs(losses["predictions"] - start)
saw(f"From one timestep to another the loss differs by up to {apart:.2f}; twelve steps of tuning",
    f"changed it by {tuned:.3f}, {apart / tuned:.0f} times less. One per bin leaves",
    f"{one_per_bin.std() / independent.std():.0%} of the spread of free draws.")  # fmt: skip

# %% [markdown]
# ## 3. From 0 to 12 steps, and far beyond
#
# One long run of tuning, with a callback that keeps the state after every step. From some of them
# we draw: without a setting in the prompt, and in three scenes. The seed is always the same. A
# prompt without a setting shows what of the input's background has become a part of `S*`.

# %%
STEPS = (0, 2, 4, 8, 12, 25, 50)
DRAWN = (0, 4, 12, 25, 50)
record, began = [], time.perf_counter()


def keep(state):
    record.append(state | {"seconds": time.perf_counter() - began})


last = pipe.personalize(picture, num_steps=STEPS[-1], callback=keep, config=TuneConfig())


# %%
def after(steps):
    """The concept after so many steps of the long run."""
    if steps == len(record):
        return last
    return replace(last, v_star=record[steps]["v_star"], offsets=record[steps]["offsets"])


def look(concept, wanted, **options):
    """One picture per prompt; `phrase` is what a method writes for S*."""
    phrase = concept.info.get("phrase", "S*")
    texts = [prompts[name].replace("S*", phrase) for name in wanted]
    rows = pipe.generate(concept, texts, num_inference_steps=15, progress=False, **options)
    return {name: row[0] for name, row in zip(wanted, rows, strict=True)}


pictures = {
    (steps, name): image for steps in DRAWN for name, image in look(after(steps), prompts).items()
}

# %%
references = {"no setting": picture} | dict(zip(list(prompts)[1:], to_pil(true), strict=True))
show(
    picture_grid(
        [
            [references[name]] + [pictures[n, name] for n in DRAWN]
            for name in ("no setting", "night")
        ],
        ["the truth", *(f"{n} steps" for n in DRAWN)],
        ["no setting", "at night"],
    ),
    f"Two rows of drawings after {', '.join(map(str, DRAWN))} steps, without a setting and at "
    "night, each beside the true picture.",
)

# %% [markdown]
# Read the upper row first: does the thing come closer and closer to the input picture's? Then why
# should one ever stop? Now read the lower row. What happens to the night, and to the colours of the
# thing? Where they go wrong, the model has unlearned what it needs for any picture but this one.
# That is **overfitting**, and the upper row cannot show it. A number for either: how far the drawn
# picture is from the true one, pixel by pixel.


# %%
def error(drawn, reference):
    """Root mean squared difference of two pictures, colours from 0 to 1."""
    a, b = pipe.pixels([drawn, reference])
    return (a - b).square().mean().sqrt().item() / 2


errors = {name: [error(pictures[n, name], references[name]) for n in DRAWN] for name in prompts}
for name, row in errors.items():
    print(f"{name:12}", " ".join(f"{n} steps {e:.3f}" for n, e in zip(DRAWN, row, strict=True)))
least = {name: DRAWN[int(np.argmin(row))] for name, row in errors.items()}
saw("Nearest to the truth after:", ", ".join(f"{n} steps ({name})" for name, n in least.items()),
    f"of {', '.join(map(str, DRAWN))}.")  # fmt: skip

# %% [markdown]
# ### With the setting in the prompt of tuning, and without
#
# The same picture, the same twelve steps, and in the second row a prompt that does not say what the
# background is: `TuneConfig(prompts=("a picture of S*",))`. Then `v*` and the offsets must say it.
# In which row does the input's background come along? The soft path draws alone (`alpha_blend=1`);
# the hard path, which has not been tuned, would hide some of it.

# %%
from dte_lab.evaluation.base_model import classify_scene
from dte_lab.world.scenes import SCENES as ALL_SCENES

tuned_with = {"setting named": after(12)}
tuned_with["not named"] = pipe.personalize(
    picture, num_steps=12, config=TuneConfig(prompts=("a picture of S*",)), progress=False
)
both = {label: look(state, prompts, alpha_blend=1) for label, state in tuned_with.items()}
show(
    picture_grid([[picture, *row.values()] for row in both.values()],
                 ["the input", *prompts], list(both)),
    f"Two rows, tuned with the setting named and not: {', '.join(prompts)}.",
)  # fmt: skip
seen_as = {
    label: [ALL_SCENES[i] for i in classify_scene(pipe.pixels(list(row.values())))]
    for label, row in both.items()
}
saw("By their border the pictures show,",
    "; ".join(f"{label}: {', '.join(scenes)}" for label, scenes in seen_as.items()) + ".",
    f"The truth: any, {', '.join(SCENES)}.")  # fmt: skip

# %% [markdown]
# ### Can the loss show it?
#
# Three losses of the same run. The dots are what tuning saw. The solid line is the same loss on
# noise that is the same at every point, so that progress can be seen, under tuning's own prompt.
# The dashed line is the loss of the *true pictures in other scenes* under their prompts: the
# validation loss that nobody with one photograph can compute.

# %%
from dte_lab.panels.tuning import losses_figure

seen = [state["diffusion"] for state in record]
own = [diffusion_loss(pipe, after(n), pixels, own_prompts) for n in STEPS]
elsewhere = [diffusion_loss(pipe, after(n), true, [edit.prompt for edit in asked]) for n in STEPS]
best = STEPS[int(np.argmin(elsewhere))]

# %%
print(
    f"input picture: {own[0]:.3f} before tuning, {own[-1]:.3f} after {STEPS[-1]} steps, lowest "
    f"after {STEPS[int(np.argmin(own))]}"
)
print(
    f"other scenes:  {elsewhere[0]:.3f} before tuning, {elsewhere[-1]:.3f} after {STEPS[-1]} "
    f"steps, lowest after {best} with {min(elsewhere):.3f}"
)
print(f"what tuning saw: standard deviation over its first 12 steps {np.std(seen[:12]):.3f}")
show(
    losses_figure(seen, STEPS, own, elsewhere),
    f"Losses over the steps. On the input picture from {own[0]:.2f} to {own[-1]:.2f}; in other "
    f"scenes from {elsewhere[0]:.2f} by {min(elsewhere):.2f} after {best} steps to "
    f"{elsewhere[-1]:.2f}.",
)

# %%
highest = STEPS[int(np.argmax(own))]
saw(f"On the input picture the loss is highest after {highest} steps and lowest after",
    f"{STEPS[int(np.argmin(own))]}" + (": the first steps hurt before they help." if highest in
    STEPS[1:4] else ".") + f" In other scenes it is lowest after {best}, and at the end",
    f"{elsewhere[-1] - min(elsewhere):+.3f} from there.")  # fmt: skip

# %% [markdown]
# #### Try it: steps and scene
#
# The pictures on the left were computed above. On the right write a prompt of your own, with `S*`
# in it: *Run it live* draws it after the same number of steps. On a page that has no notebook
# running behind it, the table below shows all pictures of the left side.

# %%
from IPython.display import display

from dte_lab.panels.live import with_live
from dte_lab.panels.tuning import steps_panel


def draw(prompt, steps, scene):
    """The concept after so many steps; the scene is what the prompt says."""
    return pipe.generate(after(steps), prompt, num_inference_steps=15, progress=False)[0][0]


display(with_live(steps_panel(pictures), draw, "a picture of S* in space", picture))

# %%
show(
    picture_grid(
        [[references[name]] + [pictures[n, name] for n in DRAWN] for name in prompts],
        ["the truth", *(f"{n} steps" for n in DRAWN)],
        list(prompts),
    ),
    f"All pictures of the panel: a row per prompt ({', '.join(prompts)}), a column per number of "
    f"steps ({', '.join(map(str, DRAWN))}).",
)

# %% [markdown]
# ## 4. The same on many concepts, by judges from outside
#
# One cupcake proves nothing. `python -m dte_lab.evaluation.steps` takes held-out concepts, tunes
# each with every method, and stops on the way to draw ten scenes with two seeds. *Identity* is read
# by a network that took part in no training here (0: no more like this thing than like any other;
# 1: like the true pictures). *Prompt fidelity* is the share of pictures whose scene, read from
# their border, is the one asked for. Either is easy alone: copy the input picture, or ignore it.
# So we go by their **harmonic mean**, which is high only where both are. The bands are bootstrap 95
# % intervals over the concepts.

# %%
from dte_lab.panels import bracketed, interval, show_table
from dte_lab.panels.tuning import quality_figure

# of the repository that this notebook lies in
RESULTS = next(p / "results" for p in Path.cwd().parents if (p / "results").is_dir())
results = json.loads((RESULTS / "steps.json").read_text())
curves = results["curves"]
names = {m: n.replace("offset_learning_rate=", "rate ") for m, n in results["names"].items()}
measures = {
    "identity_scaled": "identity",
    "scene": "prompt fidelity",
    "fidelity": "harmonic mean of the two",
}
n_concepts = curves["dte"]["fidelity"][0]["n"]

# %%
tops = {m: max(c["fidelity"], key=lambda point: point["mean"]) for m, c in curves.items()}
show_table(
    [(names[m], top["steps"], bracketed(top, 2)) for m, top in tops.items()],
    ["Method", "Steps", "Highest harmonic mean"],
    f"{n_concepts} concepts of the {results['settings']['split']} split, "
    f"{measured_with(results['versions'])}",
)
show(
    quality_figure(curves, names, measures),
    f"Identity, prompt fidelity and their harmonic mean over the steps, {n_concepts} concepts, "
    f"for {', '.join(names[m] for m in curves)}.",
)

# %% [markdown]
# How to read it. Every method's rate was the best of a few at 12 steps, on other things. What is
# best for few steps can be too fast for many, and a method may then gain identity and lose the
# prompt faster. The curve with a lower rate of the offsets tests whether the rate is the reason,
# with the same encoder at a lower rate. The E4T-style encoder tunes whole matrices;
# the next cell says who is ahead where, and how much of it the rate explains. LoRA has two curves:
# with its prior kept, it also learns pictures that the base model draws of the same kind of thing.
# Ask of this what it is for: does it cost identity at few steps, and does it keep the prompt at
# many?

# %%
fidelity, lines = {}, []
for point in results["points"]:
    cell = fidelity.setdefault((point["method"], point["steps"]), {})
    cell[point["concept"]] = point["fidelity"]
slower = [method for method in curves if "offset_learning_rate" in method]
for steps in (12, 25, 50, 100):
    for method in ("dte", *slower):
        if {(method, steps), ("e4t", steps)} - fidelity.keys():
            continue
        ours, theirs = fidelity[method, steps], fidelity["e4t", steps]
        ahead = interval(np.array([theirs[concept] - ours[concept] for concept in ours]))
        lines.append((steps, names[method], bracketed(ahead, sign="+")))
show_table(
    lines, ["Steps", "Against", "E4T-style is ahead by"],
    f"Harmonic mean, paired by concept, {measured_with(results['versions'])}",
)  # fmt: skip

# %%
seen = []
for steps in (4, 12, 50, 100) if {"lora", "lora-prior"} <= curves.keys() else ():
    kept, free = (
        {m: next((p["mean"] for p in curves[name][m] if p["steps"] == steps), np.nan)
         for m in ("identity_scaled", "scene")} for name in ("lora-prior", "lora")
    )  # fmt: skip
    seen.append(
        f"After {steps} steps the kept prior changes LoRA's identity by "
        f"{kept['identity_scaled'] - free['identity_scaled']:+.2f} and its prompt fidelity by "
        f"{kept['scene'] - free['scene']:+.2f}."
    )
saw(f"{measured_with(results['versions']).capitalize()}.", *seen)

# %% [markdown]
# ### How good a guide is the loss?
#
# Can the loss tell us when to stop? In the plot below the run of the tuning encoder moves to the
# right as the loss falls; the numbers beside the points are the steps. If the loss were a guide,
# every move to the right would be a move up, and the best point would be the last. Look where the
# path turns, on the left with the loss that tuning can see, on the right with the loss in other
# scenes.
#
# The table puts numbers to it: the rank correlation (Spearman) of the loss with each measure over
# the steps of one concept, averaged over the concepts. -1 would be a perfect guide, 0 is none, and
# above 0 the loss falls while the measure gets worse. *Early* is up to 12 steps, *late* from 12 on.
# Where a measure does not move at all there is nothing to correlate.

# %%
from dte_lab.panels.tuning import guide_figure

LOSSES = {"loss": "loss on the input picture", "loss_elsewhere": "loss in other scenes"}


def correlation(found):
    return bracketed(found, 2, "+") if found else "-"


# %%
heads = ["Method", "Part", *(label.split(" of")[0] for label in measures.values())]
for loss, title in LOSSES.items():
    lines = [
        (names[method], part, *(correlation(found[loss].get(m)) for m in measures))
        for method, parts in results["guide"].items()
        for part, found in parts.items()
    ]
    show_table(lines, heads, f"{title}, {measured_with(results['versions'])}")
points = [point for point in results["points"] if point["method"] == "dte"]
show(
    guide_figure(points, "fidelity", LOSSES),
    "Two paths over the steps of the tuning encoder, means over the concepts: harmonic mean of "
    "identity and prompt fidelity against the loss on the input picture, and against the loss in "
    "other scenes.",
)

# %%
seen = []
for part, found in results["guide"]["dte"].items():
    guide = {loss: found[loss].get("fidelity") for loss in LOSSES}
    said = ", ".join(f"{LOSSES[loss]} {correlation(r)}" for loss, r in guide.items())
    seen.append(f"Tuning encoder, {part}, with the harmonic mean: {said}.")
when = f"{measured_with(results['versions']).capitalize()}."
saw(when, *seen, "-1 would be a perfect guide.")

# %% [markdown]
# ## 5. The least steps that satisfy
#
# Steps cost time, and too many cost freedom. So: what is the least number that is good enough? We
# must say what *enough* is. Here it is a share of the best mean that any method reaches at any
# number of steps. A single concept has lucky points, so with one concept it is wise to ask the next
# points of the curve as well before one calls it enough.

# %% [markdown]
# #### Exercise 2: when is it enough?
#
# Difficulty 3 of 5 · 15 minutes
#
# `curve` is a dictionary {number of steps: value}, in any order. Return the least number of steps
# at which the value is `level` or more, and is so at the next `patience` numbers of steps in the
# curve too. Near the end of the curve there are fewer to ask: then those that are left decide.
# Return `None` where nothing satisfies.
#
# <details>
# <summary>Hint</summary>
#
# Sort the numbers of steps. For the one at position `i`, the points to ask are
# `steps[i : i + patience + 1]`; a slice that reaches over the end is simply shorter. `all(...)`
# says whether all of them are good.
#
# </details>


# %% tags=["exercise"]
def steps_needed(curve, level, patience):
    """{steps: value}, what is good enough, further points to ask -> the least steps, or None."""
    ### BEGIN SOLUTION
    steps = sorted(curve)
    for i, number in enumerate(steps):
        if all(curve[s] >= level for s in steps[i : i + patience + 1]):
            return number
    return None
    ### END SOLUTION


checks.steps_needed(steps_needed)

# %% [markdown]
# The same rule, without patience, for the means over all concepts and over each group. The paper
# reports up to 12 steps for all concepts and leaves open whether some need more: if the markers of
# two groups lie apart *and their intervals do not overlap*, they do. The intervals come from
# drawing the concepts of a group anew, with replacement. Few concepts make them wide, and rightly
# so; a single one has no spread, and its interval says nothing. A hollow marker over "never" means
# that no number of steps reached the level.

# %%
from dte_lab.panels.tuning import least_figure

least = results["least"]


def least_of(m):
    low, at, high = ("never" if m[k] is None else m[k] for k in ("low", "steps", "high"))
    return f"{at} [{low}, {high}]"


# %% tags=["expected:steps_needed"]
show_table(
    [(f"{group} (n = {found['n']})", *map(least_of, found["methods"].values()))
     for group, found in least.items()],
    ["Concepts", *(names[method] for method in least["all"]["methods"])],
    f"Enough: {results['share']:.0%} of the best mean harmonic mean in the group; "
    f"{measured_with(results['versions'])}",
)  # fmt: skip
show(
    least_figure(least, names),
    "The least steps that satisfy, a row per group of concepts, a marker per method, with 95 % "
    "intervals; the numbers are in the table above.",
)

# %% [markdown]
# ### Which optimiser moves the offsets
#
# Twelve steps are few. AdamW divides every number's gradient by its own size, so that all numbers
# move about equally far; but the update of a matrix is still led by a few directions, and the rest
# of them wait. Muon makes all directions of the update equally long. Its rate falls as one over the
# step from the sixth step on, for a matrix that goes on moving at full length never comes to rest.
# Here is each method with either, with a rate chosen for it, with the same pictures and seeds.
# Where a row says nothing else, it is Muon for the tuning encoder, and AdamW for the others. Who
# should gain most: a start that knows much, or one that knows little?

# %%
import re

from dte_lab.evaluation.conclusions import CONCLUSIONS
from dte_lab.evaluation.report import name_of

run = json.loads((RESULTS / "optimizer" / "run.json").read_text())
says = {"encoder=zero-shot": "no encoder", "optimizer=adamw": "AdamW", "optimizer=muon": "Muon",
        "constant_steps=50": "constant"}  # fmt: skip


def in_words(method):
    name = re.sub(r"[a-z_]+_rate=", "rate ", name_of(method))
    return re.sub("|".join(says), lambda found: says[found[0]], name)


# %%
show_table(
    [(in_words(row["method"]), row["steps"], bracketed(row["fidelity"]), bracketed(row["scene"], 2))
     for row in run["summary"] if row["steps"]],
    ["Method", "Steps", "Harmonic mean", "Scenes right"],
    f"{run['settings']['concepts']} things of val, {measured_with(run['versions'])}",
)  # fmt: skip
saw(*(c.sentence(RESULTS) for c in CONCLUSIONS if c.run == "optimizer"))

# %% [markdown]
# ## 6. What it costs: memory
#
# Four things fill a card: the frozen weights, what the optimiser keeps for each tuned number, the
# activations that the backward pass needs, and scratch space. The first two are arithmetic.

# %% [markdown]
# #### Exercise 3: weights, gradients, averages
#
# Difficulty 1 of 5 · 10 minutes
#
# How many bytes do all weights take, together with the gradients and what Muon remembers? Tuned
# numbers are in fp32, 4 bytes each; so are their gradients, and Muon's running average of the
# gradient. (AdamW has a second one, of the gradient's square.) A frozen weight has `frozen_bytes`:
# 2 in half precision.
#
# <details>
# <summary>Hint</summary>
#
# How many numbers does the optimiser's step need for one tuned number, itself included? And for a
# frozen one?
#
# </details>


# %% tags=["exercise"]
def tuning_bytes(trained, frozen, frozen_bytes=2):
    """Numbers tuned and frozen -> bytes of weights, gradients and Muon's averages."""
    ### BEGIN SOLUTION
    value = gradient = average = 4
    return (value + gradient + average) * trained + frozen_bytes * frozen
    ### END SOLUTION


checks.tuning_bytes(tuning_bytes)

# %% [markdown]
# ### Predicted and measured, on this machine
#
# The rest depends on every operation of the UNet, so we do not guess: `dte_lab/hardware/trace.py`
# runs a real step on *fake tensors*, which have shapes and no data, and counts what comes and goes.
# It needs no GPU, and takes as long for a large picture as for a small one. Here is its prediction
# for the small model beside what the operating system saw of a real step. A trace sees tensors. It
# does not see the scratch space of fast kernels, nor what the allocator keeps for later. Does the
# gap between the lines grow with the batch, or is it the same everywhere?

# %%
from functools import partial

from dte_lab.hardware.device import PeakMemory
from dte_lab.hardware.trace import traced_peak
from dte_lab.panels.tuning import memory_figure
from dte_lab.tuning import tune


# %%
def one_step(noise_levels):
    tune(
        pipe.backbone, pipe.prompt_encoder, prediction, pixels, pipe.encoder.method,
        TuneConfig(num_steps=1, batch_size=noise_levels),
        bank=(pipe.encoder.bank, pipe.encoder.bank_concepts), progress=False,
    )  # fmt: skip


def predicted_mb(noise_levels):
    """Peak of all tensors of a step beyond the frozen weights, without computing it."""
    frozen = [weight for part in pipe.backbone.modules for weight in part.parameters()]
    return traced_peak(partial(one_step, noise_levels), frozen) / 2**20


def measured_mb(noise_levels):
    """The same as the operating system, or CUDA's allocator, saw it; None where it does not say."""
    peak = PeakMemory(pipe.backbone.device)
    one_step(noise_levels)
    return peak.read()


# %% tags=["expected:tuning_bytes"]
batches = (1, 4, 16)
expected = [predicted_mb(batch) for batch in batches]
measured = [measured_mb(batch) for batch in batches]
measured = None if None in measured else measured

count_bytes = checks.yours("tuning_bytes", otherwise=lambda tuned, frozen: 12 * tuned)
by_hand = count_bytes(trained["predictions"], 0) / 2**20
print(f"tuned numbers, gradients and averages, by hand: {by_hand:.1f} MB")
print(f"{'noise levels':>14}{'predicted MB':>15}{'measured MB':>15}")
for i, batch in enumerate(batches):
    print(f"{batch:>14}{expected[i]:>15.0f}{measured[i] if measured else float('nan'):>15.0f}")
show(
    memory_figure(batches, expected, measured),
    f"Memory of a tuning step over its noise levels: predicted {expected[0]:.0f} to "
    f"{expected[-1]:.0f} MB"
    + (f", measured {measured[0]:.0f} to {measured[-1]:.0f} MB." if measured else "."),
)
if measured:
    gaps = [f"{m - e:+.0f} MB at {b}" for b, e, m in zip(batches, expected, measured, strict=True)]
    saw(f"Measured minus predicted: {', '.join(gaps)} noise levels.")

# %% [markdown]
# ### Stable Diffusion 1.5 on a card of 15 GB
#
# That is what a free T4 has. The bars are **predictions** by the same trace at full size, without
# weights and without a GPU; `benchmarks/sd15_memory.py` made them, `dte memory` makes others.
# The choices: how many noise levels a step has (`batch`), the side of the picture, half or full
# precision of what is frozen, *gradient checkpointing* (activations are computed anew instead of
# kept: less memory for more time) and *offload* (image encoder and autoencoder wait on the
# CPU). Which of them is the cheapest way to make it fit?

# %%
from dte_lab.memory_needs import Setting
from dte_lab.panels.tuning import card_figure
from dte_lab.sd15 import random_parts

CARD = 15
bytes_needed, choices, known = {}, [], {}
for row in json.loads((RESULTS / "sd15_memory.json").read_text())["rows"]:
    choices.append(Setting(**row["setting"]))
    bytes_needed[str(choices[-1])] = row["bytes"]
for file in sorted(RESULTS.glob("sd15_card_*.json")):
    for row in json.loads(file.read_text())["rows"]:
        if (peak := row["measured"]["tuning"]["bytes"]) is not None:
            known[str(Setting(**row["setting"]))] = peak / 1e9

# %%
parts = random_parts("meta")
weights = {k: count(v.parameters()) for k, v in parts.items() if isinstance(v, torch.nn.Module)}
free = 768 + 199_296 * Setting().rank  # v*, and A and B of 128 projections; see docs/sd15.md
print(
    f"by hand, in GB: {2 * sum(weights.values()) / 1e9:.2f} for frozen weights in fp16, "
    f"{16 * free / 1e9:.3f} for {free:,} tuned numbers"
)
print(
    f"if the whole UNet were tuned, as DreamBooth does: {16 * weights['unet'] / 1e9:.1f} GB for it "
    "before the first activation"
)
print(
    f"measured so far: {len(known)} settings, in results/sd15_card_*.json"
    if known
    else "measured so far: none; benchmarks/sd15.py would, on a GPU, and put it beside this"
)

# %%
labels = [str(c).removeprefix("sd15, ").removesuffix(f", rank {c.rank}") for c in choices]
labels = [label.replace(f", rank {choices[0].rank}", "") for label in labels]
gigabytes = [bytes_needed[str(c)] / 1e9 for c in choices]
show(
    card_figure(labels, gigabytes, [known.get(str(c)) for c in choices], CARD),
    f"Predicted peak memory of tuning Stable Diffusion 1.5 beside a card of {CARD} GB: "
    + "; ".join(f"{label}: {gb:.1f} GB" for label, gb in zip(labels, gigabytes, strict=True))
    + ".",
)

# %%
fits = [label for label, gb in zip(labels, gigabytes, strict=True) if gb <= CARD]
saw(
    f"{len(fits)} of {len(labels)} settings fit, by prediction: {'; '.join(fits)}. Fewer noise",
    "levels and a smaller side cost quality, checkpointing and offload cost time.")  # fmt: skip

# %% [markdown]
# ## 7. The same steps on Stable Diffusion 1.5
#
# These cells run where there is a GPU and the hub's files can be had (3.6 GB in half precision);
# elsewhere they say so in a line. There is no encoder for this model, so tuning starts at a mixture
# of the words that CLIP finds in the picture, with offsets of zero. Twelve steps are then a part of
# the way: plan for 25 to 50, and watch for the same turn into overfitting. The weights are under
# the CreativeML OpenRAIL-M licence, and no safety checker looks at the pictures.

# %%
from dte_lab.hardware.doctor import examine

SD15_STEPS = (0, 12, 25, 50, 100)
reason = "there is no GPU"
if device == "cuda":  # asks the hub only here
    found = next(f for f in examine("sd15", device=device) if f.topic == "backbone")
    reason = None if found.good else found.text
print(
    f"Stable Diffusion 1.5 is left out: {reason}." if reason else "Stable Diffusion 1.5: going on"
)

# %%
from PIL import Image
from skimage.data import chelsea

from dte_lab.evaluation.sd15_steps import largest_fitting, over_steps

wanted = ("a photo of S*", "a photo of S* on the beach", "a painting of S* at night")
if not reason:
    card = torch.cuda.get_device_properties(0).total_memory
    choice = largest_fitting(choices, bytes_needed, card)
    print(f"this card has {card / 1e9:.0f} GB; chosen: {choice}")
    cats, cat = over_steps(Image.fromarray(chelsea()), choice, device, SD15_STEPS, wanted)
    print(
        f"{cat.seconds:.0f} s; peak memory {cat.info['peak_memory_mb'] * 2**20 / 1e9:.2f} GB "
        f"measured, {bytes_needed[str(choice)] / 1e9:.2f} GB predicted"
    )
    show(
        picture_grid(list(zip(*cats.values(), strict=True)), list(cats), list(wanted)),
        f"A cat by Stable Diffusion 1.5: {', '.join(cats)}; {'; '.join(wanted)}.",
    )

# %% [markdown]
# ## 8. Against Textual Inversion and LoRA, by the clock
#
# Steps of different methods are not worth the same. A step of ours runs every attention layer
# twice, Textual Inversion tunes a single vector, DreamBooth LoRA tunes offsets and has no encoder
# to look at the picture first. What you wait for is seconds. So each method gets the same time on
# this machine, with the same picture, seeds and noise levels per step, and shows what it has by
# then. The encoder's own look at the picture is in its time; its pre-training is not, just as the
# base model's is not.

# %%
from dte_lab.baselines import dreambooth_lora, textual_inversion
from dte_lab.panels.tuning import captioned_grid

UP_TO = 40
budget = record[11]["seconds"]  # of our 12 steps
tracks = {"tuning encoder": {0: (predicted.seconds, predicted)}}
tracks["tuning encoder"] |= {
    n: (record[n - 1]["seconds"], after(n)) for n in range(1, len(record) + 1)
}
for name, method in (
    ("Textual Inversion", textual_inversion),
    ("DreamBooth LoRA", dreambooth_lora),
):
    states = method(pipe, pixels, range(0, UP_TO + 1, 2))
    tracks[name] = {n: (c.info["seconds"], c) for n, c in states.items()}

# %%
shares, rows = (0.25, 1, 2), []
for track in tracks.values():
    row = []
    for share in shares:
        n = max([0, *(n for n, (seconds, _) in track.items() if seconds <= share * budget)])
        seconds, concept = track[n]
        images = look(concept, ["beach", "night"]).values()
        row += [(image, f"{n} steps, {seconds:.1f} s") for image in images]
    rows.append(row)
heads = [f"{share * budget:.1f} s, {scene}" for share in shares for scene in ("beach", "night")]
show(
    captioned_grid(rows, heads, [name.replace(" ", "\n") for name in tracks]),
    f"Rows: {', '.join(tracks)}. Columns: what each draws on the beach and at night within "
    f"{', '.join(f'{share * budget:.1f}' for share in shares)} seconds of tuning.",
)

# %% [markdown]
# And the same on the held-out concepts: quality over mean seconds, as measured on the machine that
# made `results/steps.json`. At one height, the curve further to the left is the faster method. Look
# at the first point of each curve too: what does a method know before it tunes at all?

# %%
lines = []
for method, top in tops.items():
    seconds = {p["steps"]: p["mean"] for p in curves[method]["seconds"]}
    at = top["steps"]
    lines.append((names[method], f"{seconds[at]:.1f}", at, f"{top['mean']:.2f}"))
heads = ["Method", "Seconds to its best", "Steps", "Harmonic mean"]
show_table(lines, heads, measured_with(results["versions"]).capitalize())
show(
    quality_figure(curves, names, measures, over="seconds"),
    f"Identity, prompt fidelity and their harmonic mean over seconds, {n_concepts} concepts.",
)
begin = {m: c["fidelity"][0] for m, c in curves.items() if c["fidelity"][0]["steps"] == 0}
saw(when, "Harmonic mean before any tuning:",
    "; ".join(f"{names[m]} {point['mean']:.2f}" for m, point in begin.items()) + ".")  # fmt: skip

# %% [markdown]
# ## To take along
#
# - Tuning moves the prediction itself, a small share of all numbers; the model stays frozen.
# - The loss of one step is mostly noise, and even without noise it only says how well the *input
#   picture* is learned. Look at pictures in other scenes, with a prompt that asks for something.
# - Stop at the least steps that satisfy, and say for how many concepts you have checked it.
# - Muon costs 12 bytes per tuned number, AdamW 16. Low-rank offsets are few, so it is
#   checkpointing, half precision and the size of the batch that decide whether it fits.
# - Compare methods by the clock, and say what the clock leaves out.

# %%
from dte_lab.panels import take_along

take_along(
    f"Twelve steps change the loss by {losses['predictions'] - start:+.3f} where the predictions "
    f"are tuned, and by {losses['encoder'] - start:+.3f} where the encoder is.",
    f"In other scenes the loss of this one thing is lowest after {best} steps; on its own picture "
    f"after {STEPS[int(np.argmin(own))]}.",
    f"{len(fits)} of {len(labels)} settings of Stable Diffusion fit a card of {CARD} GB, by "
    "prediction.",
)

# %% [markdown]
# Everything here is in short files: `dte_lab/tuning.py` has the steps, `dte_lab/objective.py` the
# loss, `dte_lab/baselines.py` the other methods, `dte_lab/hardware/memory.py` the prediction of
# memory.
