"""Programs of others do not outlive their time, or the process that started them."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flexgs import bounded

TOP = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are those of Linux")


def gone(pid: int) -> bool:
    for _ in range(1200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_what_a_program_says(tmp_path):
    done = bounded.run(["/bin/sh", "-c", "pwd; cat; echo no >&2; exit 3"], 20, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path}\n", "no\n")
    assert bounded.run([tmp_path / "none"], 20).stderr.splitlines()[-1].startswith("FileNotFoundError")


def test_the_end_of_its_time_is_the_end_of_all_that_it_has_started(tmp_path):
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        bounded.run(["/bin/sh", "-c", "sleep 600 & echo $! > pid; wait"], 1, folder=tmp_path)
    assert time.monotonic() - began < 300  # the other one, which holds the pipes too, was not waited for
    assert gone(int((tmp_path / "pid").read_text()))


def test_the_end_of_its_parent_is_its_end(tmp_path):
    command = ["/bin/sh", "-c", f"cd {tmp_path}; echo $$ > new; mv new pid; exec sleep 600"]
    parent = subprocess.Popen([sys.executable, "-c",
                               f"from flexgs import bounded; bounded.run({command}, 600)"], cwd=TOP)
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_memory_and_time_of_the_processor():
    def limited(how: str, then: str) -> subprocess.CompletedProcess[str]:
        return bounded.run([sys.executable, "-c", f"from flexgs.bounded import limit; limit({how})\n{then}"],
                           300, folder=TOP)

    many = limited("memory=1 << 30", "bytes(1 << 31)")
    assert many.returncode == 1 and "MemoryError" in many.stderr
    assert limited("cpu_seconds=1", "while True: pass").returncode == -9
