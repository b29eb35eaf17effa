"""A program, python decode.py KIND FILE PLY: reads a file with gaussforge, so that its C++ has a process of its own."""

import sys
from pathlib import Path


def main(kind: str, file: str, ply: str) -> None:
    from gaussforge import GaussForge

    made = GaussForge().convert(Path(file).read_bytes(), kind, "ply")
    if "data" not in made:
        sys.exit(str(made.get("error")))
    Path(ply).write_bytes(made["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
