"""A program, python decode.py KIND FILE PLY SECONDS: reads a file with gaussforge.

Its memory is bounded by the size of the file and its time by SECONDS of the processor, and it ends with its parent.
"""

import ctypes
import sys
from pathlib import Path

MOST_MEMORY = 1 << 30
"""Of the address space, in bytes, besides TIMES what the file has."""
TIMES = 128
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def main(kind: str, file: str, ply: str, seconds: str = "10") -> None:
    raw = Path(file).read_bytes()
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY + TIMES * len(raw),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError):  # ValueError: the machine allows less
        pass
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    from gaussforge import GaussForge

    made = GaussForge().convert(raw, kind, "ply")
    if "data" not in made:
        sys.exit(str(made.get("error")))
    Path(ply).write_bytes(made["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
