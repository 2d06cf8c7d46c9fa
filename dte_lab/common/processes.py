"""Work that is shared out to processes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread, current_thread, main_thread
from typing import TypeVar

import torch

from dte_lab.common.command import patient_streams

Given, Made = TypeVar("Given"), TypeVar("Made")


def usable_cores() -> int:
    """Of the processor, those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    others = set(active_children())
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (work, threads)) as pool:
        try:
            with _without_interrupts():
                results = pool.map(_do, jobs, chunksize=chunk)
            yield from results
        except BaseException:  # nobody waits for what they are doing
            for process in set(active_children()) - others:
                process.terminate()
            raise


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside never hear of Ctrl-C: this one ends them."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(work: Callable, threads: int) -> None:
    global _work
    _work = work
    patient_streams()
    torch.set_num_threads(threads)
    Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the process that started this one, however that ends."""
    parent_process().join()
    os._exit(1)


def _do(job: Given) -> Made:
    return _work(job)
