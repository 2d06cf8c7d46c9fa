"""What is written is whole or not there, has the rights that are asked for, and loses nothing."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save, save_file

from dte_lab.common import files
from dte_lab.common.checkpoint import save_folder
from dte_lab.common.errors import DTEError
from dte_lab.common.files import keep_inputs, remove_leftovers, write_atomically
from dte_lab.common.resume import append_line, cut_back
from dte_lab.common.weights import read_tensors
from dte_lab.world import pack


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True)
def test_a_new_file_has_the_rights_that_the_umask_allows(tmp_path, umask):
    write_atomically(tmp_path / "new", b"1")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_an_existing_file_keeps_its_rights(tmp_path, mode):
    path = tmp_path / "old"
    path.write_bytes(b"1")
    path.chmod(mode)
    write_atomically(path, b"22")
    assert path.read_bytes() == b"22" and path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["n" * 250, "图" * 80])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    write_atomically(tmp_path / name, b"1")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@contextmanager
def disk_of(size):
    """No file can be larger inside: what writes beyond it fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [100, 4000])
def test_a_folder_of_weights_on_a_full_disk_is_named(tmp_path, limit):
    """Its weights do not fit, or not even its settings; no write beyond the limit succeeds."""

    class Model:
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("x" * 300)
            save_file({"w": torch.ones(9000)}, folder / "model.safetensors")

    with disk_of(limit), pytest.raises(OSError) as caught:
        save_folder(Model(), tmp_path / "encoder")
    assert str(tmp_path / "encoder") in str(caught.value) and not list(tmp_path.iterdir())
    save_folder(Model(), tmp_path / "encoder")
    assert len(list((tmp_path / "encoder").iterdir())) == 2


def test_what_tokenizers_says_of_a_full_disk_names_the_folder(tmp_path):
    """An Exception of no kind; any other is a fault of the program, and stays what it is."""

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "half.json").write_text("{")
            raise self.error

    for Tokenizer.error, raised in ((Exception("No space left"), OSError), (KeyError(1), KeyError)):
        with pytest.raises(raised) as caught:
            save_folder(Tokenizer(), tmp_path / "tokenizer")
        assert not list(tmp_path.iterdir())
        assert raised is KeyError or f"{tmp_path}/tokenizer cannot be" in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "x.safetensors", "config.json"])
def test_a_packed_file_on_a_full_disk_is_named(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"x": "y" * 999}))
    if name == "x.safetensors":
        save_file({"w": torch.ones(9000)}, tmp_path / name)
    target = tmp_path / "parts" / name
    pack.copy(tmp_path / name, target)
    before = target.read_bytes()
    with disk_of(100), pytest.raises(OSError) as caught:
        pack.copy(tmp_path / name, target)
    assert caught.value.filename == str(target) and target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]


def test_a_kept_picture_on_a_full_disk_is_named(tmp_path):
    from dte_lab.evaluation import run

    item = SimpleNamespace(name="a bus", picture=lambda: torch.rand(1, 3, 16, 16))
    trial = SimpleNamespace(pictures=torch.rand(2, 1, 3, 16, 16), steps=3)
    with disk_of(100), pytest.raises(OSError) as caught:
        run.keep(tmp_path, item, "dte", trial)
    assert caught.value.filename == str(tmp_path / "pictures" / "a-bus" / "input.png")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    run.keep(tmp_path, item, "dte", trial)
    assert {path.name for path in tmp_path.rglob("*.png")} == {"input.png", "dte_3.png"}


def test_a_log_on_a_full_disk_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    with disk_of(20), pytest.raises(OSError) as caught:
        append_line(path, {"step": 2, "loss": 0.5})
    assert caught.value.filename == str(path)
    cut_back(path, 9)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"a\xff\xfe" * 70)
    write_atomically(tmp_path / name, b"1")
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"a\xff\xfe" * 70]


def test_the_next_process_removes_what_a_killed_one_was_writing(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f".a.bin.dte-{killed.pid}.tmp"
    left.write_bytes(b"half")
    (tmp_path / f".model.dte-{killed.pid}.tmp").mkdir()
    (tmp_path / f".model.dte-{killed.pid}.tmp" / "part").write_bytes(b"half")
    kept = {f".b.dte-{os.getppid()}.tmp", ".c.dte-x.tmp", f"d.dte-{killed.pid}.tmp", ".e.1.tmp"}
    for name in kept:
        (tmp_path / name).write_bytes(b"1")
    remove_leftovers.cache_clear()
    write_atomically(tmp_path / "z", b"1")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"z"}


def test_an_output_is_no_input(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    keep_inputs([tmp_path / "b", tmp_path / "new"], [tmp_path / "a", tmp_path / "missing"])
    for given in ("a", "link"):
        with pytest.raises(DTEError, match="a is read and would be written over"):
            keep_inputs([tmp_path / "b", tmp_path / "a"], [tmp_path / given])


SHAPES = {"a": ("n", 3), "b": ("n",), "c": ()}


def small_file(**changes):
    found = {"a": torch.rand(2, 3).half(), "b": torch.rand(2), "c": torch.tensor(1.0)} | changes
    return save({name: tensor for name, tensor in found.items() if tensor is not None})


def test_small_files_of_tensors_are_read_in_single_precision(tmp_path):
    (tmp_path / "x").write_bytes(small_file())
    found = read_tensors(tmp_path / "x", SHAPES, "make it again")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "a": (2, 3),
        "b": (2,),
        "c": (),
    }
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, "cannot be read .No such file or directory"),
        (b"", "cannot be read"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "cannot be read"),
        (small_file()[:-3], "cannot be read"),
        (small_file(b=None), "the tensor b is missing"),
        (small_file(d=torch.ones(1)), "the tensor d is unknown"),
        (small_file(a=torch.ones(3)), "the tensor a has the shape .3,."),
        (small_file(a=torch.ones(2, 4)), "the tensor a has the shape .2, 4."),
        (small_file(a=torch.ones(0, 3), b=torch.ones(0)), "the tensor a has the shape .0, 3."),
        (small_file(b=torch.ones(3)), "the tensor b has the shape .3,."),
        (small_file(c=torch.ones(1)), "the tensor c has the shape .1,."),
        (small_file(b=torch.ones(2, dtype=torch.int64)), "the tensor b is of torch.int64"),
        (small_file(b=torch.ones(2).to(torch.float8_e4m3fn)), "b is of torch.float8_e4m3fn"),
        (small_file(b=torch.tensor([1.0, float("nan")])), "b holds values that are not finite"),
        (small_file(c=torch.tensor(float("-inf"))), "c holds values that are not finite"),
    ],
)
def test_a_damaged_small_file_is_one_sentence(tmp_path, data, fault):
    if data is not None:
        (tmp_path / "x").write_bytes(data)
    with pytest.raises(DTEError, match=rf"x.* {fault}.*: make it again\.$"):
        read_tensors(tmp_path / "x", SHAPES, "make it again")
