"""What the commands that train a part of the base model have in common."""

from dataclasses import dataclass

from dte_lab.common.device import checked_device
from dte_lab.common.settings import check_number, check_one_of, check_whole

LEAST_DRAWINGS = 160  # whose principal components make words


@dataclass(frozen=True)
class PartOptions:
    """Options of a run.

    Raises DTEError, before any slow work, for a value with which nothing can be trained.
    """

    steps: int
    minutes: float | None
    seed: int
    batch_size: int
    count: int | None  # drawings to learn from, None for all
    device: str  # as `checked_device` takes it, and returns it
    mixed_precision: str

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("batch_size", 4)):
            check_whole(name, getattr(self, name), least)
        if self.minutes is not None:
            check_number("minutes", self.minutes, 0)
        if self.count is not None:
            check_whole("count", self.count, LEAST_DRAWINGS)
        check_one_of("mixed_precision", self.mixed_precision, ("no", "bf16"))
        object.__setattr__(self, "device", checked_device(self.device))

    def settings(self, part: str) -> dict:
        """Of `train`: what a run must have been begun with, besides its recipe."""
        return {"part": part, "count": self.count}
