"""How a running search is shown: lines in the terminal, runs in MLflow."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ray import tune

from flexgs.record import WAIT_FOR_TRACKING_SECONDS
from flexgs.run import git_sha
from flexgs.tracking import Run, Tracking, Writer
from flexgs.urls import describe
from ray_jobs.cluster import SAY_SECONDS
from tuning.study import PARETO, best, front, quality
from tuning.trial import MEASURED_AT, NUMBER, RUNGS, Record, Search, begun


class Progress(tune.Callback):
    """A Tune callback that follows the trials, whose records (trial.json) say how they ended."""

    def __init__(self, search: Search, objective: str, tracking: Tracking, seconds: float | None):
        """Prepare the parent run in MLflow; seconds: the time after which Tune stops all trials."""
        self.search, self.objective, self.tracking = search, objective, tracking
        self._seconds, self._deadline = seconds or math.inf, math.inf
        self.mlflow = Writer()
        self.shown = quality(objective)
        self.ended = 0
        """The number of Tune's trials that have ended."""
        self._start = time.monotonic()
        self.parent = tracking.run(search.folder, f"{search.capture.name}: search", kind="search",
                                   tags={"scene": search.capture.name, "git_sha": git_sha()})

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the clock and the parent run in MLflow."""
        self._deadline = time.monotonic() + self._seconds
        self.mlflow.put(self.parent.start)

    def on_trial_result(self, iteration: int, trials: Sequence[Any], trial: Any,
                        result: dict[str, Any], **info: Any) -> None:
        """Print what a trial was measured at."""
        quarters = {1: "a quarter", 2: "half", RUNGS: "all"}[result["rung"]]
        self._log(trial, f"{self.shown} {result[self.shown]:.3f} after {quarters} of stage 2")

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Record whether a trial was stopped early, delete what it needs no longer, and send it to MLflow."""
        self.ended += 1
        record = self._record(trial)
        if record.status == "interrupted" and time.monotonic() > self._deadline:
            return  # the time is over: the trial continues when the search does
        if record.status == "interrupted":
            record = replace(record, stopped=True)
            self.search.save(record)
            self._log(trial, "stopped: others were better")
        if record.number:  # trial 0 is kept: it may be continued to compare it with the best
            self.search.drop(record.params, "checkpoints")
        self._drop_models()
        self.send(record)

    def _drop_models(self) -> None:
        """Delete the models of trials that others have beaten; only trial 0, the best and the front stay."""
        records = self.search.records()
        if kept := [r for r in records if r.status == "finished"]:
            kept = [records[0], best(records, self.objective),
                    *(front(records) if self.objective == PARETO else [])]
        for record in records:
            if record.status == "finished" and record not in kept:
                self.search.drop(record.params, "model")

    def on_trial_recover(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Say that a trial goes on after its process died."""
        if not self._record(trial).error:
            self._log(trial, "its process died; goes on from its checkpoint")

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Say why a trial failed, and send it to MLflow; one whose process died too often is interrupted."""
        self.ended += 1
        record = self._record(trial)
        if record.error:
            self._log(trial, f"failed: {record.error}")
            self.send(record)
            return
        why = describe(trial.get_pickled_error() or RuntimeError("unknown"))
        self._log(trial, f"its process died again and again ({why}); the same command goes on with it")

    def send(self, record: Record, final: bool = False) -> Run:
        """Let MLflow have a trial's parameters and figures, and return its run.

        Figures are logged at the view they were measured at. Those of a trial 0 that was stopped are left to
        the end of the search (final), since it may go on to be compared with the best.
        """
        params = {"number": record.number, **record.params}
        run = self.tracking.run(self.search.trial(record.params).folder, f"trial {record.number}",
                                kind="trial", parent=self.parent, params=params,
                                tags={"scene": self.search.capture.name, "status": record.status})
        stage_2 = self.search.start.steps - self.search.start.base_steps
        steps = {rung: self.search.start.steps - stage_2 * (RUNGS - rung) // RUNGS for rung in MEASURED_AT
                 if str(rung) in record.rungs}
        self.mlflow.put(run.log_history, [{"step": step, "psnr_auc": record.rungs[str(rung)]["psnr_auc"]}
                                          for rung, step in steps.items()])
        if record.last and (final or record.number or record.status == "finished"):
            self.mlflow.put(run.log_summary, record.last["ratios"], max(steps.values()),
                            {"psnr_auc": record.last["psnr_auc"], "mb": record.last["mb"],
                             "train_seconds": record.seconds})
        self.mlflow.put(run.finish, "FAILED" if record.error else "FINISHED", record.error)
        return run

    def finish(self, winner: Record, files: Sequence[Path]) -> list[Run]:
        """End the parent run, with the figures of the best trial and the report; return the trials' runs.

        MLflow gets what it has missed of the trials. If it is away, this is repeated for
        WAIT_FOR_TRACKING_SECONDS.
        """
        put, run, until = self.mlflow.put, self.parent, time.monotonic() + WAIT_FOR_TRACKING_SECONDS
        while True:
            self.tracking.retry()
            runs = [self.send(record, final=True) for record in self.search.records()]
            put(run.log_summary, winner.last["ratios"], self.search.start.steps, {
                "psnr_auc": winner.last["psnr_auc"], "mb": winner.last["mb"], "best_trial": winner.number})
            put(run.describe, (self.search.folder / "report.md").read_text())
            put(run.log_files, files)
            self.end("FINISHED")
            if self.mlflow.idle and not self.tracking.missed:
                return runs
            if not self.mlflow.idle or time.monotonic() > until:
                print("MLflow has not got all of the search; the same command sends it", flush=True)
                return runs
            time.sleep(2.0)

    def end(self, status: str) -> None:
        """End the parent run, and wait for an MLflow that is slow."""
        self.mlflow.put(self.parent.finish, status)
        self.mlflow.drain(SAY_SECONDS)
        runs = (path.parent.name for path in self.search.folder.glob("trials/*/mlflow.json"))
        self.search.store.push("mlflow.json", *(f"trials/{name}/mlflow.json" for name in runs))

    def pages(self, runs: Sequence[Run]) -> list[str]:
        """Say where MLflow shows the curves of these trials, and compares them in parallel coordinates."""
        how = self.tracking.how_to_open(runs)
        if not how:
            return []
        server, _, _ = how.rpartition("#/")
        chosen = {"runs": [run._id for run in runs if run._id], "experiments": [self.tracking.id]}
        compare = "#/compare-runs?" + urlencode({key: json.dumps(value) for key, value in chosen.items()})
        return [how, server.rpartition("open ")[2] + compare]

    def _record(self, trial: Any) -> Record:
        params = {name: value for name, value in trial.config.items() if name != NUMBER}
        return begun(self.search, params, trial.config[NUMBER])

    def _log(self, trial: Any, text: str) -> None:
        print(f"{time.monotonic() - self._start:6.0f} s  trial {self._record(trial).number}: {text}",
              flush=True)


