"""One run of an MLflow experiment: what a batch of scenes, a scene, a search or a trial sends."""

import functools
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgs.config import ratio_name
from flexgs.errors import UserError
from flexgs.files import write_json
from flexgs.inputs import read_json
from flexgs.report.table import psnr_auc
from flexgs.tracking import notes
from flexgs.urls import public

if TYPE_CHECKING:
    from flexgs.tracking.experiment import Tracking

CUT_BYTES = 50_000_000
"""Cuts larger than this are not copied to MLflow; they are in the run folder anyway."""
MODEL_BYTES = 500_000_000
"""Models larger than this are not copied to MLflow, which copies them twice: their version names the folder
that they are in."""
CURVE = "curve/psnr_by_ratio_permille"
"""The metric of PSNR over the ratio, whose step is the ratio in thousandths."""
_BATCH = 900  # MLflow takes at most 1000 metrics and 100 parameters in a call
_NOT_METRICS = {"step", "steps", "time", "eta_seconds", "stage"}
_METRIC_NAMES = {"lpips_vgg": "lpips", "lpips_alex": "lpips_alex"}


def _tolerant(method: Callable[..., None]) -> Callable[..., bool]:
    """Let a method return whether MLflow took all it sent; a failure becomes a warning and a pause."""

    @functools.wraps(method)
    def call(self: "Run", *args: Any, **kwargs: Any) -> bool:
        if self.tracking.available():
            try:
                method(self, *args, **kwargs)
                return True
            except Exception as e:
                self.tracking.failed(e)
        self.tracking.missed = True
        return False

    return call


