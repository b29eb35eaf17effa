"""MLflow experiments: opened when they are first used, and how a person opens their page."""

import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

from flexgs import telemetry
from flexgs.config import EvaluationConfig
from flexgs.tracking import notes
from flexgs.tracking.run import CURVE, Run, metric_name
from flexgs.urls import first_line, public

log = logging.getLogger("flexgs.tracking")

SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **telemetry.MLFLOW}
"""The environment variables of MLflow's server."""
RETRY_SECONDS = 60.0
"""How long MLflow is not called after a failure."""
_VIEW = "flexgs"
"""The name of the experiment's table of runs, with its columns and order."""


class Tracking:
    """An MLflow experiment, opened when it is first used; while it cannot be reached, nothing is logged."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None):
        """Note the store and the experiment's name; no connection is made yet.

        Args:
            uri: MLflow's server (http://...) or database (sqlite:///...).
            experiment: the name, such as flexgs-mipnerf360.
            artifacts: the folder for the files of a local database; a server chooses its own.
        """
        self.uri, self.name, self.artifacts = uri, experiment, artifacts
        self.client: Any = None
        self.id: str | None = None
        self.missed = False
        """Whether MLflow has not taken something since the last retry()."""
        self._retry_at, self._warned = 0.0, False

    def available(self) -> bool:
        """Whether MLflow may be called now; the first call opens the experiment, which takes seconds."""
        if time.monotonic() < self._retry_at:
            return False
        if self.id is None:
            try:
                self.client, self.id = _open(self.uri, self.name, self.artifacts)
            except Exception as e:
                self.failed(e)
        return self.id is not None

    def retry(self) -> None:
        """Let the next call reach MLflow, although it has failed less than RETRY_SECONDS ago."""
        self._retry_at, self.missed = 0.0, False

    def failed(self, error: Exception) -> None:
        """Warn of the error, and do not call MLflow for RETRY_SECONDS."""
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self.warn(error)

    def warn(self, error: Exception) -> None:
        """Log the first error as a warning, and further ones for debugging only."""
        (log.debug if self._warned else log.warning)(
            "MLflow at %s: %s; the training is not affected, "
            "metrics.jsonl and results.json have every figure", public(self.uri), first_line(error))
        self._warned = True

    def run(self, folder: Path, name: str, *, kind: str, parent: Run | None = None,
            tags: Mapping[str, object] | None = None, params: Mapping[str, object] | None = None) -> Run:
        """Make the run of a folder, which continues the folder's run in MLflow if there is one.

        Args:
            folder: the folder whose results the run shows; it keeps the run's id.
            name: the name that MLflow shows.
            kind: batch, scene, search or trial; MLflow gets it as a tag.
            parent: the run below which MLflow shows this one.
            tags: further tags; those that are None are left out.
            params: the parameters of the run.
        """
        return Run(self, folder, name, {**(tags or {}), "kind": kind}, params or {}, parent)

    def page(self, compared: Sequence[str] = ()) -> str:
        """Return the part of a URL after MLflow's address that shows the runs, or compares these run ids."""
        if compared:
            return f"#/metric?{_chart(str(self.id), compared, CURVE)}"
        return f"#/experiments/{self.id}/runs?viewStateShareKey={_VIEW}&workflowType=machine_learning"

    def how_to_open(self, compared: Sequence[Run] = ()) -> str:
        """Say how to see the runs, or PSNR over ratio of those compared: a URL, or a command and its URL.

        Empty if the experiment has not been opened.
        """
        if self.id is None:
            return ""
        page = self.page([run._id for run in compared if run._id])
        if self.uri.startswith(("http://", "https://")):
            return f"{public(self.uri).rstrip('/')}/{page}"
        mlflow = shlex.quote(str(Path(sys.executable).with_name("mlflow")))
        settings = " ".join(f"{name}={value}" for name, value in SERVER.items())
        return (f"{settings} {mlflow} server --host 127.0.0.1 --port 5000 "
                "--allowed-hosts 127.0.0.1:5000,localhost:5000 "
                f"--backend-store-uri {shlex.quote(public(self.uri))}\n"
                f"  and open http://127.0.0.1:5000/{page}")


def sqlite_uri(database: Path) -> str:
    """Return the URI of an SQLite file; percent signs in its path are encoded, as MLflow decodes them."""
    return f"sqlite:///{str(database.absolute()).replace('%', '%25')}"


def _open(uri: str, name: str, artifacts: Path | None) -> tuple[Any, str]:
    """Return a client of the store at uri and the id of the experiment, which is created if missing."""
    telemetry.turn_off()
    for key, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
                       "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                       "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}.items():
        os.environ.setdefault(key, value)
    import mlflow
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It complains when MLflow cannot be reached, which Tracking.warn() says already.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    local = uri.startswith("sqlite:///")
    if local:
        _create_database(Path(unquote(uri.removeprefix("sqlite:///"))))
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    tags = _page()
    if experiment is None:
        location = artifacts.absolute().as_uri() if local and artifacts else None
        try:
            return client, client.create_experiment(name, location, tags)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    for key in tags.keys() - experiment.tags.keys():  # tags that a person has changed stay
        client.set_experiment_tag(experiment.experiment_id, key, tags[key])
    return client, experiment.experiment_id


def _page() -> dict[str, str]:
    """Return the tags that make MLflow show an experiment with its description, columns and order."""
    ratios = [metric_name(ratio) for ratio in EvaluationConfig().ratios]
    columns = ["metrics.`psnr_auc`", *(f"metrics.`psnr/{ratio}`" for ratio in ratios),
               "metrics.`splats/ratio_1.00`", "metrics.`train_seconds`"]
    # Dataset and Models, which MLflow shows before the metrics, would push those out of the page.
    return {
        # an experiment of training runs; by default MLflow shows one of language models
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": notes.EXPERIMENT,
        # Sorted by a metric, the list is flat: scenes are not folded away below their batch.
        f"mlflow.sharedViewState.{_VIEW}": json.dumps(
            {"selectedColumns": columns, "orderByKey": "metrics.`psnr_auc`", "orderByAsc": False}),
    }


def _create_database(path: Path) -> None:
    """Make the database elsewhere and link it into place, as two processes at one new file destroy it."""
    if path.exists():
        return
    import mlflow

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        new = Path(folder) / path.name
        mlflow.MlflowClient(sqlite_uri(new)).search_experiments(max_results=1)
        try:
            os.link(new, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            os.replace(new, path)


def _chart(experiment: str, runs: Sequence[str], metric: str) -> str:
    """Return the query string of MLflow's page that draws one metric of several runs over its step."""
    return urlencode({key: json.dumps(value, separators=(",", ":")) for key, value in {
        "runs": runs, "metric": metric, "experiments": [experiment], "plot_metric_keys": [metric],
        "plot_layout": {"autosize": True}}.items()} | {"x_axis": "step", "show_point": "true"})
