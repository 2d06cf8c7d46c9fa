"""The page's JavaScript computes what Python does: random numbers, tokens, scheduler, pictures."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dte_lab.common.images import to_square_tensor
from dte_lab.common.muon import MuonAdamW
from dte_lab.common.random import stream
from dte_lab.tuning import TuneConfig, draw_batch

SOURCES = Path(__file__).parents[1] / "playground" / "src"
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not SOURCES.is_dir(),
    reason="needs node, and a checkout: apt-get install nodejs",
)


def run(code, **data):
    """What `return` gives in JavaScript; data: JSON, by name. All modules are there by name."""
    modules = [p.stem for p in SOURCES.glob("*.js") if "postMessage" not in p.read_text()]
    modules = [name for name in modules if name in ("random", "tokenizer", "scheduler", "resample",
                                                    "optimizers", "weights")]  # fmt: skip
    lines = [f'import * as {name} from "{SOURCES.as_uri()}/{name}.js";' for name in modules]
    lines += [
        'import fs from "node:fs";',
        'const data = JSON.parse(fs.readFileSync(0, "utf8"));',
        f"const main = ({{{', '.join(data)}}}) => {{ {code} }};",
        "const plain = (k, v) => ArrayBuffer.isView(v) ? Array.from(v) : v;",
        "process.stdout.write(JSON.stringify(main(data), plain));",
    ]
    done = subprocess.run(
        ["node", "--input-type=module", "-e", "\n".join(lines)],
        input=json.dumps(data), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 + 7, 2**40 + 3])
def test_a_seed_draws_the_same_numbers(seed):
    use = ["initial noise", "tuning", "static features"]
    g = [stream(seed, name) for name in use]
    expected = [
        torch.randn(96 * 16, generator=g[0]).tolist(),
        torch.randperm(8, generator=g[1]).tolist() + torch.rand(8, generator=g[1]).tolist(),
        torch.randn(41, generator=g[2]).tolist() + torch.randperm(30, generator=g[2]).tolist(),
    ]
    found = run(
        """const g = use.map((name) => random.stream(seed, name));
        return [g[0].randn(96 * 16), [...g[1].randperm(8), ...g[1].rand(8)],
                [...g[2].randn(41), ...g[2].randperm(30)]]""",
        use=use, seed=seed,
    )  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_step_of_tuning_draws_the_same_batch(tiny_backbone):
    latents = torch.ones(1, *tiny_backbone.latent_shape)
    generator = stream(3, "tuning")
    prompts = ("a picture of S*",)
    batches = [draw_batch(tiny_backbone, latents, prompts, s, 8, generator) for s in range(3)]
    found = run(
        """const g = random.stream(3, "tuning");
        return [0, 1, 2].map(() => optimizers.drawBatch(g, 8, size, 1000))""",
        size=latents.numel(),
    )
    for batch, other in zip(batches, found, strict=True):
        assert batch.timesteps.tolist() == other["timesteps"]
        np.testing.assert_allclose(batch.noise.flatten(), other["noise"], atol=2e-6)


PROMPTS = [
    "S* on the beach", "a picture of S*", "S*", "a  S*\tat night ", "S*'s house isn't red",
    "Two S* and S*, 12 of 1234!", "S* — naïve façade ÅNGSTRÖM", "S*, 漢字 and 😀 👩‍🚀",
    "S* <|endoftext|> x", "''S* don't; we'll", "S* ΣΑΣ İstanbul ﬁne", "x" * 90 + " S*",
    "S* " + "green apple on the beach " * 12, "S*\u00a0in\u2003space\u0085now\ufeff",
]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_prompts_have_the_same_tokens(name, request, tiny_backbone):
    from dte_lab import PromptEncoder

    backbone = tiny_backbone
    if name == "small":
        backbone = request.getfixturevalue("small_pipe").backbone
    encode = PromptEncoder(backbone)
    tokenizer = backbone.tokenizer
    rng = np.random.default_rng(0)
    letters = list("abcdefghij 'S*é.,!12😀-")
    prompts = PROMPTS + ["S* " + "".join(rng.choice(letters, 12)) for _ in range(60)]
    tokens = {
        "length": tokenizer.model_max_length, "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "placeholder": "S*",
        "placeholder_id": encode.table.ids[0].item(),
    }  # fmt: skip
    found = run(
        """const t = new tokenizer.Tokenizer(file, tokens);
        return prompts.map((p) => t.prompt(p))""",
        file=json.loads(tokenizer.backend_tokenizer.to_str()), tokens=tokens, prompts=prompts,
    )  # fmt: skip
    for prompt, other in zip(prompts, found, strict=True):
        pieces = [encode._piece(text) for text in prompt.split("S*")]
        ids = encode._fit(sum(([tokens["placeholder_id"]] * (i > 0) + p
                               for i, p in enumerate(pieces)), []))  # fmt: skip
        assert other["ids"] == ids, prompt
        if 0 in other["slots"]:
            assert [other["slots"]] == encode.tokenize([prompt]).slots.tolist(), prompt


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 7, 14, 15, 25, 50])
def test_a_sampling_run_takes_the_same_path(prediction, steps, small_pipe):
    """The UNet's place is taken by a function of x and t."""
    from dte_lab.backbone import new_scheduler

    scheduler = new_scheduler(small_pipe.backbone.scheduler)
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))
    x, path = noise, []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x + t / 300), t, x).prev_sample
        path.append(x.tolist())
    about = {
        "alphas_cumprod": scheduler.alphas_cumprod.tolist(), "prediction_type": prediction,
        "scheduler": dict(scheduler.config),
    }  # fmt: skip
    found = run(
        """const s = new scheduler.Scheduler(about, steps);
        let x = Float32Array.from(noise);
        const unet = (t) => x.map((v) => Math.sin(v + t / 300));
        const path = s.timesteps.map((t, i) => x = s.step(x, unet(t), i));
        return {timesteps: s.timesteps, sigmas: s.sigmas, path}""",
        about=about, steps=steps, noise=noise.tolist(),
    )  # fmt: skip
    assert found["timesteps"] == scheduler.timesteps.tolist()
    np.testing.assert_allclose(found["sigmas"], scheduler.sigmas, rtol=1e-5)
    np.testing.assert_allclose(found["path"], path, rtol=1e-4, atol=1e-4)


