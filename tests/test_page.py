"""The page, built of a small random model and driven in Chromium, does what Python does."""

import io
import json
import shutil
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dte_lab import Concept
from dte_lab.common.errors import DTEError
from dte_lab.common.images import to_square_tensor
from dte_lab.tuning import TuneConfig, tune

pytest.importorskip("onnxscript", reason="needs pip install -e '.[page]'")
page_tool = pytest.importorskip("tools.page", reason="needs a checkout")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(random_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    try:
        return page_tool.build(folder / "site", random_pipe)
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
    page.set_default_timeout(60_000)
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


def test_a_drawn_thing_is_predicted_tuned_and_drawn_as_in_python(page, random_pipe):
    """A thing drawn with the mouse, and the same pixels in Python: same seed, same numbers."""
    from dte_lab.onnx_parts.parts import Layout

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
        TuneConfig.of(pipe.backbone.recommended), seed=0, progress=False,
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
    with pytest.raises(DTEError, match="holds something that is no page"):
        page_tool.build(tmp_path, random_pipe)
    assert (tmp_path / "mine.txt").is_file()
    scheduler = random_pipe.backbone.scheduler
    config = scheduler.config | {"timestep_spacing": "leading"}
    other = SimpleNamespace(backbone=SimpleNamespace(scheduler=SimpleNamespace(config=config)))
    with pytest.raises(DTEError, match="timestep_spacing 'trailing' alone, not 'leading'"):
        page_tool.check_scheduler(other)
