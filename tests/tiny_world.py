"""The training of the small world, made so small that it takes seconds.

`python tests/tiny_world.py world train text ...` is the command so, with a checkpoint at each step.
"""

from collections.abc import Callable

from dte_lab.training import small_world as train_encoder
from dte_lab.world import (
    data,
    drawings,
    sampling,
    split_names,
    spoken,
    train_autoencoder,
    train_decoder,
    train_text,
    train_towers,
    train_unet,
    training,
)

THINGS = {"train": 54, "extra": 2, "val": 4}  # of the small world: 168 drawings
OFTEN = {"log_every": 1, "sample_every": 2, "checkpoint_minutes": 0}


def a_few(rng, size, split="train"):
    return data.random_batch(rng, 24, split)


def shrink(replace: Callable) -> None:
    """Of the base model; replace: `setattr`, or that of a monkeypatch."""
    replace(sampling, "STEPS", 2)
    replace(drawings, "split_names", lambda split: split_names(split)[: THINGS[split]])
    replace(spoken, "CAPTION_BANK", 150)
    replace(spoken, "MEASURED_EACH", 12)
    replace(train_towers, "STATES", 150)
    replace(train_unet, "ALIGNED_ON", 64)
    replace(train_autoencoder, "random_batch", a_few)
    replace(train_decoder, "random_batch", a_few)


def shrink_encoder(replace: Callable) -> None:
    """Two things to learn from and two to measure on."""

    def few(names, *others, **options):
        return drawings.Drawings(names[:2], *others, **options)

    replace(train_encoder, "Drawings", few)
    replace(train_encoder, "UNSEEN", 2)
    replace(train_encoder, "UNSEEN_EACH", 1)
    replace(train_encoder, "WORD_BATCH", 2)


def often(*arguments, **options) -> training.TrainConfig:
    return training.TrainConfig(*arguments, **options | OFTEN)


if __name__ == "__main__":
    from dte_lab.cli import main

    shrink(setattr)
    shrink_encoder(setattr)
    parts = train_autoencoder, train_text, train_unet, train_decoder, train_towers, train_encoder
    for module in parts:
        module.TrainConfig = often
    main()
