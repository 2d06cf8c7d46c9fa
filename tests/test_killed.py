"""A run that is killed at any write and called again ends in what an uninterrupted one has.

A kill is an exception that nothing catches, right before a file is replaced or a line appended,
right after, or with half of the line written.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dte_lab.common import files, resume
from dte_lab.encoder import EncoderPrediction
from dte_lab.training import callbacks, predictions, pretrain
from dte_lab.training.config import PretrainConfig
from dte_lab.world import training
from dte_lab.world.training import TrainConfig


class Killed(BaseException):
    pass


class Writes:
    """Counts what is written, and kills at the `fatal`th write."""

    def __init__(self, monkeypatch):
        self.count, self.fatal, self.how = 0, None, None
        monkeypatch.setattr(files.os, "replace", self.around(files.os.replace))
        append = self.around(resume.append_line)
        for module in (callbacks, predictions, training):
            monkeypatch.setattr(module, "append_line", append)

    def around(self, write):
        def wrapped(path, *arguments):
            self.count += 1
            if self.count == self.fatal:
                if self.how == "half":
                    if write is resume.append_line or write.__name__ == "append_line":
                        with open(path, "a") as file:
                            file.write(json.dumps(*arguments)[:11])
                elif self.how == "after":
                    write(path, *arguments)
                raise Killed
            write(path, *arguments)

        return wrapped

    def of(self, call, fatal=None, how=None):
        self.count, self.fatal, self.how = 0, fatal, how
        call()
        return self.count


def content(folder: Path) -> dict[str, object]:
    """What a run has written, without times, and without files that a kill left half done."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in line.items() if k not in ("seconds", "minutes")} for line in lines
            ]
        elif path.suffix == ".safetensors":  # its metadata come in any order
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}
                found[name] = tensors, file.metadata()
        else:
            found[name] = path.read_bytes()
    return found


def killed_everywhere(monkeypatch, tmp_path, call, least):
    """call(folder) for a whole run, and for one killed at each of its writes and called again."""
    writes = Writes(monkeypatch)
    total = writes.of(lambda: call(tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    assert total >= least
    for fatal in range(1, total + 1):
        folder, how = tmp_path / str(fatal), ("before", "half", "after")[fatal % 3]
        with pytest.raises(Killed):
            writes.of(lambda: call(folder), fatal, how)  # noqa: B023
        writes.of(lambda: call(folder))  # noqa: B023
        assert content(folder) == whole, (fatal, how)
    return whole


@pytest.fixture
def quick_pretrain(monkeypatch, tiny_backbone, tiny_encoder, picture):
    """run(folder): `pretrain` of three steps, in which a step only moves one weight."""
    v_star = torch.zeros(2, 24)
    v_star[:, 0] = 1

    def train_step(accelerator, model, optimizer, frozen, batch, max_grad_norm):
        model.zero_shot_weight.grad = torch.tensor(0.5 + batch)
        optimizer.step()
        prediction = EncoderPrediction(v_star, {"x": (v_star[:, :, None], v_star[:, None])})
        loss = model.zero_shot_weight.detach().clone()
        return {"loss": loss, "diffusion": loss}, prediction, loss

    monkeypatch.setattr(pretrain, "prepare", lambda backbone, pictures, config, part, _: part)
    monkeypatch.setattr(pretrain, "train_step", train_step)
    monkeypatch.setattr(
        callbacks, "sample_grid", lambda pipe, *_: Image.new("L", (2, 2), grey(pipe.encoder))
    )
    frozen = pretrain.Frozen.of(tiny_backbone, tiny_encoder)
    monkeypatch.setattr(pretrain.Frozen, "of", lambda *_: frozen)
    pipe = callbacks.DTEPipeline(tiny_backbone, tiny_encoder)

    def pipeline(backbone, encoder):
        made = copy.copy(pipe)
        made.encoder = encoder
        return made

    monkeypatch.setattr(pretrain, "DTEPipeline", pipeline)
    config = PretrainConfig(
        steps=3, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, sample_every=2,
        predict_every=1,
    )  # fmt: skip
    data = [{"concept": 0}, {"concept": 1}]

    def run(folder, **changes):
        encoder = copy.deepcopy(tiny_encoder)
        options = {"eval_images": [picture], "probe_images": [picture], "progress": False}
        return pretrain.pretrain(tiny_backbone, encoder, data, config, folder, **options | changes)

    return run


def grey(encoder):
    return int(encoder.zero_shot_weight * 250)


def test_pretrain_survives_a_kill_at_each_write(monkeypatch, tmp_path, quick_pretrain):
    whole = killed_everywhere(monkeypatch, tmp_path, quick_pretrain, least=15)
    assert [line["step"] for line in whole["log.jsonl"]] == [1, 2, 3]
    assert [line["step"] for line in whole["predictions.jsonl"]] == [0, 1, 2, 3]
    assert {"samples/0000002.png", "samples/0000003.png"} <= whole.keys()
    assert "encoder/diffusion_pytorch_model.safetensors" in whole


def test_a_finished_run_writes_its_encoder_again(tmp_path, quick_pretrain):
    trained = quick_pretrain(tmp_path)
    for file in (tmp_path / "encoder").iterdir():
        file.unlink()
    quick_pretrain(tmp_path)
    saved = load_file(tmp_path / "encoder" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["zero_shot_weight"], trained.zero_shot_weight)


def test_world_training_survives_a_kill_at_each_write(monkeypatch, tmp_path):
    def call(folder):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss(model):
            return nullcontext(((model(torch.randn(4, 3)) - 1).square().mean(), {}))

        def sample(average, step):
            training.append_line(folder / "predictions.jsonl", {"step": step})
            return {"weight": average.weight.sum().item()}

        config = TrainConfig(
            6, 4, 1e-2, warmup_steps=1, log_every=2, sample_every=2, checkpoint_minutes=0.0
        )
        training.train(folder, model, config, loss, sample)

    whole = killed_everywhere(monkeypatch, tmp_path, call, least=12)
    assert [line["step"] for line in whole["log.jsonl"]] == [2, 2, 4, 4, 6, 6]
    assert [line["step"] for line in whole["predictions.jsonl"]] == [2, 4, 6]


DAMAGED = "checkpoint.safetensors is damaged"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), DAMAGED),
        (lambda path: path.write_bytes(b""), DAMAGED),
        (lambda path: path.write_bytes(bytes(range(99))), DAMAGED),
        (lambda path: path.write_bytes(FOREIGN), "is no checkpoint of a training run"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, quick_pretrain, damage, message):
    quick_pretrain(tmp_path)
    damage(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        quick_pretrain(tmp_path)
    assert len(str(error.value).splitlines()) == 1


FOREIGN = b'\x40\x00\x00\x00\x00\x00\x00\x00{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FOREIGN = FOREIGN.ljust(72, b" ") + bytes(4)


def test_runs_of_another_kind_or_model_are_one_sentence(tmp_path, quick_pretrain):
    quick_pretrain(tmp_path)

    def world(out, model, settings=None, batch_size=2):
        config = TrainConfig(2, batch_size, 1e-2)
        loss = lambda m: nullcontext((m(torch.ones(1, 3)).sum(), {}))  # noqa: E731
        training.train(out, model, config, loss, lambda m, s: {}, settings=settings)

    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="belongs to dte pretrain, not to dte world train"):
        world(tmp_path, torch.nn.Linear(3, 1))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    part = tmp_path / "part"
    world(part, torch.nn.Linear(3, 1), {"part": "a", "count": 4})
    config = (part / "config.json").read_text()
    for options, name in (
        ({"settings": {"part": "b", "count": 4}}, r"\(part\)"),
        ({"settings": {"part": "a", "count": 5}}, r"\(count\)"),
        ({"settings": {"part": "a", "count": 4}, "batch_size": 3}, r"\(train.batch_size\)"),
    ):
        with pytest.raises(ValueError, match=f"a run with other settings {name}"):
            world(part, torch.nn.Linear(3, 1), **options)
    with pytest.raises(ValueError, match="weights in .* are of another model") as error:
        world(part, torch.nn.Linear(3, 2), {"part": "a", "count": 4})
    assert len(str(error.value).splitlines()) == 1
    assert (part / "config.json").read_text() == config


