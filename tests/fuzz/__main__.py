"""Random damage to the files of every reader: does it read sound values, or refuse the file in one line that
names it?

    python -m tests.fuzz --cases 20000

Each case takes a valid file or folder, changes something in it, and lets its reader read it in a process of
its own, with limits of memory and time. What else happens than these two is printed, a line for each kind and
place, with the number of its first case; the exit code is then 1. Equal seeds make equal cases:

    python -m tests.fuzz --seed 0 --case 123       that case alone, with its trace; its files are kept
"""

import argparse
import collections
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.cases import Cases, outcome_of, write_seeds
from tests.fuzz.readers import READERS, SHARED
from tests.fuzz.workers import Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"readers: {', '.join(READERS)}")
    parser.add_argument("--cases", type=int, default=20_000, help="how many (%(default)s)")
    parser.add_argument("--seed", default="0", help="a word that all cases follow from (%(default)s)")
    parser.add_argument("--reader", nargs="+", choices=READERS, default=list(READERS), metavar="NAME",
                        help="these alone; all")
    parser.add_argument("--jobs", type=int, default=max(1, multiprocessing.cpu_count() // 2),
                        help="processes (%(default)s)")
    parser.add_argument("--case", type=int, help="this one alone, with what was said; its files are kept")
    options = parser.parse_args()
    if not (SHARED / "samples").is_dir():
        print(f"fuzz: no files of strangers: {SHARED / 'samples'} does not exist "
              "(FLEXGS_SHARED names another)")
    with tempfile.TemporaryDirectory(prefix="flexgs-fuzz-") as folder:
        _import()
        writer = multiprocessing.get_context("fork").Process(target=write_seeds,
                                                             args=(options.reader, Path(folder)))
        # a process of its own: some files come from a training, whose threads no worker could be forked with
        writer.start()
        writer.join()
        if writer.exitcode:
            return 2
        cases = Cases(options.seed, options.reader, Path(folder))
        return (one(cases, options.case) if options.case is not None
                else study(cases, options.cases, options.jobs))


def _import() -> None:
    """What readers import when they are first used, once for all workers."""
    import torch

    import tuning.search  # noqa: F401
    from flexgs.scene.pycolmap_library import library

    library()
    torch.set_num_threads(1)  # nor with these


def one(cases: Cases, number: int) -> int:
    kept = Path(tempfile.mkdtemp(prefix=f"flexgs-fuzz-{number}-"))
    reader, path, what = cases.make(number, kept)
    print(f"case {number}: {reader}, {path}: {what}")
    found = next(run(lambda _, folder: outcome_of(reader, path), 1, 1))[1]
    print(f"{found.how} {found.place}\n{found.said}")
    return found.how not in ("read", "refused")


def study(cases: Cases, count: int, jobs: int) -> int:
    """Run the cases; a line for each reader and for each kind of finding."""
    start = time.monotonic()
    ends: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in cases.readers}
    findings: dict[tuple[str, str, str], int] = {}
    again = f"python -m tests.fuzz --seed {cases.seed}"
    if len(cases.readers) < len(READERS):
        again += f" --reader {' '.join(cases.readers)}"
    times: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for number, found in run(cases, count, jobs):
        reader = cases.reader(number)
        ends[reader]["found" if _wrong(found) else found.how] += 1
        if _wrong(found):
            key = (reader, found.how, found.place)
            times[key] += 1
            if key not in findings:
                findings[key] = number
                last = (found.said.strip().splitlines() or [""])[-1]
                print(f"{reader}: {found.how} {found.place}: {last[:160]}    {again} --case {number}",
                      flush=True)
    seconds = time.monotonic() - start
    print(f"\n{'reader':16}{'cases':>8}{'read':>8}{'refused':>9}{'found':>7}")
    for name, counts in ends.items():
        print(f"{name:16}{counts.total():8}{counts['read']:8}{counts['refused']:9}{counts['found']:7}")
    for key, n in times.most_common():
        print(f"{n:6} x {' '.join(key)}    --case {findings[key]}")
    print(f"{count:,} cases in {seconds:.0f} s, {count / seconds:.0f} a second: {times.total():,} "
          f"findings of {len(times)} kinds")
    return bool(times)


def _wrong(found: Outcome) -> bool:
    return found.how not in ("read", "refused")


if __name__ == "__main__":
    sys.exit(main())
