"""Draw the README's pictures anew: `python figures/make.py`. Same seed, same picture."""

import io
from pathlib import Path

from dte_lab import DTEPipeline
from dte_lab.files import write_atomically
from dte_lab.images import read_image
from dte_lab.panels import picture_grid

HERE = Path(__file__).parent
SETTINGS = ("on the beach", "at night", "in the snow", "in the desert", "in the forest")


def quickstart():
    """The README's example picture, then the concept in new settings."""
    picture = read_image(HERE.parent / "examples" / "bus.png")
    pipe = DTEPipeline.from_pretrained("small")
    concept = pipe.personalize(picture)
    drawn = pipe.generate(concept, [f"a picture of S* {setting}" for setting in SETTINGS])
    titles = ["the input"] + [f"S* {setting}" for setting in SETTINGS]
    return picture_grid([[picture] + [row[0] for row in drawn]], titles)


if __name__ == "__main__":
    buffer = io.BytesIO()
    quickstart().savefig(buffer, format="png", dpi=100)
    write_atomically(HERE / "quickstart.png", buffer.getvalue())
