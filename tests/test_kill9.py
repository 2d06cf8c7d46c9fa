"""A command that is killed, at any time, and called again leaves what an uninterrupted one leaves.

Minutes: `pytest -m long tests/test_kill9.py` runs it, DTE_KILLS says at how many points (20).
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_killed import content

POINTS = int(os.environ.get("DTE_KILLS", 20))
TIMES = ("seconds", "minutes", "peak_memory_mb", "seconds_per_picture", "extra_memory_mb")
PRETRAIN = (
    "--steps 6 --batch-size 2 --warmup 1 --checkpoint-every 2 --log-every 1 --validate-every 2 "
    "--num-workers 0"
)
WORLD = "--steps 4 --batch-size 4 --out OUT"
TINY_WORLD = str(Path(__file__).with_name("tiny_world.py"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.name == "nt", reason="no SIGKILL"),
]


@pytest.fixture(scope="module")
def things(tiny_path, tiny_backbone, tiny_config, picture, wide_cache, tmp_path_factory):
    """A folder with a tiny model, its encoder, pictures of two classes, and a wide world."""
    from dte_lab import TuningEncoder
    from dte_lab.backbone import backbone_folder

    folder = tmp_path_factory.mktemp("things")
    shutil.copytree(tiny_path, folder / "tiny")
    (folder / "small").symlink_to(backbone_folder("small"))
    (folder / "wide").symlink_to(wide_cache)
    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    encoder.save_pretrained(folder / "tiny" / "encoder")
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.rotate(len(name) * 10 + ord(name[0])).save(folder / "pictures" / name)
    return folder


COMMANDS = {
    "pretrain": f"pretrain --backbone tiny --data pictures {PRETRAIN} --out OUT",
    "autoencoder": f"world train autoencoder --count 160 {WORLD}",
    "decoder": f"world train decoder --parts small --wide wide {WORLD}",
    "text": f"world train text --parts small --wide wide {WORLD}",
    "unet": f"world train unet --parts small --wide wide {WORLD}",
    "towers": f"world train towers --parts small --wide wide {WORLD}",
    "encoder": f"world train encoder --word-steps 4 --width 32 --rank 2 {WORLD}",
    "evaluate": "evaluate --quick --method dte:0,1 --out OUT",
    "personalize": (
        "personalize pictures/a/1.png --prompt S* --prompt S*_at_night --backbone tiny --steps 3 "
        "--num-inference-steps 3 --out OUT"
    ),
}


def start(name, things, out):
    arguments = [str(out) if word == "OUT" else word for word in COMMANDS[name].split()]
    program = [TINY_WORLD] if arguments[0] == "world" else ["-m", "dte_lab"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=things, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(name, things, out):
    process = start(name, things, out)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert not [p for p in out.rglob("*") if p.name.startswith(".")], "leftovers"
    return results(out)


def without_times(value):
    """JSON without what tells how long it took."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def results(out):
    found = content(out)
    for name in found:
        path = out / name
        if path.suffix == ".csv":
            rows = csv.DictReader(path.read_text().splitlines())
            found[name] = [without_times(row) for row in rows]
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".safetensors" and "info" in (found[name][1] or {}):
            metadata = found[name][1]
            metadata["info"] = without_times(json.loads(metadata["info"]))
        elif path.name in ("table.md", "tradeoff.png", "steps.png"):  # they show times
            found[name] = "there"
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_called_again_leaves_the_same(name, things, tmp_path):
    began = time.monotonic()
    whole = finish(name, things, tmp_path / "whole")
    took = time.monotonic() - began
    assert len(whole) >= 2
    for point in range(1, POINTS + 1):
        out = tmp_path / str(point)
        process = start(name, things, out)
        try:
            process.communicate(timeout=took * point / (POINTS + 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        assert finish(name, things, out) == whole, f"{name}, killed at {point} of {POINTS}"
        shutil.rmtree(out)
