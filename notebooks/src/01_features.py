# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: Features
#     promise: look through the encoder's two pairs of eyes, and test what each of them knows
#     minutes: 75
# ---

# %% [markdown]
# # Features: what the encoder sees
#
# *Look through the encoder's two pairs of eyes, and test what each of them knows.*
#
# The tuning-encoder never looks at pixels. It looks at *features*, from two frozen networks. CLIP's
# image tower sees your picture as it is. The encoder half of the denoising UNet sees it as a noisy
# latent at a time step `t`, so its view changes with `t`. A small convolutional network fuses both,
# and two heads predict from that: the word `v*` and the weight offsets. What the features do not
# hold, no head can predict.
#
# After this notebook you can
#
# - show feature maps as pictures, and say what the colours mean and what they do not;
# - noise a latent to any `t`, and read the UNet's maps there;
# - compare feature spaces with CKA, neighbours and UMAP, and say what each leaves out;
# - test with linear probes what a space knows, on things that the networks have never seen;
# - write the fusion step, and judge at which `t` it is best to predict.

# %% [markdown] tags=["no-slide"]
# ## Set up
#
# The cell installs the package where it is missing, and leaves an installed PyTorch as it is.

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
import numpy as np
import torch
import torch.nn.functional as F

from dte_lab import checks
from dte_lab.panels import describe_machine, quiet_libraries, saw, show

quiet_libraries()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %%
from dte_lab import DTEPipeline

pipe = DTEPipeline.from_pretrained("small", device=device)
backbone, encoder = pipe.backbone, pipe.encoder
T = len(backbone.alphas_cumprod)
print(f"pictures of {backbone.resolution} x {backbone.resolution} pixels, {T} time steps")
print(f"latents of {' x '.join(map(str, backbone.latent_shape))} (channels, height, width)")

# %% [markdown]
# ### The pictures
#
# The small world can render any of its things in three drawing styles and twenty scenes. We take
# things that were kept from all training, the same number from each of the world's groups, and
# render each of them several times. Style, scene and small variations of the scene are drawn at
# random. So we know everything about every picture, and can ask which of it the features know.

# %%
from dte_lab.world import SCENES, STYLES, concepts, split_names
from dte_lab.world.data import rendered

PER_GROUP, RENDERINGS = 12, 6
rng = np.random.default_rng(0)
members = {}
for name in split_names("val") + split_names("test"):
    members.setdefault(concepts()[name].group, []).append(name)
chosen = [n for names in members.values() for n in rng.choice(names, PER_GROUP, replace=False)]
items = [
    (str(name), STYLES[rng.integers(len(STYLES))], SCENES[rng.integers(len(SCENES))], seed)
    for name in chosen
    for seed in range(RENDERINGS)
]
thing, style, scene, rendering = (np.array(column) for column in zip(*items, strict=True))
group = np.array([concepts()[name].group for name in thing])
pixels = rendered(items).to(device)  # (N, 3, H, W) in [-1, 1]
print(f"{len(items)} pictures: {len(chosen)} things, {RENDERINGS} renderings of each,")
print(f"{len(members)} groups ({', '.join(members)})")

# %% [markdown]
# ## 1. CLIP's view
#
# CLIP was trained to match pictures with their captions. Its image tower cuts the picture into
# square patches, and gives each patch a vector. The encoder reads two things from it: the vectors
# of all patches, laid out as a map, and one unit vector for the picture as a whole, which lives in
# the same space as CLIP's text vectors.

# %%
from dte_lab.features import image_features

clip = image_features(backbone, pixels, encoder.settings.clip_layer)
print("patches:", tuple(clip.patches.shape), "(pictures, channels, rows, columns)")
print("embeds: ", tuple(clip.embeds.shape), "(pictures, channels)")

# %% [markdown]
# A map with a hundred channels is no picture yet. PCA finds the three directions in which the patch
# vectors vary most, over all pictures, and we paint them as red, green and blue. **Two patches of
# one colour have similar vectors; the colours themselves mean nothing.** Below the colours is the
# first component alone, from dark (low) to bright (high), and then the two channels that vary most,
# raw, as the network made them.
#
# Look for three things. Does the thing stand out from its background? Does a background have the
# same colour in two pictures? And is the thing's colour about *what it is*, or about its paint? A
# picture of colours cannot settle the last; the probes of section 5 can.

# %%
from PIL import Image

from dte_lab.panels.features import as_colours, map_grid, principal_maps


