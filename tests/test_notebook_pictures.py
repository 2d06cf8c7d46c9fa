"""Pictures of the notebooks: alt text on the rendered page, and what an exercise leads to."""

import base64
import io
from itertools import pairwise
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from dte_lab.panels.shared import tag_of
from tools import notebooks
from tools.expected_pictures import CHECK, TAG, expected_pictures

HTMLExporter = pytest.importorskip("nbconvert", reason="needs nbconvert").HTMLExporter
soup_of = pytest.importorskip("bs4", reason="needs nbconvert").BeautifulSoup

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks" / "src").glob("*.py"))
STORED = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXERCISES = ROOT / "notebooks" / "exercises"


def picture_of(cell, alt="a red square"):
    """The cell with a picture as its output."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "png")
    data = {"text/html": tag_of(buffer.getvalue(), alt, 100), "text/plain": alt}
    cell.outputs = [new_output("stream", text="first"), new_output("display_data", data=data)]
    return cell


def images(notebook, template="lab"):
    page = HTMLExporter(template_name=template).from_notebook_node(notebook)[0]
    return soup_of(page, "html.parser").find_all("img")


@pytest.mark.parametrize("template", ["lab", "classic"])
def test_alt_text_arrives_on_the_page(template):
    (image,) = images(new_notebook(cells=[picture_of(new_code_cell("show()"))]), template)
    assert image["alt"] == "a red square" and image["width"] == "100"
    png = new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    png.metadata = {"image/png": {"alt": "a red square"}}
    cell = new_code_cell("show()", outputs=[png])
    if template == "lab":  # this is why `show` gives HTML
        assert "a red square" not in str(images(new_notebook(cells=[cell])))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_picture_of_a_stored_notebook_has_alt_text(path):
    """Of both editions; cells without a picture are left out, for rendering takes its time."""
    both = [notebooks._read(folder / path.name) for folder in (path.parent, EXERCISES)]
    cells, expected = [], 0
    for cell in (cell for notebook in both for cell in notebook.cells):
        outputs = [o for o in cell.get("outputs", []) if "<img " in str(o.get("data", ""))]
        if outputs:
            cells.append(new_code_cell(outputs=outputs))
        if cell.get("attachments"):
            cells.append(cell)
        expected += sum(str(o.data).count("<img ") for o in outputs)
        expected += len(cell.get("attachments", {}))
    found = images(new_notebook(cells=cells))
    alts = [image.get("alt", "") for image in found]
    assert all(len(alt) > 10 and "No description" not in alt for alt in alts)
    assert all(image["src"].startswith("data:image/") for image in found), "nothing is linked"
    assert len(found) == expected > 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_exercises_show_what_comes_of_them(path):
    """Each tag names an exercise that comes before it, and the exercise edition has its picture."""
    cells, asked, tagged = notebooks.read_source(path).cells, [], []
    for cell in cells:
        asked += CHECK.findall(cell.source) if "exercise" in cell.metadata.get("tags", []) else []
        tagged += [tag for tag in cell.metadata.get("tags", []) if tag.startswith(TAG)]
    names = [tag.removeprefix(TAG) for tag in tagged]
    assert names and len(set(names)) == len(names) and set(names) <= set(asked)
    stored, shown = notebooks._read(EXERCISES / f"{path.stem}.ipynb").cells, []
    for before, cell in pairwise(stored):
        for file, data in cell.get("attachments", {}).items():
            shown += CHECK.findall(before.source)
            assert file.startswith(shown[-1]) and f"](attachment:{file})" in cell.source
            assert "<details>" in cell.source, "of a guess it is the answer"
            ((kind, code),) = data.items()
            picture = Image.open(io.BytesIO(base64.b64decode(code)))
            assert kind == f"image/{picture.format.lower()}" and picture.width > 100
    assert set(shown) == set(names)


def test_the_picture_is_the_one_of_the_tagged_cell():
    first, second = (picture_of(new_code_cell(text), text) for text in ("one", "two"))
    second.metadata = {"tags": [f"{TAG}blend", f"{TAG}fuse"]}
    silent = new_code_cell("three", metadata={"tags": [f"{TAG}other"]})
    found = expected_pictures(new_notebook(cells=[first, second, silent]))
    assert {name: expected.alt for name, expected in found.items()} == {
        "blend": "two", "fuse": "two",
    }  # fmt: skip
    assert expected_pictures(None) == {}
    assert "![two](attachment:blend.png)" in found["blend"].cell("blend").source
