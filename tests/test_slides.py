"""The slides: a deck of each notebook, that fits its slides and needs no network."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dte_lab.common.errors import DTEError

slides = pytest.importorskip("tools.slides", reason="needs a checkout and pip install -e '.[site]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NOTEBOOKS = sorted(slides.ROOT.glob("notebooks/0*.ipynb"))
OUTSIDE = """() => Reveal.getSlides().map(slide => {
    const at = Reveal.getIndices(slide)
    Reveal.slide(at.h, at.v)
    const shown = [...slide.querySelectorAll('*')].filter(part => !part.closest('aside'))
    const boxes = shown.map(part => part.getBoundingClientRect())
    const right = Math.max(...boxes.map(b => b.right)), low = Math.max(...boxes.map(b => b.bottom))
    return [slide.innerText.slice(0, 60), right, low]
})"""


class Deck(HTMLParser):
    """Titles and pictures of a deck, and every address in it."""

    def __init__(self, path):
        super().__init__()
        self.titles, self.pictures, self.addresses, self.heading = [], [], [], False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.heading = tag in ("h1", "h2", "h3")
        if self.heading:
            self.titles.append("")
        if tag == "img":
            self.pictures.append(found)
        if tag in ("img", "script", "link", "iframe"):
            self.addresses += [found[key] for key in ("src", "href") if key in found]

    def handle_endtag(self, tag):
        self.heading = self.heading and tag not in ("h1", "h2", "h3")

    def handle_data(self, data):
        if self.heading:
            self.titles[-1] += data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return slides.build(tmp_path_factory.mktemp("slides") / "slides")


def test_each_notebook_is_a_deck_of_its_headings_and_figures(built):
    index = (built / "index.html").read_text()
    assert len(NOTEBOOKS) == 8
    for path in NOTEBOOKS:
        deck, cells = Deck(built / f"{path.stem}.html"), nbformat.read(path, 4).cells
        assert f'href="{path.stem}.html"' in index
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        headings = re.findall(r"^#{2,} (.*)$", prose, re.M)
        left_out = {h for h in headings if h == "Set up"}
        assert left_out and not left_out & set(deck.titles)
        plain = {re.sub(r"\W", "", title) for title in deck.titles}
        for heading in set(headings) - left_out:
            assert re.sub(r"\W", "", heading) in plain, f"{path.stem}: {heading}"
        assert deck.pictures and all(picture["alt"].strip() for picture in deck.pictures)
        assert "from dte_lab" not in (built / f"{path.stem}.html").read_text()


def test_nothing_is_fetched_and_all_files_are_there(built):
    for path in built.glob("*.html"):
        deck = Deck(path)
        assert any("reveal" in address for address in deck.addresses)
        for address in deck.addresses:
            assert not re.match(r"(https?:)?//", address), address
            assert (built / address.partition("?")[0]).is_file(), address
        assert str(slides.ROOT) not in path.read_text()


def test_no_slide_is_fuller_than_the_screen(built):
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": slides.WIDTH, "height": slides.HEIGHT})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        for path in NOTEBOOKS:
            page.goto((built / f"{path.stem}.html").as_uri())
            page.wait_for_function("window.Reveal && Reveal.isReady()")
            found = page.evaluate(OUTSIDE)
            assert len(found) > 10
            for text, right, low in found:
                assert right <= slides.WIDTH and low <= slides.HEIGHT, (path.stem, text)
        browser.close()
    assert asked and not [address for address in asked if not address.startswith("file:")]


def page_output(html):
    return new_output("display_data", data={"text/html": html})


def notebook(*cells):
    title = new_markdown_cell("# A *title*\n\n*The promise.*\n\nMore.\n\nYou can\n\n- do\n- see")
    return new_notebook(cells=[title, new_markdown_cell("times"), *cells])


def test_what_comes_on_which_slide(tmp_path):
    pixel = '<img src="data:image/png;base64,AAAA" alt="a &amp; [b]" width="9">'
    rows = "<tr><td>1</td></tr>"
    saw = "<details><summary>What we saw</summary><p>One &lt; two. And three.</p></details>"
    shown, hidden = (
        new_code_cell("secret()", outputs=[page_output(pixel), page_output(pixel)]) for _ in "ab"
    )
    more = new_code_cell("", outputs=[
        page_output(f"<table>{rows * 3}</table>"), page_output(f"<table>{rows * 40}</table>"),
        page_output(saw), page_output("<p>Found here:</p><ul><li>A &lt; b.</li><li>C.</li></ul>"),
    ])  # fmt: skip
    quiet = new_markdown_cell("## Hidden\n\nNot this.", metadata={"tags": ["no-slide"]})
    long = "A first sentence. " + "Another one follows here. " * 20
    text = f"## Seen\n\n{long}\n\n<details>a hint</details>\n\n#### Exercise 1: it\n\nDo `this`."
    found = slides.deck(
        notebook(quiet, hidden, new_markdown_cell("lost"), new_markdown_cell(text), shown, more),
        tmp_path, "deck",
    )  # fmt: skip
    assert [(slide.level, slide.title) for slide in found] == [
        (1, "A *title*"), (3, "You can"), (2, "Seen"), (3, "Exercise 1: it"), (3, "Seen"),
        (3, "Seen"), (3, "Seen"), (3, "What we saw"), (3, "Found here"),
    ]  # fmt: skip
    assert found[-1].body == "- A < b.\n- C."
    assert found[0].body == "*The promise.*" and found[0].notes == "More."
    assert found[2].body.startswith("A first sentence. Another")
    shown_of_it = found[2].body.strip()
    assert len(shown_of_it) <= slides.KEY and shown_of_it + " " + found[2].notes == long.strip()
    assert found[4].body.startswith("![a & \\[b\\]](deck/") and found[4].title == "Seen"
    assert found[-2].body == "- One < two.\n- And three."
    everything = "\n".join(slide.text() for slide in found)
    for word in ("secret", "Hidden", "Not this", "lost", "a hint"):
        assert word not in everything
    assert everything.count("<table") == 1


def test_a_first_picture_stands_below_its_sentences(tmp_path):
    pixel = page_output('<img src="data:image/png;base64,AAAA" alt="it">')
    cells = [new_markdown_cell("## Seen\n\nLook."), new_code_cell("", outputs=[pixel, pixel])]
    _, _, first, second = slides.deck(notebook(*cells), tmp_path, "deck")
    assert "Look." in first.body and "![it]" in first.body and second.body.startswith("![it]")


def test_long_lists_are_divided():
    items = [f"- {'x' * 200} {i}" for i in range(5)]
    parts = slides.split_list("\n".join(items))
    assert [part.count("- ") for part in parts] == [2, 2, 1]
    assert "\n".join(parts).splitlines() == items


def test_another_folder_is_not_written_over(tmp_path):
    Path(tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DTEError, match="not built here"):
        slides.build(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("tool", ["site", "slides"])
def test_a_folder_of_somebody_else_is_refused_in_one_line(tool, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", f"tools.{tool}", str(tmp_path)]
    ended = subprocess.run(command, cwd=slides.ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    [line] = ended.stderr.splitlines()
    reason = "holds something that was not built here: choose another folder, or empty it."
    assert line == f"error: {tmp_path} {reason}"
    assert (tmp_path / "mine.txt").read_text() == "mine"
