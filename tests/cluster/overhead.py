"""What Ray and MLflow cost: `ray_jobs/train_all.py` on one scene against `flexgs train`, which has neither,
in turns.

    python -m tests.cluster.overhead CAPTURE --rounds 5 --steps 800 --splats 24000 --factor 4

Prints the table of docs/reliability.md, of medians. Both train with all CPUs of the machine, which
must have nothing else to do.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from flexgs.files import read_jsonl


class Cost(NamedTuple):
    """Of a run."""

    start: float
    """Seconds from the command to the first step."""
    step: float
    """Milliseconds of a view, from the first report to the last, with what happens between steps."""
    end: float
    """Seconds from the last report to the end of the process: evaluation, files and, with Ray, MLflow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--splats", type=int, default=24_000)
    parser.add_argument("--factor", type=int, default=4)
    options = parser.parse_args()
    capture = options.capture.resolve()
    settings = ["--steps", str(options.steps), "--base.max-splats", str(options.splats),
                "--data.factor", str(options.factor)]
    commands = {
        "flexgs train": [sys.executable, "-m", "flexgs", "train", str(capture), "--output"],
        "train_all.py": [sys.executable, "ray_jobs/train_all.py", "--ray-address", "local", "--data-root",
                         str(capture.parent), "--scenes", capture.name, "--experiment", "runs", "--storage"],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            costs[name].append(cost([*command, "{}", *settings], capture.name))
            print(f"{name}: {costs[name][-1]}", file=sys.stderr, flush=True)
    print("| | start-up, s | a view, ms | after the last view, s |\n|---|---|---|---|")
    for name, rows in costs.items():
        row = Cost(*(median(column) for column in zip(*rows, strict=True)))
        print(f"| `{name}` | {row.start:.1f} | {row.step:.2f} | {row.end:.1f} |")
    pairs = list(zip(*costs.values(), strict=True))
    print(f"| difference of a pair | {median(b.start - a.start for a, b in pairs):+.1f} | "
          f"{median(100 * (b.step / a.step - 1) for a, b in pairs):+.1f} % | "
          f"{median(b.end - a.end for a, b in pairs):+.1f} |")


def cost(command: list[str], scene: str) -> Cost:
    """Run it, with an empty folder in place of {}."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        subprocess.run([part.format(folder) for part in command], check=True, stdout=subprocess.DEVNULL)
        end = time.time()
        (history,) = Path(folder).rglob(f"{scene}/metrics.jsonl")
        rows = read_jsonl(history)
    first, last = rows[0], rows[-1]
    return Cost(first["time"] - start - first["step"] / first["views_per_second"],
                1000 * (last["time"] - first["time"]) / (last["step"] - first["step"]), end - last["time"])


if __name__ == "__main__":
    main()
