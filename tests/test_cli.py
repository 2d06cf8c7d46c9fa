"""The `dte` command as a user meets it: what it writes, and how it answers mistakes."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab import Concept, TuneConfig, cli
from dte_lab.cli import evaluation, main
from dte_lab.cli.app import distinct
from dte_lab.cli.drawings import contact_sheet, picture_names, picture_origins, save_pictures
from dte_lab.common.errors import DTEError
from dte_lab.common.images import read_image
from dte_lab.common.origin import check_free, origin_of, pictures_digest
from dte_lab.prompts import check_prompts
from dte_lab.recommended import SMALL_WORLD

PROMPTS = ["--prompt", "S* on the beach", "--prompt", "S* at night"]
USED_UP = (
    "error: the memory is used up: a smaller batch, --gradient-checkpointing or --offload, where "
    "the command has them, take less; dte memory says how much."
)
FAST = ["--num-inference-steps", "2"]


@pytest.fixture(scope="session")
def model(tiny_path, tiny_backbone, tiny_config, tmp_path_factory):
    """Folder with the tiny backbone and a fresh encoder, as `--backbone` takes it."""
    from dte_lab import TuningEncoder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_path, folder)
    TuningEncoder.from_backbone(tiny_backbone, tiny_config).save_pretrained(folder / "encoder")
    return folder


@pytest.fixture(scope="session")
def photo(picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    plain = Image.new("RGB", (40, 36), "white")  # around it: a busy one gets a warning
    plain.paste(picture, (8, 8))
    plain.save(path)
    return path


@pytest.fixture(scope="session")
def finished(model, photo, tmp_path_factory):
    """Output folder of one `dte personalize` in a process of its own, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "new" / "folder"
    command = [sys.executable, "-m", "dte_lab", "personalize", photo, *PROMPTS, "--out", out]
    command += ["--backbone", model, "--steps", "2", "--seed", "0", "--seed", "7", *FAST]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.fixture
