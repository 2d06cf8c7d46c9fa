"""Small faults on purpose: does a test notice each of them?

    python tools/mutate.py [--only FILE] [--list] [--processes 2]

`tools/mutations.json` is the list. A mutation replaces, in `file`, the text `old` by `new`, for
which the files of `tests` ought to fail; `old` stands exactly once in its file. Each mutation is
applied alone, to a temporary copy of the tree, where pytest runs until the first failure; that test
has to pass without the mutation. Printed are the mutations that no test noticed, the survivors:
each is a test that somebody has yet to write.

Exit status: 0 without survivors, 1 with survivors, 2 where the list or the tests are at fault.

It is quick because one process imports torch and the other large libraries (`preload` of the list)
once and then forks, without dte_lab, for every mutation. It needs a system that can fork.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIST = "tools/mutations.json"
LEFT_OUT = (".git", "__pycache__", ".*_cache", ".venv", "venv", "out", "runs")
PYTEST_FAULT = "pytest failed"
TIMEOUT = 600  # seconds; a mutation that makes a test hang counts as noticed


class Mutation(NamedTuple):
    id: str
    file: str
    old: str
    new: str
    tests: list[str]  # what pytest is given: files, or files::tests

    def applied(self, root: Path) -> str:
        """The text of `file` with the mutation. Raises ValueError where it does not apply."""
        path = root / self.file
        if not path.is_file():
            raise ValueError(f"{self.id}: {self.file} is gone.")
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            how = "is gone" if not count else f"stands {count} times"
            raise ValueError(f"{self.id}: {self.old!r} {how} in {self.file}.")
        if self.old == self.new:
            raise ValueError(f"{self.id}: the new text is the old one.")
        for test in self.tests:
            if not (root / test.partition("::")[0]).is_file():
                raise ValueError(f"{self.id}: {test} is gone.")
        if not self.tests:
            raise ValueError(f"{self.id}: no tests.")
        return text.replace(self.old, self.new)


class Outcome(NamedTuple):
    passed: bool
    by: str  # the first test that failed, or the reason; "" where all passed
    seconds: float


def read_list(root: Path) -> tuple[list[str], list[Mutation]]:
    """(modules to import before forking, mutations) of the list in root."""
    data = json.loads((root / LIST).read_text())
    return data["preload"], [Mutation(**entry) for entry in data["mutations"]]


def faults(root: Path, mutations: list[Mutation]) -> list[str]:
    """One sentence for each mutation that does not apply, or whose id another one has."""
    said, ids = [], set()
    for mutation in mutations:
        try:
            mutation.applied(root)
        except ValueError as error:
            said.append(str(error))
        if mutation.id in ids:
            said.append(f"{mutation.id}: stands twice in the list.")
        ids.add(mutation.id)
    return said


class Copy:
    """A copy of the tree in which one mutation at a time is tested by a forked process."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder, self.pid = root, folder, None
        self.log = folder.with_suffix(".log")
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))

    def start(self, job: Mutation | str, number: int) -> None:
        """Run the tests of a mutation, or a test file as it is. number: another for each job."""
        self.job, self.began = job, time.monotonic()
        tests = [job]
        if isinstance(job, Mutation):
            path, tests = self.folder / job.file, job.tests
            self.before = path.read_text(), path.stat().st_mtime
            path.write_text(job.applied(self.folder))
            # Bytecode is told apart by time and size: a time that no other version has.
            os.utime(path, (2_000_000_000 + number,) * 2)
        self.pid = os.fork()
        if not self.pid:
            try:
                _run_tests(self.root, self.folder, tests, self.log)
            finally:
                os._exit(70)  # only where pytest itself broke

    def poll(self) -> Outcome | None:
        """The outcome once the tests have ended; the copy is then as it was."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.began
        if not pid and seconds < TIMEOUT:
            return None
        self.kill()
        if not pid:
            os.waitpid(self.pid, 0)
        if isinstance(self.job, Mutation):
            text, modified = self.before
            (self.folder / self.job.file).write_text(text)
            os.utime(self.folder / self.job.file, (modified, modified))
        self.pid = None
        code = os.waitstatus_to_exitcode(status) if pid else None
        said = self.log.read_text(errors="replace")
        summary = said.rpartition("short test summary")[2]
        if code == 0:
            by = ""
        elif first := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", summary, re.MULTILINE):
            by = first[1]
        elif code is None or code < 0:
            by = "timeout" if code is None else f"signal {-code}"
        else:
            by = f"{PYTEST_FAULT}: {said[-300:]}"
        return Outcome(code == 0, by, seconds)

    def kill(self) -> None:
        """The tests and what they have started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _run_tests(root: Path, folder: Path, tests: list[str], log: Path) -> NoReturn:
    """In a forked process: pytest in the copy, with the copy's modules."""
    import pytest

    os.setsid()
    os.chdir(folder)
    own = {"", str(root), str(Path(__file__).parent), str(ROOT)}
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in own)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "dte_lab"]:
        del sys.modules[name]  # how this command ends, of the tree that has no mutation
    os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # it takes a second
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, "-o", "addopts=", f"--rootdir={folder}", *tests])
    sys.stdout.flush()
    os._exit(code)


