"""External programs, run with limits on time and memory, that end when the process that started them ends.

This file is also a program itself: `python bounded.py PARENT PROGRAM ...` ties its own process to the process
id PARENT and then replaces itself with PROGRAM. (The usual way, Python's preexec_fn, may deadlock where there
are threads.)
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
    """Run a command to its end, with empty standard input, and return its exit code and output.

    Args:
        command: the program, as a path, and its arguments.
        seconds: after so many, the program is killed with all processes it has started, and
            subprocess.TimeoutExpired is raised. Any other exception, such as Ctrl-C, kills it likewise.
        folder: the working directory; default: this process's own.

    On Linux the program is also killed when this process ends in any way.
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
    """Kill a process and all its descendants, which would keep its pipes open."""
    import psutil  # not at the top: `python -I -S bounded.py` has no installed packages

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def limit(memory: int = -1, cpu_seconds: int = -1) -> None:
    """Limit this process where the system allows it, and write no core file.

    Args:
        memory: the most bytes of address space; -1: unchanged.
        cpu_seconds: the most seconds of processor time; -1: unchanged.

    On Linux the process is also killed when the process that started it ends.
    """
    if sys.platform == "win32":
        return
    import resource

    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu_seconds),
                       (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # the system's limit is lower already
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
