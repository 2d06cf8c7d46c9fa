"""The site: pages, links and pictures; the whole of it, with notebooks, is built by hand."""

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dte_lab.common.errors import DTEError

site = pytest.importorskip("tools.site", reason="needs a checkout and pip install -e '.[site]'")
editions = pytest.importorskip("tools.notebook_editions", reason="needs a checkout")
built_folder = pytest.importorskip("tools.built", reason="needs a checkout")


class Page(HTMLParser):
    """Anchors, links and pictures of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.pictures = path, set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.pictures.append(found)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository of two pages, one notebook with a picture, a formula and an attachment."""
    root = tmp_path_factory.mktemp("root")
    for name in ("README.md", "pyproject.toml"):
        (root / name).write_text((site.ROOT / name).read_text())
    for folder in ("docs", "notebooks/exercises", "figures", "dte_lab/weights/small"):
        (root / folder).mkdir(parents=True)
    for name in ("docs/architecture.md", "dte_lab/weights/small/README.md"):
        (root / name).write_text((site.ROOT / name).read_text())
    (root / "results/table").mkdir(parents=True)
    for path in (*(site.ROOT / "figures").glob("*.png"), site.ROOT / "results/table/tradeoff.png"):
        (root / path.relative_to(site.ROOT)).write_bytes(path.read_bytes())
    for name in ("05_tuning.ipynb", "exercises/05_tuning.ipynb"):
        (root / "notebooks" / name).write_text((site.ROOT / "notebooks" / name).read_text())
    return root


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """With a page for a browser in it."""
    playground = tmp_path_factory.mktemp("page")
    (playground / "index.html").write_text("<p>the page</p>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "PLAYGROUND", playground)
        return site.build(tmp_path_factory.mktemp("site") / "site", root)


def pages(built):
    return {path: Page(path) for path in built.rglob("*.html")}


def test_no_link_is_dead_and_every_picture_has_its_text(built):
    found, pictures = pages(built), 0
    for path, page in found.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match("[a-z]+:", target):
                continue
            to = (path.parent / target).resolve() if target else path
            assert to.exists(), f"{path.name}: {link}"
            if anchor and to in found:
                assert anchor in found[to].ids, f"{path.name}: {link}"
        for picture in page.pictures:
            pictures += 1
            assert picture.get("alt", "").strip(), f"{path.name}: {picture.get('src', '')[:60]}"
    assert pictures > 10


def test_the_page_for_a_browser_is_in_it(built):
    assert "playground/index.html" in Page(built / "index.html").links
    assert (built / "playground/index.html").read_text() == "<p>the page</p>"


def test_nothing_is_fetched_and_no_machine_is_named(built):
    for path in built.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(https?:)?//", text), path.name
        assert str(site.ROOT) not in text and str(Path.home()) not in text, path.name


def test_notebooks_have_outputs_formulas_and_folded_solutions(built):
    solved = (built / "notebooks/05_tuning.html").read_text()
    assert "data:image/" in solved and "<math" in solved and "Show code cell source" in solved
    exercises = (built / "notebooks/exercises/05_tuning.html").read_text()
    assert "<summary>" in exercises and "attachment:" not in exercises


def test_the_api_shows_docstrings_as_they_are(built):
    text = (built / "api.html").read_text()
    for name in site.dte_lab._public:
        assert f'.{name}"' in text, name
    assert "system-message" not in text


@pytest.mark.parametrize("docstring, shown", [
    ("a word v* and `x_y`", "a word v\\* and ``x_y``"),
    ("A|B and under_scored", "A\\|B and under\\_scored"),
])  # fmt: skip
def test_plain_docstrings_are_escaped(docstring, shown):
    assert site.escaped(docstring) == shown


def test_launch_buttons_come_with_an_address(tmp_path, root):
    text = (root / "pyproject.toml").read_text()
    named = tmp_path / "named"
    (named / "notebooks").mkdir(parents=True)
    address = 'repository = "https://github.com/someone/dte_lab"'
    (named / "pyproject.toml").write_text(text.replace('repository = ""', address))
    name = "notebooks/05_tuning.ipynb"
    (named / name).write_text((root / name).read_text())
    published = tmp_path / "published"  # whose notebooks have badges of their own
    shutil.copytree(named, published)
    notebook = json.loads((published / name).read_text())
    link = editions.colab_link("https://github.com/someone/dte_lab", "v0.1.0", name)
    picture = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
    notebook["cells"][1]["source"] = f"[{picture}]({link})\n\n" + "".join(
        notebook["cells"][1]["source"]
    )
    (published / name).write_text(json.dumps(notebook))
    for where, count in ((root, 0), (named, 1), (published, 1)):
        site.Staging(where, tmp_path / "staged").write_notebook(name)
        cells = json.loads((tmp_path / "staged" / name).read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells]
        assert sum("colab.research.google.com/github/someone/dte_lab" in t for t in texts) == count
        assert not any("![Open in Colab]" in t for t in texts), "its picture would be fetched"


def test_another_folder_is_not_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DTEError, match="not built here"):
        site.build(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_former_site(tmp_path, monkeypatch):
    def full(tree, target, real=shutil.copytree):
        real(tree, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    built, folder = tmp_path / "built", tmp_path / "build" / "site"
    for made, text in ((built, "new"), (folder, "old")):
        made.mkdir(parents=True)
        (made / ".buildinfo").write_text(text)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
        patch.setattr(built_folder.shutil, "copytree", full)
        built_folder.put(built, folder)
    assert caught.value.filename == str(folder)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(".buildinfo", "old")]
    assert list(folder.parent.iterdir()) == [folder], "and nothing beside it"
    built_folder.put(built, folder)
    assert (folder / ".buildinfo").read_text() == "new"
    (built / ".buildinfo").write_text("newer")
    (tmp_path / "link").symlink_to(folder)
    built_folder.put(built, tmp_path / "link")
    assert (folder / ".buildinfo").read_text() == "newer" and (tmp_path / "link").is_symlink()
