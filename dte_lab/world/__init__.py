"""The small world: 822 concepts x 3 drawing styles x 20 scenes, in which every edit has a truth.

The method (everything outside this folder) knows nothing of it.
"""

from dte_lab.world.captions import caption
from dte_lab.world.scenes import SCENES, render, render_image
from dte_lab.world.sprites import STYLES, concepts, split_names

__all__ = ["SCENES", "STYLES", "caption", "concepts", "render", "render_image", "split_names"]
