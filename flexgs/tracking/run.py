"""One run of an MLflow experiment: what a folder of runs, a scene, a search or a trial sends."""

import functools
import hashlib
import json
import math
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
"""Likewise models: MLflow gets a copy per training, and copies it twice. A tag says where the model is."""
CURVE = "curve/psnr_by_ratio_permille"
_BATCH = 900  # MLflow takes at most 1000 metrics and 100 parameters in a call
_NOT_METRICS = {"step", "steps", "time", "eta_seconds"}
_METRIC_NAMES = {"lpips_vgg": "lpips", "lpips_alex": "lpips_alex"}


def _tolerant(method: Callable[..., None]) -> Callable[..., bool]:
    """Turn a failure of MLflow into a warning and leave it alone for a while. The method returns whether
    MLflow took it all."""

    @functools.wraps(method)
    def call(self: "Run", *args: Any, **kwargs: Any) -> bool:
        if self.tracking.available():
            try:
                method(self, *args, **kwargs)
                return True
            except Exception as e:
                self.tracking.failed(e)
        return False

    return call


class Run:
    """One run of a Tracking; made by Tracking.run."""

    def __init__(self, tracking: "Tracking", folder: Path, name: str, tags: Mapping[str, object],
                 params: Mapping[str, object], parent: "Run | None"):
        self.tracking, self.folder, self.name, self.tags, self.params = (tracking, folder, name, dict(tags),
                                                                         params)
        self.parent = parent
        self._id: str | None = None
        self._logged = -1
        """The last step of the history that MLflow has."""
        self._monitor: Any = None

    @property
    def id(self) -> str:
        """MLflow's id of the run: the one in mlflow.json if MLflow knows it, else a new run."""
        if self._id is None:
            self._id = self._continued() or self._created()
        return self._id

    @_tolerant
    def start(self) -> None:
        """Show the run as running, created if need be."""
        self.tracking.client.update_run(self.id, status="RUNNING")

    @_tolerant
    def watch_machine(self) -> None:
        """From now to the end of the run, log CPU, memory, disk, network and GPUs of the machine that calls
        this.

        That is the one that the job was started on; on a cluster, what a scene needs is in its
        train/memory_mb.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=self.tracking.uri)
        self._monitor.start()

    @_tolerant
    def describe(self, text: str) -> None:
        """Show the Markdown text as the description of the run."""
        self.tracking.client.set_tag(self.id, "mlflow.note.content", public(text))

    @_tolerant
    def log_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log each row's numbers as train/<name> at row["step"] and row["time"], except rows up to the last
        step logged."""
        from mlflow.entities import Metric

        run_id, metrics = self.id, []
        new = sorted((row for row in rows if row["step"] > self._logged), key=lambda row: row["step"])
        for i, row in enumerate(new):
            # A step goes whole or not at all; and what is sent again, because the answer was lost, has the
            # same time as before and is one metric to MLflow.
            metrics += [Metric(f"train/{key}", float(value), _ms(row.get("time")), row["step"])
                        for key, value in row.items() if key not in _NOT_METRICS and _is_number(value)]
            if i + 1 == len(new) or len(metrics) + len(new[i + 1]) > _BATCH:
                self.tracking.client.log_batch(run_id, metrics=metrics)
                self._logged, metrics = row["step"], []

    @_tolerant
    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        self.tracking.client.log_metric(self.id, name, value, step=step)

    @_tolerant
    def log_results(self, results: Mapping[str, Any], folder: Path) -> None:
        """Log results.json, the renders and the smaller cuts of the run folder, end the run, and register the
        model.

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
        client.set_tag(run_id, "results", _digest(results["ratios"]))  # after the rest: all of it is there
        self._end("FINISHED", None)

    def _log_model(self, results: Mapping[str, Any], model: Path) -> None:
        """Register the model in this folder, with its results; a large one stays where it is."""
        if not model.is_dir():
            return
        where = str(model)
        if sum(file.stat().st_size for file in model.iterdir()) <= MODEL_BYTES:
            from flexgs.tracking.registry import register

            try:
                where = register(self.tracking.client, self.id, results, model, _digest(results["ratios"]))
            # a full disk, a registry that is not ours to write to: no reason to lose other results
            except Exception as e:
                self.tracking.warn(e)
        self.tracking.client.set_tag(self.id, "model", where)

    @_tolerant
    def log_summary(self, ratios: Mapping[str, Mapping[str, float]], steps: int,
                    numbers: Mapping[str, float] | None = None, when: float | None = None) -> None:
        """Log figures per ratio, for instance means over scenes, and other numbers, unless the run has them
        already.

        when: the time that they are of, in seconds since 1970; default: now.
        """
        client, digest = self.tracking.client, _digest([ratios, numbers])
        if client.get_run(self.id).data.tags.get("results") != digest:
            self._log_ratios(ratios, numbers or {}, steps, when)
            client.set_tag(self.id, "results", digest)

    @_tolerant
    def log_files(self, files: Iterable[Path]) -> None:
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

        at = _ms(when)  # sent again with the same time, it is one metric to MLflow
        metrics = [Metric(f"{_METRIC_NAMES.get(key, key)}/{metric_name(float(ratio))}", float(value), at,
                          steps)
                   for ratio, row in ratios.items() for key, value in row.items() if _is_number(value)]
        # MLflow draws over steps and time only: with the ratio as the step, it draws quality over ratio.
        metrics += [Metric(CURVE, row["psnr"], at, round(1000 * float(ratio)))
                    for ratio, row in ratios.items() if _is_number(row.get("psnr"))]
        metrics += [Metric(key, float(value), at, steps) for key, value in numbers.items()]
        self.tracking.client.log_batch(self.id, metrics=metrics)

    def _log_capture(self, results: Mapping[str, Any]) -> None:
        """The capture as the run's dataset; nothing if the results are older than the digest of captures."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        protocol = results.get("protocol", {})
        if "digest" in protocol:
            profile = {key: protocol[key]
                       for key in ("train_views", "test_views", "width", "height", "points")}
            dataset = Dataset(results["scene"], protocol["digest"], "local",
                              json.dumps({"uri": results["capture"]}),
                              profile=json.dumps(profile))
            self.tracking.client.log_inputs(self.id,
                                            [DatasetInput(dataset,
                                                          [InputTag("mlflow.data.context", "training")])])

    def _continued(self) -> str | None:
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
        from mlflow.entities import Param

        client = self.tracking.client
        run_id = client.create_run(self.tracking.id, run_name=self.name, tags=self._all_tags()).info.run_id
        write_json(self.folder / "mlflow.json", {"run_id": run_id})
        params = [Param(key, public(str(value))[:6000]) for key, value in self.params.items()]
        for i in range(0, len(params), 100):
            client.log_batch(run_id, params=params[i:i + 100])
        return run_id

    def _all_tags(self) -> dict[str, str]:
        tags = {key: public(str(value)) for key, value in self.tags.items() if value is not None}
        if self.parent is not None:
            tags["mlflow.parentRunId"] = self.parent.id
        return tags


def metric_name(ratio: float) -> str:
    """0.05 -> ratio_0.05: at least two decimals, as many as the ratio needs."""
    return "ratio_" + max(f"{ratio:.2f}", f"{Decimal(ratio_name(ratio)):f}", key=len)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"base": {"stage1_fraction": 0.5}} -> {"base.stage1_fraction": 0.5}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _digest(value: object) -> str:
    """A short name for the value, the same in every process."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def _ms(when: float | None) -> int:
    """MLflow's time, for seconds since 1970, or for now."""
    return int(1000 * (time.time() if when is None else when))
