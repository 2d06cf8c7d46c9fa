import dataclasses
import functools
import json
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.data import default_collate

from dte_lab import TuningEncoder, load_encoder
from dte_lab.backbone import add_noise
from dte_lab.cli.pretrain import training_pictures
from dte_lab.common.checkpoint import read_state
from dte_lab.encoder import EncoderPrediction
from dte_lab.pipeline import DTEPipeline
from dte_lab.tokens import PromptEncoder
from dte_lab.training import validation
from dte_lab.training.batches import StepBatches, prepare
from dte_lab.training.callbacks import statistics
from dte_lab.training.config import PretrainConfig, learning_rate
from dte_lab.training.optimizer import build_optimizer
from dte_lab.training.predictions import read_predictions
from dte_lab.training.pretrain import pretrain
from dte_lab.training.run import accelerator_for
from dte_lab.training.step import Frozen, Processes, training_step

CONFIG = PretrainConfig(
    steps=4, batch_size=3, warmup_steps=2, log_every=1, checkpoint_every=2, sample_every=100
)


class Pictures(torch.utils.data.Dataset):
    """Six concepts, two pictures each; item i is a pure function of i."""

    prompts = ("a picture of S*", "S* on the beach", "S* at night")

    def __len__(self):
        return 12

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        image, target = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
        return {
            "image": image, "target": target, "prompt": self.prompts[i % 3], "concept": i // 2,
        }  # fmt: skip


def run(backbone, dte, out_dir, config=CONFIG, **kwargs):
    encoder = TuningEncoder.from_backbone(backbone, dte)
    return pretrain(backbone, encoder, Pictures(), config, out_dir, progress=False, **kwargs)


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Interrupted(Exception):
    pass