def to_image(x):
    """(3, H, W) in [-1, 1] -> PIL image."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


# One thing of each group, whose name fits above a picture, in the styles by turns.
examples = [
    next(
        i
        for i, (name, drawn, *_) in enumerate(items)
        if group[i] == g and drawn == STYLES[k % len(STYLES)] and len(name) <= 12
    )
    for k, g in enumerate(members)
]

# %%
pictures = [to_image(pixels[i]) for i in examples]
captions = [f"{thing[i]}\n{style[i]}, {scene[i]}" for i in examples]

patches = clip.patches.cpu().numpy()
components = principal_maps(patches)[examples]  # (n, g, g, 3)
strongest = patches.std(axis=(0, 2, 3)).argsort()[::-1][:2]
rows = {
    "picture": pictures,
    "3 components": list(as_colours(components)),
    "the first": list(components[..., 0]),
    **{f"channel {c}": list(patches[examples, c]) for c in strongest},
}
show(
    map_grid(list(rows.values()), captions, list(rows)),
    f"{len(examples)} pictures; below each its CLIP patches as colours from three principal "
    "components, the first component alone, and two single channels.",
)

# %%
every = principal_maps(patches)  # (N, g, g, 3)
ring = np.ones(every.shape[1:3], bool)
ring[2:-2, 2:-2] = False  # the border of a picture, two patches wide
borders, middles = every[:, ring].mean(1), every[:, ~ring].mean(1)  # (N, 3)
within = every[:, ring].std(1).mean()
inward = np.linalg.norm(middles - borders, axis=1).mean() / within


def apart(of, same):
    """Mean distance of pairs that share a label, as a share of that of all others."""
    d = np.linalg.norm(of[:, None] - of[None], axis=2)
    return d[same & ~np.eye(len(d), dtype=bool)].mean() / d[~same].mean()


alike = {name: apart(of, values[:, None] == values) for name, of, values in
         (("scene", borders, scene), ("thing", middles, thing))}  # fmt: skip
saw(f"All {len(items)} pictures, in the three components: the middle is {inward:.1f} times as far",
    "from the border as the patches of a border scatter. Borders of one scene are",
    f"{alike['scene']:.0%} as far apart as those of two; middles of one thing, in whatever scene",
    f"and style, {alike['thing']:.0%} as far as those of two things.")  # fmt: skip

# %% [markdown]
# ## 2. The UNet's view
#
# The UNet was trained to take noise out of latents. To feed it we need a noisy latent: `x0` is the
# clean latent, `noise` is Gaussian, and $\bar\alpha_t$ falls from nearly 1 at `t = 0` to nearly 0
# at the last step.
#
# $$x_t = \sqrt{\bar\alpha_t}\; x_0 + \sqrt{1 - \bar\alpha_t}\;\text{noise}$$
#
# #### Exercise 1: noise a latent
#
# Difficulty 2 of 5 · 10 minutes
#
# Write this rule for a batch in which every picture has its own `t`. `alphas_cumprod` is a table of
# $\bar\alpha$ with one number for each of the `T` time steps.
#
# <details>
# <summary>Hint</summary>
#
# `alphas_cumprod[t]` has one number per picture, shape `(B,)`. To multiply a latent
# `(B, C, h, w)` by it, it needs three more axes of length 1: `[:, None, None, None]`. Without them
# PyTorch would line it up with the last axis, and sometimes not even complain.
#
# </details>


# %% tags=["exercise"]
def noisy_latent(x0, noise, t, alphas_cumprod):
    """x0 and noise (B, C, h, w), t (B,), alphas_cumprod (T,) -> x_t (B, C, h, w)."""
    ### BEGIN SOLUTION
    abar = alphas_cumprod[t][:, None, None, None]  # (B, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    ### END SOLUTION


checks.noisy_latent(noisy_latent)

# %% [markdown]
# The package has it as `add_noise` in `dte_lab/backbone.py`; below, yours is used if it is right.
# Now we can ask for features at several `t`. The prompt is the one that the encoder uses, by
# default the empty one: nobody tells the UNet what it looks at.
#
# The UNet's encoder half has few layers: `conv_in`, the down blocks and the middle block. Each
# gives one map or several. Their scales differ by far, and so may their sizes; to fuse them they
# must be alike.

# %%
from dte_lab.backbone import add_noise
from dte_lab.features import unet_feature_dim, unet_features, unet_layers

FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the last time step
STEPS = [round(f * (T - 1)) for f in FRACTIONS]
mix = checks.yours("noisy_latent", lambda x0, noise, t, table: add_noise(backbone, x0, noise, t))
layers = unet_layers(backbone.unet)
prompt = pipe.prompt_encoder.plain([encoder.settings.feature_prompt])


# %%
def noised(latents, step, seed):
    """Latents at time step `step`: (x_t, timesteps); the noise depends on seed and step."""
    generator = torch.Generator().manual_seed(seed * T + step)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = torch.full((len(latents),), step, device=latents.device)
    return mix(latents, noise, timesteps, backbone.alphas_cumprod), timesteps


latents = backbone.encode_images(pixels).float()
print("t     signal  noise   (factors of x0 and of the noise)")
for step in STEPS:
    abar = backbone.alphas_cumprod[step].item()
    print(f"{step:<5} {abar**0.5:.3f}   {(1 - abar) ** 0.5:.3f}")
for layer in layers:
    print(f"{layer}: {unet_feature_dim(backbone.unet, [layer])} channels")

# %% [markdown]
# #### Exercise 2: bring a map to one scale and size
#
# Difficulty 3 of 5 · 15 minutes
#
# Take the maps of one layer, one per picture, `(B, C, h, w)`. Normalise each *picture's* map over
# itself, so that all its numbers together have mean 0 and variance 1. Then average it down to
# `grid × grid` cells; `h` and `w` are multiples of `grid`.
#
# <details>
# <summary>Hint</summary>
#
# `x.mean((1, 2, 3), keepdim=True)` is one number per picture; `x.std` takes the same arguments, and
# `correction=0`. `F.adaptive_avg_pool2d(x, grid)` averages cells. The order of the two steps
# matters: which of them changes the variance?
#
# </details>


# %% tags=["exercise"]
def map_to_grid(x, grid):
    """x (B, C, h, w) -> (B, C, grid, grid), each picture's map normalised over itself first."""
    ### BEGIN SOLUTION
    mean = x.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    std = x.std((1, 2, 3), keepdim=True, correction=0)
    return F.adaptive_avg_pool2d((x - mean) / std, grid)
    ### END SOLUTION


