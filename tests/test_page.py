"""ONNX Runtime computes what torch computes, to 1e-3, and the page in Chromium what Python does.

All with a small world of random numbers; making its graphs is what takes the time.
"""

import io
import json
import shutil
import urllib.error
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dte_lab import Concept, DTEPipeline, EncoderConfig, TuningEncoder
from dte_lab.backbone import new_scheduler
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_pil, to_square_tensor
from dte_lab.common.muon import MuonAdamW
from dte_lab.common.random import stream
from dte_lab.tuning import TuneConfig, draw_batch, tune

ort = pytest.importorskip("onnxruntime", reason="needs pip install -e '.[page]'")
pytest.importorskip("onnxscript", reason="needs pip install -e '.[page]'")
from dte_lab.cli import main  # noqa: E402
from dte_lab.onnx_parts import export as export_module  # noqa: E402
from dte_lab.onnx_parts.export import PART_NAMES, export_onnx  # noqa: E402
from dte_lab.onnx_parts.parts import Layout  # noqa: E402
from dte_lab.onnx_parts.tuning import TUNING_PROMPTS  # noqa: E402

page_tool = pytest.importorskip("tools.page", reason="needs a checkout")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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
    """Gradients of the graph with the optimiser in Python, against `tune`."""
    backbone, layout = pipe.backbone, Layout.of(pipe.encoder)
    masks = torch.zeros(1, 1, *picture.shape[2:])
    masks[..., :40, 16:] = 1
    config = TuneConfig.of(backbone.recommended, prompts=TUNING_PROMPTS)
    result = tune(
        backbone, pipe.prompt_encoder, predicted, picture, pipe.encoder.method, config,
        bank=(pipe.encoder.bank, pipe.encoder.bank_concepts), seed=2, progress=False,
        masks=masks if masked else None,
    )  # fmt: skip

    about = graphs.about["tuning"]
    v, packed = predicted.v_star.clone(), layout.pack(predicted.offsets)
    matrices = [m for pair in layout.unpack(packed).values() for m in pair]  # views of `packed`
    groups = [{"params": [v], "lr": about["token_learning_rate"]},
              {"params": matrices, "lr": about["offset_learning_rate"], "muon": True}]  # fmt: skip
    optimizer = MuonAdamW(groups, betas=about["betas"], weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial"] = group["lr"]
    latents = graphs("encode", picture=picture)["latents"]
    ids, slots = (x.int() for x in pipe.prompt_encoder.tokenize([about["prompt"]]))
    generator, losses = stream(2, "tuning"), []
    for step in range(about["num_steps"]):
        for group in optimizer.param_groups:
            group["lr"] = group["initial"] * min(1, about["constant_steps"] / (step + 1))
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
        v.grad, gradients = found["v_star_gradient"], layout.unpack(found["offsets_gradient"])
        for m, gradient in zip(matrices, sum(gradients.values(), ()), strict=True):
            m.grad = gradient
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


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--onnx", "OUT", "CONCEPT"], "--onnx writes the model alone: leave out CONCEPT, --out"),
        (["--onnx", "OUT", "--out", "OUT"], "--onnx writes the model alone"),
        (["CONCEPT"], "dte export needs a CONCEPT and --out DIR; or, for the model, --onnx DIR."),
        ([], "dte export needs a CONCEPT and --out DIR"),
    ],
)
def test_the_command_exports_one_thing(arguments, said, tmp_path, capsys):
    paths = {"OUT": tmp_path / "out", "CONCEPT": tmp_path / "x.safetensors"}
    with pytest.raises(SystemExit) as ended:
        main(["export", *(str(paths.get(x, x)) for x in arguments)])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_exports_the_model_of_a_folder(
    pipe, folder, small_world_path, tmp_path, capsys, monkeypatch
):
    """The making of graphs is taken as done: by what it is called with."""
    called = []
    monkeypatch.setattr(
        export_module, "export_onnx", lambda *a: called.append(a) or sorted(folder.iterdir())
    )
    pipe.encoder.save_pretrained(tmp_path / "encoder")
    options = ["--backbone", str(small_world_path), "--encoder", str(tmp_path / "encoder")]
    with pytest.raises(SystemExit) as ended:
        main(["export", "--onnx", str(tmp_path / "out"), *options])
    assert not ended.value.code
    ((exported, where),) = called
    assert where == tmp_path / "out" and exported.backbone.name == str(small_world_path)
    assert exported.encoder.settings == pipe.encoder.settings
    assert "tune.onnx" in capsys.readouterr().out


