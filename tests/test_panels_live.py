"""A free prompt beside what a panel looks up; and a panel driven in a real browser."""

import base64
import io
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_notebook, writes
from PIL import Image

from dte_lab.common.errors import DTEError
from dte_lab.panels import live, quickstart
from dte_lab.panels.contrastive import sliders_panel

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALPHAS, SEEDS = (0, 0.5, 1), (0, 1)


def shade(alpha, seed):
    return Image.new("RGB", (8, 8), (int(200 * alpha), 100 * seed, 30))


@pytest.fixture
def panel():
    looked_up = {(alpha, seed): shade(alpha, seed) for alpha in ALPHAS for seed in SEEDS}
    panel = live.with_live(quickstart.blend_panel(looked_up), draw, "S* at night", shade(1, 1))
    panel.alpha.value, panel.seed.value = 0, 1
    return panel


def draw(prompt, alpha, seed):
    if "S*" not in prompt:
        raise DTEError(f"The prompt {prompt!r} does not contain S*.")
    if prompt == "S* broken":
        raise KeyError("<b>")
    return Image.new("RGB", (8, 8), (len(prompt), int(200 * alpha), 100 * seed))


def middles(page):
    """Colours in the middle of the two halves of the picture in a widget's HTML."""
    data = re.search(r'base64,([^"]+)"', page)[1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    height, width, _ = picture.shape
    return [tuple(int(x) for x in picture[int(0.6 * height), int(s * width)]) for s in (0.25, 0.75)]


def test_the_input_is_there_before_the_first_run(panel):
    assert 'alt="The input"' in panel.live.value and middles(panel.live.value)[0] == (200, 100, 30)


def test_a_prompt_is_drawn_with_the_knobs_as_they_stand(panel):
    panel.prompt.value, panel.alpha.value = "S* in space", 0.5
    panel.run.click()
    assert panel.status.value == "<p>Done.</p>" and not panel.run.disabled
    assert middles(panel.live.value) == [(200, 100, 30), (11, 100, 100)]
    assert "alpha_blend 0.5 and seed 1; prompt: S* in space</p>" in panel.live.value
    assert "prompt: S* in space" in re.search(r'alt="([^"]*)"', panel.live.value)[1]


def test_mistakes_are_said_above_the_drawing_which_stays(panel):
    panel.run.click()
    before = panel.live.value
    for prompt, said in (("a boat", "does not contain S*"), ("S* broken", "KeyError")):
        panel.prompt.value = prompt
        panel.run.click()
        assert 'role="alert"' in panel.status.value and said in panel.status.value
        assert "<b>" not in panel.status.value and panel.live.value == before
        assert not panel.run.disabled
    panel.prompt.value = "S* <i>"
    panel.run.click()
    assert "<i>" not in panel.live.value and "&lt;i&gt;" in panel.live.value


def test_what_is_looked_up_still_follows_its_knobs(panel, shown_picture):
    panel.alpha.value = 1
    picture = shown_picture(panel)
    assert picture.getpixel((picture.width // 2, picture.height // 2)) == (200, 100, 30)


def test_a_knob_may_choose_the_input_and_a_figure_is_shown_as_it_is():
    seen = []

    def figure_of(n):
        return Figure(figsize=(1, 1))

    panel = sliders_panel({"N": (1, 2)}, (1,), figure_of, lambda n: f"N {n}")
    live.with_live(panel, lambda prompt, n: seen.append((prompt, n)) or figure_of(n), "S*",
                   lambda n: shade(0, n - 1))  # fmt: skip
    assert middles(panel.live.value)[0] == (0, 0, 30)
    panel.sliders["N"].value = 2
    panel.run.click()
    assert seen == [("S*", 2)] and 'width="100"' in panel.live.value


PANEL = """\
from PIL import Image
from dte_lab.common.errors import DTEError
from dte_lab.panels.live import with_live
from dte_lab.panels.quickstart import blend_panel

def draw(prompt, alpha, seed):
    if "S*" not in prompt:
        raise DTEError("The prompt does not contain S*.")
    return Image.new("RGB", (8, 8), (0, 200, 0))

pictures = {(a, s): Image.new("RGB", (8, 8)) for a in (0, 0.5, 1) for s in (0, 1)}
with_live(blend_panel(pictures), draw, "S* at night", Image.new("RGB", (8, 8)))
"""


@pytest.fixture
def page(tmp_path):
    """The panel as a page of voila, in headless Chromium."""
    pytest.importorskip("voila", reason="needs pip install -e '.[explore]'")
    sync = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[page]'")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH")
    path = tmp_path / "panel.ipynb"
    path.write_text(writes(new_notebook(cells=[new_code_cell(PANEL)])))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", str(path), f"--port={port}", "--no-browser"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/static/", server, tmp_path / "log")
        with sync.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
            )
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/", timeout=240_000)
            page.set_default_timeout(60_000)
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address, server, log):
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=1)
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


def test_a_panel_works_in_a_browser(page):
    page.wait_for_selector("button:has-text('Run it live')", timeout=240_000)
    alts = page.locator("img").evaluate_all("all => all.map(image => image.alt)")
    assert "The concept with alpha_blend 0.5 and seed 0" in alts and "The input" in alts
    page.click("button:text-is('1')")  # the seed
    page.wait_for_selector("img[alt='The concept with alpha_blend 0.5 and seed 1']")
    page.fill("input[type=text]", "a boat")
    page.click("button:has-text('Run it live')")
    page.wait_for_selector("[role=alert]:has-text('does not contain S*')")
    page.fill("input[type=text]", "S* in space")
    page.click("button:has-text('Run it live')")
    page.wait_for_selector("img[alt*='seed 1; prompt: S* in space']")
    assert page.locator("[role=alert]").count() == 0
    boxes = [
        page.locator(f"img[alt^='{text}']").bounding_box() for text in ("The concept", "Drawn")
    ]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], "side by side, no empty space"
