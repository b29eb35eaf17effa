"""MLflow experiments: one per dataset, opened when first used, and how a person opens their page."""

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
"""The environment of MLflow's server."""
RETRY_SECONDS = 60.0
"""How long an MLflow that failed is left alone."""
_VIEW = "flexgs"


class Tracking:
    """An MLflow experiment, opened when it is first used; without effect while it cannot be reached."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None):
        """artifacts: where files go that belong to a local database; a server decides for itself."""
        self.uri, self.name, self.artifacts = uri, experiment, artifacts
        self.client: Any = None
        self.id: str | None = None
        self._retry_at, self._warned = 0.0, False

    def available(self) -> bool:
        """Whether MLflow may be called now; opens the experiment when it is first asked, which takes
        seconds."""
        if time.monotonic() < self._retry_at:
            return False
        if self.id is None:
            try:
                self.client, self.id = _open(self.uri, self.name, self.artifacts)
            except Exception as e:
                self.failed(e)
        return self.id is not None

    def retry(self) -> None:
        """Call MLflow again the next time, although it has failed a moment ago."""
        self._retry_at = 0.0

    def failed(self, error: Exception) -> None:
        """Warn, and leave MLflow alone for a while."""
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self.warn(error)

    def warn(self, error: Exception) -> None:
        (log.debug if self._warned else log.warning)(
            "MLflow at %s: %s; the training is not affected, metrics.jsonl and "
            "results.json have every figure",
            public(self.uri), first_line(error))
        self._warned = True

    def run(self, folder: Path, name: str, *, kind: str, parent: Run | None = None,
            tags: Mapping[str, object] | None = None, params: Mapping[str, object] | None = None) -> Run:
        """The run that belongs to folder, continued if there is one; kind is batch, scene, search or
        trial."""
        return Run(self, folder, name, {**(tags or {}), "kind": kind}, params or {}, parent)

    def page(self, compared: Sequence[str] = ()) -> str:
        """Where MLflow's server shows the runs, or PSNR over ratio of those with these ids, behind its
        address."""
        if compared:
            return f"#/metric?{_chart(str(self.id), compared, CURVE)}"
        return f"#/experiments/{self.id}/runs?viewStateShareKey={_VIEW}&workflowType=machine_learning"

    def how_to_open(self, compared: Sequence[Run] = ()) -> str:
        """What a person types and where they look to see the runs, or PSNR over ratio of those compared; may
        be empty."""
        if self.id is None:
            return ""
        page = self.page([run._id for run in compared if run._id])
        if self.uri.startswith(("http://", "https://")):
            return f"{public(self.uri).rstrip('/')}/{page}"
        mlflow = shlex.quote(str(Path(sys.executable).with_name("mlflow")))
        settings = " ".join(f"{name}={value}" for name, value in SERVER.items())
        return (f"{settings} {mlflow} server --host 127.0.0.1 --port 5000 --allowed-hosts "
                f"127.0.0.1:5000,localhost:5000 --backend-store-uri {shlex.quote(public(self.uri))}\n  and "
                f"open http://127.0.0.1:5000/{page}")


def sqlite_uri(database: Path) -> str:
    """The URI of a database file, which is read with percent signs decoded."""
    return f"sqlite:///{str(database.absolute()).replace('%', '%25')}"


def _open(uri: str, name: str, artifacts: Path | None) -> tuple[Any, str]:
    """A client of the store at uri, and the id of the experiment, created if need be."""
    telemetry.turn_off()
    for key, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
                       "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                       "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}.items():
        os.environ.setdefault(key, value)
    import mlflow
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # it ends when MLflow goes, which we say ourselves
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
    for key in tags.keys() - experiment.tags.keys():  # what a person has changed stays
        client.set_experiment_tag(experiment.experiment_id, key, tags[key])
    return client, experiment.experiment_id


def _page() -> dict[str, str]:
    """The tags of an experiment that say how MLflow shows it."""
    ratios = [metric_name(ratio) for ratio in EvaluationConfig().ratios]
    columns = ["metrics.`psnr_auc`", *(f"metrics.`psnr/{ratio}`" for ratio in ratios),
               "metrics.`splats/ratio_1.00`", "metrics.`train_seconds`", "attributes.`Dataset`",
               "attributes.`Models`"]
    return {
        # training runs; MLflow's own default is language models
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": notes.EXPERIMENT,
        # Sorted by a metric, the list is flat: scenes are not folded away below their batch, and the best
        # come first.
        f"mlflow.sharedViewState.{_VIEW}": json.dumps(
            {"selectedColumns": columns, "orderByKey": "metrics.`psnr_auc`", "orderByAsc": False}),
    }


def _create_database(path: Path) -> None:
    """Make the database aside and link it into place: processes that create one file together destroy it."""
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
    """The query of MLflow's page that draws one metric of several runs over its step."""
    return urlencode({key: json.dumps(value, separators=(",", ":")) for key, value in {
        "runs": runs, "metric": metric, "experiments": [experiment], "plot_metric_keys": [metric],
        "plot_layout": {"autosize": True}}.items()} | {"x_axis": "step", "show_point": "true"})
