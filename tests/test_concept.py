import pytest
import torch

from dte_lab import Concept, MethodConfig


@pytest.fixture
def concept(tiny_offsets):
    v_star = torch.randn(1, 24)
    pictures = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    config, info = (
        MethodConfig(alpha_blend=(0.4, 1.0), prediction_interval=3),
        {"words_after": [["cat", 0.5]]},
    )
    return Concept(v_star, tiny_offsets(1), "tiny", config, info, pictures)


def test_round_trip(concept, tmp_path):
    path = tmp_path / "concept.safetensors"
    concept.save(path)
    loaded = Concept.load(path)
    assert torch.equal(loaded.v_star, concept.v_star)
    assert set(loaded.offsets) == set(concept.offsets)
    for key, (a, b) in concept.offsets.items():
        assert torch.equal(loaded.offsets[key][0], a) and torch.equal(loaded.offsets[key][1], b)
    assert loaded.backbone == "tiny"
    assert loaded.config == concept.config and loaded.info == concept.info
    assert loaded.nearest_words == [["cat", 0.5]]
    assert loaded.pictures.dtype == torch.uint8 and torch.equal(loaded.pictures, concept.pictures)
    concept.pictures = None  # as in files of the first version
    concept.save(path)
    assert Concept.load(path).pictures is None


def test_saving_is_atomic(concept, tmp_path, monkeypatch):
    path = tmp_path / "concept.safetensors"
    concept.save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    concept.v_star = concept.v_star + 1
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        concept.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def damage_text(path):
    path.write_text("no tensors here")


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path):
    path.write_bytes(b"")


def damage_header(path):
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))


def damage_nan(path):
    concept = Concept.load(path)
    concept.v_star[0, 0] = torch.nan
    concept.save(path)


def damage_other_file(path):
    from safetensors.torch import save_file

    save_file({"v_star": torch.zeros(1, 24)}, path)


def damage_missing_half(path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    del tensors[next(k for k in tensors if k.endswith(".B"))]
    save_file(tensors, path, metadata)


def damage_config(path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    save_file(tensors, path, metadata | {"config": "{broken"})


@pytest.mark.parametrize(
    "damage",
    [
        damage_text, damage_truncate, damage_empty, damage_header, damage_nan, damage_other_file,
        damage_missing_half, damage_config,
    ],
)  # fmt: skip
def test_damaged_files_get_one_sentence(concept, tmp_path, damage):
    path = tmp_path / "concept.safetensors"
    concept.save(path)
    damage(path)
    with pytest.raises(ValueError, match="is not a readable concept file") as error:
        Concept.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no concept file"):
        Concept.load(tmp_path / "nothing.safetensors")


def test_a_concept_of_another_backbone(concept, tiny_backbone):
    concept.check(tiny_backbone)
    key = next(iter(concept.offsets))
    concept.offsets["elsewhere"] = concept.offsets.pop(key)
    with pytest.raises(ValueError, match="another model"):
        concept.check(tiny_backbone)
    concept.v_star = torch.zeros(1, 23)
    with pytest.raises(ValueError, match="v\\* has shape"):
        concept.check(tiny_backbone)


def test_a_word_or_the_weights_alone(tiny_offsets):
    concept = Concept(torch.full((1, 24), 2.0), tiny_offsets(), "tiny", info={"seed": 7})
    word = concept.word_alone()
    assert word.v_star is concept.v_star and word.info == concept.info
    for key, (a, b) in word.offsets.items():
        assert torch.equal(a, concept.offsets[key][0]) and not b.any()
        assert concept.offsets[key][1].any(), "the concept itself keeps its offsets"
    weights = concept.weights_alone(torch.full((1, 24), 3.0, dtype=torch.float64))
    assert weights.offsets is concept.offsets and concept.v_star[0, 0] == 2
    assert torch.equal(weights.v_star, torch.full((1, 24), 3.0))
