"""Programs of others, in processes with bounded time and memory that end with the one that started them.

This file is also what stands between: `python bounded.py PARENT PROGRAM ...` binds its own process to its
parent, and then becomes the program. (Python's preexec_fn may deadlock where there are threads.)
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, SIGKILL = 1, 9


def run(command: Sequence[str | Path], seconds: float,
        folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run command in folder to its end, with nothing to read; its exit code and what it has said.

    subprocess.TimeoutExpired after so many seconds: it is killed then, as after any exception, with all that
    it has started. On Linux it is killed when this process ends, too.
    """
    bound = [sys.executable, "-I", "-S", __file__, str(os.getpid())] if sys.platform == "linux" else []
    with subprocess.Popen([*bound, *command], cwd=folder, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          errors="replace") as process:
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


def limit(memory: int = -1, cpu_seconds: int = -1) -> None:
    """For this process, where the system can: at most so many bytes of addresses and seconds of a processor,
    and no core file.

    -1: as it was. It also ends with the one that started it.
    """
    if sys.platform == "win32":
        return
    import resource

    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu_seconds),
                       (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # the machine allows less
            if most >= 0:
                resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)


def _become(parent: str, *command: str) -> None:
    limit()
    if os.getppid() != int(parent):
        sys.exit("the process that started this one has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])