checks.map_to_grid(map_to_grid)

# %% [markdown]
# `unet_features` in `dte_lab/features.py` does this with every map and stacks their channels; a map
# that is smaller than the grid is not averaged, its cells are repeated. Here
# are the maps of our example pictures at six noise levels. The first row is the noisy latent,
# decoded; in the other rows each layer has a PCA of its own, over these pictures and all `t`, so a
# colour means the same in all columns of a row.
#
# Read each row from left to right. Up to which `t` can you still find the thing, or its outline?
# Does the whole row change its colour with `t`? A layer that knows the time can change everywhere
# at once, even where the picture did not change. And a pattern may stay up to the last step, where
# no picture is left: it then belongs to the places of the grid, whatever picture is there, and the
# number below leaves it out. And compare the rows: does a deeper layer lose the picture sooner, or
# later, than the first one, which sees the noise directly?

# %%
small = latents[examples]
grid = encoder.settings.grid
noisy, raw = {}, {layer: [] for layer in layers}
keys = [(str(thing[i]), f) for f in FRACTIONS for i in examples]
for fraction, step in zip(FRACTIONS, STEPS, strict=True):
    x_t, timesteps = noised(small, step, seed=0)
    decoded = [to_image(picture) for picture in backbone.decode_latents(x_t)]
    noisy |= {(str(thing[i]), fraction): p for i, p in zip(examples, decoded, strict=True)}
    for layer in layers:
        maps = unet_features(backbone, x_t, timesteps, prompt, grid, [layer])
        raw[layer].append(maps.cpu().numpy())
layer_maps = {
    layer: dict(zip(keys, principal_maps(np.concatenate(maps)), strict=True))
    for layer, maps in raw.items()
}

# %% tags=["expected:noisy_latent"]
first = str(thing[examples[1]])
rows = [[noisy[first, f] for f in FRACTIONS]]
rows += [[as_colours(maps[first, f]) for f in FRACTIONS] for maps in layer_maps.values()]
show(
    map_grid(rows, [f"t = {s}" for s in STEPS], ["noisy latent,\ndecoded", *layers]),
    f"The picture of {first} at {len(STEPS)} noise levels, and below it the maps of "
    f"{len(layers)} UNet layers as colours.",
)

# %%
shown = list(dict.fromkeys(name for name, _ in keys))


def own(maps, name, f):
    """What the map of a picture has beyond the mean map of all of them, at one t."""
    return (maps[name, f] - np.mean([maps[n, f] for n in shown], axis=0)).ravel()


# %%
alike = {
    layer: [
        np.mean([np.corrcoef(own(maps, n, f), own(maps, n, 0.0))[0, 1] for n in shown])
        for f in FRACTIONS
    ]
    for layer, maps in layer_maps.items()
}
for layer, row in alike.items():
    print(f"{layer:28}", " ".join(f"{r:5.2f}" for r in row))
half = {layer: [f for f, r in zip(FRACTIONS, row, strict=True) if r > 0.5][-1]
        for layer, row in alike.items()}  # fmt: skip
saw("What a map has beyond the mean of all pictures correlates by more than 0.5 with itself at",
    "t = 0 up to:",
    "; ".join(f"{layer} {f:g} T" for layer, f in half.items()) + ".")  # fmt: skip

# %% [markdown]
# #### Try it: picture, noise level and layer
#
# The panel shows any of the pictures, at any of these `t`, in any layer. The maps on the left were
# made under the empty prompt. On the right tell the UNet what it looks at, and *run it live*: do
# its maps change? On a page that has no notebook running behind it, the figure below has two of the
# other pictures in the last layer.

# %%
from IPython.display import display

from dte_lab.panels.features import layer_figure, layer_panel
from dte_lab.panels.live import with_live


def look(text, name, fraction, layer):
    """The maps of a layer under a prompt, in the colours of the panel."""
    at = FRACTIONS.index(fraction)
    x_t, timesteps = noised(small, STEPS[at], seed=0)
    said = pipe.prompt_encoder.plain([text])
    maps = unet_features(backbone, x_t, timesteps, said, grid, [layer]).cpu().numpy()
    i = [str(thing[k]) for k in examples].index(name)
    colours = principal_maps(maps, of=np.concatenate(raw[layer]))[i]
    before = raw[layer][at][i]
    change = np.linalg.norm(maps[i] - before) / np.linalg.norm(before)
    title = f"{layer}: {change:.0%} of its length away from the empty prompt's"
    return layer_figure(noisy[name, fraction], colours, title)


