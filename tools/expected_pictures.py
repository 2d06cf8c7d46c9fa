"""What an exercise leads to, as a picture: taken from the stored run of the solved edition.

A cell with the tag "expected:NAME" shows, as its first picture, what comes of a right answer to
exercise NAME.
"""

import re
from typing import NamedTuple

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

PICTURE = re.compile(r'<img alt="([^"]+)"[^>]*src="data:(image/\w+);base64,([^"]+)"')
CHECK = re.compile(r"^checks\.(\w+)\(", re.M)
TAG = "expected:"


class Expected(NamedTuple):
    """A picture as a notebook attaches it; alt is escaped for HTML."""

    alt: str
    kind: str
    data: str

    def cell(self, name: str) -> NotebookNode:
        """A folded cell that shows it: of a guess it would be the answer."""
        file = f"{name}.{self.kind.removeprefix('image/')}"
        alt = self.alt.replace("[", "(").replace("]", ")")
        cell = new_markdown_cell(
            f"<details>\n<summary>What comes of it</summary>\n\n![{alt}](attachment:{file})\n\n"
            "</details>"
        )
        cell["attachments"] = {file: {self.kind: self.data}}
        return cell


def expected_pictures(solved: NotebookNode | None) -> dict[str, Expected]:
    """{exercise: the picture of the cell that has its tag}, of an executed notebook."""
    found = {}
    for cell in solved.cells if solved else []:
        names = [tag.removeprefix(TAG) for tag in cell.metadata.get("tags", []) if TAG in tag]
        shown = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
        if names and (picture := PICTURE.search("".join(shown))):
            found |= dict.fromkeys(names, Expected(*picture.groups()))
    return found
