"""ONNX Runtime computes with the exported graphs what torch computes, to 1e-3."""

import json
import warnings

import numpy as np
import pytest
import torch

from dte_lab import DTEPipeline, EncoderConfig, TuningEncoder
from dte_lab.backbone import new_scheduler
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil
from dte_lab.common.random import stream
from dte_lab.onnx_parts.export import PART_NAMES, export_onnx
from dte_lab.onnx_parts.parts import Layout
from dte_lab.tuning import TuneConfig, draw_batch, tune

ort = pytest.importorskip("onnxruntime", reason="needs pip install -e '.[page]'")
pytest.importorskip("onnxscript", reason="needs pip install -e '.[page]'")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


class Graphs:
    """The graphs in a folder, run with arrays by name."""

    def __init__(self, folder):
        self.folder, self.sessions = folder, {}
        self.about = json.loads((folder / "model.json").read_text())

    def __call__(self, name, **inputs):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if name not in self.sessions:
            path = str(self.folder / f"{name}.onnx")
            self.sessions[name] = ort.InferenceSession(path, options)
        feeds = {key: np.asarray(value) for key, value in inputs.items()}
        names = [output.name for output in self.sessions[name].get_outputs()]
        found = self.sessions[name].run(None, feeds)
        return dict(zip(names, map(torch.from_numpy, map(np.atleast_1d, found)), strict=True))

    def text(self, prompt, v_star, pipe):
        """Of a prompt with S*; plain where it has none."""
        if "S*" in prompt:
            ids, slots = pipe.prompt_encoder.tokenize([prompt])
        else:
            ids = torch.tensor([pipe.prompt_encoder._fit(pipe.prompt_encoder._piece(prompt))])
            slots = torch.full_like(ids, -1)
        return self("text", ids=ids.int(), slots=slots.int(), v_star=v_star)["states"]


