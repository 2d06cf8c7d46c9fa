"""One check per exercise of the notebooks: `checks.NAME(your_function)`.

A check prints one line when the function is right. When it is wrong it raises an AssertionError
with a sentence that says where to look: the known mistakes are recognised by what they return. For
a part not yet written it is a NotImplementedError. A notebook shows the sentence and no more.
`yours` hands a right answer to later cells.
"""

from dte_lab.checks.compare import yours
from dte_lab.checks.contrastive import contrastive_loss, cosine_gradient, negatives_mask
from dte_lab.checks.dual_path import alpha_schedule, dual_output, soft_attention
from dte_lab.checks.explorer import fair_pair, guess_stop, what_follows
from dte_lab.checks.features import fuse, map_to_grid, noisy_latent
from dte_lab.checks.hypernetwork import largest_useful_rank, low_rank_norm, offset_cosine
from dte_lab.checks.own_encoder import guess_breadth, training_hours, training_pair, why_jumpy
from dte_lab.checks.quickstart import blend, low_rank_offset, nearest_words
from dte_lab.checks.tuning import steps_needed, tuning_bytes, velocity_target

__all__ = [
    "alpha_schedule",
    "blend",
    "contrastive_loss",
    "cosine_gradient",
    "dual_output",
    "fair_pair",
    "fuse",
    "guess_breadth",
    "guess_stop",
    "largest_useful_rank",
    "low_rank_norm",
    "low_rank_offset",
    "map_to_grid",
    "nearest_words",
    "negatives_mask",
    "noisy_latent",
    "offset_cosine",
    "soft_attention",
    "steps_needed",
    "training_hours",
    "training_pair",
    "tuning_bytes",
    "velocity_target",
    "what_follows",
    "why_jumpy",
    "yours",
]