def test_an_average_shares_the_buffers_and_not_the_weights():
    model = torch.nn.BatchNorm1d(2)
    average = training.average_of(model)
    assert average.running_mean is model.running_mean and not average.training
    assert average.weight is not model.weight and not average.weight.requires_grad
    assert torch.equal(average.weight, model.weight) and model.weight.requires_grad


def test_a_folder_is_written_file_by_file(monkeypatch, tmp_path):
    from safetensors import SafetensorError

    from dte_lab.common.checkpoint import save_folder

    class Model:
        def save_pretrained(self, folder):
            (Path(folder) / "config.json").write_text("{}")
            if full:
                raise SafetensorError("No space left on device")

    full = False
    save_folder(Model(), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert (tmp_path / "model" / "config.json").stat().st_mode & 0o444 == 0o444
    full = True
    with pytest.raises(OSError, match="model cannot be written .No space left"):
        save_folder(Model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_time_is_up_where_it_is_up_in_any_process():
    calls = []
    accelerator = SimpleNamespace(
        set_trigger=lambda: calls.append("set"), check_trigger=lambda: calls.append("check") or True
    )
    unlimited, limited = PretrainConfig(), PretrainConfig(max_minutes=60.0)
    assert pretrain.out_of_time(accelerator, unlimited, 0.0) is False and calls == []
    assert pretrain.out_of_time(accelerator, limited, float("inf")) and calls == ["check"]
    assert pretrain.out_of_time(accelerator, limited, float("-inf"))
    assert calls == ["check", "set", "check"]


def test_the_encoder_is_written_before_the_checkpoint_that_calls_it_finished(monkeypatch):
    order = []
    monkeypatch.setattr(callbacks, "save_folder", lambda model, folder: order.append(folder))
    checkpoint = SimpleNamespace(save=lambda *state: order.append(state[-1]))
    save = callbacks.Save("encoder", 2, checkpoint, None, None, None)
    for step, last in ((1, False), (2, False), (3, True)):
        save(callbacks.StepResult(step, {}, None, None, 0.0, None, last))
    assert order == ["encoder", 2, "encoder", 3]
