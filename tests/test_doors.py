"""The command and the pipeline refuse the same values with the same sentence, before slow work."""

import inspect
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dte_lab import (
    Concept,
    DTEPipeline,
    EncoderConfig,
    MethodConfig,
    TuneConfig,
    load_backbone,
    load_encoder,
)
from dte_lab.cli import main
from dte_lab.cli.app import app
from dte_lab.common.errors import DTEError
from dte_lab.common.images import read_pictures
from dte_lab.evaluation import base_model
from dte_lab.evaluation.methods import Methods
from dte_lab.evaluation.report import finished
from dte_lab.evaluation.run import EvaluationConfig, measure_methods
from dte_lab.export import export
from dte_lab.hardware.memory import advise, needs
from dte_lab.memory_needs import Setting
from dte_lab.objective import weighted_error
from dte_lab.prompts import check_prompts
from dte_lab.training import small_world
from dte_lab.training.cache import CachedPictures
from dte_lab.training.config import PretrainConfig
from dte_lab.training.pictures import ClassPictures, load_pictures
from dte_lab.training.streams import StreamedPictures
from dte_lab.world import wide
from dte_lab.world.data import write_drawings
from dte_lab.world.options import PartOptions

DEVICES, WORDS, COUNTS = ("foo", "", "CPU", "cuda:x", "xla"), ("int8", ""), (-1, "one", "1.5")
PRETRAIN = {  # option: (setting of PretrainConfig, values)
    "--steps": ("steps", (0, *COUNTS)),
    "--minutes": ("max_minutes", (-1.0, math.nan, math.inf, "soon")),
    "--batch-size": ("batch_size", (0, *COUNTS)),
    "--gradient-accumulation": ("gradient_accumulation", (0, *COUNTS)),
    "--learning-rate": ("learning_rate", (-1.0, math.nan, math.inf, "fast")),
    "--warmup": ("warmup_steps", COUNTS),
    "--seed": ("seed", COUNTS),
    "--mixed-precision": ("mixed_precision", ("fp32", "")),
    "--num-workers": ("num_workers", COUNTS),
    "--log-every": ("log_every", (0, *COUNTS)),
    "--checkpoint-every": ("checkpoint_every", (0, *COUNTS)),
    "--validate-every": ("validate_every", (0, *COUNTS)),
}
LOADED = {  # what every command says that loads a backbone
    "--device": (lambda v: load_backbone(device=v), DEVICES),
    "--backbone": (load_backbone, ("nowhere", "SD15", "a/model")),
}
DTYPE = {"--dtype": (lambda v: load_backbone(dtype=v), WORDS)}
GENERATE = {  # the argument of DTEPipeline.generate, values
    "--guidance-scale": ("guidance_scale", (math.inf, math.nan, -1.0, 1e38, "much")),
    "--num-inference-steps": ("num_inference_steps", (0, 1001, "few", "2.5")),
    "--alpha": ("alpha_blend", (-0.1, 1.5, math.nan, "half")),
    "--seed": ("seeds", ("one", "1.5")),
    "--negative-prompt": ("negative_prompt", ("a\udcff",)),
    "--prompt": ("prompts", ("a cat", "", "S* a\udcff", "S* and S2* on the beach")),
}


def generate(argument):
    """A call of `DTEPipeline.generate` with one value, of a pipeline of which nothing is used."""
    pipe = DTEPipeline.__new__(DTEPipeline)
    pipe.backbone = pipe.prompt_encoder = SimpleNamespace()
    return lambda value: pipe.generate(None, **{"prompts": "S*", argument: value})


def setting(kind, argument):
    return lambda value: kind(**{argument: value})


PART = {  # of `world train`: option: (argument of PartOptions, values)
    "--steps": ("steps", (0, *COUNTS)),
    "--minutes": ("minutes", (-1.0, math.nan, "soon")),
    "--batch-size": ("batch_size", (0, 3, *COUNTS)),
    "--count": ("count", (0, *COUNTS)),
    "--seed": ("seed", COUNTS),
    "--device": ("device", DEVICES),
    "--mixed-precision": ("mixed_precision", ("fp16", "")),
}
ENCODER = PART | {
    "--batch-size": ("batch_size", (0, *COUNTS)),
    "--word-steps": ("word_steps", (0, *COUNTS)),
    "--width": ("width", (0, 9, *COUNTS)),
    "--rank": ("rank", (0, *COUNTS)),
    "--regulariser": ("regulariser", ("l3", "")),
}


