# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   dte_lab:
#     title: The explorer
#     promise: turn every switch of the method on a picture of your own, A beside B
#     minutes: 60
# ---

# %% [markdown]
# # The explorer: what if?
#
# *Turn every switch of the method on a picture of your own, A beside B.*
#
# The notebooks before this one took the method apart, a piece at a time. Here is all of it in one
# panel: a picture, any prompt, and every switch, in two settings side by side. Ask it what you
# always wanted to know: *what if* the word were not held among the words? If there were no word at
# all? If the weights were cut to rank 1? If the picture were my own?
#
# After this notebook you can
#
# - change one thing at a time, and say in words what changed and what came of it;
# - read measures beside pictures, and tell which of them knows the truth;
# - name the switches that change nothing in a given combination, and say why;
# - tell a fair comparison from one that only looks like it;
# - put the three questions that the paper leaves open to this small world yourself;
# - save what you found as a small file that somebody else can take up again.

# %% [markdown] tags=["no-slide"]
# ## Set up
#
# The cell installs the package where it is missing, and leaves an installed PyTorch as it is.

# %% tags=["setup"]
# Filled in by tools/notebooks.py: installs dte_lab where it is missing.

# %%
import torch

from dte_lab import checks
from dte_lab.panels import describe_machine, quiet_libraries, saw, show

quiet_libraries()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(describe_machine(device))
print("backbone: small, since it comes with the package, needs no download and runs on a CPU")

# %%
from dte_lab import DTEPipeline

pipe = DTEPipeline.from_pretrained("small", device=device)

# %% [markdown]
# On a GPU, `DTEPipeline.from_pretrained("sd15", device="cuda")` in its place makes the cells below
# work on Stable Diffusion 1.5 and photographs. The expeditions and their things belong to the small
# world, and stay away then.

# %% [markdown]
# ## The panel
#
# Choose a thing or upload a picture, write prompts with `S*` (one a line), open a group of knobs,
# and press *Run A and B*. A knob that changes nothing beside the others is put to rest, with the
# reason beside it; one in which A and B differ is marked. *Stop* ends a run at its next step.
# Without a kernel, on GitHub for instance, the panel is not shown: what it answers is below.
#
# The same panel is an app: `dte explore` in a terminal (`pip install "dte_lab[explore]"`).

# %%
from IPython.display import display

from dte_lab.panels.explorer import explorer_panel

panel = explorer_panel(pipe)
display(panel)

# %% [markdown]
# ### How to read it
#
# *Like the input* and *as the prompt says* are cosines of CLIP, and exist for any picture. For a
# thing of the small world, identity is judged on the thing's own region by EfficientNet, which had
# no part in making the picture (`pip install "dte_lab[evaluate]"`). Where the prompt is one of the
# world's captions, the true rendering is known: it stands beside A and B, and *off the true
# rendering* is the error on the thing.
#
# **One picture of one thing proves nothing.** The panel makes hypotheses; notebooks 02 to 05 and
# `dte evaluate` test them, with intervals over many things.
#
# How the rates fall does not depend on the last step, so a run of tuning passes through the results
# of all shorter ones. The panel keeps its states: fewer steps, another guidance or the word alone
# need no tuning again.

# %% [markdown]
# ## Three expeditions
#
# The paper leaves three questions open. Each is an expedition in the panel, with stops that put
# the knobs where they should be. Below, the same stops are run without the panel. *Predict first*:
# write down what you expect at each stop, then look.

# %%
from dte_lab.panels.explorer_expeditions import expeditions
from dte_lab.panels.explorer_history import Run
from dte_lab.panels.explorer_settings import ExplorerSetting, change_in_words
from dte_lab.panels.explorer_view import described, run_figure

explorer = panel.control.explorer
usual = ExplorerSetting.of(pipe, num_inference_steps=10)
breadth, steps, regularisation = expeditions()
runs = panel.control.runs  # the history