def run(
    root: Path,
    jobs: list[Mutation | str],
    processes: int,
    say: Callable[[Mutation | str, Outcome], None] | None = None,
) -> list[Outcome]:
    """The outcome of every job, `processes` at a time; say(job, outcome) as they end."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="mutate_") as temporary:
        copies = [Copy(root, Path(temporary, str(i))) for i in range(min(processes, len(jobs)))]
        waiting = list(enumerate(jobs))[::-1]
        running = {}
        try:
            while waiting or running:
                for copy in copies:
                    if copy.pid is None and waiting:
                        running[copy], job = waiting.pop()
                        copy.start(job, running[copy])
                    if copy.pid is not None and (outcome := copy.poll()):
                        outcomes[running.pop(copy)] = outcome
                        if say is not None:
                            say(copy.job, outcome)
                time.sleep(0.05)
        finally:  # also where somebody presses Ctrl-C
            for copy in running:
                copy.kill()
    return [outcomes[i] for i in range(len(jobs))]


def _say(job: Mutation, outcome: Outcome) -> None:
    how = "SURVIVED" if outcome.passed else f"by {outcome.by}"
    print(f"{job.id:16} {job.file}  {how}  {outcome.seconds:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="FILE", help="its mutations, or an id")
    parser.add_argument("--list", action="store_true", help="print the list and stop")
    parser.add_argument("--processes", type=int, default=2, help="mutations at a time")
    parser.add_argument("--root", type=Path, default=ROOT, help="another project's folder")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    preload, mutations = read_list(root)
    if said := faults(root, mutations):
        print("\n".join(said), file=sys.stderr)
        return 2
    if options.only:
        mutations = [m for m in mutations if {m.id, m.file} & set(options.only)]
    if not mutations:
        print("No mutation is chosen.", file=sys.stderr)
        return 2
    if options.list:
        for m in mutations:
            print(f"{m.id}  {m.file}\n  - {m.old}\n  + {m.new}\n  {' '.join(m.tests)}")
        return 0

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    for name in ("pytest", *preload):
        importlib.import_module(name)
    outcomes = run(root, mutations, options.processes, _say)
    noticing = sorted({o.by for o in outcomes if ".py" in o.by.partition("::")[0]})
    sound = run(root, noticing, options.processes)
    failed = [test for test, outcome in zip(noticing, sound, strict=True) if not outcome.passed]
    failed += [outcome.by for outcome in outcomes if outcome.by.startswith(PYTEST_FAULT)]
    if failed:
        print("These fail without a mutation, too:", *failed, sep="\n", file=sys.stderr)
        return 2
    survivors = [m for m, outcome in zip(mutations, outcomes, strict=True) if outcome.passed]
    print(f"\n{len(mutations)} mutations, {len(survivors)} survivors")
    for m in survivors:
        print(f"{m.id}  {m.file}\n  - {m.old}\n  + {m.new}\n  {' '.join(m.tests)}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from dte_lab.common.command import run_command

    run_command(main)
