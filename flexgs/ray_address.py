"""Find out in seconds whether a Ray cluster is at an address.

Another process connects to it: at a wrong address, ray.init tries for minutes and cannot be stopped.
"""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass

from flexgs.errors import UserError
from flexgs.ray_library import started_address
from flexgs.urls import public

SECONDS = 25.0
"""How long a cluster may take to answer once Ray is imported, which takes long on a busy machine; Ray needs
20 s to say that a token is wrong."""
EXPECTED = ("expected host:port of Ray itself, usually port 6379, or local; start it, or correct "
            "--ray-address or RAY_ADDRESS")
_ASK = """
import json, sys, ray
print("imported", flush=True)
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR", configure_logging=False)
resources, alive = ray.cluster_resources(), [n for n in ray.nodes() if n["Alive"]]
print(json.dumps([len(alive), resources.get("CPU", 0), resources.get("GPU", 0)]))
"""


@dataclass(frozen=True)
class Found:
    """A Ray cluster that has answered, and its resources."""

    address: str
    """host:port."""
    machines: int
    cpus: float
    gpus: float


def find(address: str | None) -> Found | None:
    """Return the cluster at address, else at $RAY_ADDRESS, else of `ray start`; None for this machine alone.

    Unlike Ray's own "auto", it never joins a cluster that another script has started on this machine.
    UserError, within seconds, if the named cluster does not answer.
    """
    source, named = ("--ray-address", address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))
    if named == "local":
        return None
    if named and named != "auto":
        return _reach(named, source)
    if started := started_address():
        try:
            return _reach(started, "ray start")
        except UserError:
            print(f"Ray: the cluster that was started here at {started} has gone", flush=True)
    if named:
        raise UserError(f"{source} auto: found no cluster started here; run ray start, or use local")
    return None


def _reach(address: str, source: str) -> Found:
    """Return the cluster at address; UserError if none answers (source: what named the address)."""
    named = f"{source} {public(address)}"
    if address.startswith(("http://", "https://")):
        raise UserError(f"{named}: is where jobs are submitted, not Ray itself; {EXPECTED}")
    if address.startswith("ray://"):
        raise UserError(f"{named}: is the port of Ray's client, through which nothing is trained; {EXPECTED}")
    parts = re.fullmatch(r"\[?([^\s/@\[\]]+?)\]?:(\d{1,5})", address)
    if not parts or not 0 < int(parts[2]) < 65536:
        raise UserError(f"{named}: is not host:port; {EXPECTED}")
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=5).close()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{named}: no Ray cluster answers ({reason}); {EXPECTED}") from None
    # In a submitted job, these variables would make Ray set up the job's environment once more.
    env = {name: value for name, value in os.environ.items()
           if name not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")}
    with subprocess.Popen([sys.executable, "-c", _ASK, address], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, bufsize=0, env=env) as asking:
        assert asking.stdout
        try:
            asking.stdout.readline()  # that and no more, as there is no buffer
            out, errors = (said.decode(errors="replace") for said in asking.communicate(timeout=SECONDS))
        except subprocess.TimeoutExpired:
            raise UserError(f"{named}: something answers there, but not as Ray does within "
                            f"{SECONDS:.0f} s; {EXPECTED}") from None
        finally:
            asking.kill()
    if asking.returncode:
        reason = public(next((line for line in reversed(errors.splitlines()) if line.strip()), ""))[:200]
        token = "Authentication" in errors or "UNAUTHENTICATED" in errors
        raise UserError(f"{named}: {reason}; "
                        + ("set RAY_AUTH_MODE=token and give it the cluster's token" if token else
                          f"is it of the same version? {EXPECTED}"))
    return Found(address, *json.loads(out.splitlines()[-1]))
