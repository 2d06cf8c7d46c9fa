"""A GPU that is exhausted or too small: one sentence with what would fit. The GPU is a stub."""

import dataclasses
import json

import pytest
import torch

from dte_lab import DTEPipeline, TuneConfig, TuningEncoder, memory_needs
from dte_lab.cli import main
from dte_lab.common.errors import DTEError, is_out_of_memory
from dte_lab.memory_needs import Setting, advice, check_room, choices, needed, out_of_memory_advised
from dte_lab.sd15 import random_parts
from dte_lab.training import pretrain as pretraining
from dte_lab.training.config import PretrainConfig
from dte_lab.zero_shot import ZeroShotStart

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def card(monkeypatch):
    """card(GB): a GPU with so many free."""

    def put(gigabytes):
        monkeypatch.setattr(memory_needs, "room", lambda device: ("Card X", int(gigabytes * 1e9)))

    return put


@pytest.fixture
def large(monkeypatch, tiny_backbone):
    """A backbone that is taken for Stable Diffusion 1.5, with batch as asked for."""
    monkeypatch.setattr(memory_needs, "setting_of", lambda backbone, batch: Setting(batch=batch))
    return dataclasses.replace(tiny_backbone, name="sd15")


def gigabytes(part, **setting):
    return needed(Setting(**setting), part) / 1e9


def test_what_is_shipped_covers_all_batches_and_grows_with_them():
    rows = json.loads(memory_needs.NEEDS.read_text())["rows"]
    assert len(rows) == 5 * 2 * 4
    for part in memory_needs.WORKLOADS:
        for dtype in ("fp16", "bf16", "fp32"):
            needs = [gigabytes(part, batch=b, dtype=dtype) for b in (1, 2, 4, 8, 16)]
            assert needs == sorted(needs) and len(set(needs)) == 5
    assert gigabytes("tuning", batch=3) == gigabytes("tuning", batch=4)  # rather too much
    assert needed(Setting(batch=17), "tuning") is None
    assert needed(Setting(resolution=384), "tuning") is None
    assert gigabytes("tuning", batch=4, dtype="fp32") > 1.5 * gigabytes("tuning", batch=4)


def test_choices_begin_with_the_least_change_and_give_nothing_back():
    setting = Setting(batch=2, offload=True)
    found = [(c.batch, c.gradient_checkpointing, c.offload) for c in choices(setting)]
    assert found[0] == (2, True, True) and found[-1] == (1, True, True)
    assert all(offload for *_, offload in found) and (2, False, True) not in found


def test_advice_takes_the_first_that_fits():
    setting = Setting(batch=4)
    free = gigabytes("tuning", batch=4, offload=True)
    told = advice(setting, "tuning", int(free * 1e9) + 1)
    assert told == f"it fits with --offload (in Python offload=True), predicted {free:.1f} GB"
    free = gigabytes("tuning", batch=1, gradient_checkpointing=True, offload=True)
    told = advice(setting, "tuning", int(free * 1e9) + 1)
    assert "--batch-size 1 --gradient-checkpointing --offload" in told
    assert "batch_size=1, gradient_checkpointing=True, offload=True" in told
    assert advice(setting, "tuning", int(1e9)) == (
        f"it needs {free:.1f} GB at least, predicted, so take a larger GPU"
    )
    assert "at least" in advice(Setting(batch=1, gradient_checkpointing=True, offload=True),
                                "tuning", int(1e9))  # fmt: skip


def test_a_card_too_small_is_refused_and_one_that_fits_is_not(card):
    need = gigabytes("tuning", batch=8)
    card(need + 0.01)
    check_room(Setting(batch=8), "tuning", "cuda")
    card(need - 0.01)
    with pytest.raises(DTEError) as error:
        check_room(Setting(batch=8), "tuning", "cuda")
    text = str(error.value)
    assert text.startswith("Tuning with sd15, 512 pixels, batch 8, fp16, rank 4 takes ")
    assert f"Card X has {need - 0.01:.1f} GB free: it fits with --" in text and "\n" not in text


def test_elsewhere_than_on_a_gpu_nothing_is_refused():
    assert memory_needs.room("cpu") is None
    check_room(Setting(batch=16, dtype="fp32"), "tuning", "cpu")


