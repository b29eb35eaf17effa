"""Machines out of network namespaces: Ray clusters of several nodes on one Linux machine, each with an
address of its own.

Nothing outside of the namespaces is touched (but /etc/netns, where their hosts files are) or reachable from
them, and what runs there ends with them. Needs root.

Two traps of real machines are set: /etc/hosts maps the machine's name to 127.0.1.1, as Debian does, and every
machine has a second interface with the same address on all, as Docker makes one. Whoever tells others the
address of either is not reached.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

NETWORK = "10.77.0"
TRAP = "172.17.0.1"
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
               "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
               "MLFLOW_DISABLE_TELEMETRY": "true"}
PATIENCE = 900
"""Seconds after which a test takes what it waits for as hung: a busy machine may be ten times as slow."""
_UP = "Ray runtime started."


def unavailable() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need root and the program ip"
    tried = subprocess.run(["ip", "netns", "add", "flexgs-try"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "flexgs-try"], capture_output=True, check=False)
    return tried.stderr.strip() or None


class Network:
    """Namespaces named after the machines, joined by a bridge that is in a namespace too."""

    def __init__(self, machines: Sequence[str], prefix: str = "flexgs-", **environment: str):
        """environment: what all that runs there has in it besides."""
        self.environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32), **environment}
        self.prefix, self.addresses = prefix, {name: f"{NETWORK}.{i}" for i, name in enumerate(machines, 1)}
        self.processes: list[psutil.Popen] = []
        self.temporary = tempfile.mkdtemp(prefix="fgs-")  # Ray's; short, as sockets are in it

    def __enter__(self) -> Self:
        self._delete()
        switch = self._new("switch")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, (name, address) in enumerate(self.addresses.items()):
            space = self._new(name)
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", f"port{i}", "netns", switch)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "add", "docker0", "type", "bridge")
            _ip("-n", space, "addr", "add", f"{TRAP}/16", "dev", "docker0")
            _ip("-n", space, "link", "set", "docker0", "up")
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge")
            _ip("-n", switch, "link", "set", f"port{i}", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            kill(process)
        self._delete()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start(self, machine: str, command: Sequence[str | Path], log: Path) -> psutil.Popen:
        """A process there, whose output goes to log."""
        with log.open("ab") as out:
            process = psutil.Popen(["ip", "netns", "exec", self.prefix + machine, *map(str, command)],
                                   stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=self._environment())
        self.processes.append(process)
        return process

    def run(self, machine: str, command: Sequence[str | Path]) -> str:
        """What a command that is run there prints."""
        done = subprocess.run(["ip", "netns", "exec", self.prefix + machine, *map(str, command)], check=True,
                              text=True, stdout=subprocess.PIPE, env=self._environment())
        return done.stdout

    def start_ray(self, machine: str, log: Path, head: str | None = None, cpus: int = 0) -> psutil.Popen:
        """A Ray node that joins head, or is one; returns when it runs: two that start at once abort, as they
        share a folder. One that gives up, as on a busy machine, is started again."""
        address, started = self.addresses[machine], log.read_text().count(_UP) if log.exists() else 0
        join = (["--head", "--port=6379", "--dashboard-host=0.0.0.0"] if head is None
                else [f"--address={self.addresses[head]}:6379"])
        command = [RAY, "start", *join, f"--node-ip-address={address}", f"--num-cpus={cpus}", "--num-gpus=0",
                   "--object-store-memory=100000000", "--block"]
        node = self.start(machine, command, log)

        def up() -> bool:
            nonlocal node
            if node.poll() is not None:
                node = self.start(machine, command, log)
            return log.read_text().count(_UP) > started

        wait_for(f"Ray on {machine}", up, PATIENCE)
        return node

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **ENVIRONMENT, **self.environment, "RAY_TMPDIR": self.temporary}

    def _new(self, name: str) -> str:
        space = self.prefix + name
        folder = Path("/etc/netns") / space
        folder.mkdir(parents=True, exist_ok=True)
        # `ip netns exec` mounts it
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        return space

    def _delete(self) -> None:
        for name in ("switch", *self.addresses):
            subprocess.run(["ip", "netns", "del", self.prefix + name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / (self.prefix + name), ignore_errors=True)


def kill(process: psutil.Process) -> None:
    """SIGKILL to a process and all that it has started."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=10)


def wait_for(what: str, done, seconds: float = PATIENCE, process: psutil.Popen | None = None) -> None:
    """Until done() is true; RuntimeError once the process that it depends on has ended, TimeoutError after so
    many seconds."""
    end = time.monotonic() + seconds
    while not done():
        if process and process.poll() is not None and not done():
            raise RuntimeError(f"{what}: what it depends on has ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
