"""Apply one mutant after another to a copy of the tree and run its tests; prints what was noticed, and the
share."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.blind import chosen
from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", default="", help="mutants with this in their name or file")
    parser.add_argument("--blind", type=int, default=0, metavar="N",
                        help="instead, N numbers and operators of the code, picked evenly by "
                             "place and not by eye")
    options = parser.parse_args()
    mutants = chosen(ROOT, options.blind) if options.blind else MUTANTS
    mutants = [m for m in mutants if options.only in m.name or options.only in m.file]
    for m in mutants:
        if (times := m.change((ROOT / m.file).read_text())[1]) != 1:
            print(f"{m.name}: found its text {times} times in {m.file}, expected it once: "
                  "change tests/mutation",
                  file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="flexgs-mutation-") as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "*.png"),
                        symlinks=True)
        tests = sorted({test for m in mutants for test in m.tests})
        if _failing(copy, tests):
            print("the tests fail without any mutant", file=sys.stderr)
            return 2
        noticed = [_noticed(copy, m) for m in mutants]
    print(f"{sum(noticed)} of {len(mutants)} noticed, {100 * sum(noticed) / max(1, len(mutants)):.0f} %")
    return 0


def _noticed(copy: Path, mutant: Mutant) -> bool:
    path, start = copy / mutant.file, time.monotonic()
    before = path.read_text()
    path.write_text(mutant.change(before)[0])
    try:
        noticed = _failing(copy, mutant.tests)
    finally:
        path.write_text(before)
    seconds, how = time.monotonic() - start, "noticed" if noticed else "NOT NOTICED"
    print(f"{how:12} {mutant.file}: {mutant.name} ({seconds:.0f} s)", flush=True)
    return noticed


def _failing(copy: Path, tests: Sequence[str]) -> bool:
    """Whether one of the tests fails; one that runs for minutes has noticed that it does not end."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=300,
                              check=False).returncode != 0
    except subprocess.TimeoutExpired:
        return True


if __name__ == "__main__":
    sys.exit(main())
