"""A program, python decode.py KIND FILE PLY SECONDS: reads a file with gaussforge.

Its memory is bounded by the size of the file and its time by SECONDS of the processor, and it ends with its
parent.
"""

import runpy
import sys
from pathlib import Path

MOST_MEMORY = 1 << 30
"""Of the address space, in bytes, besides TIMES what the file has."""
TIMES = 128


def main(kind: str, file: str, ply: str, seconds: str = "10") -> None:
    raw = Path(file).read_bytes()
    # to import flexgs takes longer than to read a file
    bounded = runpy.run_path(str(Path(__file__).parents[1] / "bounded.py"))
    bounded["limit"](MOST_MEMORY + TIMES * len(raw), int(seconds))
    from gaussforge import GaussForge

    made = GaussForge().convert(raw, kind, "ply")
    if "data" not in made:
        sys.exit(str(made.get("error")))
    Path(ply).write_bytes(made["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
