"""The site: notebooks, pages and the API, from the repository's own files.

    python -m tools.site [FOLDER]        by default build/site; needs the extra `site`

Nothing is fetched, and a warning ends the build. The notebooks are shown as they are stored, with
their outputs; their install cells and solutions are folded. Links to files that are no pages lead
to the repository where `[tool.dte_lab] repository` names one, and are plain text elsewhere. Where
`python -m tools.page build` has made the page for a browser, the site holds it as well.
"""

import argparse
import base64
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

import nbformat
from docutils.nodes import Node, NodeVisitor, SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

import dte_lab
from dte_lab.common.command import run_command
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from tools.built import check_ours, put
from tools.notebook_editions import colab_link, repository

ROOT = Path(__file__).parents[1]
SITE, MARK = ROOT / "build" / "site", ".buildinfo"  # which Sphinx writes
PLAYGROUND = ROOT / "build" / "page"
PAGES = (  # in the order of the navigation: (heading, globs of pages)
    ("Notebooks", ("notebooks/*.ipynb",)),
    ("With exercises", ("notebooks/exercises/*.ipynb",)),
    ("Guides", ("docs/*.md", "recipes/*.md")),
    ("Results", ("dte_lab/weights/small/README.md", "results/*/table.md")),
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
MATH = {"…": r"\ldots ", r"\big": ""}  # what docutils' MathML does not know: what it does
TRY_IT = '<p><a href="playground/index.html">Try it in this browser</a></p>'
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
# A badge of a published notebook: its picture lies elsewhere, and a link in words takes its place.
BADGE = re.compile(r"\[!\[[^\]]*\]\(https?:[^)]*\)\]\([^)]*\)\s*")
BINDER = "https://mybinder.org/v2/gh/{path}/{tag}?labpath={page}"


def build(folder: Path, root: Path = ROOT) -> Path:
    """Write the site to a folder, in the place of what was there; returns it.

    Raises DTEError for a folder that holds something else, and for what Sphinx warns of.
    """
    check_ours(folder, MARK)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        Staging(root, source).write()
        built = run_sphinx(source, "html", settings())
        if PLAYGROUND.is_dir():
            shutil.copytree(PLAYGROUND, built / "playground")
        put(built, folder)
    return folder


def run_sphinx(source: Path, builder: str, configuration: dict) -> Path:
    """The folder beside `source` with what Sphinx makes of it. Raises DTEError for a warning."""
    built, log = source.parent / "built", source.parent / "log"
    with log.open("w") as warnings, docutils_namespace():
        Sphinx(
            source, None, built, source.parent / "trees", builder, configuration,
            status=None, warning=warnings,
        ).build()  # fmt: skip
    if said := log.read_text().replace(f"{source}/", ""):
        print(said, file=sys.stderr)
        raise DTEError(f"Sphinx warned {len(said.splitlines())} times, see above.")
    return built


def settings() -> dict:
    """Sphinx's, in place of a conf.py."""
    return {
        "project": "dte_lab", "version": dte_lab.__version__, "html_title": "dte_lab",
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "tools.site"],
        "nb_execution_mode": "off", "html_theme": "furo", "default_role": "literal",
        "myst_enable_extensions": ["dollarmath"], "myst_heading_anchors": 4,
        "html_math_renderer": "mathml", "html_copy_source": False, "html_show_sphinx": False,
        "autodoc_member_order": "bysource", "smartquotes": False,
        "suppress_warnings": ["myst.header"],  # exercises are two levels down
    }  # fmt: skip


