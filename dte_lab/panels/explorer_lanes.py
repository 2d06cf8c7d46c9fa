"""A and B at the same time, each in a lane: a thread with modules of its own.

The dual path and the place of v* are set on a model's modules while it runs, so two threads cannot
share them; weights they can. torch computes without Python's lock, and layers as narrow as the
small model's keep one core busy and not two: two cores do more for two settings than for one.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

from dte_lab.common.errors import DTEError
from dte_lab.pipeline import DTEPipeline

LANES = 2
Asked, Answered = TypeVar("Asked"), TypeVar("Answered")


class Stopped(Exception):
    """The user has stopped the run."""


class Progress:
    """What is done of `total`, told to `tick` as a fraction; lanes may call it at the same time.

    Once `tick` has raised, or `end` was called, whoever comes next is stopped.
    """

    def __init__(self, total: float, tick: Callable[[float], object]) -> None:
        self.total, self.tick = max(1, total), tick
        self.done, self.ended, self.lock = 0, False, Lock()

    def __call__(self, cost: float) -> None:
        with self.lock:
            if self.ended:
                raise Stopped
            self.done += cost
            try:
                self.tick(min(1.0, self.done / self.total))
            except BaseException:
                self.ended = True
                raise

    def end(self) -> None:
        self.ended = True


def lanes_for(pipe: DTEPipeline) -> int:
    """How many settings are computed at once: two of the small model on two cores."""
    small = pipe.backbone.draws_small_world and pipe.backbone.device.type == "cpu"
    return min(LANES, torch.get_num_threads()) if small else 1


def twin(pipe: DTEPipeline) -> DTEPipeline:
    """A pipeline with modules of its own, and the same weights."""
    modules = *pipe.backbone.modules, pipe.encoder
    weights = [w for module in modules for w in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(pipe, {id(weight): weight for weight in weights})


def side_by_side(
    work: Callable[[Asked, int], Answered], jobs: Sequence[Asked], lanes: int, progress: Progress
) -> list[Answered | DTEError]:
    """[work(job, lane)], or the DTEError that it raised, of jobs on lanes 0, 1, ... in turn.

    The lanes share torch's threads. What else one raises ends the others by `progress`, and is
    raised when they have ended.
    """
    lanes, threads = min(lanes, len(jobs)), torch.get_num_threads()

    def made_of(job: Asked, lane: int) -> Answered | DTEError:
        try:
            return work(job, lane)
        except DTEError as error:
            return error

    def run(lane: int) -> list[Answered | DTEError]:
        torch.set_num_threads(max(1, threads // lanes))
        try:
            return [made_of(job, lane) for job in jobs[lane::lanes]]
        except BaseException:
            progress.end()
            raise

    if lanes < 2:
        return [made_of(job, 0) for job in jobs]

    try:
        with ThreadPoolExecutor(lanes) as pool:
            futures = [pool.submit(run, lane) for lane in range(lanes)]
            try:
                errors = [future.exception() for future in futures]  # each waits for its lane
            except BaseException:  # Ctrl-C
                progress.end()
                raise
    finally:
        torch.set_num_threads(threads)  # of threads that begin later
    if raised := [error for error in errors if error is not None]:
        raise min(raised, key=lambda error: isinstance(error, Stopped))  # what stopped the others
    return [futures[i % lanes].result()[i // lanes] for i in range(len(jobs))]
