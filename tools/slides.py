"""Slides: a deck of each notebook, from the notebook's own cells, for a browser without a network.

    python -m tools.slides [FOLDER]      by default build/slides; needs the extra `site`

A heading starts a slide, with the first sentences below it and the first figure, its lists and
formulas; each other figure and table has one, and so have the answers, "What we saw" and "Found
here". The rest of the prose is in the speaker's notes (press S). Code and long tables are left out,
and so is a section whose heading's cell has the tag "no-slide". sphinx-revealjs brings reveal.js
along.
"""

import argparse
import base64
import html
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically
from tools.built import check_ours, put
from tools.site import LINK, MARK, ROOT, Staging, run_sphinx, settings

SLIDES = ROOT / "build" / "slides"
WIDTH, HEIGHT = 1280, 720
STYLE = Path(__file__).with_name("slides.css")
KEY, FULL = 260, 520  # letters: of the first sentences, and of a slide full of text
ROWS, CELLS = 12, 320  # of a table that is shown; letters of one in letters of the usual size
HEADING = re.compile(r"(#+) (.*)")
SENTENCE = re.compile(r"(?<=[.?!]) (?=[A-Z*`])")
PICTURE = re.compile(r'<img [^>]*?src="data:image/(\w+);base64,([^"]+)"[^>]*>', re.S)
ALT = re.compile(r'alt="([^"]*)"')
TABLE = re.compile(r"<table.*?</table>", re.S)
ANSWER = re.compile(r"<summary>What we saw</summary><p>(.*?)</p>", re.S)
FOUND = re.compile(r"<p>Found here:</p><ul><li>(.*?)</li></ul>", re.S)


@dataclass
class Slide:
    """One slide, in MyST; the level of its heading is 1 for the title, 2 for a section, or 3."""

    level: int
    title: str
    body: str
    notes: str = ""

    def takes_picture(self) -> bool:
        """Whether a picture fits below what is said: sentences alone."""
        return 0 < len(self.body) < KEY + 40 and not re.search(
            r"^(- |\$\$|!\[|<|\|)", self.body, re.M
        )

    def text(self) -> str:
        said = LINK.sub(lambda found: found[2], self.notes)
        notes = "".join(f"<p>{html.escape(part)}</p>" for part in said.split("\n\n") if part)
        spoken = f'\n\n<aside class="notes">{notes}</aside>' if notes else ""
        return f"{'#' * self.level} {self.title}\n\n{self.body}{spoken}\n"


def build(folder: Path = SLIDES, root: Path = ROOT) -> Path:
    """Write the decks and a page that leads to them to a folder, in the place of older ones.

    Raises DTEError for a folder that holds something else, and for what Sphinx warns of.
    """
    check_ours(folder, MARK)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        staging = Staging(root, source)
        names = staging.found(("notebooks/*.ipynb",))
        staging.pages = {name: f"{Path(name).stem}.md" for name in names}
        titles = {}
        for name, page in staging.pages.items():
            slides = deck(nbformat.read(root / name, 4), source, Path(name).stem)
            titles[page] = slides[0].title
            text = "\n".join(slide.text() for slide in slides)
            write_atomically(source / page, staging.with_links(text, name).encode())
        links = "\n".join(f"- [{title}]({page})" for page, title in titles.items())
        write_atomically(source / "index.md", f"# dte_lab\n\n{links}\n".encode())
        write_atomically(source / "static" / STYLE.name, STYLE.read_bytes())
        put(run_sphinx(source, "revealjs", configuration()), folder)
    return folder


