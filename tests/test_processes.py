"""Pre-training in two processes (gloo): the losses of one, and no harm from a kill."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dte_lab.cli.pretrain import pretrain

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of two pictures."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(6):
        path = root / "abc"[i // 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return root


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_with_a_kill_train_as_one(tiny_path, data, tmp_path, cached):
    """Where there is a cache they fill one of their own, and it is the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    caches = [tmp_path / "cache of one", tmp_path / "cache of two"]
    options = {"crops": 30, "cache": caches[0]} if cached else {}  # 180 items, in two shards
    pretrain(
        out=one, backbone=str(tiny_path), data=str(data), steps=STEPS, batch_size=4, log_every=1,
        checkpoint_every=2, **options,
    )  # fmt: skip
    command = [
        # (accelerate's --cpu starts one process whatever --num_processes says)
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
        *("-m", "dte_lab", "pretrain", "--out", str(two), "--backbone", str(tiny_path)),
        *("--data", str(data), "--steps", str(STEPS), "--batch-size", "4"),
        *("--log-every", "1", "--checkpoint-every", "2"),
        *(("--crops", "30", "--cache", str(caches[1])) if cached else ()),
    ]
    output = (tmp_path / "output").open("w")
    launcher = subprocess.Popen(command, stdout=output, stderr=output)
    while not (two / "log.jsonl").is_file() or len(log_lines(two)) < 3:
        assert launcher.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.01)
    workers = [p for p in psutil.Process(launcher.pid).children() if "pretrain" in str(p.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=600) != 0  # the other one is ended, not left waiting
    assert len(log_lines(two)) < STEPS
    with safe_open(two / "checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) >= 2

    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    ours, theirs = log(two), log(one)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "diffusion", "contrastive", "v_star_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a["step"], name)
    assert theirs[0]["contrastive"] > 0  # negatives within the batch count
    with (
        safe_open(one / "checkpoint.safetensors", "pt") as a,
        safe_open(two / "checkpoint.safetensors", "pt") as b,
    ):
        concepts = [f.get_tensor("model.bank_concepts").tolist() for f in (a, b)]
    assert concepts[0] == concepts[1]  # the bank was filled in the same order
    if cached:
        names = [sorted(path.name for path in folder.iterdir()) for folder in caches]
        assert names[0] == names[1] == ["000000.safetensors", "000001.safetensors", "cache.json"]
        for name in names[0][:2]:
            a, b = (load_file(folder / name) for folder in caches)
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=2e-3, atol=1e-5)


def log_lines(out):
    return (out / "log.jsonl").read_text().splitlines()


def trained_in_a_process(rank, port, backbone, encoder, folder):
    """Three steps of one of two processes; its bank goes to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from dte_lab import load_backbone, load_encoder
    from dte_lab.training.pretrain import PretrainConfig
    from dte_lab.training.pretrain import pretrain as train

    backbone = load_backbone(backbone)
    encoder = load_encoder(encoder, backbone)
    g = torch.Generator().manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1
    data = [{"image": x, "prompt": "a picture of S*", "concept": i} for i, x in enumerate(pictures)]
    config = PretrainConfig(steps=3, batch_size=4, warmup_steps=1, log_every=1)
    train(backbone, encoder, data, config, folder, progress=False)
    save_file(dict(encoder.named_buffers()), f"{folder}/{rank}.safetensors")


def test_the_bank_is_the_same_in_all_processes(tiny_path, tiny_encoder, tmp_path):
    """Without being broadcast: all gather the same."""
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = port, tiny_path, tmp_path / "encoder", tmp_path
    torch.multiprocessing.spawn(trained_in_a_process, arguments, nprocs=2)
    a, b = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert a["bank"].abs().sum() > 0 and a["bank_concepts"].min() >= 0  # 12 entries, for 6 rows
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_that_cannot_be_shared_is_refused(tiny_backbone, monkeypatch, tmp_path):
    from dte_lab import TuningEncoder
    from dte_lab.training import pretrain as trainer
    from dte_lab.training import run as module

    class Three(module.Accelerator):
        num_processes = 3

    monkeypatch.setattr(module, "Accelerator", Three)
    config = module.PretrainConfig(batch_size=4)
    with pytest.raises(ValueError, match="batch of 4 cannot be shared out evenly to 3"):
        trainer.pretrain(tiny_backbone, TuningEncoder.from_backbone(tiny_backbone), [], config)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(tiny_backbone, monkeypatch, tmp_path, kind):
    from dte_lab import TuningEncoder
    from dte_lab.training import pretrain as trainer
    from dte_lab.training import run as module

    class Sharded(module.Accelerator):
        distributed_type = module.DistributedType[kind]

        def __init__(self, **kwargs):
            pass

    monkeypatch.setattr(module, "Accelerator", Sharded)
    with pytest.raises(ValueError, match="without --use_fsdp or --use_deepspeed"):
        trainer.pretrain(
            tiny_backbone, TuningEncoder.from_backbone(tiny_backbone), [], out_dir=tmp_path
        )


def test_folders_of_pictures(data, tmp_path):
    from dte_lab.training.pictures import load_pictures

    pictures = load_pictures(data, 16)
    assert len(pictures) == 6 and pictures[3]["concept"] == 1
    assert pictures[0]["image"].shape == (3, 16, 16) and pictures[0]["prompt"] == "a picture of S*"
    assert "target" not in pictures[0], "the same picture would be encoded twice"
    with pytest.raises(ValueError, match="no sub-folders with pictures"):
        load_pictures(tmp_path, 16)


def test_files_that_are_no_pictures_are_skipped_always_for_the_same(data, tmp_path, monkeypatch):
    from dte_lab.training import pictures

    root = tmp_path / "data"
    shutil.copytree(data, root)
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "junk.png").write_bytes(b"no picture")
    (root / "b" / "folder.png").mkdir()
    (root / "b" / "link.png").symlink_to("nowhere.png")
    os.mkfifo(root / "b" / "pipe.png")  # would wait for ever
    Image.new("RGB", (8, 99)).save(root / "c" / "small.png")
    (root / "c" / "5.png").write_bytes(whole[: len(whole) // 2])
    dataset = pictures.load_pictures(root, 16)
    names = [path.name for path, *_ in dataset.examples]
    assert len(names) == 11
    bad = {"junk.png", "folder.png", "link.png", "pipe.png", "small.png", "5.png"}
    for i, name in enumerate(names):
        good = next(j % 11 for j in range(i, i + 11) if names[j % 11] not in bad)
        passed = [names[j % 11] for j in range(i, good if good >= i else good + 11)]
        item, again = dataset[i], dataset[i]
        assert torch.equal(item["image"], again["image"])
        assert torch.equal(item["image"], dataset[good]["image"])
        assert item["concept"] == dataset.examples[good].concept
        assert bool(item["skipped"]) == (name in bad)
        assert [name for name in passed if name not in item["skipped"]] == []
    monkeypatch.setattr(pictures, "MOST_SKIPPED", 1)
    with pytest.raises(ValueError, match="1 pictures in a row cannot be read: .*5.png"):
        dataset[names.index("5.png")]


def test_hugging_face_datasets(monkeypatch, picture):
    from types import ModuleType

    from dte_lab.training.pictures import load_pictures

    class Rows(list):
        column_names = ["image", "label"]

    fake = ModuleType("datasets")
    fake.load_dataset = lambda name, split: Rows([{"image": picture, "label": 7}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    item = load_pictures("some/thing", 16)[0]
    assert item["concept"] == 7 and item["image"].shape == (3, 16, 16)
    Rows.column_names = ["image"]
    with pytest.raises(ValueError, match="no column label or cls"):
        load_pictures("some/thing", 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_pictures("some/thing", 16)