@pytest.fixture(scope="module")
def site(random_pipe, folder, tmp_path_factory):
    site = tmp_path_factory.mktemp("page") / "site"
    try:
        return page_tool.build(site, random_pipe, exported=folder)
    except urllib.error.URLError as error:
        pytest.skip(f"ONNX Runtime Web cannot be fetched from npm: {error}")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(site, browser):
    """The page after its first picture; `problems` has what the console complains of."""
    server = page_tool.serve(site)
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.set_default_timeout(180_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
    drawn(page)
    yield page
    server.shutdown()


def drawn(page):
    """Wait until nothing is being computed and a picture is there."""
    page.wait_for_function(
        "() => { const s = playground.state; return s.shown && !s.busy && !s.tuning && s.concept; }"
    )


def psnr(one, other):
    one, other = (np.asarray(x, np.float64).reshape(64, 64, -1)[..., :3] for x in (one, other))
    return 10 * np.log10(255**2 / max(np.square(one - other).mean(), 1e-9))


def shown(page):
    return page.evaluate("Array.from(playground.state.shown.rgba)")


def fields(page, *names):
    """Arrays of the page's state."""
    code = "(names) => names.map((n) => Array.from(playground.state.concept[n]))"
    return [torch.tensor(x) for x in page.evaluate(code, list(names))]


def test_the_first_picture_comes_by_itself(page):
    assert page.problems == []
    assert page.get_attribute("#picture", "aria-label").startswith("S* on the beach, seed 0")
    assert page.is_hidden("#error") and page.locator("#words li").count() == 6
    assert page.locator("#things button").count() == 30
    assert len(page.locator("#scenes button").all()) == 12


@pytest.mark.parametrize("width", [320, 390, 760, 1100, 1280, 1920])
def test_nothing_is_wider_than_the_window(page, width):
    usual = page.viewport_size
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size(usual)


def test_a_drawn_thing_is_predicted_tuned_and_drawn_as_in_python(page, random_pipe):
    """A thing drawn with the mouse, and the same pixels in Python: same seed, same numbers."""
    pipe, layout = random_pipe, Layout.of(random_pipe.encoder)
    page.click("#clear")
    page.click("#colours [aria-label=blue]")
    box = page.locator("#pad").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    page.mouse.move(*at(0.2, 0.3))
    page.mouse.down()
    page.mouse.move(*at(0.8, 0.4), steps=5)
    page.mouse.move(*at(0.4, 0.8), steps=5)
    page.mouse.up()
    page.wait_for_function("() => playground.state.thing > 2")
    drawn(page)
    rgba = page.evaluate("Array.from(playground.pad.pixels().rgba)")
    picture = Image.fromarray(np.array(rgba, np.uint8).reshape(256, 256, 4)).convert("RGB")
    assert len(picture.getcolors(10_000)) > 2
    pixels = to_square_tensor(picture, 64)[None]
    predicted = pipe.encoder.predict(pipe.backbone, pixels, 0, pipe.prompt_encoder)
    v, offsets = fields(page, "v", "offsets")
    np.testing.assert_allclose(v, predicted.v_star[0], atol=1e-3)
    np.testing.assert_allclose(offsets, layout.pack(predicted.offsets), atol=1e-3)
    words = [w for w, _ in pipe.nearest_words(predicted.v_star, 6)]
    assert page.locator("#words li span:first-child").all_text_contents() == words

    def same_picture(prediction, prompt, **options):
        concept = Concept(prediction.v_star, prediction.offsets, pipe.backbone.name)
        ((expected,),) = pipe.generate(concept, prompt, [3], progress=False, **options)
        found = psnr(shown(page), expected)
        assert found > 35, f"PSNR {found:.1f} dB"

    page.fill("#seed", "3")
    page.click("#scenes button:has-text('at night')")
    drawn(page)
    page.wait_for_function("() => playground.state.shown.wish.prompt === 'S* at night'")
    drawn(page)
    same_picture(predicted, "S* at night")

    page.click("#tune")
    page.wait_for_function("() => playground.state.tuned === 12")
    drawn(page)
    result = tune(
        pipe.backbone, pipe.prompt_encoder, predicted, pixels, pipe.encoder.method,
        TuneConfig.of(pipe.backbone.recommended, prompts=TUNING_PROMPTS), seed=0, progress=False,
        bank=(pipe.encoder.bank, pipe.encoder.bank_concepts),
    )  # fmt: skip
    v, offsets = fields(page, "v", "offsets")
    np.testing.assert_allclose(v, result.prediction.v_star[0], atol=1e-3)
    np.testing.assert_allclose(offsets, layout.pack(result.prediction.offsets), atol=1e-3)
    losses = page.evaluate("playground.state.losses")
    np.testing.assert_allclose(losses, [step["loss"] for step in result.losses], atol=1e-3)
    assert page.locator("#film canvas").count() == 12
    assert page.locator("#curve circle").count() == 12
    same_picture(result.prediction, "S* at night")

    page.check("text=the word alone")
    page.wait_for_function("() => playground.state.shown.wish.parts === 'word'")
    drawn(page)
    alone = SimpleNamespace(
        v_star=result.prediction.v_star,
        offsets={k: (a, 0 * b) for k, (a, b) in result.prediction.offsets.items()},
    )
    same_picture(alone, "S* at night")
    page.check("text=both")
    drawn(page)
    assert page.problems == []


def test_mistakes_are_answered(page):
    page.fill("#prompt", "on the beach")
    page.click("#draw")
    page.wait_for_selector("#error:visible")
    assert "Write S* where your thing goes" in page.text_content("#error")
    page.fill("#prompt", "S* " + "on the beach " * 20)
    page.click("#draw")
    page.wait_for_function(
        "() => document.getElementById('caption').textContent.includes('not read')"
    )
    assert page.is_hidden("#error")
    drawn(page)
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG nothing"}
    page.set_input_files("#file", broken)
    page.wait_for_selector("#error:visible")
    assert "broken.png is no picture that this browser can read" in page.text_content("#error")
    page.click("#clear")
    page.wait_for_function("() => playground.state.concept === null")
    assert page.is_disabled("#draw") and page.is_disabled("#tune")
    buffer = io.BytesIO()
    picture = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(picture).ellipse((60, 10, 150, 110), "green")
    picture.save(buffer, "JPEG")
    whole = {"name": "p.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}
    page.fill("#prompt", "S* in the snow")
    page.set_input_files("#file", whole)
    page.wait_for_function("() => playground.state.shown.wish.prompt === 'S* in the snow'")
    drawn(page)
    assert page.is_hidden("#error")
    page.problems.clear()


def test_all_of_it_can_be_reached_and_has_a_name(page):
    """Every control has a label; Tab comes to all that can be used."""
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, canvas, summary, a, svg, progress")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
        .filter((e) => !e.ariaHidden)
        .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.focus("#pad")
    before = page.evaluate("playground.state.thing")
    for key in ("Space", *["ArrowRight"] * 6, *["ArrowDown"] * 6, "Space"):
        page.keyboard.press(key)
    page.wait_for_function(f"() => playground.state.thing > {before}")
    drawn(page)
    page.focus("#things button")
    page.keyboard.press("Enter")
    drawn(page)
    assert page.get_attribute("#things button", "aria-pressed") == "true"


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (820, "light")])
def test_it_fits_a_phone_in_light_and_dark(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, .button")].filter((e) => e.offsetParent)
        .map((e) => [e.id || e.textContent || e.title, e.getBoundingClientRect().height])
        .filter(([, height]) => height < 26)"""
    )
    assert small == []
    colours = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    ink, paper = (np.mean([int(x) for x in c[4:-1].split(",")[:3]]) for c in colours)
    assert (ink < 80 < paper) if scheme == "light" else (paper < 80 < ink)


def test_the_second_visit_loads_nothing_again(page):
    page.set_viewport_size({"width": 1360, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    drawn(page)
    assert not [url for url in asked if url.endswith(".gz")]
    assert [url for url in asked if url.endswith("site.json")]
    assert all(url.startswith(("http://127.0.0.1", "blob:", "data:")) for url in asked)


def test_the_same_model_gives_the_same_bytes(site, random_pipe, tmp_path, monkeypatch):
    """Of all but the graphs, which are made once: their names come from torch's counters."""
    again = page_tool.split_planes(bytes(range(8)) + b"rest", 8)
    assert again == bytes([0, 2, 4, 6, 1, 3, 5, 7]) + b"rest"
    packed = [page_tool.pack(tmp_path, "x", b"abc" * 50) for _ in range(2)]
    assert packed[0] == packed[1] and (tmp_path / "x.gz").stat().st_size == packed[0]["bytes"]
    about = json.loads((site / "site.json").read_text())
    assert about["version"] == page_tool.version_of(site)
    assert len(set(about["things"]["names"])) == 30
    licences = (site / "licences.txt").read_text()
    for part in ("Noto Emoji", "Twemoji", "Fluent Emoji", "ONNX Runtime", "Apache License", "MIT"):
        assert part in licences
    for file in about["files"].values():
        assert (site / file["file"]).stat().st_size == file["bytes"]


def test_what_the_page_cannot_do_is_refused(random_pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("not to be lost")
    with pytest.raises(DTEError, match="not built here"):
        page_tool.build(tmp_path, random_pipe)
    assert (tmp_path / "mine.txt").is_file()
    scheduler = random_pipe.backbone.scheduler
    config = scheduler.config | {"timestep_spacing": "leading"}
    other = SimpleNamespace(backbone=SimpleNamespace(scheduler=SimpleNamespace(config=config)))
    with pytest.raises(DTEError, match="timestep_spacing 'trailing' alone, not 'leading'"):
        page_tool.check_scheduler(other)


def test_a_page_that_fails_leaves_the_former_one(random_pipe, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_tool, "model_files", broken)
    (tmp_path / "site.json").write_text("{}")
    with pytest.raises(OSError, match="No space"):
        page_tool.build(tmp_path, random_pipe, exported=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["site.json"]


def test_what_cannot_be_served_is_one_sentence(tmp_path):
    with pytest.raises(DTEError, match="holds no page"):
        page_tool.main(["serve", str(tmp_path)])
    with pytest.raises(DTEError, match="port is a whole number from 0 to 65535"):
        page_tool.serve(tmp_path, 70_000)
    server = page_tool.serve(tmp_path)
    with pytest.raises(DTEError, match="cannot be used .Address already in use"):
        page_tool.serve(tmp_path, server.server_address[1])
    server.shutdown()