# %%
display(with_live(layer_panel(noisy, layer_maps), look, "a picture of a cat on the beach"))

# %%
names = list(dict.fromkeys(name for name, _ in keys))
rows, shown = [], names[2:4]
for name in shown:
    rows.append([noisy[name, f] for f in FRACTIONS])
    rows.append([as_colours(layer_maps[layers[-1]][name, f]) for f in FRACTIONS])
show(
    map_grid(rows, [f"t = {s}" for s in STEPS], [t for n in shown for t in (n, layers[-1])]),
    f"For each of {len(shown)} pictures two rows: the noisy latent, decoded, at {len(STEPS)} noise "
    f"levels, and the maps of {layers[-1]} as colours.",
)

# %% [markdown]
# ## 3. How the features change with t
#
# Pictures of maps are good for ideas and bad for claims. So we go on with numbers, over all the
# pictures. Each map is averaged over the four quarters of the picture, so that a picture becomes
# one vector. Every picture gets fresh noise at every `t`. What two noise levels have in common then
# comes from the picture.

# %%
from tqdm.auto import tqdm


def quarters(maps):
    """Maps (N, C, g, g) averaged over each quarter of the picture: (N, 4 * C) as an array."""
    return F.adaptive_avg_pool2d(maps, 2).flatten(1).cpu().numpy()


unet = {}  # {t / T: (N, 4 * C)}
noisy_latents = {}  # what the UNet was given, pooled alike
for fraction, step in zip(tqdm(FRACTIONS, desc="noise levels"), STEPS, strict=True):
    x_t, timesteps = noised(latents, step, seed=1)
    maps = unet_features(backbone, x_t, timesteps, prompt, grid, encoder.settings.unet_layers)
    unet[fraction], noisy_latents[fraction] = quarters(maps), quarters(x_t)
clip_patches, clip_embeds = quarters(clip.patches), clip.embeds.cpu().numpy()
print(f"numbers per picture: UNet {unet[0.0].shape[1]}, CLIP patches {clip_patches.shape[1]},")
print(f"CLIP embedding {clip_embeds.shape[1]}")

# %% [markdown]
# **Linear CKA** (centred kernel alignment, [Kornblith et al.
# 2019](https://arxiv.org/abs/1905.00414)) asks whether two spaces arrange the same pictures alike.
# `X` and `Y` hold one row per picture, and each column's mean is subtracted. $K = X X^\top$ is then
# the table of similarities between all pictures in the one space, $L = Y Y^\top$ in the other, and
# CKA is the cosine between the two tables:
#
# $$\mathrm{CKA}(X, Y) = \frac{\langle K, L \rangle}{\|K\|\;\|L\|}$$
#
# It is 1 when one space is a rotated or scaled copy of the other, and does not mind different
# numbers of channels. It is not quite 0 for spaces that have nothing to do with each other; the
# line *pictures shuffled* shows how much is left then.
#
# The left map compares the UNet's features at two noise levels. The diagonal is 1, since a space is
# compared with itself. Where the values fall off quickly beside the diagonal, a head that reads
# these features must know `t` to understand them. CKA does not see a shift that all pictures share,
# nor a rotation; a head would have to know of these, too. The right side compares them with CLIP,
# which sees no noise and is the same at every `t`.

# %%
from dte_lab.panels.features import linear_cka, similarity_figure

between = np.array([[linear_cka(unet[a], unet[b]) for b in FRACTIONS] for a in FRACTIONS])
shuffled = [rng.permutation(clip_patches) for _ in range(5)]
curves = {
    "with CLIP patches": ([linear_cka(unet[f], clip_patches) for f in FRACTIONS], None),
    "with CLIP embedding": ([linear_cka(unet[f], clip_embeds) for f in FRACTIONS], None),
    "with CLIP patches, pictures shuffled": (
        [np.mean([linear_cka(unet[f], s) for s in shuffled]) for f in FRACTIONS],
        [np.std([linear_cka(unet[f], s) for s in shuffled]) for f in FRACTIONS],
    ),
    "with CLIP embedding, pictures shuffled": (
        [linear_cka(unet[f], rng.permutation(clip_embeds)) for f in FRACTIONS], None
    ),
}  # fmt: skip
like_clip = dict(zip(FRACTIONS, curves["with CLIP patches"][0], strict=True))
nearest_clip = max(like_clip, key=like_clip.get)

# %%
print(f"n = {len(items)} pictures. The UNet's features are most like CLIP's patches at")
print(f"t = {nearest_clip:g} T (CKA {like_clip[nearest_clip]:.2f}). Neighbouring noise levels have")
print(f"a CKA between {between.diagonal(1).min():.2f} and {between.diagonal(1).max():.2f}.")
show(
    similarity_figure(FRACTIONS, between, curves),
    "A map of the CKA between the UNet's features at all pairs of noise levels, from "
    f"{between.min():.2f} to 1, and curves of their CKA with CLIP's features.",
)

