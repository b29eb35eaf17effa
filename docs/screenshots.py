"""Take the pictures of MLflow's pages that are in docs/: of an experiment, of a run, of PSNR over what is
kept.

    python docs/screenshots.py                                  # of the demo, as `make train` has left it
    python docs/screenshots.py --mlflow-uri sqlite:////data/runs/mlflow.db --experiment flexgs-mipnerf360

It starts an MLflow server of its own on a free port of this machine, and needs Chromium or Chrome.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgs.commands.guard import guard
from flexgs.errors import UserError
from flexgs.options import parse
from flexgs.tracking import SERVER, Tracking, sqlite_uri
from flexgs.urls import public

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOST = "flexgs.localhost"
"""Browsers take it for this machine. Under the name localhost itself, MLflow opens a panel to chat with over
the page."""
SERVER_SECONDS = 90
PAGE_SECONDS = 120


@dataclass
class Screenshots:
    """Take the pictures of MLflow's pages that are in docs/."""

    mlflow_uri: str = sqlite_uri(Path("runs/mlflow.db"))
    experiment: str = "flexgs-demo"
    output: Path = Path(__file__).parent

    def __call__(self) -> None:
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            raise UserError(f"screenshots: found no browser; expected one of {', '.join(BROWSERS)} in PATH")
        tracking, runs = open_runs(self.mlflow_uri, self.experiment)
        with server(self.mlflow_uri) as address:
            for name, (page, height) in pages(tracking, runs).items():
                shoot(browser, f"{address}/{page}", self.output / name, height)
                print(self.output / name)


def open_runs(uri: str, experiment: str) -> tuple[Tracking, list[Any]]:
    """The experiment, and its runs of scenes; UserError if there are none. Nothing is created."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"{uri}: no such database; train something first, for instance the demo: make train")
    tracking = Tracking(uri, experiment)
    if not tracking.available():
        raise UserError(f"{public(uri)}: MLflow does not answer")
    runs = tracking.client.search_runs([tracking.id], "tags.kind = 'scene'",
                                       order_by=["attributes.start_time"])
    if not runs:
        raise UserError(f"{public(uri)}: found no scenes in the experiment {experiment}")
    return tracking, runs


def pages(tracking: Tracking, runs: list[Any]) -> dict[str, tuple[str, int]]:
    """The address of each page behind that of the server, and the height of its picture."""
    kind = "workflowType=machine_learning"
    return {
        "mlflow_experiment.png": (tracking.page(), 620),
        "mlflow_run.png": (f"#/experiments/{tracking.id}/runs/{runs[-1].info.run_id}?{kind}", 900),
        "mlflow_chart.png": (f"{tracking.page([run.info.run_id for run in runs])}&{kind}", 620),
    }


@contextmanager
def server(uri: str) -> Iterator[str]:
    """The address of an MLflow server that shows the store at uri while the block runs."""
    if not uri.startswith("sqlite:"):
        yield uri.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port),
             "--workers", "1", "--backend-store-uri", uri, "--allowed-hosts",
             f"{HOST}:{port},127.0.0.1:{port}", "--cors-allowed-origins", f"http://{HOST}:{port}"],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **SERVER})
        try:
            _wait(f"http://127.0.0.1:{port}/health", process)
            yield f"http://{HOST}:{port}"
        finally:
            os.killpg(process.pid, 15)  # its workers are processes of their own
            process.wait(20)


def _wait(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"screenshots: the MLflow server does not answer at {url}")


def shoot(browser: str, url: str, file: Path, height: int) -> None:
    """Save what the browser shows of url. It knows nothing of this machine's user: its profile is new and
    empty."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-sync", "--disable-background-networking", "--disable-component-update",
             f"--user-data-dir={profile}", "--hide-scrollbars",
             "--virtual-time-budget=15000", f"--window-size=1440,{height}", f"--screenshot={file.absolute()}",
             url],
            capture_output=True, text=True, timeout=PAGE_SECONDS, check=False)
    if done.returncode or not file.is_file():
        raise UserError(f"{browser}: took no picture of {url}: "
                        f"{(done.stderr.strip().splitlines() or ['?'])[-1]}")


if __name__ == "__main__":
    sys.exit(guard(parse(Screenshots, sys.argv[1:], "screenshots.py")))