def dte(capsys):
    """Run `dte` in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def refused(dte):
    """Run `dte`, demand one error line and exit status 2, and return that line."""

    def run(*arguments):
        code, out, err = dte(*arguments)
        assert code == 2, err
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert not out
        return lines[0]

    return run


def test_personalize_writes_everything(finished):
    out, result = finished
    pictures = [f"{name}_seed{s}.png" for name in ("on-the-beach", "at-night") for s in (0, 7)]
    names = {path.name for path in out.iterdir()}
    assert names == {*pictures, "contact_sheet.png", "concept.safetensors"}
    for name in pictures:
        image = Image.open(out / name)
        assert image.size == (16, 16) and image.mode == "RGB"
    arrays = [np.asarray(Image.open(out / name)) for name in pictures]
    assert not np.array_equal(arrays[0], arrays[1])  # the seed matters
    assert not np.array_equal(arrays[0], arrays[2])  # so does the prompt
    width, height = Image.open(out / "contact_sheet.png").size
    assert width > 5 * 192 and height > 2 * 192


def test_personalize_tells_what_it_learned(finished):
    _, result = finished
    lines = result.stdout.splitlines()
    (predicted,) = (line for line in lines if line.strip().startswith("predicted only"))
    (tuned,) = (line for line in lines if line.strip().startswith("tuned"))
    for line in (predicted, tuned):
        words = line.replace("predicted only", "").replace("tuned", "").split(", ")
        assert len(words) == 5
        cosines = [float(word.split()[-1]) for word in words]
        assert cosines == sorted(cosines, reverse=True) and max(cosines) <= 1
    assert any("2 tuning steps" in line and "peak memory" in line for line in lines)
    assert "on-the-beach_seed7.png" in lines[-1] and "concept.safetensors" in lines[-1]


def test_nothing_but_progress_is_on_stderr(finished):
    _, result = finished
    for line in result.stderr.replace("\r", "\n").splitlines():
        known = (
            "loading ",
            "tuning:",
            "sampling:",
            "warning: A prompt of",
        )  # the tiny one reads 14
        assert not line.strip() or line.startswith(known), line


def test_contact_sheet_shows_each_picture_in_its_place():
    """Two inputs, two prompts, two seeds, two results: every picture has a colour of its own."""
    pictures = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(10)]
    drawn = {
        "predicted only": [pictures[2:4], pictures[4:6]],
        "tuned": [pictures[6:8], pictures[8:]],
    }
    figure = contact_sheet(pictures[:2], drawn, ["S* a", "S* b"], [0, 7])
    shown = [ax.get_images()[0].get_array()[0, 0, 0] for ax in figure.axes]
    assert shown == [0, 2, 3, 6, 7, 1, 4, 5, 8, 9]
    columns = ["input", *(f"{n}\nseed {s}" for n in ("predicted only", "tuned") for s in (0, 7))]
    assert [ax.get_title() for ax in figure.axes[:5]] == columns
    assert [ax.get_ylabel() for ax in figure.axes[::5]] == ["S* a", "S* b"]
    one_seed = contact_sheet(pictures[:1], {"tuned": [pictures[:1]]}, ["S*"], [3])
    assert [ax.get_title() for ax in one_seed.axes] == ["input", "tuned"]


class StandIn:
    """A pipeline that remembers what it was asked, and draws one colour per call, prompt, seed."""

    def __init__(self):
        self.asked, self.recommended_steps, self.has_trained_encoder = [], 12, True
        self.backbone = SimpleNamespace(resolution=16, recommended=SMALL_WORLD)
        self.prompt_encoder = SimpleNamespace(tokenize=lambda prompts: None)

    def personalize(self, pictures, num_steps, seed, config=None, mask=None, fit="crop"):
        self.asked.append(("personalize", len(pictures), num_steps, seed, config))
        info = {"words_after": [[f"word{num_steps}", 0.5]], "seconds": 3.0, "peak_memory_mb": 2048}

        def save(path):
            self.saved = self.made.settings
            Path(path).write_text(f"{num_steps} steps")

        self.made = SimpleNamespace(info=info, num_steps=num_steps, save=save, settings=SMALL_WORLD)
        return self.made

    def generate(self, concept, prompts, **options):
        self.asked.append(("generate", concept.num_steps, options))
        return [
            [Image.new("RGB", (16, 16), (concept.num_steps, p, s)) for s in options["seeds"]]
            for p in range(len(prompts))
        ]


@pytest.fixture
def stand_in(monkeypatch):
    """The pipeline that the command loads, and the arguments with which it was loaded."""
    pipe, loaded = StandIn(), []

    def load(*arguments, **options):
        loaded.append((*arguments, options))
        return pipe

    monkeypatch.setattr("dte_lab.cli.app.load_pipeline", load)
    return pipe, loaded


def test_personalize_hands_on_every_option(stand_in, dte, photo, tmp_path):
    pipe, loaded = stand_in
    options = ["--steps", "5", "--seed", "4", "--seed", "9", "--seed", "4", "--batch-size", "3"]
    options += ["--guidance-scale", "0", "--num-inference-steps", "7", "--alpha", "0"]
    options += ["--backbone", "B", "--encoder", "E", "--device", "cpu", "--offload"]
    options += ["--learning-rate", "0.002", "--dtype", "bf16", "--negative-prompt", "blue"]
    code, out, err = dte("personalize", photo, photo, *PROMPTS, "--out", tmp_path, *options)
    assert code == 0, err
    flags = {"gradient_checkpointing": False, "offload": True}
    assert loaded == [("B", Path("E"), "cpu", "bf16", 3, flags)]
    sampling = {
        "seeds": [4, 9], "guidance_scale": 0, "num_inference_steps": 7, "alpha_blend": 0,
        "negative_prompt": "blue", "batch_size": 3,
    }  # fmt: skip
    first, second, *drawn = pipe.asked
    assert first == ("personalize", 2, 0, 4, None)
    assert second[:4] == ("personalize", 2, 5, 4)
    assert second[4] == TuneConfig.of(SMALL_WORLD, batch_size=3, offset_learning_rate=0.002)
    assert pipe.saved == replace(SMALL_WORLD, guidance_scale=0)
    assert drawn == [("generate", 0, sampling), ("generate", 5, sampling)]
    # What is kept is what was tuned, each picture under its own name.
    assert (tmp_path / "concept.safetensors").read_text() == "5 steps"
    for p, name in enumerate(("on-the-beach", "at-night")):
        for seed in (4, 9):
            picture = Image.open(tmp_path / f"{name}_seed{seed}.png")
            assert picture.getpixel((3, 3)) == (5, p, seed)
    lines = out.splitlines()
    assert lines[1].split() == ["predicted", "only", "word0", "0.50"]
    assert lines[2].split() == ["tuned", "word5", "0.50"]
    assert lines[3].startswith("learned in 3.0 s with 5 tuning steps (")
    assert lines[3].endswith(" s in all), peak memory 2.0 GB")


def test_what_is_not_given_keeps_the_default_of_the_pipeline(stand_in, dte, photo, tmp_path):
    pipe, loaded = stand_in
    assert dte("personalize", photo, "--prompt", "S*", "--out", tmp_path)[0] == 0
    flags = {"gradient_checkpointing": False, "offload": False}
    assert loaded == [("small", None, None, None, 0, flags)]
    assert [asked[2] for asked in pipe.asked[:2]] == [0, 12]
    assert pipe.asked[1][4] == TuneConfig.of(SMALL_WORLD) and pipe.saved == SMALL_WORLD
    assert "guidance_scale" not in pipe.asked[2][2]
    assert pipe.asked[2][2]["alpha_blend"] is None


def test_without_an_encoder_no_prediction_is_drawn(stand_in, dte, photo, tmp_path):
    pipe, _ = stand_in
    pipe.recommended_steps, pipe.has_trained_encoder = 30, False
    assert dte("personalize", photo, "--prompt", "S*", "--out", tmp_path)[0] == 0
    assert [asked[:2] for asked in pipe.asked] == [("personalize", 1), ("generate", 30)]
    pipe.asked.clear()
    out = tmp_path / "other"
    assert dte("personalize", photo, "--prompt", "S*", "--steps", "0", "--out", out)[0] == 0
    assert [asked[:2] for asked in pipe.asked] == [("personalize", 1), ("generate", 0)]


def test_an_unknown_dtype_is_refused(refused, photo, tmp_path):
    said = refused("personalize", photo, "--prompt", "S*", "--out", tmp_path, "--dtype", "int8")
    assert said.endswith("error: dtype is one of fp16, bf16, fp32, not 'int8'.")


def test_generate_draws_the_same_picture_again(finished, model, tmp_path, dte):
    """Same concept, prompt and seed, same picture, in another process; and alpha matters."""
    out, _ = finished
    concept = out / "concept.safetensors"
    # The backbone is not named: the concept knows it.
    arguments = ["generate", concept, "--prompt", "S* at night", *FAST]
    code, stdout, stderr = dte(*arguments, "--seed", "7", "--out", tmp_path)
    assert code == 0, stderr
    assert f"loading the backbone {model}" in stderr and "at-night_seed7.png" in stdout
    again = np.asarray(Image.open(tmp_path / "at-night_seed7.png"), int)
    first = np.asarray(Image.open(out / "at-night_seed7.png"), int)
    assert np.abs(again - first).max() <= 1

    for alpha in ("0", "1"):
        folder = tmp_path / alpha
        assert dte(*arguments, "--out", folder, "--alpha", alpha, "--backbone", model)[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / a / "at-night_seed0.png")) for a in "01"]
    assert not np.array_equal(*pictures)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_paths_of_bytes_that_are_no_text(finished, photo, model, tmp_path, capsys):
    """The library that reads weights opens none there; that is said before any work."""
    odd = tmp_path / os.fsdecode(b"o\xff")
    odd.mkdir()
    shutil.copy(finished[0] / "concept.safetensors", odd / "concept.safetensors")
    shutil.copytree(model, odd / "model")
    at_night = ["--prompt", "S* at night"]
    for arguments in (
        ["personalize", photo, *at_night, "--backbone", model, "--out", odd],
        ["personalize", photo, *at_night, "--backbone", odd / "model", "--out", tmp_path / "a"],
        ["generate", odd / "concept.safetensors", *at_night, "--out", tmp_path / "b"],
        ["export", odd / "concept.safetensors", "--out", tmp_path / "c"],
        ["pretrain", "--out", odd],
        ["evaluate", "--out", odd, "--method", "dte:1"],
        ["world", "train", "encoder", "--out", odd],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])  # where the streams learn to show such names
        line = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and line.startswith("error: "), arguments
        assert "o\\udcff" in line and "has bytes that are not UTF-8" in line, line
    assert len(list(odd.iterdir())) == 2


def test_no_tuning_steps_leave_the_prediction(photo, model, tmp_path, dte):
    arguments = ["--prompt", "S*", "--out", tmp_path, "--backbone", model, *FAST]
    code, out, err = dte("personalize", photo, photo, *arguments, "--steps", "0")
    assert code == 0, err
    assert "predicted only" in out and "tuned" not in out
    assert (tmp_path / "concept_seed0.png").exists()


def test_prompt_without_placeholder(refused, photo, tmp_path):
    error = refused("personalize", photo, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "S*" in error and "'a cat'" in error
    assert not (tmp_path / "out").exists()  # nothing was touched
    error = refused("generate", "x.safetensors", "--prompt", "a cat", "--out", tmp_path / "out")
    assert "S*" in error


def test_prompt_too_long_is_found_before_tuning(refused, photo, model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dte_lab.DTEPipeline.personalize", lambda *_, **__: pytest.fail("slow work")
    )
    prompt = "the red apple on the beach " * 20 + "S*"
    arguments = ["--prompt", prompt, "--out", tmp_path, "--backbone", model]
    assert "too long" in refused("personalize", photo, *arguments)


@pytest.mark.parametrize("name", ["missing.png", "text.png", "truncated.jpg", "dot.png", "folder"])
def test_bad_pictures(refused, tmp_path, name):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    error = refused("personalize", tmp_path / name, *PROMPTS, "--out", tmp_path / "out")
    assert name in error
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_used(refused, photo, tmp_path):
    file = tmp_path / "file"
    file.write_text("keep me")
    assert "is a file" in refused("personalize", photo, *PROMPTS, "--out", file)
    assert "cannot be written" in refused("personalize", photo, *PROMPTS, "--out", file / "below")
    assert file.read_text() == "keep me"
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may write everywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "cannot be written" in refused("personalize", photo, *PROMPTS, "--out", locked)


def test_unknown_backbone_and_encoder(refused, photo, model, tmp_path):
    arguments = ["personalize", photo, *PROMPTS, "--out", tmp_path]
    assert "no-such-model" in refused(*arguments, "--backbone", "no-such-model")
    error = refused(*arguments, "--backbone", model, "--encoder", tmp_path / "no-encoder")
    assert "no-encoder" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "dte:12", "--method", "dtee:12"], "Unknown method 'dtee'"),
        (["--method", "dte@warp=1:12"], "no option 'warp'"),
        (["--method", "ti:2", "--method", "ti:3"], "ti is given twice"),
        (["--experiment", "tables"], "Unknown experiment 'tables'"),
        (["--split", "tests"], "Unknown split 'tests': use one of extra, test, train, val"),
        (["--concepts", "5000"], "The split test has"),
    ],
)
def test_evaluate_tells_mistakes_before_anything_is_loaded(
    refused, monkeypatch, tmp_path, arguments, said
):
    def load_pipeline(*_):
        raise AssertionError("a backbone is loaded for what cannot be run")

    monkeypatch.setattr(evaluation, "load_pipeline", load_pipeline)
    assert said in refused("evaluate", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "flipped"])
def test_damaged_concept_file(refused, finished, tmp_path, damage):
    data = (finished[0] / "concept.safetensors").read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a concept",
        "truncated": data[: len(data) // 2],
        "flipped": data[:20] + bytes(255 - byte for byte in data[20:60]) + data[60:],
    }
    path = tmp_path / "concept.safetensors"
    if damage in contents:
        path.write_bytes(contents[damage])
    assert "concept" in refused("generate", path, *PROMPTS, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_write_keeps_what_was_there(refused, photo, model, tmp_path, monkeypatch):
    """The disk fills up after the concept is saved: it stays, and no half-written file appears."""
    old = tmp_path / "on-the-beach_seed0.png"
    old.write_bytes(b"an older picture")
    real, calls = os.fsync, []

    def full_after_the_first_file(handle):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device", str(old))
        return real(handle)

    monkeypatch.setattr("os.fsync", full_after_the_first_file)
    with pytest.raises(SystemExit) as caught:
        main(
            ["personalize", str(photo), *PROMPTS, "--out", str(tmp_path), "--steps", "0", *FAST]
            + ["--backbone", str(model), "--overwrite"]
        )
    assert caught.value.code == 2
    assert old.read_bytes() == b"an older picture"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["concept.safetensors", "on-the-beach_seed0.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "bogus"),
        (["personalize"], "IMAGE"),
        (["personalize", "a.png", "--out", "x"], "--prompt"),
        (["personalize", "a.png", *PROMPTS], "--out"),
        (["personalize", "a.png", *PROMPTS, "--out", "x", "--steps", "-1"], "num_steps"),
        (["personalize", "a.png", *PROMPTS, "--out", "x", "--alpha", "2"], "alpha_blend"),
        (["personalize", "a.png", *PROMPTS, "--out", "x", "--seed", "one"], "seed is a whole"),
        (["world", "train", "bogus"], "bogus"),
        (["world", "train", "text", "--out", "x", "--parts", "y"], "--wide"),
        (["world", "pack", "--out", "x"], "one run at least"),
    ],
)
def test_wrong_usage_is_one_line_too(refused, arguments, words):
    assert words in refused(*arguments)


def test_help_and_version(dte):
    import dte_lab

    assert dte("--version") == (0, f"dte_lab {dte_lab.__version__}\n", "")
    for command in ([], ["--help"], ["personalize", "--help"], ["world", "train", "--help"]):
        code, out, err = dte(*command)
        assert code == 0 and "Usage" in out and not err


PARTS = ["--out", "x", "--parts", "y", "--wide", "z"]


@pytest.mark.parametrize(
    ("command", "module", "arguments"),
    [
        ("world build", "dte_lab.world.build", ["--packages", "npm"]),
        ("world train autoencoder", "dte_lab.world.train_autoencoder", ["--out", "x"]),
        (
            "world train autoencoder",
            "dte_lab.world.train_autoencoder",
            ["--out", "x", "--wide", "z", "--count", "700"],
        ),
        ("world train decoder", "dte_lab.world.train_decoder", [*PARTS, "--steps", "5"]),
        ("world train text", "dte_lab.world.train_text", [*PARTS, "--seed", "3"]),
        ("world train unet", "dte_lab.world.train_unet", [*PARTS, "--count", "2000"]),
        ("world train towers", "dte_lab.world.train_towers", PARTS),
        ("world evaluate", "dte_lab.evaluation.base_model", ["--out", "x.json"]),
        (
            "world pack",
            "dte_lab.world.pack",
            ["--autoencoder", "a", "--text", "b", "--unet", "c", "--towers", "d", "--out", "x"],
        ),
    ],
)
def test_training_commands_fit_the_functions_they_call(
    dte, monkeypatch, command, module, arguments
):
    function = importlib.import_module(module).main
    calls = []

    def record(*args, **options):
        calls.append(inspect.signature(function).bind(*args, **options).arguments)

    monkeypatch.setattr(f"{module}.main", record)
    steps = ["--steps", "5"] if "train" in command else []
    code, _, err = dte(*command.split(), *arguments, *steps)
    assert code == 0, err
    (call,) = calls
    assert call.get("steps") == (5 if steps else None)


def test_pretrain_starts_a_run(dte, monkeypatch, tmp_path):
    def record(backbone, encoder, dataset, config, **options):
        item = dataset[0]
        assert {"image", "target", "prompt", "concept"} <= set(item)
        assert (config.steps, options["out_dir"]) == (3, tmp_path)
        assert encoder.config.clip_dim and encoder.method.regulariser == "none"
        assert len(options["eval_images"]) == len(options["probe_images"]) == 4

    monkeypatch.setattr("dte_lab.training.pretrain.pretrain", record)
    arguments = ["--steps", "3", "--regulariser", "none"]
    code, _, err = dte("pretrain", "--out", tmp_path, *arguments)
    assert code == 0, err


def test_sample_concepts_were_never_trained_on():
    from dte_lab.world.sprites import SAMPLE_CONCEPTS, split_names

    assert set(SAMPLE_CONCEPTS) <= set(split_names("val"))


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError])
def test_faults_of_the_program_keep_their_traceback(monkeypatch, kind):
    """A ValueError of torch or of ours, too: only DTEError is made for the user."""

    def broken(*_):
        raise kind("a bug")

    monkeypatch.setattr("dte_lab.cli.app.read_pictures", broken)
    with pytest.raises(kind, match="a bug"):
        main(["personalize", "a.png", *PROMPTS, "--out", "x"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DTEError("say it\n otherwise."), "error: say it otherwise."),
        (OSError("no tokenizer there"), "error: no tokenizer there"),
        (PermissionError(13, "Permission denied", "a.png"), "error: a.png: Permission denied."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), USED_UP),
        (RuntimeError("CUDA error: out of memory"), USED_UP),
        (MemoryError(), USED_UP),
    ],
)
def test_what_the_user_can_put_right_is_one_line(monkeypatch, refused, error, line):
    def broken(*_):
        raise error

    monkeypatch.setattr("dte_lab.cli.app.read_pictures", broken)
    assert refused("personalize", "a.png", *PROMPTS, "--out", "x") == line


def test_interrupt_is_quiet(monkeypatch, dte):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dte_lab.cli.app.read_pictures", interrupted)
    code, _, err = dte("personalize", "a.png", *PROMPTS, "--out", "x")
    assert code == 130 and len(err.splitlines()) <= 1


def test_picture_names_are_safe_and_distinct():
    prompts = [
        "S* on the beach",
        "S* on the beach!",
        "S*",
        "../../S*",
        "é S* 夜",
        "S* " + "x" * 300,
    ]
    names = [name for row in picture_names(prompts, [0, -1]) for name in row]
    assert len(set(names)) == len(names) == 12
    assert names[:2] == ["on-the-beach_seed0.png", "on-the-beach_seed-1.png"]
    assert all(Path(name).name == name and len(name.encode()) < 140 for name in names)
    assert names[8:10] == ["é-夜_seed0.png", "é-夜_seed-1.png"]  # no other prompt's
    numbered = [name for (name,) in picture_names(["S* a", "a S*", "S* a 2"], [0])]
    assert numbered == ["a_seed0.png", "a-2_seed0.png", "a-2-2_seed0.png"]


def test_pictures_are_saved_under_the_name_of_their_prompt_and_seed(tmp_path):
    drawn = [[Image.new("RGB", (1, 1), (p, s, 0)) for s in (5, 6, 7)] for p in (1, 2)]
    prompts = ["S* at night", "S* at sea"]
    names = save_pictures(drawn, picture_origins(prompts, [5, 6, 7], tmp_path, "abc"))
    assert names == [f"at-{where}_seed{s}.png" for where in ("night", "sea") for s in (5, 6, 7)]
    colours = [Image.open(tmp_path / name).getpixel((0, 0)) for name in names]
    assert colours == [(p, s, 0) for p in (1, 2) for s in (5, 6, 7)]
    assert origin_of(tmp_path / names[4]) == {"concept": "abc", "prompt": "S* at sea"}


def test_nothing_is_written_over_what_was_made_of_something_else(refused, finished, tmp_path):
    out, _ = finished
    concept = out / "concept.safetensors"
    same = [path.read_bytes() for path in sorted(out.iterdir())]
    other = tmp_path / "other.png"
    two_colours = Image.new("RGB", (20, 20), "blue")
    two_colours.paste("red", (5, 5, 15, 15))
    two_colours.save(other)
    arguments = [*PROMPTS, "--out", out, "--backbone", tmp_path / "missing"]
    assert "was made of another picture or prompt" in refused("personalize", other, *arguments)
    for prompt in ("S* on the beach!", "on the beach S*"):  # the same name, but not the same
        line = refused("generate", concept, "--prompt", prompt, "--out", out)
        assert "on-the-beach_seed0.png is there already" in line and "--overwrite" in line
    mine = tmp_path / "at-night_seed0.png"
    two_colours.save(mine)
    for name in (mine.name, "contact_sheet.png"):
        mine = mine.rename(tmp_path / name)
        line = refused("personalize", mine, *PROMPTS, "--out", tmp_path, "--overwrite")
        assert f"{name} is read and would be written over" in line
        assert Image.open(mine).getpixel((0, 0)) == (0, 0, 255)
    assert same == [path.read_bytes() for path in sorted(out.iterdir())]
    # What was made of the same may be made again.
    drawings = picture_origins(["S* on the beach"], [0], out, Concept.load(concept).origin)
    check_free(drawings, overwrite=False)
    check_free({out / "at-night_seed0.png": {}}, overwrite=True)


def test_the_origin_of_a_concept_is_its_pictures(photo, finished):
    picture = read_image(photo)
    found = Concept.load(finished[0] / "concept.safetensors")
    assert found.origin == pictures_digest([picture]) != pictures_digest([picture] * 2)
    assert pictures_digest([picture]) != pictures_digest([picture.transpose(Image.FLIP_TOP_BOTTOM)])
    by_numbers = Concept(found.v_star, {}, "x").origin
    assert by_numbers != found.origin and by_numbers != Concept(found.v_star + 1, {}, "x").origin


def test_repeated_values_are_dropped():
    assert distinct([3, 1, 3]) == [3, 1]


def test_check_prompts_accepts_the_placeholder_anywhere():
    check_prompts(["S*", "a photo of S* at night"])
    with pytest.raises(DTEError, match="'S at night'"):
        check_prompts(["S*", "S at night"])
