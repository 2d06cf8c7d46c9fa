"""Whatever stands in a concept file, it is a concept or one sentence."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dte_lab import Concept
from dte_lab.common.errors import DTEError
from dte_lab.export import export

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, print_blob=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint8, torch.uint16, torch.uint64, torch.int64, torch.bool,
    torch.complex64,
]  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 24]), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def parts(tiny_backbone, tiny_offsets, tmp_path):
    """Tensors and metadata of a good file."""
    path = tmp_path / "concept.safetensors"
    v_star = torch.randn(1, 24, generator=torch.Generator().manual_seed(4))
    Concept(v_star, tiny_offsets(scale=0.5), tiny_backbone.name).save(path)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata(), path


def is_a_concept_or_one_sentence(path, tiny_backbone):
    try:
        concept = Concept.load(path)
        concept.check(tiny_backbone)
        export(concept, path.parent / "exported")
    except DTEError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return False
    assert concept.v_star.isfinite().all() and concept.v_star.dtype == torch.float32
    return True


@BOUNDED
@given(data=st.data())
def test_any_tensors(parts, tiny_backbone, tmp_path, data):
    tensors, metadata, _ = parts
    names = [*tensors, "pictures", "offsets.x.A", "offsets.x.B", "foreign", "offsets..A"]
    key = data.draw(st.sampled_from(names))
    if data.draw(st.booleans()) and key in tensors:
        changed = {k: t for k, t in tensors.items() if k != key}
    else:
        value = data.draw(st.sampled_from([0.0, 1.0, math.nan, -math.inf, 1e38, 3.0]))
        tensor = torch.full(data.draw(SHAPES), value).to(data.draw(st.sampled_from(DTYPES)))
        changed = tensors | {key: tensor}
    save_file(changed, tmp_path / "c.safetensors", metadata)
    is_a_concept_or_one_sentence(tmp_path / "c.safetensors", tiny_backbone)


@BOUNDED
@given(data=st.data())
def test_any_metadata(parts, tiny_backbone, tmp_path, data):
    tensors, metadata, _ = parts
    key = data.draw(st.sampled_from([*metadata, "settings"]))
    known = json.loads(metadata["config"])
    if key == "config" and data.draw(st.booleans()):
        value = json.dumps(known | {data.draw(st.sampled_from([*known, "new"])): data.draw(JSON)})
    else:
        value = data.draw(st.one_of(st.text(max_size=20), JSON.map(json.dumps)))
    save_file(tensors, tmp_path / "c.safetensors", metadata | {key: value})
    is_a_concept_or_one_sentence(tmp_path / "c.safetensors", tiny_backbone)


@BOUNDED
@given(place=st.floats(0, 0.999), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage(parts, tiny_backbone, tmp_path, place, byte, cut):
    data = bytearray(parts[2].read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # mostly the header: numbers may be any
    at = int(place * start * 1.05)
    data[at] = byte
    (tmp_path / "c.safetensors").write_bytes(data[:at] if cut else data)
    is_a_concept_or_one_sentence(tmp_path / "c.safetensors", tiny_backbone)


@pytest.mark.parametrize("key", ["config", "info", "settings"])
def test_brackets_without_end(parts, tiny_backbone, tmp_path, key):
    tensors, metadata, good = parts
    save_file(tensors, tmp_path / "c.safetensors", metadata | {key: "[" * 100_000})
    assert not is_a_concept_or_one_sentence(tmp_path / "c.safetensors", tiny_backbone)
    assert is_a_concept_or_one_sentence(good, tiny_backbone)


def test_a_sentence_is_one_line_whatever_it_cites():
    assert str(DTEError("There is no a\r\nb\u2028c.")) == "There is no a b c."