def visit(stop):
    """Answer a stop's question, show the pictures, and note the run in the history."""
    settings = stop.settings(usual)
    outcomes = explorer.compare(stop.question, settings)
    runs.append(Run.of(stop.question, settings, outcomes, stop.title))
    print(f"{stop.title}. {change_in_words(*settings)}")
    show(run_figure(stop.question, outcomes), described(stop.question, outcomes))
    return runs[-1]


# %% [markdown]
# ### 1. Breadth: what lies outside the training?
#
# How does the method do when it is trained on larger, more diverse data? The authors ask it, and
# had no means to say. Here the other side of the question can be asked: how much worse does *one*
# encoder do, the further a thing lies from what it was trained on? A is the prediction alone, B has
# twelve steps.

# %% [markdown]
# #### Exercise 1: predict, then run
#
# Difficulty 1 of 5 · 5 minutes
#
# The stops are 1, a thing that the encoder was trained on; 2, a thing never seen; 3, a thing never
# seen, in a drawing style never seen. Guess before you run them: at which stop do twelve steps of
# tuning take away most of the error?
#
# <details>
# <summary>Hint</summary>
#
# Two things count: how far off the prediction is, since only that can be taken away; and how much
# of it twelve steps reach. The first should grow with the distance from the training, but for how
# hard each thing is. Does the second?
#
# </details>


# %% tags=["exercise"]
def guess_stop():
    """The stop, 1, 2 or 3, at which tuning takes away most of the error."""
    ### BEGIN SOLUTION
    return 3
    ### END SOLUTION


checks.guess_stop(guess_stop)

# %% tags=["expected:guess_stop"]
found = [visit(stop) for stop in breadth.stops]

# %%
gains, taken = [], []
for run in found:
    before, after = (side.measures["truth_error"] for side in run.sides)
    gains.append(f"{run.where}: {before:.3f} as predicted, {after:.3f} after 12 steps.")
    taken.append(before - after)
guess = checks.yours("guess_stop", otherwise=lambda: 3)()
saw("Off the true rendering, mean of two scenes.", *(g[0].upper() + g[1:] for g in gains),
    f"Most is taken away at stop {taken.index(max(taken)) + 1}; {guess} was the guess.",
    "These are one thing each; the table of the README has sixty.")  # fmt: skip

# %% [markdown]
# ### 2. Steps: how many are enough, and for what?
#
# "Up to 12 optimization steps were sufficient", says the paper, and not how few would do, nor for
# which things.

# %%
found = [visit(stop) for stop in steps.stops]

# %%
said = []
for run in found:
    few, many = (side.setting.steps for side in run.sides)
    before, after = (side.measures["truth_error"] for side in run.sides)
    verdict = "less" if after < before else "no less"
    said.append(f"{run.question.subject.label}: {before:.3f} off the truth after {few} steps, "
                f"{after:.3f} after {many}, {verdict}.")  # fmt: skip
saw(*said, "Notebook 05 asks the same of many things, and of 500 steps.")

# %% [markdown]
# ### 3. Regularisation: is the contrastive term better than others?
#
# The paper compares its contrastive term with an L2 term and with the nearest word. What of other
# ways? In the panel they act in tuning only; the encoder stays. The usual weight is a hundredth of
# the diffusion loss's; A has a weight of 1, so that there is something to see. In the last stop two
# switches differ, since a term of another kind has a weight of its own. (The middle stop is an
# exercise.)

# %%
found = [visit(stop) for stop in (regularisation.stops[0], regularisation.stops[2])]

# %%
from dte_lab.panels.explorer_view import words_said

said = []
for run in found:
    for side in run.sides:
        said.append(f"{side.setting.regulariser}: {side.measures['truth_error']:.3f} off the "
                    f"truth, length {side.measures['word_length']:.2f}, nearest "
                    f"{words_said(side.words_after[:3])}.")  # fmt: skip
saw(*dict.fromkeys(said))

