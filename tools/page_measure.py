"""How long the page takes in headless Chromium, for `python -m tools.page measure`."""

import json
import os
import platform
import shutil
import time
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

from dte_lab.common.errors import DTEError
from tools.page import HEADERS, MARK, RUNTIME, Handler, check_page, serve

LAST = "playground.state.times"
GOALS = {"download_mb": 45, "first_picture_s": 10, "picture_s": 3, "tuning_s": 10}


def measure(folder: Path, shots: Path | None = None) -> dict:
    """Sizes and seconds of a built page, with threads and without; shots: for screenshots.

    Raises DTEError where there is no page, or no Chromium.
    """
    check_page(folder)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise DTEError("No Chromium is on the PATH: apt-get install chromium, or Google Chrome.")
    site = json.loads((folder / MARK).read_text())
    files = [*site["files"].values(), *site["runtime"]["wasm_files"].values()]
    small = [p for p in folder.rglob("*") if p.suffix in (".js", ".html", ".css", ".json", ".png")]
    sizes = sum(f["bytes"] for f in files) + sum(p.stat().st_size for p in small)
    found = {
        "goals": GOALS,
        "note": "Seconds are of a machine that also did what load_of_the_machine says.",
        "download_mb": round(sizes / 1e6, 1),
        "parts_mb": {name: round(f["bytes"] / 1e6, 2) for name, f in site["files"].items()}
        | {name: round(f["bytes"] / 1e6, 2) for name, f in site["runtime"]["wasm_files"].items()},
        "runtime": f"{RUNTIME[0]} {RUNTIME[1]}, WebAssembly",
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found["chromium"] = browser.version
        for name, headers in (("with_threads", HEADERS), ("without_threads", {})):
            Handler.headers_sent = headers
            before = os.getloadavg()[0]
            found[name] = one_visit(browser.new_context().new_page(), folder, shots)
            found[name]["load_of_the_machine"] = [round(before, 1), round(os.getloadavg()[0], 1)]
        browser.close()
    return found


def one_visit(page: Page, folder: Path, shots: Path | None) -> dict[str, float]:
    """Seconds of a first visit, of what is done there, and of a second one."""
    page.set_default_timeout(600_000)
    server = serve(folder)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    page.goto(address)
    idle(page)
    times = {"first_picture_s": page.evaluate(f"{LAST}.first") / 1000}
    times["prediction_s"] = page.evaluate(f"{LAST}.predict") / 1000
    page.evaluate("playground.ask('prepareTuning')")
    before = processor_seconds()
    times["picture_s"] = min(one_picture(page) for _ in range(3))
    times["picture_processor_s"] = (processor_seconds() - before) / 3
    start, before = time.perf_counter(), processor_seconds()
    page.evaluate(
        """() => playground.ask("tune", {concept: playground.state.concept, steps: 12,
        picture: playground.state.picture, weights: null, preview: null})"""
    )
    times["tuning_s"] = time.perf_counter() - start
    times["tuning_processor_s"] = processor_seconds() - before
    page.click("#tune")
    page.wait_for_function("() => playground.state.tuned === 12")
    idle(page)
    times["tuning_with_a_picture_after_each_step_s"] = page.evaluate(f"{LAST}.tune") / 1000
    if shots is not None:
        page.screenshot(path=shots)
    page.goto(address)
    idle(page)
    times["first_picture_of_the_second_visit_s"] = page.evaluate(f"{LAST}.first") / 1000
    server.shutdown()
    return {name: round(value, 2) for name, value in times.items()}


def processor_seconds() -> float:
    """What the browser has computed so far, which other work on the machine does not lengthen."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


def one_picture(page: Page) -> float:
    page.click("#next")
    idle(page)
    return page.evaluate(f"{LAST}.draw") / 1000


def idle(page: Page) -> None:
    page.wait_for_function(
        "() => { const s = playground.state; return s.shown && !s.busy && !s.tuning && s.concept; }"
    )
