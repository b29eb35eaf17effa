"""A program, python decode.py KIND FILE PLY: reads a file with gaussforge, in memory that its size bounds."""

import sys
from pathlib import Path

MOST_MEMORY = 4 << 30
"""Of the address space, in bytes, besides TIMES what the file has."""
TIMES = 200


def main(kind: str, file: str, ply: str) -> None:
    raw = Path(file).read_bytes()
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY + TIMES * len(raw),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:
        pass
    from gaussforge import GaussForge

    made = GaussForge().convert(raw, kind, "ply")
    if "data" not in made:
        sys.exit(str(made.get("error")))
    Path(ply).write_bytes(made["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