def test_guidance_is_between_the_halves_and_beyond():
    found = run("return [0.5, 1, 3].map((s) => scheduler.guided([1, 10, 2, 30], s))")
    assert found == [[2, 30], [2, 30], [4, 70]]


def test_adam_moves_as_torch_does():
    g = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(20, generator=g), torch.randn(12, 20, generator=g)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0)
    config = TuneConfig(num_steps=12, constant_steps=5)
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.03 * config.rate_at(step)
        x.grad = gradient
        optimizer.step()
    found = run(
        """const x = Float32Array.from(start), a = new optimizers.Adam(20, 0.03);
        gradients.forEach((g, i) => a.step(x, g, optimizers.rateAt(i, 5)));
        return x""",
        start=start.tolist(), gradients=gradients.tolist(),
    )  # fmt: skip
    np.testing.assert_allclose(found, x.detach(), atol=1e-6)


def test_muon_moves_as_ours_does():
    """A tall, a wide and a square matrix in one vector, with momentum, at a rate that falls."""
    g, shapes = torch.Generator().manual_seed(2), [(7, 3), (3, 5), (4, 4)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    gradients = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(4)]
    x = [m.clone().requires_grad_() for m in start]
    optimizer = MuonAdamW([{"params": x, "muon": True}], lr=0.03, weight_decay=0.0)
    config = TuneConfig(num_steps=4, constant_steps=2)
    for step, of_step in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.03 * config.rate_at(step)
        for m, gradient in zip(x, of_step, strict=True):
            m.grad = gradient
        optimizer.step()

    def packed(matrices):
        return torch.cat([m.detach().flatten() for m in matrices])

    found = run(
        """const x = Float32Array.from(start), a = new optimizers.Muon(shapes, 0.03);
        gradients.forEach((g, i) => a.step(x, Float32Array.from(g), optimizers.rateAt(i, 2)));
        return x""",
        start=packed(start).tolist(), shapes=shapes,
        gradients=[packed(of_step).tolist() for of_step in gradients],
    )  # fmt: skip
    np.testing.assert_allclose(found, packed(x), atol=1e-5)
    assert (packed(x) - packed(start)).abs().max() > 0.01


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (131, 257), (40, 48)])
def test_pictures_are_made_square_as_pillow_makes_them(size):
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    rgba = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, np.uint8)], axis=2)
    expected = to_square_tensor(Image.fromarray(pixels), 64)
    found = run(
        "return resample.squarePicture(rgba, w, h, 64)",
        rgba=rgba.flatten().tolist(), w=size[0], h=size[1],
    )  # fmt: skip
    assert found["mask"] is None
    difference = np.abs(np.array(found["picture"]) - expected.flatten().numpy())
    assert difference.max() < 1.01 / 127.5


def test_transparent_parts_are_white_and_do_not_count():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 32:] = (200, 100, 50, 255)
    found = run(
        """const {picture, mask} = resample.squarePicture(rgba, 64, 64, 64);
        return {picture, cells: resample.cells(mask, 64, 4, 4), bytes: resample.toBytes(picture),
                blank: resample.isBlank(Float32Array.from(picture)),
                white: resample.isBlank(new Float32Array(300))}""",
        rgba=rgba.flatten().tolist(),
    )
    picture = np.array(found["bytes"]).reshape(64, 64, 4)
    assert picture[0, 0].tolist() == [255] * 4 and picture[20, 40].tolist() == [200, 100, 50, 255]
    assert np.array(found["cells"]).reshape(4, 4).tolist() == [
        [0] * 4,
        *[[0, 0, 1, 1]] * 2,
        [0] * 4,
    ]
    assert not found["blank"] and found["white"]