def part_option(argument):
    good = dict(
        steps=1, minutes=None, seed=0, batch_size=4, count=None, device="cpu", mixed_precision="no"
    )
    return lambda value: PartOptions(**good | {argument: value})


def encoder_option(argument):
    return lambda value: small_world.main(Path(os.devnull) / "x", **{argument: value})


drawn = {option: (generate(argument), values) for option, (argument, values) in GENERATE.items()}
DOORS = {  # command: {option: (what takes its value in Python, values that mean nothing)}
    "personalize": drawn | DTYPE | LOADED | {
        "--steps": (setting(TuneConfig, "num_steps"), COUNTS),
        "--learning-rate": (setting(TuneConfig, "offset_learning_rate"), (-1.0, math.nan, "x")),
        "--batch-size": (setting(TuneConfig, "batch_size"), (0, *COUNTS)),
        "--fit": (lambda v: read_pictures(PHOTO, fit=v), ("stretch", "")),
    },
    "generate": drawn | DTYPE | LOADED | {"--batch-size": (generate("batch_size"), (0, *COUNTS))},
    "pretrain": LOADED | {
        option: (setting(PretrainConfig, argument), values)
        for option, (argument, values) in PRETRAIN.items()
    } | {
        "--rank": (setting(EncoderConfig, "rank"), (0, *COUNTS)),
        "--regulariser": (setting(MethodConfig, "regulariser"), ("l3", "")),
        "--crops": (lambda v: ClassPictures([], 16, v), COUNTS),
        "--pictures": (lambda v: StreamedPictures("x", 16, pictures=v), (0, *COUNTS)),
    },
    "evaluate": LOADED | {
        "--experiment": (lambda v: Methods(None).experiment(v), ("tables", "")),
        "--method": (lambda v: measure([v]), ("dte", "dtee:1", "ti@x=1:2", "ti@batch_size=0:2")),
        "--concepts": (lambda v: measure(concepts=v), (1, 5000, *COUNTS)),
        "--scene": (lambda v: measure(scenes=(v,)), ("moon", "")),
        "--split": (lambda v: measure(split=v), ("tests", "")),
        "--seeds": (lambda v: measure(seeds=v), (1, *COUNTS)),
        "--processes": (lambda v: measure(processes=v), (0, *COUNTS)),
    },
    "memory": {
        "--backbone": (lambda v: needs(Setting(v)), ("small", "sdxl", "")),
        "--resolution": (lambda v: needs(Setting(resolution=v)), (0, -64, 100, 10**9, "large")),
        "--batch": (lambda v: Setting(batch=v), (0, 10**9, *COUNTS)),
        "--dtype": (lambda v: Setting(dtype=v), WORDS),
        "--rank": (lambda v: needs(Setting(rank=v)), (0, *COUNTS)),
        "--card": (lambda v: advise(Setting(), v, 0), (0.0, -1.0, math.nan, math.inf, "T4")),
    },
    "parameters": {"--width": (setting(EncoderConfig, "width"), (0, 9, *COUNTS))},
    "export": {
        "--name": (lambda v: export(CONCEPT, "x", name=v), ("a/b", "..", "")),
        "--token": (lambda v: export(CONCEPT, "x", token=v), ("two words", "", "a\udcff")),
    },
    "world drawings": {"--each": (lambda v: write_drawings(Path("x"), v), (0, *COUNTS))},
    **{
        f"world train {name}": {
            option: (part_option(argument), values)
            for option, (argument, values) in PART.items()
        }
        for name in ("autoencoder", "text", "unet", "decoder", "towers")
    },
    "world train encoder": {
        option: (encoder_option(argument), values)
        for option, (argument, values) in ENCODER.items()
    } | {"--backbone": (load_backbone, ("nowhere",))},
    "world evaluate": {
        "--backbone": (load_backbone, ("nowhere",)),
        "--captions": (lambda v: base_model.main("x.json", n=v), (3, *COUNTS)),
    },
}  # fmt: skip
ELSEWHERE = {  # files and folders; what the loading of pictures and encoders answers; a report
    ("pretrain", "--data"), ("doctor", "--backbone"), ("doctor", "--device"),
    ("export", "--backbone"), ("explore", "--backbone"), ("explore", "--device"),
    ("explore", "--port"),
}  # fmt: skip
PHOTO = Image.new("RGB", (16, 16), "white")  # neither blank nor busy at its corners
PHOTO.putpixel((8, 8), (255, 0, 0))
CONCEPT = Concept(torch.ones(1, 4), {}, "small")
START = {  # arguments without which a command does not begin
    "personalize": ["PHOTO", "--prompt", "S*", "--out", "OUT"],
    "generate": ["CONCEPT", "--prompt", "S*", "--out", "OUT"],
    "pretrain": ["--out", "OUT"],
    "evaluate": ["--out", "OUT"],
    "export": ["CONCEPT", "--out", "OUT"],
    "world evaluate": ["--out", "OUT.json"],
    "world drawings": ["--out", "OUT"],
    "world train autoencoder": ["--out", "OUT"],
    **{
        f"world train {x}": ["--out", "OUT", "--parts", "OUT", "--wide", "OUT"]
        for x in ("text", "unet", "decoder", "towers")
    },
    "world train encoder": ["--out", "OUT"],
}