# %% [markdown]
# The middle stop asks for the temperature: does a word that is pulled mostly to the nearest of its
# N words (0.03) draw otherwise than one that is pulled to all N alike (1)?
#
# #### Exercise 2: find the mistake
#
# Difficulty 2 of 5 · 10 minutes
#
# Somebody wrote the two settings of that comparison. `usual` has a value for each switch.
#
# ```python
# def fair_pair(usual):
#     a = usual | {"regulariser": "none", "temperature": 0.03}
#     b = usual | {"temperature": 1.0, "seed": 1}
#     return a, b
# ```
#
# It runs, and the pictures differ. But do they differ because of the temperature? Two things are
# wrong; write it as it should be. The cell below runs your settings.
#
# <details>
# <summary>Hint</summary>
#
# Which regulariser reads the temperature? In the panel, a knob that nothing reads is put to rest
# and says why. And list all switches in which A and B differ: how many may there be?
#
# </details>


# %% tags=["exercise"]
def fair_pair(usual):
    """usual {switch: value} -> A at temperature 0.03 and B at 1, each {switch: value}."""
    ### BEGIN SOLUTION
    usual = usual | {"contrastive_weight": 1.0}
    return usual | {"temperature": 0.03}, usual | {"temperature": 1.0}
    ### END SOLUTION


checks.fair_pair(fair_pair)

# %% tags=["expected:fair_pair"]
from dataclasses import asdict

from dte_lab.panels.explorer_expeditions import temperature_pair

pair = checks.yours("fair_pair", otherwise=temperature_pair)(asdict(usual))
stop = regularisation.stops[1]
run = visit(stop._replace(title="Warm or cold", a=pair[0], b=pair[1]))
errors = [side.measures["truth_error"] for side in run.sides]
saw(f"The temperature alone changes the error by {errors[1] - errors[0]:+.3f}, and the cosine of",
    f"the nearest word from {run.sides[0].words_after[0][1]:.2f} to",
    f"{run.sides[1].words_after[0][1]:.2f}.")  # fmt: skip

# %% [markdown]
# #### Exercise 3: explain
#
# Difficulty 2 of 5 · 5 minutes
#
# You run A, with the contrastive term, and B, without it and with all else equal. Say that on this
# thing, with this seed, B is nearer to the true rendering. Which of these may you say?
#
# - **a** On this thing, with this seed, the picture without the term is nearer to the truth.
# - **b** The method does better without the term.
# - **c** The term, and nothing else that you set, made these two pictures differ.
# - **d** *Like the input, by CLIP* would have shown the same.
#
# <details>
# <summary>Hint</summary>
#
# For each, ask what else you would need: more things, another measure, or nothing?
#
# </details>


# %% tags=["exercise"]
def what_follows():
    """The letters of what may be said, as one string."""
    ### BEGIN SOLUTION
    return "ac"
    ### END SOLUTION


checks.what_follows(what_follows)

# %% [markdown]
# ## The history, and how to share it
#
# Every run is in the history: of the panel, and of the cells above. The file holds settings,
# prompts, seeds, measures and words, and no picture, so it is small, and an upload stays with you.
# *Load a history* in the panel, or `load_history`, reads it; *take this run up again* puts all
# knobs where they were.

# %%
import tempfile
from pathlib import Path

from IPython.display import HTML

from dte_lab.panels.explorer_history import load_history, save_history
from dte_lab.panels.explorer_view import history_html

file = Path(tempfile.mkdtemp()) / "explorer.json"
save_history(runs, file)
again = load_history(file)
print(f"{len(again)} runs in {file.stat().st_size / 1000:.0f} kB")
display(HTML(history_html(again)))

# %% [markdown]
# ## To take along
#
# - The panel is in `dte_lab/panels/explorer.py`.
# - Change one thing at a time, keep the seeds, and look at the input beside both.
# - A measure that knows the truth is worth more than CLIP; where there is none, look.
# - A switch can be idle: know what a setting reads before you explain what it did.
# - What one picture shows is a question for many. Take yours to `dte evaluate`.