def test_a_run_in_pieces_is_bit_identical(tiny_backbone, tiny_config, tmp_path):
    whole = run(tiny_backbone, tiny_config, tmp_path / "whole")

    def interrupt(line):  # at step 3, after the checkpoint of step 2
        if line["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tiny_backbone, tiny_config, tmp_path / "pieces", callback=interrupt)
    with open(tmp_path / "pieces" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    one_step = dataclasses.replace(CONFIG, max_minutes=0.0)
    run(tiny_backbone, tiny_config, tmp_path / "pieces", one_step)  # step 3, by the time limit
    torch.manual_seed(99)  # global random state must not matter
    pieces = run(tiny_backbone, tiny_config, tmp_path / "pieces")

    for (name, x), y in zip(whole.state_dict().items(), pieces.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    lines = log(tmp_path / "pieces")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert without_times(lines) == without_times(log(tmp_path / "whole"))
    (a, info), (b, other) = (
        read_state(tmp_path / d / "checkpoint.safetensors") for d in ("whole", "pieces")
    )
    assert info == other and a.keys() == b.keys() == {"model", "ema", "optimizer"}
    for part in a:
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items()), part


class StubAdamW8bit(torch.optim.Optimizer):
    """What matters of bitsandbytes' to a checkpoint: int steps, uint8 averages, nested state."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            if not state:
                state |= {"step": 0, "state1": torch.zeros_like(p, dtype=torch.uint8)}
                state |= {"state2": state["state1"].clone(), "qmap1": torch.linspace(-1, 1, 256)}
            assert type(state["step"]) is int and state["state1"].dtype == torch.uint8
            state["step"] += 1
            state["state1"] += (100 * p.grad.abs()).round().clamp(max=9).to(torch.uint8)
            p -= self.param_groups[0]["lr"] * state["qmap1"][state["state1"].int()] / state["step"]

    def state_dict(self):
        whole = super().state_dict()
        nested = {
            i: {"step": state["step"], "wrapped": {k: state[k] for k in state if k != "step"}}
            for i, state in whole["state"].items()
        }
        return whole | {"state": nested}


def test_8_bit_optimizer_goes_on_as_it_would_have(
    tiny_backbone, tiny_config, tmp_path, monkeypatch
):
    config = dataclasses.replace(CONFIG, optimizer_8bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        run(tiny_backbone, tiny_config, tmp_path, config)

    stub = ModuleType("bitsandbytes.optim")
    stub.AdamW8bit = StubAdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stub)
    in_pieces_as_whole(tiny_backbone, tiny_config, tmp_path, config)
    state = read_state(tmp_path / "pieces" / "checkpoint.safetensors")[0]["optimizer"]
    assert state["0.state1"].dtype == torch.uint8 and state["0.step"] == config.steps


def test_8_bit_optimizer_of_bitsandbytes(tiny_backbone, tiny_config, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(CONFIG, optimizer_8bit=True)
    wide = dataclasses.replace(tiny_config, width=64)  # from 4096 values on it takes 8 bits
    in_pieces_as_whole(tiny_backbone, wide, tmp_path, config)
    state = read_state(tmp_path / "pieces" / "checkpoint.safetensors")[0]["optimizer"]
    assert any(value.dtype == torch.uint8 for value in state.values())


def test_only_a_fresh_encoder_is_initialised(tiny_backbone, tiny_config, tmp_path):
    calls = []

    def initialise(encoder):
        calls.append(torch.nn.init.zeros_(encoder.zero_shot_weight))

    for steps in (1, 2):
        config = dataclasses.replace(CONFIG, steps=steps, learning_rate=0.0)
        trained = run(tiny_backbone, tiny_config, tmp_path, config, initialise=initialise)
    assert len(calls) == 1 and trained.zero_shot_weight == 0


def in_pieces_as_whole(backbone, dte, tmp_path, config):
    whole = run(backbone, dte, tmp_path / "whole", config)
    piece = dataclasses.replace(config, max_minutes=0.0)
    for _ in range(2):
        run(backbone, dte, tmp_path / "pieces", piece)
    pieces = run(backbone, dte, tmp_path / "pieces", config)
    for (name, x), y in zip(whole.state_dict().items(), pieces.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_training_moves_every_parameter_and_the_ema_follows(tiny_backbone, tiny_config, tmp_path):
    fresh = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    trained = run(tiny_backbone, tiny_config, tmp_path)
    for (name, x), y in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(x, y), name
    from safetensors.torch import load_file

    raw = load_file(tmp_path / "checkpoint.safetensors")
    name = "hypernetwork.queries"
    assert not torch.equal(raw[f"model.{name}"], trained.state_dict()[name])  # EMA is another
    assert raw["model.bank_concepts"].min() >= 0  # the bank has been filled
    exported = load_encoder(tmp_path / "encoder", tiny_backbone)
    for (name, x), y in zip(exported.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(x, y), name
    kinds = {type(p).__name__ for p in tiny_backbone.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


def test_two_steps_of_the_optimizer_by_hand():
    x, gradients = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, -1.0], [2.0, 0.1]])
    p = torch.nn.Parameter(x.clone())
    optimizer = build_optimizer([p], weight_decay=0.3)
    optimizer.param_groups[0]["lr"] = 0.1
    m = v = torch.zeros(2)
    for i, gradient in enumerate(gradients, start=1):
        p.grad = gradient
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        step = m / (1 - 0.9**i) / (v / (1 - 0.99**i)).sqrt()
        x = (1 - 0.1 * 0.3) * x - 0.1 * step
    torch.testing.assert_close(p.detach(), x)


def test_the_first_step_against_adamw_and_the_average(tiny_backbone, tiny_config, tmp_path):
    """Half of the rate in the warm-up, decoupled weight decay; the average keeps a tenth."""
    config = dataclasses.replace(CONFIG, steps=1, learning_rate=0.02, weight_decay=5.0)
    fresh = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    average = run(tiny_backbone, tiny_config, tmp_path, config)
    raw = read_state(tmp_path / "checkpoint.safetensors")[0]["model"]
    name = "hypernetwork.queries"
    before, after = fresh.get_parameter(name).detach(), raw["token_head.out.bias"]
    assert after.abs().max().item() == pytest.approx(0.01, rel=1e-3), "it was 0: one rate of AdamW"
    step = raw[name] - before * (1 - 0.01 * 5.0)
    assert step.abs().max() <= 0.01 * 1.001
    torch.testing.assert_close(
        average.get_parameter(name).detach(), 0.1 * before + 0.9 * raw[name], atol=1e-6, rtol=1e-5
    )
    (line,) = log(tmp_path)
    assert line["learning_rate"] == 0.01 and line["grad_norm"] > 0


def test_the_configs_norm_clips_and_the_last_step_is_logged(
    tiny_backbone, tiny_config, monkeypatch, tmp_path
):
    module, norms = sys.modules["dte_lab.training.pretrain"], []
    train_step = module.train_step

    def step(*arguments):
        norms.append(arguments[-1])
        return train_step(*arguments)

    monkeypatch.setattr(module, "train_step", step)
    config = dataclasses.replace(CONFIG, steps=3, log_every=2, max_grad_norm=0.25)
    run(tiny_backbone, tiny_config, tmp_path, config)
    assert norms == [0.25] * 3
    assert [line["step"] for line in log(tmp_path)] == [2, 3]


def test_the_log_says_what_the_prediction_is(tiny_backbone, monkeypatch):
    table = PromptEncoder(tiny_backbone).table
    v_star = 2 * table.embeddings[3:5]
    a, b = torch.ones(2, 3, 1), torch.full((2, 1, 5), 0.5)
    found = statistics(EncoderPrediction(v_star, {"q": (a, b), "k": (a, 3 * b)}), table)
    norm = v_star.norm(dim=-1).mean().item() / table.mean_norm
    assert found["v_star_norm"] == pytest.approx(norm)
    assert found["nearest_cosine"] == pytest.approx(1)
    assert found["offset_rms"] == pytest.approx(((0.25 + 2.25) / 2) ** 0.5)


def test_pictures_that_were_skipped_are_logged_at_their_step(tiny_backbone, tiny_config, tmp_path):
    class Some(Pictures):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"skipped": f"{i}: bad" if i % 2 else ""}

    config = dataclasses.replace(CONFIG, steps=2, log_every=2)
    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    pretrain(tiny_backbone, encoder, Some(), config, tmp_path, progress=False)
    drawn = list(StepBatches(12, config, 0))
    expected = [
        (step, [f"{i}: bad" for i in batch if i % 2]) for step, batch in enumerate(drawn, 1)
    ]
    lines = log(tmp_path)
    assert [(x["step"], x["skipped"]) for x in lines if "skipped" in x] == [
        line for line in expected if line[1]
    ]
    assert lines[-1]["step"] == 2 and "loss" in lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"batch_size": True}, "batch_size is a whole number"),
        ({"log_every": 0}, "log_every is a whole number from 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is"),
        ({"sample_every": 1.5}, "sample_every is"),
        ({"predict_every": 0}, "predict_every is"),
        ({"warmup_steps": -1}, "warmup_steps is a whole number from 0"),
        ({"seed": -1}, "seed is"),
        ({"num_workers": -1}, "num_workers is"),
        ({"learning_rate": float("inf")}, "learning_rate is a number from 0"),
        ({"weight_decay": "x"}, "weight_decay is"),
        ({"decay_fraction": 2}, "decay_fraction is a number from 0 to 1"),
        ({"ema_decay": 1.1}, "ema_decay is"),
        ({"shared_timestep_probability": -0.1}, "shared_timestep_probability is"),
        ({"max_grad_norm": 0}, "max_grad_norm is a number above 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision is one of no, bf16, fp16"),
        ({"optimizer_8bit": 1}, "optimizer_8bit is true or false"),
        ({"max_minutes": -1}, "max_minutes is"),
    ],
)
def test_settings_with_which_nothing_can_be_trained_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**change)


def test_a_model_of_another_world_needs_pictures(tiny_backbone):
    with pytest.raises(ValueError, match="is no model of the small world: say --data FOLDER"):
        training_pictures(tiny_backbone, None)


def test_finished_run_is_not_trained_further(tiny_backbone, tiny_config, tmp_path):
    first = run(tiny_backbone, tiny_config, tmp_path)
    size = len(log(tmp_path))
    second = run(tiny_backbone, tiny_config, tmp_path)
    assert len(log(tmp_path)) == size
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)


def test_other_settings_are_refused(tiny_backbone, tiny_config, tmp_path):
    run(tiny_backbone, tiny_config, tmp_path, dataclasses.replace(CONFIG, steps=2))
    with pytest.raises(ValueError, match="batch_size"):
        run(tiny_backbone, tiny_config, tmp_path, dataclasses.replace(CONFIG, batch_size=2))
    with pytest.raises(ValueError, match="width"):
        run(tiny_backbone, dataclasses.replace(tiny_config, width=24), tmp_path)


def test_pictures_and_predictions_are_written_and_change_nothing(
    tiny_backbone, tiny_config, tmp_path, picture, monkeypatch
):
    generate = functools.partialmethod(DTEPipeline.generate, num_inference_steps=2)
    monkeypatch.setattr(DTEPipeline, "generate", generate)
    seen, config = [], dataclasses.replace(CONFIG, steps=3, sample_every=2)
    plain = run(tiny_backbone, tiny_config, tmp_path / "a", config)
    sampled = run(
        tiny_backbone, tiny_config, tmp_path / "b", config, eval_images=[picture, picture],
        probe_images=[picture], callback=seen.append,
    )  # fmt: skip
    for x, y in zip(plain.parameters(), sampled.parameters(), strict=True):
        assert torch.equal(x, y)
    grids = [x for x in seen if "grid" in x]
    assert [x["step"] for x in grids] == [2, 3] and grids[0]["grid"].size == (32, 32)
    names = sorted(path.name for path in (tmp_path / "b" / "samples").iterdir())
    assert names == ["0000002.png", "0000003.png"]
    assert without_times(x for x in seen if "loss" in x) == without_times(log(tmp_path / "a"))
    assert not (tmp_path / "a" / "samples").exists()
    assert not (tmp_path / "a" / "predictions.jsonl").exists()


def test_predictions_of_probe_images_are_those_of_the_encoder(
    tiny_backbone, tiny_config, tmp_path, picture
):
    """At step 0 and every so many steps, with the EMA weights."""
    pictures = [picture, picture.rotate(90)]
    fresh = TuningEncoder.from_backbone(tiny_backbone, tiny_config).eval()
    pixels = DTEPipeline(tiny_backbone, fresh).pixels(pictures)
    config = dataclasses.replace(CONFIG, steps=4, predict_every=2, learning_rate=0.05)
    trained = run(tiny_backbone, tiny_config, tmp_path, config, probe_images=pictures)
    steps, v_star = read_predictions(tmp_path / "predictions.jsonl")
    assert steps.tolist() == [0, 2, 4] and v_star.shape == (3, 2, 24)
    for encoder, row in ((fresh, v_star[0]), (trained, v_star[-1])):
        for image, v in zip(pixels, row, strict=True):
            predicted = encoder.predict(tiny_backbone, image[None]).v_star[0]
            torch.testing.assert_close(torch.tensor(v), predicted, atol=2e-6, rtol=0)
    assert abs(v_star[-1] - v_star[0]).max() > 1e-3


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tiny_backbone, tiny_config, tmp_path
):
    class Broken(Pictures):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"target": torch.full((3, 16, 16), torch.nan)}

    run(tiny_backbone, tiny_config, tmp_path, dataclasses.replace(CONFIG, steps=2))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    with pytest.raises(RuntimeError, match="step 2 is not finite"):
        pretrain(tiny_backbone, encoder, Broken(), CONFIG, tmp_path, progress=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_learning_rate_is_a_trapezoid_that_ends_at_zero():
    config = PretrainConfig(steps=100, warmup_steps=10, decay_fraction=0.2, learning_rate=1.0)
    rates = [learning_rate(s, config) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 and rates[50] == 1 and rates[80] == 1
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05) and rates[100] == 0


def test_batches_depend_on_the_step_alone():
    config = dataclasses.replace(CONFIG, steps=5)
    whole = list(StepBatches(1000, config, 0))
    assert whole[3:] == list(StepBatches(1000, config, 3))
    assert len({tuple(b) for b in whole}) == 5


def test_batches_of_a_step_are_counted_through(tiny_backbone, tiny_config, tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, gradient_accumulation=3)
    one_each = dataclasses.replace(CONFIG, steps=6)
    assert list(StepBatches(1000, config, 1)) == list(StepBatches(1000, one_each, 3))
    assert len(StepBatches(1000, config, 1)) == 3
    in_pieces_as_whole(tiny_backbone, tiny_config, tmp_path, config)
    (first, _), parts = log(tmp_path / "whole"), log_of_parts(tiny_backbone, tiny_config, tmp_path)
    for name in ("loss", "diffusion"):
        assert first[name] == pytest.approx(sum(parts[name]) / 3, rel=1e-5)


def log_of_parts(backbone, dte, tmp_path):
    """Losses of the first three batches where nothing is learned."""
    config = dataclasses.replace(CONFIG, steps=3, learning_rate=0.0)
    run(backbone, dte, tmp_path / "parts", config)
    return {name: [x[name] for x in log(tmp_path / "parts")] for name in ("loss", "diffusion")}


def test_the_validation_loss_is_that_of_the_average_on_other_classes(
    tiny_backbone, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(validation, "MEASURED_AT_ONCE", 2)
    config = dataclasses.replace(CONFIG, validate_every=2, learning_rate=0.05)
    held = torch.utils.data.Subset(Pictures(), [3, 8, 1])
    trained = run(tiny_backbone, tiny_config, tmp_path / "a", config, validation=held)
    plain = run(tiny_backbone, tiny_config, tmp_path / "b", config)
    for x, y in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.equal(x, y), "measuring changes nothing"
    lines = map(json.loads, (tmp_path / "a" / "validation.jsonl").read_text().splitlines())
    found = {line["step"]: line["validation"] for line in lines}
    assert list(found) == [0, 2, 4]

    fresh = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
    frozen = Frozen.of(tiny_backbone, fresh)
    for encoder, step in ((fresh, 0), (trained, 4)):
        total = 0
        for k, indices in enumerate(([3, 8], [1])):
            own = dataclasses.replace(config, seed=2**40, shared_timestep_probability=0.0)
            batch = prepare(
                tiny_backbone, collated([held.indices.index(i) for i in indices], held), own, k
            )
            with torch.no_grad(), training_step(encoder, frozen, batch, enqueue=False) as (x, _):
                total += len(indices) * x["diffusion"].item()
        assert found[step] == pytest.approx(total / 3, rel=1e-5)
    piece = dataclasses.replace(config, max_minutes=0.0)
    for _ in range(4):
        run(tiny_backbone, tiny_config, tmp_path / "c", piece, validation=held)
    lines = map(json.loads, (tmp_path / "c" / "validation.jsonl").read_text().splitlines())
    assert {x["step"]: x["validation"] for x in lines if x["step"] in found} == found


def test_each_twentieth_class_is_held_out():
    class Classes(list):
        concepts = torch.tensor([0, 19, 20, 39, 38, 19])

    train, held = validation.hold_out(Classes("abcdef"))
    assert [*train] == ["a", "c", "e"] and [*held] == ["b", "d", "f"]
    Classes.concepts = torch.arange(6)
    few = Classes("abcdef")
    assert validation.hold_out(few) == (few, None)


def collated(indices, dataset=None):
    dataset = Pictures() if dataset is None else dataset
    return default_collate([dataset[i] for i in indices])


def test_processes_share_the_batch_and_its_noise(tiny_backbone):
    config = dataclasses.replace(CONFIG, batch_size=4, steps=1)
    (batch,) = list(StepBatches(12, config, 0))
    two = [Processes(rank, 2) for rank in (0, 1)]
    shares = [list(StepBatches(12, config, 0, processes))[0] for processes in two]
    assert shares[0] + shares[1] == batch
    whole = prepare(tiny_backbone, collated(batch), config, 7)
    parts = [
        prepare(tiny_backbone, collated(share), config, 7, processes)
        for processes, share in zip(two, shares, strict=True)
    ]
    for name in ("noise", "timesteps", "feature_timesteps", "concepts"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name)), name
    for name in ("latents", "feature_latents"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(whole, name))


@pytest.mark.parametrize("shared", [True, False])
def test_what_the_features_see(tiny_backbone, shared):
    """The noisy target at the loss's timestep, or the noisy concept picture at one of its own."""
    pictures = collated(range(3))
    config = dataclasses.replace(CONFIG, shared_timestep_probability=float(shared))
    batch = prepare(tiny_backbone, pictures, config, part=4)
    latents = tiny_backbone.encode_images(pictures["target"])
    torch.testing.assert_close(batch.latents, latents)
    noisy = add_noise(tiny_backbone, latents, batch.noise, batch.timesteps)
    assert torch.equal(batch.feature_timesteps, batch.timesteps) == shared
    assert torch.allclose(batch.feature_latents, noisy, atol=1e-5) == shared
    if not shared:  # solve for the noise: it must be standard normal around the concept picture
        own = tiny_backbone.encode_images(pictures["image"])
        alpha = tiny_backbone.alphas_cumprod[batch.feature_timesteps][:, None, None, None]
        noise = (batch.feature_latents - alpha.sqrt() * own) / (1 - alpha).sqrt()
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
        assert not torch.allclose(noise, batch.noise, atol=1e-2)
    again = prepare(tiny_backbone, pictures, config, part=4)
    other = prepare(tiny_backbone, pictures, config, part=5)
    assert torch.equal(again.noise, batch.noise)
    assert not torch.equal(other.noise, batch.noise)


def test_runs_of_one_process_have_each_their_own_precision(tiny_backbone):
    for precision in ("no", "bf16", "no"):
        config = PretrainConfig(mixed_precision=precision)
        assert accelerator_for(tiny_backbone, config).mixed_precision == precision