@pytest.fixture(scope="module")
def folder(random_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the exporter's own remarks reaches the user
        paths = export_onnx(random_pipe, folder)
    assert sorted(folder.iterdir()) == sorted(paths)
    return folder


@pytest.fixture(scope="module")
def graphs(folder):
    return Graphs(folder)


@pytest.fixture(scope="module")
def pipe(random_pipe):
    return random_pipe


@pytest.fixture(scope="module")
def picture(pipe):
    size = pipe.backbone.resolution
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def predicted(pipe, picture):
    return pipe.encoder.predict(pipe.backbone, picture, 5, pipe.prompt_encoder)


def close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_encoder_predicts_the_same(pipe, graphs, picture, predicted):
    n = len(pipe.encoder.settings.feature_timesteps)
    noise = torch.randn(n, *pipe.backbone.latent_shape, generator=stream(5, "static features"))
    found = graphs("encoder", picture=picture, noise=noise)
    close(found["v_star"], predicted.v_star)
    offsets = Layout.of(pipe.encoder).unpack(found["offsets"])
    assert list(offsets) == list(predicted.offsets)
    for key, pair in predicted.offsets.items():
        for one, other in zip(offsets[key], pair, strict=True):
            close(one, other)
            assert other.abs().max() > 0.01, "so that a mistake would show"


def test_the_nearest_words_are_the_same(pipe, graphs, predicted):
    found, table = graphs("words", v_star=predicted.v_star), pipe.prompt_encoder.table
    best, rows = found["similarity"][None].topk(5)
    similarities, expected = table.nearest_rows(predicted.v_star, 5)
    assert rows.tolist() == expected.tolist()
    close(best, similarities)
    close(found["v_hard"], table.embeddings[expected[:, 0]])


@pytest.mark.parametrize("prompt", ["S* on the beach", "a red S* and a blue S*", "", "the car"])
def test_the_text_tower_reads_the_same(pipe, graphs, predicted, prompt):
    encode = pipe.prompt_encoder
    call = (lambda: encode([prompt], predicted.v_star)) if "S*" in prompt else (
        lambda: encode.plain([prompt])
    )  # fmt: skip
    close(graphs.text(prompt, predicted.v_star, pipe), call())


def test_the_autoencoder_is_the_same(pipe, graphs, picture):
    latents = pipe.backbone.encode_images(picture)
    close(graphs("encode", picture=picture)["latents"], latents)
    found = graphs("decode", latents=latents)["picture"]
    close(found, pipe.backbone.decode_latents(latents))
    assert found.abs().max() <= 1


@pytest.mark.parametrize("alpha, guidance", [(0.7, 1.5), (1.0, 3.0), (0.0, 1.0)])
def test_a_sampling_run_ends_at_the_same_picture(
    pipe, graphs, predicted, alpha, guidance, monkeypatch
):
    """Graphs alone, but for the scheduler, against `generate`."""
    decode, ends = pipe.backbone.decode_latents, []
    monkeypatch.setattr(pipe.backbone, "decode_latents", lambda z: decode(ends.append(z) or z))
    from dte_lab import Concept

    concept = Concept(predicted.v_star, predicted.offsets, pipe.backbone.name)
    prompt = "S* on the beach"
    options = {"guidance_scale": guidance, "alpha_blend": alpha, "progress": False}
    ((expected,),) = pipe.generate(concept, prompt, [4], num_inference_steps=10, **options)

    v_star, packed = predicted.v_star, Layout.of(pipe.encoder).pack(predicted.offsets)
    v_hard = graphs("words", v_star=v_star)["v_hard"]
    plain = graphs.text("", v_star, pipe)
    soft, hard = (torch.cat([plain, graphs.text(prompt, v, pipe)]) for v in (v_star, v_hard))
    scheduler = new_scheduler(pipe.backbone.scheduler)
    scheduler.set_timesteps(10)
    x = pipe.initial_noise(4)
    for t in scheduler.timesteps:
        output = graphs(
            "unet", latents=torch.cat([x, x]), timestep=t[None].int(), soft=soft, hard=hard,
            offsets=packed, alpha=torch.full((2,), alpha),
        )["output"]  # fmt: skip
        u, c = output.chunk(2)
        x = scheduler.step(u + guidance * (c - u), t, x).prev_sample
    close(x, ends[0])
    found = to_pil(graphs("decode", latents=x)["picture"])[0]
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_offsets_and_blend_matter_in_the_graph(pipe, graphs, predicted):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, *pipe.backbone.latent_shape, generator=g), pipe.prompt_encoder
    soft = torch.cat([text.plain([""]), text(["S* at night"], predicted.v_star)])
    base = {"latents": x, "timestep": torch.tensor([700], dtype=torch.int32), "soft": soft}
    base |= {"hard": text.plain(["car", "red"]), "alpha": torch.tensor([1.0, 1.0])}
    base["offsets"] = Layout.of(pipe.encoder).pack(predicted.offsets)
    first = graphs("unet", **base)["output"]
    for change in (
        {"offsets": 0 * base["offsets"]}, {"alpha": torch.tensor([0.2, 0.2])},
        {"timestep": torch.tensor([100], dtype=torch.int32)},
    ):  # fmt: skip
        assert (graphs("unet", **(base | change))["output"] - first).abs().max() > 1e-3
    same = graphs("unet", **(base | {"hard": 0 * base["hard"]}))["output"]
    close(same, first)


