"""Programs of others, in processes with bounded time and memory that end with the one that started them.

This file is also what stands between: `python bounded.py PARENT MEMORY SECONDS PROGRAM ...` limits its own process, and then
becomes the program. (Python's preexec_fn may deadlock where there are threads.)
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, SIGKILL = 1, 9


def run(command: Sequence[str | Path], seconds: float, cpu_seconds: int = -1, memory: int = -1,
        folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run command in folder to its end, with nothing to read; its exit code and what it has said.

    subprocess.TimeoutExpired after so many seconds: it is killed then, as after any exception, with all that it has started. On
    Linux it is killed too when this process ends, and when it has used cpu_seconds of a processor; it gets no more than memory
    bytes of addresses. -1: as much as this process.
    """
    limits = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(memory), str(cpu_seconds)]
    with subprocess.Popen([*(limits if sys.platform == "linux" else ()), *command], cwd=folder, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            _kill(process.pid)
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _kill(pid: int) -> None:
    """The process and all below it, which would keep its pipes open."""
    import psutil  # not where this file is the program

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _become(parent: str, memory: str, seconds: str, *command: str) -> None:
    import ctypes
    import resource

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the process that started this one has ended")
    for limit, value in ((resource.RLIMIT_AS, int(memory)), (resource.RLIMIT_CPU, int(seconds)), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # the machine allows less
            if value >= 0:
                resource.setrlimit(limit, (value, value))
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])