class Staging:
    """Pages and notebooks on their way to where Sphinx reads them, with links that hold there."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.address, self.tag = repository(root)
        self.contents = {heading: self.found(globs) for heading, globs in PAGES}
        names = [name for found in self.contents.values() for name in found]
        self.pages = {"README.md": "index.md", **{name: name for name in names}}

    def found(self, globs: tuple[str, ...]) -> list[str]:
        """Names of the pages, but for what a reader's reset has kept."""
        paths = [path for glob in globs for path in sorted(self.root.glob(glob))]
        return [p.relative_to(self.root).as_posix() for p in paths if ".mine-" not in p.name]

    def write(self) -> None:
        for name in self.pages:
            if name.endswith(".ipynb"):
                self.write_notebook(name)
            else:
                self.write_page(name)
        write_atomically(self.source / "api.md", api_page().encode())

    def write_page(self, name: str) -> None:
        text = (self.root / name).read_text()
        if name.startswith("results/"):
            text = f"# Results: {PurePosixPath(name).parent.name.replace('_', ' ')}\n\n{text}"
        text = self.with_links(text, name)
        if name == "README.md":
            if PLAYGROUND.is_dir():
                title, rest = text.split("\n", 1)
                text = f"{title}\n\n{TRY_IT}\n{rest}"
            contents = self.contents | {"Reference": ["api.md"]}
            text += "\n".join(toctree(heading, names) for heading, names in contents.items())
        write_atomically(self.source / self.pages[name], text.encode())

    def write_notebook(self, name: str) -> None:
        """With attachments as files, which MyST-NB does not show otherwise."""
        notebook = nbformat.read(self.root / name, 4)
        folder = (self.source / name).with_suffix("")
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type != "markdown":
                continue
            for file, data in cell.pop("attachments", {}).items():
                (content,) = data.values()
                write_atomically(folder / f"{i}-{file}", base64.b64decode(content))
                cell.source = cell.source.replace(f"attachment:{file}", f"{folder.name}/{i}-{file}")
            cell.source = self.with_links(BADGE.sub("", cell.source), name)
        if self.address:
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(self.launch(name)))
        write_atomically(self.source / name, nbformat.writes(notebook).encode())

    def launch(self, name: str) -> str:
        """Links that open a notebook where it runs."""
        path = self.address.removeprefix("https://github.com/")
        colab = colab_link(self.address, self.tag, name)
        binder = BINDER.format(path=path, tag=self.tag, page=name)
        return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"

    def with_links(self, text: str, name: str) -> str:
        """Links of the page `name`, to pages, to copied pictures, to the repository, or as text."""
        here = PurePosixPath(self.pages[name]).parent

        def replaced(found: re.Match) -> str:
            is_picture, shown, target = found.groups()
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target) or not path:
                return found[0]
            place = normpath((PurePosixPath(name).parent / path).as_posix())
            if is_picture:
                if (self.root / place).is_file():
                    write_atomically(self.source / place, (self.root / place).read_bytes())
                    return f"![{shown}]({relpath(place, here)})"
                return found[0]
            if place in self.pages:
                to = relpath(self.pages[place], here)
                return f"[{shown}]({to}{'#' + anchor if anchor else ''})"
            return f"[{shown}]({self.address}/blob/{self.tag}/{place})" if self.address else shown

        return LINK.sub(replaced, text)


def toctree(heading: str, pages: list[str]) -> str:
    names = "\n".join(page.rpartition(".")[0] for page in pages)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{names}\n```\n"


def api_page() -> str:
    """Every public name, from its docstring."""
    lines = ["# The API", "", "Import these names from `dte_lab`.", "", "```{eval-rst}"]
    for name in dte_lab._public:
        value = getattr(dte_lab, name)
        kind = "autoclass" if isinstance(value, type) else "autofunction"
        lines += [f".. {kind}:: {value.__module__}.{name}"]
        lines += ["   :members:"] * isinstance(value, type) + [""]
    return "\n".join([*lines, "```", ""])


def plain_docstring(
    app: object, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Docstrings are plain text with `code`: what reStructuredText would read otherwise is escaped,
    and indented lines stand as they are."""
    found, inside = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside:
            found += ["", "::", ""]
        if inside and not indented and line.strip():
            found.append("")
        inside = indented or (inside and not line.strip())
        found.append(line if indented else escaped(line.strip()))
    lines[:] = found


def escaped(text: str) -> str:
    """reStructuredText that shows a line as it is, with `code` as code."""
    parts = CODE.split(text)
    plain = (re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2])
    code = (f"``{part.strip('`')}``" for part in parts[1::2])
    return "".join(x for pair in zip(plain, [*code, ""], strict=True) for x in pair)


def setup(app: Sphinx) -> dict[str, object]:
    """The extension that `build` runs with: docstrings, and formulas as MathML, offline."""

    def formula(writer: NodeVisitor, node: Node, as_block: bool) -> None:
        text = node.astext()
        for unknown, known in MATH.items():
            text = text.replace(unknown, known)
        writer.body.append(tex2mathml(text, as_block=as_block))
        raise SkipNode

    app.connect("autodoc-process-docstring", plain_docstring)
    app.add_html_math_renderer(
        "mathml",
        (lambda writer, node: formula(writer, node, False), None),
        (lambda writer, node: formula(writer, node, True), None),
    )
    return {"version": dte_lab.__version__, "parallel_read_safe": True}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SITE)
    given = parser.parse_args(arguments)
    print(f"wrote {build(given.folder)}: open index.html in a browser")


if __name__ == "__main__":
    run_command(main)
