"""The scenes of a batch as the process that starts them sees them: results, errors, and runs in MLflow."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgs.config import Config, percent
from flexgs.errors import UserError
from flexgs.report.table import mean_ratios, psnr_auc
from flexgs.run import finished, git_sha, history
from flexgs.scene import Scene
from flexgs.store import Store, storage_may_be_away
from flexgs.tracking import SLOW, Run, Tracking, Writer, flatten, notes

RESULTS = ("config.json", "model", "cuts", "renders", "results.json")
"""What a finished run has besides its history; results.json is pushed last, when the rest is there."""
HISTORY = ("metrics.jsonl", "failures.jsonl")
"""Files of a run folder that tell how its training went."""
WAIT_FOR_TRACKING_SECONDS = 60.0
"""How long to wait for an MLflow that cannot be reached when all scenes are trained."""
DRAIN_SECONDS = 30.0
"""How long an interrupted batch waits for MLflow."""


def push_results(store: Store) -> None:
    """Push what a finished run has."""
    store.delete("results.json")  # an old one must not lie beside a new model
    store.push(*RESULTS)


@dataclass(frozen=True)
class SceneRun:
    """A scene to train, and where its run goes."""

    capture: Path
    store: Store
    """The run folder, which the caller owns (files.only_one)."""
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder, or its local copy."""
        return self.store.folder

    @property
    def name(self) -> str:
        """The name of the scene."""
        return self.folder.name


class BatchRecord:
    """The scenes of an experiment folder, whose `results` and `errors`, by name, grow while they train.

    MLflow has a run for each scene below one for the batch, and is called in a thread of its own.
    """

    def __init__(self, store: Store, tracking: Tracking, command: str):
        """Prepare the parent run in MLflow; command: the command line that repeats the batch."""
        self.store, self.tracking, self.command, self.sha = store, tracking, command, git_sha()
        store.pull("mlflow.json")
        self.parent = tracking.run(store.folder, "all scenes", kind="batch", tags={"git_sha": self.sha})
        self.mlflow = Writer()
        self.results: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}
        self._untold: list[SceneRun] = []
        """Finished scenes whose results MLflow has not taken yet."""
        self._ended = False
        """Whether MLflow has got the end of the parent run."""

    def run_of(self, scene: SceneRun) -> Run:
        """Return the scene's run in MLflow."""
        return self.tracking.run(scene.folder, scene.name, kind="scene", parent=self.parent,
                                 params=flatten(scene.config.to_dict()),
                                 tags={"scene": scene.name, "preset": scene.config.preset,
                                       "git_sha": self.sha})

    def skip(self, scene: SceneRun, capture: Scene) -> bool:
        """Whether not to train: the scene is finished, or its folder holds other settings or another capture.

        The results of a finished scene are sent to MLflow, which may have missed them.
        """
        scene.store.pull("config.json", "results.json", "model/model.json", "mlflow.json", *HISTORY)
        try:
            results = finished(scene.folder, scene.config, capture)
        except UserError as e:
            self.errors[scene.name] = e
            return True
        if results is None:
            return False
        print(f"{scene.name}: already finished, {results['steps']} views", flush=True)
        with storage_may_be_away():
            scene.store.pull(*RESULTS)
        self.results[scene.name] = results
        self.mlflow.put(self._report, scene, self.run_of(scene))
        return True

    def begin(self) -> None:
        """Show the batch as running in MLflow."""
        self.mlflow.put(self._open, self.parent, self.store)
        self.mlflow.put(self.parent.watch_machine)

    def started(self, scene: SceneRun, run: Run) -> None:
        """Show a scene as running in MLflow."""
        self.mlflow.put(self._open, run, scene.store)

    def succeeded(self, scene: SceneRun, run: Run, results: Mapping[str, Any]) -> str:
        """Record the results of a scene, and return its figures in words."""
        self.results[scene.name] = dict(results)
        self.mlflow.put(self._report, scene, run)
        return ", ".join(f"{row['psnr']:.2f} dB at {percent(ratio)}"
                         for ratio, row in results["ratios"].items())

    def failed(self, scene: SceneRun, run: Run, error: Exception) -> None:
        """Record why a scene failed."""
        self.errors[scene.name] = error
        self.mlflow.put(run.finish, "FAILED", str(error))

    def killed(self, runs: list[Run]) -> None:
        """Show the batch and these runs as killed in MLflow."""
        for run in (*runs, self.parent):
            self.mlflow.put(run.finish, "KILLED")
        with suppress(KeyboardInterrupt):
            self.mlflow.drain(DRAIN_SECONDS)

    def finish(self) -> None:
        """End the parent run in MLflow, with the means over scenes.

        If MLflow cannot be reached, what it misses is sent again for WAIT_FOR_TRACKING_SECONDS.
        """
        self.mlflow.put(self._end)
        if not self.mlflow.wait(10.0) or self._untold or not self._ended:
            print(SLOW.format(WAIT_FOR_TRACKING_SECONDS), flush=True)
        until = time.monotonic() + WAIT_FOR_TRACKING_SECONDS
        while (self.mlflow.wait(WAIT_FOR_TRACKING_SECONDS) and (self._untold or not self._ended)
               and time.monotonic() < until):
            time.sleep(2.0)
            self.tracking.retry()
            untold, self._untold = self._untold, []
            for scene in untold:
                self.mlflow.put(self._report, scene, self.run_of(scene))
            self.mlflow.put(self._end)
        if self._untold or not self._ended:
            names = ", ".join(scene.name for scene in self._untold) or "the end of the batch"
            print(f"MLflow has not got {names}; the same command sends it", flush=True)

    def _end(self) -> None:
        """End the parent run."""
        told = True
        if self.results:
            results = [self.results[scene] for scene in sorted(self.results)]
            means = mean_ratios(results)
            told = (self.parent.log_summary(means, max(r["steps"] for r in results),
                                            {"psnr_auc": psnr_auc(means)} if means else {},
                                            max(r.get("time", 0) for r in results))
                    and self.parent.describe(notes.batch(results, self.command)))
        self._ended = self.parent.finish("FAILED" if self.errors else "FINISHED") and told

    def _open(self, run: Run, store: Store) -> None:
        """Show a run as running in MLflow; its id goes to the store."""
        run.start()
        with storage_may_be_away():
            store.push("mlflow.json")

    def _report(self, scene: SceneRun, run: Run) -> None:
        """Send MLflow what it does not have of a finished scene."""
        run.log_history(history(scene.folder / "metrics.jsonl"))
        if not run.log_results(self.results[scene.name], scene.folder):
            self._untold.append(scene)
        with storage_may_be_away():
            scene.store.push("mlflow.json")  # the run may have been made only now