class Run:
    """A run in MLflow, made by Tracking.run; methods without a result return whether MLflow took it all."""

    def __init__(self, tracking: "Tracking", folder: Path, name: str, tags: Mapping[str, object],
                 params: Mapping[str, object], parent: "Run | None"):
        self.tracking, self.folder, self.name = tracking, folder, name
        self.tags, self.params, self.parent = dict(tags), params, parent
        self._id: str | None = None
        self._logged = -1
        """The last step of the history that MLflow has."""
        self._monitor: Any = None

    @property
    def id(self) -> str:
        """MLflow's id of the run, from mlflow.json if MLflow still knows that one, else of a new run."""
        if self._id is None:
            self._id = self._continued() or self._created()
        return self._id

    @_tolerant
    def start(self) -> None:
        """Show the run as running; it is created if MLflow does not have it."""
        self.tracking.client.update_run(self.id, status="RUNNING")

    @_tolerant
    def watch_machine(self) -> None:
        """Log CPU, memory, disk, network and GPUs of this machine until the run ends.

        On a cluster these are not the machines that train: the metric train/memory_mb has a scene's memory.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=self.tracking.uri)
        self._monitor.start()

    @_tolerant
    def describe(self, text: str) -> None:
        """Show a Markdown text as the description of the run."""
        self.tracking.client.set_tag(self.id, "mlflow.note.content", public(text))

    @_tolerant
    def log_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log the numbers of each row after the last step logged, at row["step"].

        They are named train/<name>; those by ratio, of config.eval_every, are named as at the end, so that
        the experiment's table shows the quality of a scene while it trains.
        """
        from mlflow.entities import Metric

        run_id, metrics = self.id, []
        new = sorted((row for row in rows if row["step"] > self._logged), key=lambda row: row["step"])
        for i, row in enumerate(new):
            # A step is sent whole or not at all. Metrics that are sent twice, because the answer was lost,
            # have the same time, and are one metric to MLflow.
            at = _ms(row.get("time"))
            metrics += [Metric(f"train/{key}", float(value), at, row["step"])
                        for key, value in row.items() if key not in _NOT_METRICS and _is_number(value)]
            metrics += _by_ratio(ratios := row.get("ratios", {}), at, row["step"])
            if len(ratios) > 1:
                metrics.append(Metric("psnr_auc", psnr_auc(ratios), at, row["step"]))
            if i + 1 == len(new) or len(metrics) > _BATCH // 2:
                self.tracking.client.log_batch(run_id, metrics=metrics)
                self._logged, metrics = row["step"], []

    @_tolerant
    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Log one number."""
        self.tracking.client.log_metric(self.id, name, value, step=step)

    @_tolerant
    def log_results(self, results: Mapping[str, Any], folder: Path) -> None:
        """Log results.json, renders and small cuts of a run folder, end the run, and register the model.

        Results that the run has already are not logged again.
        """
        if self.tracking.client.get_run(self.id).data.tags.get("results") != _digest(results["ratios"]):
            self._log_results(results, folder)
        self._log_model(results, folder / "model")

    def _log_results(self, results: Mapping[str, Any], folder: Path) -> None:
        client, run_id, steps = self.tracking.client, self.id, results["steps"]
        times = {k: results[k] for k in ("train_seconds", "seconds") if _is_number(results.get(k))}
        self._log_ratios(results["ratios"], {"psnr_auc": psnr_auc(results["ratios"]), **times}, steps,
                         results.get("time"))
        self._log_capture(results)
        for name in ("results.json", "config.json"):
            if (folder / name).is_file():
                client.log_artifact(run_id, str(folder / name))
        for part, ours in (("renders", "[!.]*.png"), ("cuts", "[!.]*.ply")):
            for file in sorted((folder / part).glob(ours)):
                if part == "renders" or file.stat().st_size <= CUT_BYTES:
                    client.log_artifact(run_id, str(file), part)
        client.set_tag(run_id, "mlflow.note.content", notes.scene(results, folder))
        client.set_tag(run_id, "results", _digest(results["ratios"]))  # last: it says that the rest is there
        self._end("FINISHED", None)

    def _log_model(self, results: Mapping[str, Any], model: Path) -> None:
        """Register the model of a folder, a large one by reference, and tag the run with where it is."""
        if not model.is_dir():
            return
        from flexgs.tracking.registry import register

        where, digest = str(model), _digest(results["ratios"])
        small = sum(file.stat().st_size for file in model.iterdir()) <= MODEL_BYTES
        try:
            where = register(self.tracking.client, self.id, results, model, digest, copied=small)
        # After a full disk or a refusal of the registry, the other results are still logged.
        except Exception as e:
            self.tracking.warn(e)
        self.tracking.client.set_tag(self.id, "model", where)

    @_tolerant
    def log_summary(self, ratios: Mapping[str, Mapping[str, float]], steps: int,
                    numbers: Mapping[str, float] | None = None, when: float | None = None) -> None:
        """Log figures by ratio, such as means over scenes, and other numbers, unless the run has them.

        Args:
            ratios: the figures, such as psnr, by name of the ratio.
            steps: the step to log them at.
            numbers: further metrics.
            when: the time of the figures, in seconds since 1970; None for now.
        """
        client, digest = self.tracking.client, _digest([ratios, numbers])
        if client.get_run(self.id).data.tags.get("results") != digest:
            self._log_ratios(ratios, numbers or {}, steps, when)
            client.set_tag(self.id, "results", digest)

    @_tolerant
    def log_files(self, files: Iterable[Path]) -> None:
        """Copy files to the run's artifacts."""
        for file in files:
            self.tracking.client.log_artifact(self.id, str(file))

    @_tolerant
    def finish(self, status: str = "FINISHED", error: str | None = None) -> None:
        """End the run: FINISHED, FAILED (with the error as a tag) or KILLED."""
        self._end(status, error)

    def _end(self, status: str, error: str | None) -> None:
        client = self.tracking.client
        if self._monitor is not None:
            self._monitor.finish()
        if error is not None:
            client.set_tag(self.id, "error", public(error)[:5000])
        elif "error" in client.get_run(self.id).data.tags:
            client.delete_tag(self.id, "error")
        client.set_terminated(self.id, status)

    def _log_ratios(self, ratios: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, float], steps: int,
                    when: float | None) -> None:
        from mlflow.entities import Metric

        at = _ms(when)  # a metric that is sent twice with the same time is one to MLflow
        metrics = _by_ratio(ratios, at, steps)
        # MLflow draws over steps and time only: with the ratio as the step, it draws quality over ratio.
        metrics += [Metric(CURVE, row["psnr"], at, round(1000 * float(ratio)))
                    for ratio, row in ratios.items() if _is_number(row.get("psnr"))]
        metrics += [Metric(key, float(value), at, steps) for key, value in numbers.items()]
        self.tracking.client.log_batch(self.id, metrics=metrics)

    def _log_capture(self, results: Mapping[str, Any]) -> None:
        """Log the capture as the run's dataset, unless the results are of before captures had digests."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        protocol = results.get("protocol", {})
        if "digest" in protocol:
            profile = {key: protocol[key]
                       for key in ("train_views", "test_views", "width", "height", "points")}
            source = json.dumps({"uri": results["capture"]})
            dataset = Dataset(results["scene"], protocol["digest"], "local", source,
                              profile=json.dumps(profile))
            context = [InputTag("mlflow.data.context", "training")]
            self.tracking.client.log_inputs(self.id, [DatasetInput(dataset, context)])

    def _continued(self) -> str | None:
        """Return the id in mlflow.json and update the run's tags; None if MLflow has no such run any more."""
        from mlflow.exceptions import MlflowException

        client = self.tracking.client
        try:
            run_id = read_json(self.folder / "mlflow.json", dict[str, str])["run_id"]
            run = client.get_run(run_id)
        except (UserError, KeyError):  # no file, or a damaged one
            return None
        except MlflowException as e:
            if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        histories = (client.get_metric_history(run_id, name) for name in run.data.metrics
                     if name.startswith("train/"))
        self._logged = max((m.step for history in histories for m in history), default=-1)
        for key, value in self._all_tags().items():
            client.set_tag(run_id, key, value)
        return run_id

    def _created(self) -> str:
        """Create the run, with its tags and parameters, and write its id to mlflow.json.

        MLflow may make a run although its answer is lost, and its client then asks again. So a request has a
        name, which is in mlflow.json before it is sent, and one of the runs of that name stays.
        """
        from mlflow.entities import Param

        client, about, made = self.tracking.client, self.folder / "mlflow.json", []
        try:
            request = read_json(about, dict[str, str])["request"]
            made = self._made(request)
        except (UserError, KeyError):  # no file, or one that does not say
            request = secrets.token_hex(8)
            write_json(about, {"request": request})
        if not made:
            client.create_run(self.tracking.id, run_name=self.name,
                              tags=self._all_tags() | {"request": request})
            made = self._made(request)
        run_id, *others = made
        for other in others:
            client.delete_run(other)
        write_json(about, {"run_id": run_id})
        params = [Param(key, public(str(value))[:6000]) for key, value in self.params.items()]
        for i in range(0, len(params), 100):
            client.log_batch(run_id, params=params[i:i + 100])
        return run_id

    def _made(self, request: str) -> list[str]:
        """Return the ids of the runs that were made for a request, the oldest first."""
        found = self.tracking.client.search_runs([self.tracking.id], f"tags.request = '{request}'",
                                                 order_by=["attributes.start_time"])
        return [run.info.run_id for run in found]

    def _all_tags(self) -> dict[str, str]:
        tags = {key: public(str(value)) for key, value in self.tags.items() if value is not None}
        if self.parent is not None:
            tags["mlflow.parentRunId"] = self.parent.id
        return tags


def metric_name(ratio: float) -> str:
    """Return the part of a metric's name for a ratio: 0.05 is ratio_0.05, with two decimals or more."""
    return "ratio_" + max(f"{ratio:.2f}", f"{Decimal(ratio_name(ratio)):f}", key=len)


def _by_ratio(ratios: Mapping[str, Mapping[str, Any]], at: int, step: int) -> list[Any]:
    """Return the metrics of each ratio, psnr/ratio_0.05, at a time in ms and a step."""
    from mlflow.entities import Metric

    return [Metric(f"{_METRIC_NAMES.get(key, key)}/{metric_name(float(ratio))}", float(value), at, step)
            for ratio, row in ratios.items() for key, value in row.items() if _is_number(value)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Make nested dicts one: {"base": {"stage1_fraction": 0.5}} is {"base.stage1_fraction": 0.5}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _digest(value: object) -> str:
    """Return a short hexadecimal name for a JSON value, the same in every process."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def _ms(when: float | None) -> int:
    """Return a time in seconds since 1970, or now, in MLflow's milliseconds."""
    return int(1000 * (time.time() if when is None else when))