# %%
flat = max(like_clip.values()) - min(v for f, v in like_clip.items() if f < 1)
saw(
    f"Below the last step the CKA with CLIP's patches varies by {flat:.2f}: "
    f"{'a flat curve, so do not make much of its maximum' if flat < 0.1 else 'it depends on t'}.",
    "Shuffled pictures still reach "
    + " and ".join(
        f"{max(values):.2f} ({name.split(',')[0].removeprefix('with ')})"
        for name, (values, _) in curves.items()
        if "shuffled" in name
    )
    + ".",
)

# %% [markdown]
# ## 4. Neighbourhoods
#
# UMAP draws a space of a hundred dimensions on paper, and tries to keep neighbours together. Here
# are CLIP's embedding and the UNet's features at two noise levels; the pictures are the same in
# both rows, coloured and marked first by group, then by drawing style. Where the clumps fit
# neither, the lines below the figure ask what else holds them together.
#
# Trust UMAP with *who is near whom*. Do not read distances between far clumps, nor the size of a
# clump. And since an eye finds patterns in anything, under each map is a number from the full
# space: of a picture's ten nearest neighbours that show another thing, how many are of its kind?

# %%
import warnings

from umap import UMAP

from dte_lab.panels.features import neighbours_alike, umap_figure

EARLY, LATE = FRACTIONS[1], FRACTIONS[-2]
spaces = {
    "CLIP embedding": clip_embeds,
    f"UNet, t = {EARLY:g} T": unet[EARLY],
    f"UNet, t = {LATE:g} T": unet[LATE],
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns that a fixed seed allows one process only
    points = {
        name: UMAP(metric="cosine", random_state=0).fit_transform(x - x.mean(axis=0))
        for name, x in spaces.items()
    }

# %%
labels = {"group": group, "style": style}
notes = {}
for what, names in {**labels, "scene": scene}.items():
    for name, x in spaces.items():
        share = neighbours_alike(x, names, thing)
        chance = neighbours_alike(rng.normal(size=x.shape), names, thing)
        notes[what, name] = f"neighbours of the same {what}:\n{share:.0%} (chance {chance:.0%})"
show(
    umap_figure(points, labels, notes),
    "UMAP of three feature spaces, marked by group and by style. "
    + "; ".join(
        f"{name}: {notes[what, name]}".replace("\n", " ") for what in labels for name in spaces
    )
    + ".",
)
for name in spaces:
    print(f"{name + ':':<22}" + notes["scene", name].replace("\n", " "))

# %%
above = {
    name: {what: neighbours_alike(x, values, thing) / neighbours_alike(
        rng.normal(size=x.shape), values, thing) for what, values in
        (("group", group), ("style", style), ("scene", scene))}
    for name, x in spaces.items()
}  # fmt: skip
saw("What decides most, measured in multiples of chance:",
    "; ".join(f"in {name} the {max(v, key=v.get)} ({max(v.values()):.1f} times)"
              for name, v in above.items()) + ".")  # fmt: skip

# %% [markdown]
# The last three lines ask the same about the scene. Compare them with the numbers in the figure:
# what decides who is near whom in each space? If it is the scene, then a small difference between
# two things hides behind a large one between their backgrounds. That is no harm by itself, since a
# head need not look at all directions. Which of them it *could* use is the next question.

# %% [markdown]
# ## 5. Linear probes: which space knows what
#
# A linear probe is a logistic regression from features to a label. If even that can read the label,
# the label lies open in the features. What the probe cannot read may still be there in a twisted
# form.
#
# Four labels, and what is held back differs:
#
# - **thing**: which of the things is it? The probe learns from all renderings of each but one, and
#   is asked about the one, so it meets the thing in another scene and often in another style.
# - **group, style, scene**: the probe is asked about *things that it was never shown*. Otherwise it
#   could learn by heart that a certain thing is food.
#
# To be fair to spaces of different size, every space is first brought to the same number of
# dimensions, its first principal components. For comparison we probe the picture's own pixels, 8 ×
# 8 of them, and the noisy latents: what the UNet's maps know beyond those is the UNet's own work,
# but for what the mean over quarters of a picture takes from either. The bars are one standard
# deviation over the splits, and *guessing* always says the most frequent label.

# %%
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# %%
DIMENSIONS = 64
probe = LogisticRegression(C=0.3, max_iter=500)
by_thing = GroupKFold(5, shuffle=True, random_state=0)
targets = {  # label -> (its values, how to split, what a split holds together)
    "thing": (thing, LeaveOneGroupOut(), rendering),
    "group": (group, by_thing, thing),
    "style": (style, by_thing, thing),
    "scene": (scene, by_thing, thing),
}


def reduced(features):
    """(N, d) -> (N, DIMENSIONS) of variance 1; labels play no part in it."""
    pca = PCA(DIMENSIONS, whiten=True, random_state=0)
    return make_pipeline(StandardScaler(), pca).fit_transform(features)


# %%
def accuracy(features, target):
    """Mean and standard deviation of the probe's accuracy on what was held back."""
    values, splitter, together = targets[target]
    scores = cross_val_score(probe, features, values, groups=together, cv=splitter)
    return scores.mean(), scores.std()


tiny = F.adaptive_avg_pool2d(pixels, 8).flatten(1).cpu().numpy()
over_t = {
    name: {f: reduced(x) for f, x in by_t.items()}
    for name, by_t in {"UNet maps": unet, "noisy latents": noisy_latents}.items()
}
without_t = {"CLIP patches": clip_patches, "CLIP embedding": clip_embeds, "8 x 8 pixels": tiny}
without_t = {name: reduced(x) for name, x in without_t.items()}
probed = {}
for target in tqdm(targets, desc="labels"):
    probed[target] = {
        name: tuple(np.transpose([accuracy(x[f], target) for f in FRACTIONS]))
        for name, x in over_t.items()
    } | {name: accuracy(x, target) for name, x in without_t.items()}

# %%
from dte_lab.panels.features import curves_figure

chance = {  # always the most frequent label
    target: np.unique(values, return_counts=True)[1].max() / len(values)
    for target, (values, *_) in targets.items()
}
titles = {t: f"{t} (one of {len(set(values))})" for t, (values, *_) in targets.items()}
for target, curves in probed.items():
    best = max(without_t, key=lambda name: curves[name][0])
    level, spread = curves[best]
    first, *_, last = (
        f"{mean:.0%} ± {sd:.0%} at t = {f:g} T"
        for f, mean, sd in zip(FRACTIONS, *curves["UNet maps"], strict=True)
    )
    print(
        f"{target}: {best} {level:.0%} ± {spread:.0%}; UNet {first}, {last}; "
        f"guessing {chance[target]:.0%}"
    )

# %%
show(
    curves_figure(
        FRACTIONS,
        {titles[t]: curves for t, curves in probed.items()},
        "accuracy on what was held back",
        {titles[t]: level for t, level in chance.items()},
    ),
    f"Accuracy of linear probes against t for four labels, n = {len(items)} pictures; "
    "the numbers are printed above the figure.",
)

# %%
seen = []
for target, curves in probed.items():
    level = {n: (v[0][0] if n in over_t else v[0]) for n, v in curves.items()}
    best, second = sorted(level, key=level.get, reverse=True)[:2]
    seen.append(
        f"{target}, at the smallest t: {best} {level[best]:.0%}, {second} {level[second]:.0%}; "
        f"at the last step the UNet is {curves['UNet maps'][0][-1] - chance[target]:+.0%} from "
        "guessing."
    )
lead = {t: curves["UNet maps"][0] - chance[t] for t, curves in probed.items()}
lost = {t: next((f for f, x in zip(FRACTIONS, v, strict=True) if x < v[0] / 2), 1)
        for t, v in lead.items()}  # fmt: skip
seen.append(
    "Half of the UNet's lead over guessing is lost by: "
    + ", ".join(f"{t} {f:g} T" for t, f in lost.items()) + "."
)  # fmt: skip
saw(*seen)

# %% [markdown]
# How to read it:
#
# - A UNet curve that **falls** with `t` is about something that noise destroys. A scene is made of
#   large areas of colour, a thing of outlines and details: which of the two curves falls first?
# - At the last step the latent is pure noise, and every UNet curve should be at the level of
#   guessing, give or take the few percent that chance allows with so many pictures. If one were
#   far above, we would have made a mistake: this is the experiment's own test.
# - A UNet curve **above** that of the noisy latents is knowledge that the UNet adds. One beside it
#   only hands on what it was given.
# - A CLIP line above the UNet's curve is a reason to look at CLIP as well; where the error bars
#   overlap, these splits cannot tell.
# - Where *nothing* is far above guessing, this backbone knows little about that label for things it
#   was never shown, and a head that predicts from its features will have to do with that little.

# %% [markdown]
# ## 6. The fusion
#
# The encoder wants both: CLIP's view, which no noise disturbs, and the UNet's, which is in the
# language of the network that will draw. `FeatureFusion` in `dte_lab/features.py` brings them
# together on one grid. A convolution of size 1 × 1 projects the channels of each map to a common
# width `d`, position by position; the picture's embedding is projected as well and added at every
# position; and each position becomes a *token*, a vector of `d` numbers.
#
# #### Exercise 3: fuse
#
# Difficulty 3 of 5 · 15 minutes
#
# Write this step. A 1 × 1 convolution without bias is nothing but a matrix applied to the channels
# of each position, so the weights come as plain matrices. Tokens are listed row by row.
#
# <details>
# <summary>Hint</summary>
#
# `torch.einsum("dc,bchw->bdhw", w, x)` applies `w` to the channels; `F.conv2d` with
# `w[:, :, None, None]` does the same. The vector becomes `(B, d)`, and needs two more axes to be
# added to a map `(B, d, g, g)`. For the tokens, `flatten(2)` makes one axis of rows and columns; a
# token is then a column, not a row, so two axes change places.
#
# </details>


# %% tags=["exercise"]
def fuse(patches, unet, whole, w_clip, w_unet, w_whole):
    """patches (B, Dc, g, g), unet (B, Du, g, g), whole (B, De) -> tokens (B, g*g, d).

    The weights have the shapes (d, Dc), (d, Du) and (d, De).
    """
    ### BEGIN SOLUTION
    x = torch.einsum("dc,bchw->bdhw", w_clip, patches)  # (B, d, g, g)
    x = x + torch.einsum("dc,bchw->bdhw", w_unet, unet)
    x = x + (whole @ w_whole.T)[:, :, None, None]
    return x.flatten(2).transpose(1, 2)  # (B, g*g, d)
    ### END SOLUTION


checks.fuse(fuse)

# %% [markdown]
# The module adds an embedding of `t` to the picture's vector. Section 3 says how far the same
# picture's features depend on `t`. After the sum come residual blocks of 3 × 3 convolutions, in
# which neighbours talk to each other, and a learned vector for each position. The head of the word
# reads the tokens *in their places* beside their mean, since a mean no longer knows what is where
# (`TokenHead` in `dte_lab/hypernetwork.py`). Here are the two maps that go in, and the tokens of
# the trained encoder that come out.

# %% tags=["expected:fuse"]
middle = min(FRACTIONS, key=lambda f: abs(f - np.mean(encoder.settings.feature_timesteps)))
step = STEPS[FRACTIONS.index(middle)]
x_t, timesteps = noised(latents, step, seed=1)
maps = unet_features(backbone, x_t, timesteps, prompt, grid, encoder.settings.unet_layers)
with torch.no_grad():
    tokens = encoder.fusion(clip, maps, timesteps)  # (N, g*g, d)
fused = tokens.transpose(1, 2).unflatten(2, (grid, grid))  # (N, d, g, g)
rows = {"picture": pictures}
for label, x in {"CLIP patches": clip.patches, "UNet maps": maps, "tokens": fused}.items():
    rows[label] = list(as_colours(principal_maps(x.cpu().numpy())[examples]))
print(f"at t = {step}: {tuple(tokens.shape)} tokens (pictures, positions, width)")
show(
    map_grid(list(rows.values()), captions, list(rows)),
    f"{len(examples)} pictures, and below each CLIP's patches, the UNet's maps at t = {step} and "
    "the fused tokens, as colours from three principal components.",
)

# %% [markdown]
# ## 7. At which t should one predict?
#
# During sampling the UNet's features change at every step, and so would the prediction. The package
# can predict anew as it samples (`prediction_interval`), or make one *static* prediction: it takes
# the mean of the predictions at a few `t`, the `feature_timesteps` of `EncoderConfig`. Which `t`
# are good ones? The paper does not say. A good `t` has features that still tell of the picture, and
# that depend little on the noise that happened to be drawn.
#
# So we ask the trained encoder. For pictures that no network was trained on, we predict at each
# `t`, and then change one input alone:
#
# - **other noise**, same picture: how much of the prediction is chance?
# - **UNet maps of another picture**, CLIP's features kept: how much does it listen to the UNet?
# - **CLIP features of another picture**, the UNet's maps kept: how much does it listen to CLIP?
#
# The change is the length of the difference, in percent of the length of the prediction. For the
# offsets it is that of the products `A B`, over all layers together. The scale is logarithmic; the
# bars go from the first to the third quartile of the pictures.

# %%
from dte_lab.features import ImageFeatures

generator = np.random.default_rng(2)
held_back = [
    (n, STYLES[generator.integers(len(STYLES))], SCENES[generator.integers(len(SCENES))], 0)
    for n in split_names("val")
]
unseen = rendered(held_back).to(device)
view, clean = encoder.image_features(backbone, unseen), backbone.encode_images(unseen).float()
other_view = ImageFeatures(*(x.roll(1, dims=0) for x in view))


# %%
def length(pairs):
    """Frobenius norm of all the products A B together, per picture: (B,).

    |A B|^2 is the sum of (A^T A) * (B B^T), two matrices of the size of the rank.
    """
    squares = [((a.mT @ a) * (b @ b.mT)).sum((1, 2)) for a, b in pairs]
    return torch.stack(squares).sum(dim=0).sqrt()


def change(old, new):
    """Lengths of the differences between two predictions, as shares of the old: v*, offsets."""
    words = (new.v_star - old.v_star).norm(dim=1) / old.v_star.norm(dim=1)
    before = [[m.double() for m in pair] for pair in old.offsets.values()]
    after = [[m.double() for m in pair] for pair in new.offsets.values()]
    difference = [  # A' B' - A B as one product
        (torch.cat([a, c], dim=2), torch.cat([-b, d], dim=1))
        for (a, b), (c, d) in zip(before, after, strict=True)
    ]
    return words.cpu().numpy(), (length(difference) / length(before)).cpu().numpy()


# %%
changes = ["other noise", "UNet maps of another picture", "CLIP features of another picture"]
moved = {part: {name: [] for name in changes} for part in ("word v*", "weight offsets")}
words_at = {}
for fraction, step in zip(tqdm(FRACTIONS, desc="noise levels"), STEPS, strict=True):
    maps, again = (
        encoder.unet_features(backbone, *noised(clean, step, seed), prompt) for seed in (2, 3)
    )
    at = torch.full((len(clean),), step, device=device)
    variants = [(view, again), (view, maps.roll(1, dims=0)), (other_view, maps)]
    with torch.no_grad():
        old, *new = (encoder(*given, at) for given in [(view, maps), *variants])
    words_at[fraction] = old.v_star
    for name, prediction in zip(changes, new, strict=True):
        for part, shares in zip(moved, change(old, prediction), strict=True):
            moved[part][name].append(shares)


# %%
def median_and_quartiles(by_t):
    """n values at each t -> medians, and how far the quartiles lie below and above them."""
    low, median, high = np.quantile(by_t, (0.25, 0.5, 0.75), axis=1)
    return median, (median - low, high - median)


curves = {
    part: {name: median_and_quartiles(by_t) for name, by_t in by_change.items()}
    for part, by_change in moved.items()
}
used = encoder.settings.feature_timesteps
for part, by_change in curves.items():
    print(f"change of the {part}, median over n = {len(clean)} pictures, smallest and largest t:")
    for name, (median, _) in by_change.items():
        print(f"    {name}: {median[0]:.1%}, {median[-1]:.1%}")
show(
    curves_figure(FRACTIONS, curves, "change of the prediction", marks=used, log=True),
    f"Change of v* and of the offsets against t for three changed inputs, n = {len(clean)} "
    f"pictures, medians and quartiles; t = {', '.join(f'{f:g} T' for f in used)} marked.",
)

# %%
seen = []
for part, by_change in curves.items():
    at = {name: median[FRACTIONS.index(middle)] for name, (median, _) in by_change.items()}
    noise, of_unet, of_clip = (at[name] for name in changes)
    seen.append(
        f"The {part} at t = {middle:g} T: another picture's CLIP features move it "
        f"{of_clip / of_unet:.1f} times as far as another picture's UNet maps, and those "
        f"{of_unet / noise:.1f} times as far as other noise."
    )
saw(*seen)

# %% [markdown]
# The grey stripes mark the `feature_timesteps` of this encoder. Where *other noise* is as high as
# *UNet maps of another picture*, the UNet's maps tell the prediction no more of the picture than
# noise would, and a mean over several `t`, or several noises, is the better choice. Where both are
# low, the encoder hardly listens to the UNet there; whether it should is a question for a trained
# comparison, with the UNet's features switched off, and not one that probes can answer.
#
# And how different are the predictions at two `t`?

# %%
alike = {
    f: F.cosine_similarity(v, torch.stack([words_at[g] for g in FRACTIONS]).mean(dim=0), dim=-1)
    for f, v in words_at.items()
}
table = pipe.prompt_encoder.table
nearest = {f: [w[0] for w in table.nearest(v, k=1)[1]] for f, v in words_at.items()}
print(f"n = {len(clean)} pictures; ±: one standard deviation over them")
print("t / T   cosine of v* with its mean over all t   nearest word as at the smallest t")
for f, cosine in alike.items():
    same = np.mean([a == b for a, b in zip(nearest[f], nearest[FRACTIONS[0]], strict=True)])
    print(f"{f:<7g} {cosine.mean():.3f} ± {cosine.std():.3f}{'':26}{same:.0%}")

# %%
means = {f: cosine.mean().item() for f, cosine in alike.items()}
saw(
    f"The word changes most at t = {min(means, key=means.get):g} T (cosine",
    f"{min(means.values()):.3f}), and is most like the mean at {max(means, key=means.get):g} T.",
)

# %% [markdown]
# If the cosines are near 1 and the nearest word stays the same, a static prediction loses little,
# and one exported LoRA file can stand for all of sampling. If they fall at large `t`, leave large
# `t` out of `feature_timesteps`, or let `prediction_interval` predict anew as the picture clears. A
# nearest word may change even where the cosine is near 1: several words can be about equally near,
# and the hard path (notebook 04) reads whichever comes first.

# %% [markdown]
# ## To take along
#
# - The encoder sees a picture through CLIP, clean, and through the UNet, noisy and at a time `t`.
# - Maps as colours show where, CKA and UMAP show who is like whom, and probes show what can be
#   read. Each can mislead alone.
# - Split by what must be new. A probe that has met the thing before tells you little.
# - The UNet's features depend on `t`, so the fusion is told `t`; at the last step they hold nothing
#   of the picture, and `feature_timesteps` should stay well below it.

# %%
from dte_lab.panels import take_along

strongest = "; ".join(f"{name} {max(v, key=v.get)}" for name, v in above.items())
best = {t: max(without_t, key=lambda name: curves[name][0]) for t, curves in probed.items()}
take_along(
    f"What decides who is near whom: {strongest}.",
    "Read best by a probe of clean pictures: "
    + "; ".join(f"{t} from {b}, {probed[t][b][0]:.0%} (guessing {chance[t]:.0%})"
                for t, b in best.items()) + ".",
    "Half of the UNet's lead over guessing is lost at: "
    + ", ".join(f"{t} {f:g} T" for t, f in lost.items()) + ".",
    *seen,  # of section 7
)  # fmt: skip

# %% [markdown]
# The code is short: `dte_lab/features.py` has both views and `FeatureFusion`, the fusion;
# `static_features` in `dte_lab/encoder.py` has the choice of `t`.
