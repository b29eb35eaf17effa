"""What docs/security.md says: who listens where, and where no secret goes."""

import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from flexgs.urls import public

TOP = Path(__file__).parent.parent
SMALL = ["--preset", "smoke", "--steps", "80", "--data.factor", "1", "--base.max-splats", "600", "--report-every", "20",
         "--checkpoint-every", "40", "--evaluation.ratios", "0.05", "1"]
CLUSTER = """
import sys, ray
from ray_jobs.cluster import Cluster
with Cluster("local") as cluster:
    cluster.nodes()
    ray.get(ray.remote(lambda: 1).remote())
    print("dashboard", ray._private.worker.get_dashboard_url(), flush=True)
    sys.stdin.read()
"""


def listeners(process: psutil.Popen) -> dict[str, set[str]]:
    """The addresses that a process and all that it has started listen on, by what each is."""
    found: dict[str, set[str]] = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            line = " ".join(one.cmdline())
            name = next((part for part in ("gcs_server", "raylet/raylet", "ray::") if part in line), one.name())
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(name, set()).add(connection.laddr.ip.removeprefix("::ffff:"))
        except psutil.Error:
            continue
    return found


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"PYTHONPATH": str(TOP)}


@pytest.mark.ray
def test_ray_on_a_laptop_listens_on_loopback_alone_and_wants_a_token(tmp_path):
    with psutil.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                      env=environment() | {"HOME": str(tmp_path)}) as cluster:
        while (line := cluster.stdout.readline()) and not line.startswith("dashboard"):
            pass
        found, page = listeners(cluster), f"http://{line.split()[1]}/api/jobs/"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(page, timeout=20)
        cluster.stdin.close()
    assert {"gcs_server", "raylet/raylet", "ray::"} <= set(found), found
    assert set().union(*found.values()) == {"127.0.0.1"}, found
    assert refused.value.code == 401  # another user of this machine has no token, and cannot read ours
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_a_laptop_listens_on_loopback_alone(capture, tmp_path):
    """Two workers, all the time that it takes."""
    found: set[str] = set()
    with (tmp_path / "out").open("w") as out:
        job = psutil.Popen([
            sys.executable, TOP / "ray_jobs" / "train_all.py", "--data-root", capture.parent, "--storage", tmp_path,
            "--ray-address", "local", "--workers", "2", *SMALL], stdout=out, stderr=out, env=environment())
        while job.poll() is None:
            for name, addresses in listeners(job).items():
                found |= {f"{name} {address}" for address in addresses}
            psutil.wait_procs([job], timeout=0.5)
    assert job.returncode == 0, (tmp_path / "out").read_text()
    assert any(name.startswith("ray::") for name in found) and {name.split()[-1] for name in found} == {"127.0.0.1"}, found


@pytest.mark.parametrize(("uri", "shown"), [
    ("https://me:secret@mlflow.example/x", "https://mlflow.example/x"),
    ("postgresql://me:secret@db/mlflow: no such host", "postgresql://db/mlflow: no such host"),
    ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
])
def test_what_is_shown_of_an_address_has_no_password(uri, shown):
    assert public(uri) == shown
