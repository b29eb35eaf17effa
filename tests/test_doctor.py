"""flexgs doctor, on conditions that are made: places that cannot be written, servers that are not there,
wrong folders."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

import flexgs
from flexgs import cli, ray_address
from flexgs.commands import doctor
from flexgs.tracking import Tracking, sqlite_uri
from ray_jobs.cluster import this_python

CLEAN = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "NUMBA_CACHE_DIR", "FLEXGS_LPIPS_WEIGHTS")


def examine(tmp_path, capsys, *args: object) -> tuple[int, dict[str, str]]:
    """The exit code, and the line of each check."""
    words = ["--storage", str(tmp_path / "runs"), *map(str, args)]
    code = cli.guard(lambda: cli.parse(cli.Doctor, words, "doctor")())
    return code, {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)


def test_all_is_well_here(tmp_path, capture, capsys):
    code, lines = examine(tmp_path, capsys, "--data-root", capture.parent)
    assert code == 0 and all(line.startswith("ok ") for line in lines.values()), lines
    assert list(lines) == ["python", "torch", "gpu", "backend", "kernels", "threads", "ray", "mlflow", "disk",
                           "captures", "lpips", "extras"]
    assert (f"1 in {capture.parent}: {capture.name}" in lines["captures"]
            and "made by the first job" in lines["mlflow"])
    assert not (tmp_path / "runs").exists()  # it only looks


def test_wrong_places_are_named_with_a_cure(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, lines = examine(tmp_path, capsys, "--data-root", tmp_path, "--storage", tmp_path / "file" / "runs",
                          "--mlflow-uri", "http://127.0.0.1:9", "--ray-address", "127.0.0.1:9")
    assert code == 1
    assert [name for name, line in lines.items()
            if line.startswith("WRONG ")] == ["ray", "mlflow", "disk", "captures"]
    assert "127.0.0.1:9: no Ray cluster answers" in lines["ray"] and "correct --ray-address" in lines["ray"]
    assert ("http://127.0.0.1:9 cannot be written" in lines["mlflow"]
            and "MLFLOW_TRACKING_URI" in lines["mlflow"])
    assert f"{tmp_path}/file/runs cannot be written" in lines["disk"] and "--storage" in lines["disk"]
    assert "no capture here" in lines["captures"] and "--data-root" in lines["captures"]


def test_a_database_that_is_there_is_written_to_and_left_as_it_was(tmp_path, capsys, monkeypatch):
    uri = sqlite_uri(tmp_path / "mlflow.db")
    tracking = Tracking(uri, "mine")
    assert tracking.available()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code, lines = examine(tmp_path, capsys)
    assert code == 0 and "written to" in lines["mlflow"]
    experiments = [e.experiment_id for e in tracking.client.search_experiments()]
    assert tracking.client.search_runs(experiments) == []
    (tmp_path / "mlflow.db").write_text("no database")
    code, lines = examine(tmp_path, capsys)
    assert code == 1 and lines["mlflow"].startswith("WRONG") and "cannot be written" in lines["mlflow"]


def test_passwords_are_not_shown(tmp_path, capsys):
    _, lines = examine(tmp_path, capsys, "--mlflow-uri", "http://me:secret@127.0.0.1:9")
    assert "http://127.0.0.1:9 " in lines["mlflow"] and "secret" not in str(lines)


def test_no_place_for_kernels(tmp_path):
    """What numba does when neither the source's folder, nor the user's, nor NUMBA_CACHE_DIR can be written;
    also for root."""
    shutil.copytree(Path(flexgs.__file__).parent, tmp_path / "flexgs",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "flexgs" / "raster" / "cpu" / "__pycache__").touch()
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/x", "NUMBA_CACHE_DIR": "/dev/null/x",
               "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-B", "-m", "flexgs", "doctor"], cwd=tmp_path, capture_output=True,
                          text=True, check=False, env=os.environ | nowhere)
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1] == "kernels")
    assert done.returncode == 1, done.stderr
    assert line.startswith("WRONG") and line.endswith("set NUMBA_CACHE_DIR to a folder that can be written")
    done = subprocess.run([sys.executable, "-B", "-m", "flexgs", "doctor"], cwd=tmp_path, capture_output=True,
                          text=True, check=False,
                          env=os.environ | nowhere | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")})
    assert done.returncode == 0 and f"kept in {tmp_path}/kernels" in done.stdout


def test_whoever_never_answers_is_not_waited_for(tmp_path, capsys, monkeypatch):
    """Two servers that accept and say nothing."""
    monkeypatch.setattr(doctor, "SECONDS", 9.0)
    monkeypatch.setattr(ray_address, "SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        code, lines = examine(tmp_path, capsys, "--mlflow-uri", f"http://{address}", "--ray-address", address)
    assert code == 1 and lines["ray"].startswith("WRONG") and "no answer within 9 s" in lines["mlflow"]
    assert time.monotonic() - start < 60 and any(thread.daemon for thread in threading.enumerate())


@pytest.mark.parametrize(("versions", "expected"), [
    (("13.0", "13.0", None, False), "no gsplat: pip install 'flexgs[cuda]'"),
    (("13.0", None, "1.5.3", False), "no nvcc: install the CUDA 13.0 toolkit"),
    (("13.0", "12.8", "1.5.3", False), "torch is for CUDA 13.0, nvcc is 12.8"),
    (("13.0", "13.1", "1.5.3", False), None),
    (("13.0", None, "1.5.3", True), None),  # compiled elsewhere, as in the image
])
def test_versions_that_do_not_fit(versions, expected):
    problem = doctor.gsplat_problem(*versions)
    assert problem is None if expected is None else expected in str(problem)


def test_weights_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLEXGS_LPIPS_WEIGHTS", str(tmp_path))
    code, lines = examine(tmp_path, capsys)
    assert (code == 1 and "vgg16_features_f16.pth in this folder" in lines["lpips"]
            and "unset it" in lines["lpips"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_answers_and_one_that_refuses(tmp_path, capsys, monkeypatch):
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
             runtime_env=this_python())
    try:
        address = ray.get_runtime_context().gcs_address
        code, lines = examine(tmp_path, capsys, "--ray-address", address)
        assert code == 0 and f"{address} has 1 machine, 3 CPUs and 0 GPUs" in lines["ray"], lines["ray"]
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        code, lines = examine(tmp_path, capsys, "--ray-address", address)
        assert code == 1 and lines["ray"].startswith("WRONG"), lines["ray"]
        assert "give it the cluster's token" in lines["ray"] and "0" * 64 not in lines["ray"], lines["ray"]
    finally:
        ray.shutdown()
