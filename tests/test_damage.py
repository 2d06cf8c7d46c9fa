"""Whatever stands in a folder of weights or in a checkpoint, it is loaded whole or one sentence."""

import copy
import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import nn

from dte_lab import load_backbone, load_encoder
from dte_lab.common.checkpoint import Checkpoint
from dte_lab.common.errors import DTEError


def bounded(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, print_blob=False,
        phases=[Phase.generate],  # a shorter example is not worth the minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8,
    torch.uint16, torch.int8, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip
VALUES = st.sampled_from([0.0, 1.0, math.nan, -math.inf, 3.0])
NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 1000, 10**7, 10**12, 10**30, 0.5, math.nan, math.inf])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=2),
    max_leaves=5,
)
PARTS = ("unet", "vae", "text_encoder", "image_encoder")
SMALL_PARTS = {
    "tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
}  # fmt: skip


def in_one_sentence(load, *names):
    """What `load` makes, or None where it ends in one sentence that has all the names."""
    try:
        return load()
    except DTEError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and 20 < len(said) < 1000, said
        assert all(str(name) in said for name in names), (names, said)
        return None


def all_finite(*modules):
    return all(t.isfinite().all() for m in modules for t in m.state_dict().values())


def damaged(data, tensors, other):
    """The tensors of a file, with one that is missing, foreign or of another kind; and its name."""
    tensors = dict(tensors)
    name = data.draw(st.sampled_from([*tensors, other]))
    if name in tensors and data.draw(st.booleans()):
        del tensors[name]
        return tensors, name
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 24]), max_size=4))
    if name in tensors and data.draw(st.booleans()):
        shape = tensors[name].shape
    tensor = torch.full(tuple(shape), data.draw(VALUES)).to(data.draw(st.sampled_from(DTYPES)))
    return tensors | {name: tensor}, name


def changed(data, config, more=()):
    """Settings with another value somewhere, and the name of the setting."""
    config = copy.deepcopy(config)
    place, key = config, data.draw(st.sampled_from([*config, *more]))
    while isinstance(place.get(key), dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from([*place]))
    place[key] = data.draw(JSON)
    return config


@contextmanager
def restored(path):
    """The file's bytes; it is away inside, where another is written, and there again at the end.

    (Never in place: who has loaded it may still read from it.)
    """
    whole = path.read_bytes()
    path.unlink()
    try:
        yield whole
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.fixture
def backbone_folder(tiny_path, tmp_path):
    return shutil.copytree(tiny_path, tmp_path / "backbone")


