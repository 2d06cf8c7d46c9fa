"""Work that is shared out to processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

Given, Made = TypeVar("Given"), TypeVar("Made")


def in_processes(
    work: Callable[[Given], Made], jobs: Sequence[Given], processes: int, chunk: int
) -> Iterator[Made]:
    """map(work, jobs), shared out to processes in chunks, in the order of the jobs.

    The processes are spawned, not forked, since a fork does not get torch's threads, and share the
    threads of this one. With one process everything happens here.
    """
    if processes == 1:
        yield from map(work, jobs)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (work, threads)) as pool:
        yield from pool.map(_do, jobs, chunksize=chunk)


def _begin(work: Callable, threads: int) -> None:
    global _work
    _work = work
    torch.set_num_threads(threads)


def _do(job: Given) -> Made:
    return _work(job)