@pytest.mark.parametrize("masked", [False, True])
def test_twelve_steps_of_tuning_end_at_the_same_concept(pipe, graphs, picture, predicted, masked):
    """Gradients of the graph with torch's optimiser, against `tune`."""
    backbone, layout = pipe.backbone, Layout.of(pipe.encoder)
    masks = torch.zeros(1, 1, *picture.shape[2:])
    masks[..., :40, 16:] = 1
    config = TuneConfig.of(backbone.recommended)
    result = tune(
        backbone, pipe.prompt_encoder, predicted, picture, pipe.encoder.method, config,
        bank=(pipe.encoder.bank, pipe.encoder.bank_concepts), seed=2, progress=False,
        masks=masks if masked else None,
    )  # fmt: skip

    about = graphs.about["tuning"]
    v, packed = predicted.v_star.clone(), layout.pack(predicted.offsets)
    groups = [{"params": [v], "lr": about["token_learning_rate"]},
              {"params": [packed], "lr": about["offset_learning_rate"]}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=about["betas"], weight_decay=0.0)
    latents = graphs("encode", picture=picture)["latents"]
    ids, slots = (x.int() for x in pipe.prompt_encoder.tokenize([about["prompt"]]))
    generator, losses = stream(2, "tuning"), []
    for step in range(about["num_steps"]):
        batch = draw_batch(
            backbone, latents, (about["prompt"],), step, about["batch_size"], generator,
            masks if masked else None,
        )  # fmt: skip
        weights = torch.ones(1, 1, *latents.shape[2:]) if not masked else batch.weights[:1]
        found = graphs(
            "tune", v_star=v, offsets=packed, latents=latents, noise=batch.noise, ids=ids,
            slots=slots, timesteps=batch.timesteps.int(), weights=weights,
        )  # fmt: skip
        losses.append(found["terms"][0].item())
        v.grad, packed.grad = found["v_star_gradient"], found["offsets_gradient"]
        optimizer.step()
    close(torch.tensor(losses), torch.tensor([step["loss"] for step in result.losses]))
    close(v, result.prediction.v_star)
    close(packed, layout.pack(result.prediction.offsets))
    assert (v - predicted.v_star).abs().max() > 0.01
    assert (packed - layout.pack(predicted.offsets)).abs().max() > 0.01


def test_the_description_is_of_the_files(pipe, folder, graphs):
    about = graphs.about
    assert set(about["parts"]) == set(PART_NAMES) and about["opset"] == 20
    for name, size in about["files"].items():
        assert (folder / name).stat().st_size == size
    for name, part in about["parts"].items():
        graphs(name, **{k: np.zeros(shape, dtype) for k, (dtype, shape) in part["inputs"].items()})
        for given in graphs.sessions[name].get_inputs():
            assert given.shape == part["inputs"][given.name][1]
        assert [o.name for o in graphs.sessions[name].get_outputs()] == part["outputs"]
    assert about["words"] == pipe.prompt_encoder.table.words
    assert sum(d * r + r * e for _, d, r, e in about["offsets"]) == len(
        graphs("encoder", picture=np.ones((1, 3, 64, 64), np.float32),
               noise=np.ones((2, *pipe.backbone.latent_shape), np.float32))["offsets"]
    )  # fmt: skip


def test_weights_are_stored_once_and_in_half_precision(pipe, folder, graphs):
    """All of them are fp16 numbers here, but for what is computed."""
    whole = (*pipe.backbone.modules, pipe.encoder)
    count = sum(p.numel() for module in whole for p in module.parameters())
    size, half = (folder / "weights.bin").stat().st_size, graphs.about["weights"]["half_bytes"]
    assert half <= 2 * count * 1.1 and size - half < 20_000
    for name in PART_NAMES:
        text = (folder / f"{name}.onnx").read_bytes()
        assert b"/dte_lab/" not in text and b".py" not in text, "says where it was made"


def test_what_cannot_be_exported_is_refused(pipe, tiny_backbone, tmp_path):
    from dte_lab.zero_shot import ZeroShotStart

    with pytest.raises(DTEError, match="needs a trained encoder"):
        export_onnx(DTEPipeline(tiny_backbone, ZeroShotStart(tiny_backbone)), tmp_path)
    full = EncoderConfig(rank="full", width=8, grid=4, num_heads=2, negative_bank_size=2)
    encoder = TuningEncoder.from_backbone(tiny_backbone, full)
    with pytest.raises(DTEError, match="low rank"):
        export_onnx(DTEPipeline(tiny_backbone, encoder), tmp_path)
    assert not list(tmp_path.iterdir())