def configuration() -> dict:
    """Sphinx's, in place of a conf.py: the site's, with reveal.js."""
    site = settings()
    return site | {
        "extensions": [*site["extensions"], "sphinx_revealjs"],
        "revealjs_static_path": ["static"], "revealjs_css_files": [STYLE.name],
        "revealjs_style_theme": "white", "revealjs_use_section_ids": True,
        "revealjs_script_conf": {
            "width": WIDTH, "height": HEIGHT, "margin": 0.04, "center": False, "hash": True,
            "slideNumber": True, "transition": "none",
        },
        "revealjs_script_plugins": [
            {"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}
        ],
        "suppress_warnings": ["myst.header", "toc.not_included"],
    }  # fmt: skip


def deck(notebook: NotebookNode, source: Path, name: str) -> list[Slide]:
    """The slides of a notebook; its pictures are written to the folder `name` of `source`."""
    title, *rest = blocks(notebook.cells[0].source)
    heading, shown = HEADING.fullmatch(title)[2], True
    slides = first_slides(heading, rest)
    for cell in notebook.cells[2:]:  # the second one says how long it takes
        if cell.cell_type == "code":
            if shown:
                for slide in results(cell, heading, source, f"{name}/{len(slides)}"):
                    add(slides, slide)
            continue
        for block in sections(blocks(cell.source)):
            if found := HEADING.fullmatch(block[0]):
                shown = "no-slide" not in cell.metadata.get("tags", [])
                if shown:
                    slides += text_slides(min(len(found[1]), 3), found[2], block[1:])
                if not found[2].startswith("Exercise"):
                    heading = found[2]
            elif shown:
                slides[-1].notes += "\n\n" + "\n\n".join(block)
    return slides


def sections(parts: list[str]) -> Iterator[list[str]]:
    """Blocks of a cell, divided before each heading."""
    starts = [0, *(i for i, part in enumerate(parts) if i and HEADING.fullmatch(part)), len(parts)]
    yield from (parts[i:j] for i, j in pairwise(starts) if i < j)


def add(slides: list[Slide], slide: Slide) -> None:
    """Append a slide, or put its picture below the last one's sentences, where there is room."""
    last = slides[-1]
    if slide.body.startswith("![") and last.title == slide.title and last.takes_picture():
        last.body += slide.body
    else:
        slides.append(slide)


def blocks(text: str) -> list[str]:
    """Paragraphs, lists, formulas, tables and headings of Markdown, without hints and code."""
    text = re.sub(r"<details>.*?</details>|^```.*?^```", "", text, flags=re.S | re.M)
    return [block for block in re.split(r"\n\s*\n", text.strip()) if block.strip()]


def first_slides(title: str, rest: list[str]) -> list[Slide]:
    """The title with the promise, and what a reader can do afterwards."""
    promise, *prose = rest
    lists = [part for part in prose if is_list(part)]
    lead = next((prose[i - 1] for i, part in enumerate(prose) if part in lists), "")
    said = [part for part in prose if part not in lists and part != lead]
    slides = [Slide(1, title, promise, "\n\n".join(said))]
    return slides + [Slide(3, lead.rstrip(":"), part) for part in lists]


def is_list(block: str) -> bool:
    return bool(re.match(r"(-|\d+\.) ", block))


def text_slides(level: int, title: str, parts: list[str]) -> list[Slide]:
    """The first sentences, then lists, formulas and tables, on as many slides as they need."""
    shown, notes = [], []
    for i, part in enumerate(parts):
        if is_list(part) or part.startswith(("$$", "|", "Difficulty")):
            shown += split_list(part) if is_list(part) else [part]
        elif i == 0 or parts[i - 1].startswith("Difficulty"):
            key, rest = first_sentences(part)
            shown.append(key)
            notes.append(rest)
        else:
            notes.append(part)
    slides, size = [Slide(level, title, "")], 0
    for part in shown:
        if size and size + len(part) > FULL:
            slides.append(Slide(3, title, ""))
            size = 0
        slides[-1].body += part + "\n\n"
        size += len(part)
    slides[-1].notes = "\n\n".join(note for note in notes if note)
    return slides


def split_list(text: str) -> list[str]:
    """A list as one or more that are no longer than a slide."""
    pieces = [""]
    for item in re.split(r"\n(?=(?:-|\d+\.) )", text):
        if pieces[-1] and len(pieces[-1]) + len(item) > FULL:
            pieces.append("")
        pieces[-1] += ("\n" if pieces[-1] else "") + item
    return pieces


def first_sentences(paragraph: str) -> tuple[str, str]:
    """As many whole sentences as are no longer than KEY, at least one; and the rest."""
    first, *others = SENTENCE.split(" ".join(paragraph.split()))
    while others and len(first) + len(others[0]) < KEY:
        first += " " + others.pop(0)
    return first, " ".join(others)


def results(cell: NotebookNode, title: str, source: Path, stem: str) -> Iterator[Slide]:
    """A slide for each figure, table and answer that a cell shows."""
    pages = [output.get("data", {}).get("text/html", "") for output in cell.outputs]
    for i, page in enumerate(pages):
        for j, found in enumerate(PICTURE.finditer(page)):
            file = f"{stem}-{i}-{j}.{found[1]}"
            write_atomically(source / file, base64.b64decode(found[2]))
            alt = ALT.search(found[0])
            said = re.sub(r"([\[\]*_`\\])", r"\\\1", html.unescape(alt[1]) if alt else title)
            yield Slide(3, title, f"![{said}]({file})")
        for table in TABLE.findall(page):
            if table.count("<tr") <= ROWS:
                kind = "long" if len(re.sub("<[^>]*>", "", table)) > CELLS else "short"
                yield Slide(3, title, f'<div class="{kind}">{table}</div>')
        for text in ANSWER.findall(page):
            yield from answers("What we saw", SENTENCE.split(text))
        for text in FOUND.findall(page):
            yield from answers("Found here", text.split("</li><li>"))


def answers(title: str, sentences: list[str]) -> Iterator[Slide]:
    """What was seen, a sentence to a line."""
    for part in split_list("\n".join(f"- {html.unescape(said)}" for said in sentences)):
        yield Slide(3, title, part)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.slides", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SLIDES)
    print(f"wrote {build(parser.parse_args(arguments).folder)}: open index.html in a browser")


if __name__ == "__main__":
    run_command(main)
