"""Cases in processes of their own, which import once.

What crashes, hangs or fills the memory ends one of them, is a finding, and another takes its place.
"""

import contextlib
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) for name in ("flexgs", "ray_jobs", "tuning"))
SECONDS, LONGEST, BYTES = 10.0, 60.0, 2 << 30
"""That a case may take: of the processor, and on the clock, which runs on while others have the machine;
bytes beyond what a process has before its first."""


class Outcome(NamedTuple):
    how: str
    """"read", "refused", or else what is wrong: the type of an exception, "hang", "died", "memory", ..."""
    place: str = ""
    """File, line and function of ours where it happened."""
    said: str = ""


def outcome(read: Callable[[], Any], named: str) -> Outcome:
    """How a read ended. Allowed is that it succeeds, and a UserError of one line with `named` in it."""
    from flexgs.errors import UserError

    before = _children()
    try:
        read()
    except UserError as e:
        said = str(e)
        if not said.isprintable():  # it has several lines, control characters, or what UTF-8 cannot hold
            return Outcome("not a line", _place(e), ascii(said))
        if named not in said:
            return Outcome("no file named", _place(e), said)
        return Outcome("refused", "", said)
    except MemoryError as e:
        return Outcome("memory", _place(e), f"more than {BYTES:,} bytes")
    except Exception as e:
        return Outcome(type(e).__name__, _place(e), "".join(traceback.format_exception(e)))
    if _children() > max(BYTES, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10):
        return Outcome("memory", "", "a process that it started took more than 2 GB")
    return Outcome("read")


def _children() -> int:
    """Bytes of the largest process that this one has started; it begins with those of this one."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def _place(error: BaseException) -> str:
    """Where in our code, the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if f.filename.startswith(OURS)] or frames[-1:]
    return (f"{mine[-1].filename.removeprefix(f'{ROOT}/')}:{mine[-1].lineno} in {mine[-1].name}" if mine
            else "")


Case = Callable[[int, Path], Outcome]
"""A numbered case, given an empty folder."""


def run(case: Case, cases: int, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """The outcome of every case from 0 on, as they end: worker j has the cases j, j + jobs, ..."""
    workers = {j: _Worker(case, j, cases, jobs) for j in range(jobs)}
    try:
        while workers:
            ready = wait([w.pipe for w in workers.values()], timeout=0.5)
            for j, worker in list(workers.items()):
                found = worker.look(worker.pipe in ready)
                yield from found
                if worker.at >= cases:
                    del workers[j]
                elif worker.ended:
                    workers[j] = _Worker(case, worker.at, cases, jobs)
    finally:
        for worker in workers.values():
            worker.end()


class _Worker:
    """One process; `at` is the case that it is busy with."""

    def __init__(self, case: Case, start: int, cases: int, step: int):
        self.at, self.step, self.ended, self.since = start, step, False, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="flexgs-fuzz-",
                                            dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(case, range(start, cases, step), self.folder, theirs), daemon=True)
        self.process.start()
        self.used = 0.0
        theirs.close()

    def look(self, ready: bool) -> list[tuple[int, Outcome]]:
        """What it has said; a finding, and its end, if it has died or takes too long."""
        found = []
        try:
            while ready and self.pipe.poll():
                found.append((self.at, self.pipe.recv()))
                self.at, self.since = self.at + self.step, time.monotonic()
        except EOFError:
            self.process.join(SECONDS)
            if self.process.exitcode:  # else it is through
                found.append((self.at,
                              Outcome("died", "",
                                      f"the process ended with {_signal(self.process.exitcode)}")))
                self.at += self.step
            self.end()
            return found
        if found:
            self.used = self._used()
        took = time.monotonic() - self.since
        if took > LONGEST or (took > SECONDS and self._used() - self.used > SECONDS):
            found.append((self.at, Outcome("hang", "", f"more than {took:.0f} s")))
            self.at += self.step
            self.end()
        return found

    def _used(self) -> float:
        """Seconds of the processor so far."""
        with contextlib.suppress(psutil.Error):  # it has just ended
            return sum(psutil.Process(self.process.pid).cpu_times()[:2])
        return 0.0

    def end(self) -> None:
        self.ended = True
        if self.process.is_alive():
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code and code < 0 else str(code)


def _work(case: Case, numbers: range, folder: Path, pipe: Connection) -> None:
    """In a worker: the cases of these numbers, one after another."""
    limit = psutil.Process().memory_info().vms + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115  (until the process ends)
    warnings.simplefilter("ignore")
    # numpy's, which a user could not place
    warnings.filterwarnings("error", category=RuntimeWarning, module="flexgs")
    for number in numbers:
        place = folder / str(number)
        place.mkdir()
        try:
            pipe.send(case(number, place))
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)  # the case could not be made
            raise
        shutil.rmtree(place, ignore_errors=True)
