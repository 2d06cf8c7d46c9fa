"""The shipped weights do what the README says: unseen pictures, offline, in under a minute."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dte_lab import Concept
from dte_lab.backbone import WEIGHTS
from dte_lab.encoder import ABLATIONS, load_encoder
from dte_lab.evaluation.base_model import classify_scene, generate
from dte_lab.world import SCENES, caption, render_image, split_names

# Any attempt to connect fails loudly.
OFFLINE = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError("tried to reach the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from dte_lab.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def pipe(small_pipe):
    return small_pipe


@pytest.fixture(scope="module")
def concept(pipe):
    return pipe.personalize(render_image("strawberry", "fluent", "white"), progress=False)


def test_weights_are_under_75_mb_all_data_and_pictures_under_110_and_no_pickle():
    weights = list(WEIGHTS.rglob("*.safetensors"))
    assert len(weights) == 9 and sum(f.stat().st_size for f in weights) < 75e6
    root = Path(__file__).parents[1]
    folders = [root / name for name in ("dte_lab", "results", "figures", "examples")]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix not in (".py", ".pyc")]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 110e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_the_encoder_of_the_ablation_is_shipped(pipe):
    for kind in ABLATIONS:
        other = load_encoder(f"small/{kind}", pipe.backbone)
        assert other.method == replace(pipe.encoder.method, regulariser=kind)
        assert other.settings == pipe.encoder.settings, "alike but for the regulariser"


@pytest.mark.parametrize("photo", ["chelsea", "coffee"])
def test_a_photograph_is_personalized_offline_within_a_minute(photo, tmp_path):
    Image.fromarray(getattr(data, photo)()).save(tmp_path / "photo.png")
    command = [sys.executable, "-c", OFFLINE, "personalize", tmp_path / "photo.png"]
    command += ["--prompt", "S* on the beach", "--prompt", "S* at night", "--out", tmp_path / "out"]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "on-the-beach_seed0.png", "at-night_seed0.png", "contact_sheet.png", "concept.safetensors"
    }  # fmt: skip
    assert Concept.load(tmp_path / "out" / "concept.safetensors").info["num_steps"] == 12
    assert seconds < 60, f"{seconds:.0f} s"


def test_same_seed_same_picture_in_another_process(concept, pipe, tmp_path):
    concept.save(tmp_path / "concept.safetensors")
    here = pipe.generate(concept, "S* at night", seeds=[3], progress=False)[0][0]
    command = [sys.executable, "-c", OFFLINE, "generate", tmp_path / "concept.safetensors"]
    command += ["--prompt", "S* at night", "--seed", "3", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    assert np.array_equal(np.asarray(here), np.asarray(Image.open(tmp_path / "at-night_seed3.png")))


def test_a_caption_sets_the_scene(pipe):
    scenes = ["red", "blue", "yellow", "white", "night", "snow", "water", "desert"]
    pictures = generate(pipe.backbone, [caption("sushi", "noto", s) for s in scenes], seed=0)
    hits = classify_scene(pictures.clamp(-1, 1)) == [SCENES.index(s) for s in scenes]
    assert hits.mean() >= 0.75


def test_an_edit_keeps_its_scene_for_an_unseen_concept(pipe, concept):
    scenes = {"on a red background": "red", "on a blue background": "blue", "at night": "night"}
    prompts = [f"a picture of S* {words}" for words in scenes]
    drawn = pipe.generate(concept, prompts, seeds=[0, 1], progress=False)
    x = pipe.pixels([picture for row in drawn for picture in row])
    hits = classify_scene(x) == np.repeat([SCENES.index(s) for s in scenes.values()], 2)
    assert hits.mean() >= 0.5


def test_the_prediction_and_tuning_bring_unseen_concepts_closer(pipe):
    """Mean squared error to the input in the sprite's box, over 6 val concepts and 2 seeds."""
    names = split_names("val")[::10]
    inputs = [render_image(name, "fluent", "white") for name in names]
    box = np.s_[:, :, 8:56, 8:56]

    def error(steps, alpha=None):
        errors = []
        for picture in inputs:
            concept = pipe.personalize(picture, num_steps=steps, progress=False)
            prompt = "a picture of S* on a white background"
            drawn = pipe.generate(concept, prompt, [0, 1], alpha_blend=alpha, progress=False)[0]
            difference = (pipe.pixels(drawn) - pipe.pixels([picture]))[box]
            errors.append(difference.square().mean().item())
        return np.mean(errors)

    hard, predicted, tuned = error(0, alpha=0.0), error(0), error(12)
    assert predicted < 0.9 * hard, (predicted, hard)
    assert tuned < 0.95 * predicted, (tuned, predicted)