@pytest.fixture
def encoder_folder(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("dte_lab.encoder.words_of_folder", lambda *_: tiny_encoder.word_clip)
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@bounded(24)
@given(data=st.data())
def test_any_tensor_of_an_encoder(encoder_folder, tiny_backbone, data):
    (file,) = encoder_folder.glob("*.safetensors")
    with restored(file) as whole:
        tensors, name = damaged(data, sorted_tensors(whole), "foreign")
        save_file(tensors, file, {"format": "pt"})
        encoder = in_one_sentence(lambda: load_encoder(encoder_folder, tiny_backbone), file, name)
    assert encoder is None or (all_finite(encoder) and name in tensors)


@bounded(40)
@given(data=st.data())
def test_any_setting_of_an_encoder(encoder_folder, tiny_backbone, data):
    path = encoder_folder / "config.json"
    with restored(path) as before:
        path.write_text(json.dumps(changed(data, json.loads(before), ["new"])))
        in_one_sentence(lambda: load_encoder(encoder_folder, tiny_backbone), encoder_folder)


@bounded(12)
@given(data=st.data())
def test_any_tensor_of_a_backbone(backbone_folder, data):
    part = data.draw(st.sampled_from(PARTS))
    (file,) = (backbone_folder / part).glob("*.safetensors")
    with restored(file) as whole:
        tensors, name = damaged(data, sorted_tensors(whole), "foreign")
        save_file(tensors, file, {"format": "pt"})
        backbone = in_one_sentence(lambda: load_backbone(backbone_folder), file, name)
    assert backbone is None or (all_finite(*backbone.modules) and name in tensors)


@bounded(30)
@given(data=st.data())
def test_any_setting_of_a_backbone(backbone_folder, data):
    part = data.draw(st.sampled_from([*PARTS, *SMALL_PARTS]))
    path = backbone_folder / part / SMALL_PARTS.get(part, "config.json")
    with restored(path) as before:
        path.write_text(json.dumps(changed(data, json.loads(before), ["quantization_config", "x"])))
        in_one_sentence(lambda: load_backbone(backbone_folder), backbone_folder.name)


@pytest.mark.parametrize("text", ["", "[1]", "5", "null", "{", "[" * 100_000, b"\xff\xfe{}"])
def test_settings_that_are_none(backbone_folder, encoder_folder, tiny_backbone, text):
    data = text if isinstance(text, bytes) else text.encode()
    files = [p / "config.json" for p in (encoder_folder, *(backbone_folder / x for x in PARTS))]
    files += [backbone_folder / part / name for part, name in SMALL_PARTS.items()]
    for file in files:
        of_encoder = file.parent == encoder_folder
        with restored(file):
            file.write_bytes(data)
            found = in_one_sentence(
                lambda: (
                    load_encoder(encoder_folder, tiny_backbone)
                    if of_encoder  # noqa: B023
                    else load_backbone(backbone_folder)
                ),
                file.parent,
            )
        assert found is None, file


@pytest.mark.parametrize("fault", ["folder", "truncated", "header", "empty"])
def test_files_of_weights_that_are_none(backbone_folder, encoder_folder, tiny_backbone, fault):
    loads = {backbone_folder / part: lambda: load_backbone(backbone_folder) for part in PARTS}
    loads[encoder_folder] = lambda: load_encoder(encoder_folder, tiny_backbone)
    for folder, loading in loads.items():
        (file,) = folder.glob("*.safetensors")
        with restored(file) as whole:
            if fault == "folder":
                file.mkdir()
            else:
                cut = {"truncated": whole[:-9], "header": b"\xff" * 8 + whole[8:], "empty": b""}
                file.write_bytes(cut[fault])
            assert in_one_sentence(loading, file) is None


@pytest.fixture
def checkpoint(tmp_path):
    """A saved run, and go_on(): a fresh model that goes on with it."""
    saved = Checkpoint(tmp_path / "run" / "checkpoint.safetensors", "dte x", {"train": {"a": 1}})

    def made():
        torch.manual_seed(0)
        model, average = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(2, 3)
        average = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, average, optimizer

    model, average, optimizer = made()
    model(torch.randn(5, 2)).square().sum().backward()
    optimizer.step()
    saved.save(model, average, optimizer, 7)

    def go_on():
        parts = made()
        step = saved.load(*parts)
        parts[0](torch.randn(5, 2)).square().sum().backward()
        parts[2].step()
        return step, parts

    return saved.path, go_on


@bounded(120)
@given(data=st.data())
def test_any_tensor_of_a_checkpoint(checkpoint, data):
    path, go_on = checkpoint
    metadata, other = metadata_of(path), data.draw(st.sampled_from(["x", "optimizer.9.y"]))
    with restored(path) as whole:
        tensors, name = damaged(data, sorted_tensors(whole), other)
        if data.draw(st.booleans()):
            metadata["tensors"] = str(len(tensors))
        save_file(tensors, path, metadata)
        found = in_one_sentence(go_on, path)
    assert found is None or (all_finite(found[1][0], found[1][1]) and name in tensors)


@bounded(60)
@given(data=st.data())
def test_any_word_of_a_checkpoint(checkpoint, data):
    path, go_on = checkpoint
    metadata = metadata_of(path)
    with restored(path) as whole:
        key = data.draw(st.sampled_from(sorted(metadata)))
        value = data.draw(JSON.map(json.dumps) | st.text(max_size=9) | st.just("[" * 100_000))
        if data.draw(st.booleans()):
            metadata[key] = value
        else:
            del metadata[key]
        save_file(load(whole), path, metadata)
        in_one_sentence(go_on, path.parent)


def sorted_tensors(whole):
    return dict(sorted(load(whole).items()))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_folder_in_place_of_a_checkpoint(checkpoint):
    path, go_on = checkpoint
    assert go_on()[0] == 7
    path.unlink()
    path.mkdir()
    assert in_one_sentence(go_on, path) is None