def test_the_room_is_what_is_free_and_what_torch_holds_in_reserve(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (3_000, 9_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 500)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Card X")
    assert memory_needs.room("cuda") == ("Card X", 3_500)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OOM, True), (RuntimeError("CUDA error: out of memory"), True), (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes differ"), False), (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_an_exhausted_card_is_told_what_would_fit(card, large):
    card(8)
    with pytest.raises(DTEError) as error, out_of_memory_advised(large, "tuning", 8):
        raise OOM
    text = str(error.value)
    assert text.startswith("Card X, with 8.0 GB, ran out of memory in tuning with sd15, 512 pixels")
    assert "it fits with --" in text and "\n" not in text and error.value.__cause__ is OOM
    with pytest.raises(RuntimeError, match="a fault"), out_of_memory_advised(large, "tuning", 8):
        raise RuntimeError("a fault")


def test_where_the_prediction_was_too_low_less_is_advised(card, large):
    """24 GB should hold it, and did not."""
    card(24)
    with pytest.raises(DTEError, match="fits with --offload "):
        with out_of_memory_advised(large, "tuning", 4):
            raise OOM


def test_other_models_are_told_the_options(tiny_backbone):
    with pytest.raises(DTEError) as error, out_of_memory_advised(tiny_backbone, "sampling", 3):
        raise MemoryError
    assert str(error.value) == (
        "This machine ran out of memory in sampling with batch 3: a smaller --batch-size, "
        "--gradient-checkpointing or --offload take less."
    )


def test_a_setting_is_read_off_a_full_size_model(tiny_backbone):
    from dte_lab import Backbone

    assert memory_needs.setting_of(tiny_backbone, 4) is None
    parts = random_parts("meta", torch.bfloat16)
    parts["unet"].enable_gradient_checkpointing()
    found = memory_needs.setting_of(Backbone("sd15", **parts, offload=True), 2)
    assert found == Setting(batch=2, dtype="bf16", gradient_checkpointing=True, offload=True)
    parts = random_parts("meta", torch.float16, resolution=384)
    assert memory_needs.setting_of(Backbone("sd15", **parts), 2) is None


@pytest.mark.parametrize("part", ["tuning", "sampling"])
def test_personalize_and_generate_answer_in_a_sentence(card, large, picture, part):
    """The UNet runs out of memory; tuning and sampling are as they were afterwards."""
    card(6)
    pipe = DTEPipeline(large, ZeroShotStart(large))
    concept = pipe.personalize(picture, num_steps=0, progress=False)

    def full(module, args):
        raise OOM

    handle = large.unet.register_forward_pre_hook(full)
    try:
        with pytest.raises(DTEError, match=f"^Card X, with 6.0 GB, ran out of memory in {part}"):
            if part == "tuning":
                config = TuneConfig(batch_size=8)
                pipe.personalize(picture, 2, config=config, progress=False)
            else:
                pipe.generate(concept, "S*", num_inference_steps=1, progress=False)
    finally:
        handle.remove()
    assert pipe.generate(concept, "S*", num_inference_steps=1, progress=False)


def test_pretraining_answers_in_a_sentence(card, large, tiny_config, tmp_path, monkeypatch):
    card(6)

    def full(*_):
        raise OOM

    monkeypatch.setattr(pretraining, "take_step", full)
    encoder = TuningEncoder.from_backbone(large, tiny_config)
    config = PretrainConfig(steps=1, batch_size=4)
    with pytest.raises(DTEError, match="^Card X, with 6.0 GB, ran out of memory in pre-training"):
        pretraining.pretrain(large, encoder, [{}] * 4, config, tmp_path, progress=False)


@pytest.mark.parametrize("command", ["personalize", "generate"])
def test_the_command_refuses_before_it_loads_anything(
    card, monkeypatch, capsys, tmp_path, picture, command
):
    card(2)
    picture.save(tmp_path / "a.png")
    for module in ("common.device", "pipeline"):
        monkeypatch.setattr(f"dte_lab.{module}.checked_device", lambda device: "cuda:0")
    monkeypatch.setattr("dte_lab.pipeline.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    given = tmp_path / "a.png"
    if command == "generate":
        from dte_lab import Concept

        given = tmp_path / "c.safetensors"
        Concept(torch.zeros(1, 768), {}, "sd15").save(given)
    arguments = [str(given), "--backbone", "sd15", "--prompt", "S*", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main([command, *arguments])
    part = "Tuning" if command == "personalize" else "Sampling"
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and said.startswith(f"error: {part} with sd15, 512 pixels, batch")
    assert "Card X has 2.0 GB free: it needs" in said
