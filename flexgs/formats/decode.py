"""A program, python decode.py KIND FILE PLY SECONDS: converts a file to PLY with gaussforge.

Its memory is bounded in proportion to the file, its CPU time by SECONDS, and it ends with its parent process.
"""

import runpy
import sys
from pathlib import Path

MOST_MEMORY = 1 << 30
"""Bytes of address space for a file of size 0; each byte of the file adds TIMES more."""
TIMES = 128


def main(kind: str, file: str, ply: str, seconds: str = "10") -> None:
    """Convert the file of this kind to a PLY within the bounds; exit with gaussforge's error, if any."""
    raw = Path(file).read_bytes()
    # importing flexgs would take longer than reading a file
    bounded = runpy.run_path(str(Path(__file__).parents[1] / "bounded.py"))
    bounded["limit"](MOST_MEMORY + TIMES * len(raw), int(seconds))
    from gaussforge import GaussForge

    made = GaussForge().convert(raw, kind, "ply")
    if "data" not in made:
        sys.exit(str(made.get("error")))
    Path(ply).write_bytes(made["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