def measure(methods=("dte:1",), processes=1, **options):
    measure_methods("x", None, methods, EvaluationConfig(**options), processes=processes)


ROWS = [
    (command, option, value)
    for command, options in DOORS.items()
    for option, (_, values) in options.items()
    for value in values
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(command): its arguments, of files that are there."""
    folder = tmp_path_factory.mktemp("doors")
    PHOTO.save(folder / "photo.png")
    CONCEPT.save(folder / "concept.safetensors")
    words = {"PHOTO": folder / "photo.png", "CONCEPT": folder / "concept.safetensors"}
    words |= {"OUT": folder / "out", "OUT.json": folder / "out.json"}

    def arguments(command):
        return [str(words.get(x, x)) for x in START.get(command, [])]

    arguments.folder = folder
    return arguments


@pytest.mark.parametrize(("command", "option", "value"), ROWS)
def test_both_doors_say_the_same(command, option, value, start, capsys):
    with pytest.raises(DTEError) as caught:
        DOORS[command][option][0](value)
    arguments = start(command)
    if option == "--prompt":
        arguments = [x for x in arguments if x not in ("--prompt", "S*")]
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *arguments, f"{option}={value}"])
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("loading ")]
    shown = str(caught.value).encode("utf-8", "backslashreplace").decode()
    assert ended.value.code == 2 and " ".join(said).split() == f"error: {shown}".split()
    assert not {"out", "out.json"} & set(os.listdir(start.folder))


@pytest.mark.parametrize("command", [x for x in START if "--device" in DOORS[x]])
def test_a_gpu_that_is_missing_leaves_no_folder(command, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "mine").mkdir()
    for out in ("new/inner", "mine"):
        arguments = [*start(command), "--out", str(tmp_path / out), "--device=cuda"]
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), *arguments])
        assert ended.value.code == 2 and "torch finds no CUDA device" in capsys.readouterr().err
    assert [x.name for x in tmp_path.rglob("*")] == ["mine"]  # the user's own stays


NOT_PATHS = (None, 3, b"x", ["a", "b"], float("nan"), torch.zeros(2))
PATHS = {  # what takes a path in Python
    "the backbone": load_backbone,
    "the backbone of a pipeline": DTEPipeline.from_pretrained,
    "the encoder": lambda v: load_encoder(v, None),
    "the concept file": Concept.load,
    "a new concept file": CONCEPT.save,
    "the output folder": lambda v: export(CONCEPT, v),
    "the pictures": lambda v: load_pictures(v, 16),
    "the cache": CachedPictures,
    "the run": finished,
    "the wide world": wide.load,
}


@pytest.mark.parametrize("value", NOT_PATHS, ids=repr)
@pytest.mark.parametrize("what", PATHS)
def test_what_is_no_path_is_one_sentence(what, value):
    with pytest.raises(DTEError, match="is a path, not"):
        PATHS[what](value)


@pytest.mark.parametrize("value", [3, "concept.safetensors", {"num_steps": 3}, torch.zeros(2)])
def test_a_setting_of_another_kind_is_one_sentence(value):
    pipe = DTEPipeline.__new__(DTEPipeline)
    pipe.backbone = pipe.prompt_encoder = SimpleNamespace()
    for call, kind in (
        (lambda: pipe.generate(value, ["S*"]), "Concept"),
        (lambda: export(value, "x"), "Concept"),
        (lambda: pipe.personalize(PHOTO, config=value), "TuneConfig"),
        (lambda: pipe.personalize(PHOTO, method=value), "MethodConfig"),
        (lambda: pipe.personalize(PHOTO, prediction=value), "EncoderPrediction"),
    ):
        with pytest.raises(DTEError, match=f" is a {kind}, not"):
            call()
    if not isinstance(value, str):
        for name in ("name", "token"):
            with pytest.raises(DTEError, match=f"the {name} is a text, not"):
                export(CONCEPT, "x", **{name: value})


def options_of(app, above=""):
    """(command, option) of every option that takes a number or a word."""
    for command in app.registered_commands:
        name = f"{above}{command.name or command.callback.__name__}"
        for parameter in inspect.signature(command.callback).parameters.values():
            kind, option = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
            words = option.param_decls or (f"--{parameter.name.replace('_', '-')}",)
            if kind is not bool and "Path" not in str(kind):
                yield name, words[-1]
    for group in app.registered_groups:
        yield from options_of(group.typer_instance, f"{above}{group.name} ")


def test_every_option_is_tried():
    known = {(command, option) for command, option, _ in ROWS} | ELSEWHERE
    assert set(options_of(app)) == known


@pytest.mark.parametrize("device", DEVICES)
def test_doctor_says_of_a_device_what_loading_says(device, capsys):
    with pytest.raises(DTEError) as caught:
        load_backbone(device=device)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", f"--device={device}"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    assert [x.split(None, 2)[2] for x in lines if x.startswith("FAIL")] == [str(caught.value)]


def test_options_of_pictures_that_are_not_named(start, capsys):
    for option in ("--stream", "--crops=2", "--pictures=9"):
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", *start("pretrain"), option])
        assert ended.value.code == 2 and "that --data names" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["S2* at night, S*", "S* and s*", "S*, s_1*", "s*"])
def test_a_near_miss_of_the_placeholder_is_answered(value):
    with pytest.raises(DTEError, match="S"):
        check_prompts([value])


@pytest.mark.parametrize("value", ["S*", "S*'s house", "<S*>", "S**", "xS*y", "US2 S*", "cats* S*"])
def test_prompts_that_name_the_concept_pass(value):
    check_prompts([value])


def test_the_error_counts_as_much_as_the_weights_say():
    g = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 3, 4, 4, generator=g)
    weights = torch.rand(2, 1, 4, 4, generator=g)
    total = sum(
        weights[b, 0, y, x] * (output[b, c, y, x] - target[b, c, y, x]) ** 2
        for b in range(2) for c in range(3) for y in range(4) for x in range(4)
    )  # fmt: skip
    torch.testing.assert_close(weighted_error(output, target, weights), total / weights.sum() / 3)
    plain = torch.nn.functional.mse_loss(output, target)
    assert torch.equal(weighted_error(output, target, None), plain)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_stream_that_lacks_letters_ends_nothing(encoding, tmp_path, picture):
    picture.save(tmp_path / "图.png")
    command = [sys.executable, "-m", "dte_lab", "personalize", tmp_path / "图.png"]
    command += ["--prompt", "s* 海", "--out", tmp_path / "aus 图"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert encoding == "ascii" or r"\u6d77" in ended.stderr  # click writes UTF-8 for ASCII


def test_the_streams_of_the_command_show_what_they_can(monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        main(["--version"])
    print("wrote 图")
    out.flush()
    assert rb"wrote \u56fe" in out.buffer.getvalue()
