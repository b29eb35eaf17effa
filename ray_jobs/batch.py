"""Many scenes side by side: a thread for each that trains, their progress on the screen and in MLflow."""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import ray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from flexgs import notes
from flexgs.cli import progress_line
from flexgs.errors import UserError
from flexgs.evaluate.table import mean_ratios, psnr_auc
from flexgs.run import finished, git_sha
from flexgs.tracking import Run, Tracking, flatten, read_jsonl
from flexgs.training.checkpoint import latest_checkpoint
from ray_jobs.train_scene import SceneJob, train_scene

PLAIN_SECONDS = 10.0
"""Between two progress lines of a scene where the output is not a terminal."""
TRACKING_SECONDS = 10.0
"""Between two messages to MLflow about a scene."""


class Batch:
    """The scenes of an experiment folder. results and errors, by scene, grow while they train."""

    def __init__(self, folder: Path, tracking: Tracking, command: str):
        """command: what started it, for whoever wants the same again."""
        self.folder, self.tracking, self.command, self.sha = folder, tracking, command, git_sha()
        self.run = tracking.run(folder, "all scenes", kind="batch", tags={"git_sha": self.sha})
        self.results: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}

    def skip(self, job: SceneJob) -> bool:
        """Whether there is nothing to train: the scene was finished earlier. MLflow gets what it may have missed."""
        try:
            results = finished(job.folder, job.config)
        except UserError as e:
            self.errors[job.name] = e
            return True
        if results is None:
            return False
        print(f"{job.name}: already finished, {results['steps']} views", flush=True)
        self.results[job.name] = results
        run = self._run_of(job)
        run.log_history(read_jsonl(job.folder / "metrics.jsonl"))
        run.log_results(results, job.folder)
        return True

    def train(self, jobs: Sequence[SceneJob], slots: int) -> None:
        """Train the scenes, so many at a time; one that fails does not disturb the others."""
        watches: dict[Future, Watch] = {}
        pool = ThreadPoolExecutor(slots)
        try:
            with Screen() as screen:
                for job in jobs:
                    watches[pool.submit(train_scene, job)] = Watch(job, self._run_of(job))
                self.run.start()  # opens MLflow while Ray starts the workers
                self.run.watch_machine()
                while watches:
                    running = [watch for future, watch in watches.items() if future.running()]
                    screen.show({watch.job.name: watch.look(screen) for watch in running}, len(watches) - len(running))
                    for watch in running:
                        watch.track()
                    done, _ = wait(watches, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        screen.say(self._ended(watches.pop(future), future))
        except BaseException:
            for watch in watches.values():
                if watch.started:
                    watch.run.finish("KILLED")
            self.run.finish("KILLED")
            ray.shutdown()  # frees the threads, which wait for Ray and would keep Python from ending
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """End the parent run in MLflow, with the means over scenes."""
        if self.results:
            results = [self.results[scene] for scene in sorted(self.results)]
            means = mean_ratios(results)
            self.run.log_summary(means, max(r["steps"] for r in results), {"psnr_auc": psnr_auc(means)} if means else {})
            self.run.describe(notes.batch(results, self.command))
        self.run.finish("FAILED" if self.errors else "FINISHED")

    def _ended(self, watch: "Watch", future: Future) -> str:
        """Note how a scene ended; the line to show."""
        job, run = watch.job, watch.run
        watch.track(now=True)
        error = future.exception()
        if error is None:
            results = self.results[job.name] = future.result()
            run.log_results(results, job.folder)
            figures = ", ".join(f"{row['psnr']:.2f} dB at {100 * float(r):g} %" for r, row in results["ratios"].items())
            return f"{job.name}: finished in {watch.seconds():.0f} s: {figures}"
        if not isinstance(error, Exception):
            raise error
        self.errors[job.name] = error
        run.finish("FAILED", str(error))
        return f"{job.name}: failed after {watch.seconds():.0f} s: {error}"

    def _run_of(self, job: SceneJob) -> Run:
        return self.tracking.run(job.folder, job.name, kind="scene", parent=self.run, params=flatten(job.config.to_dict()),
                                 tags={"scene": job.name, "preset": job.config.preset, "git_sha": self.sha})


class Watch:
    """Follows one scene by the files that its workers write."""

    def __init__(self, job: SceneJob, run: Run):
        self.job, self.run = job, run
        self.started, self._kept = 0.0, 0
        self._history, self._failures = job.folder / "metrics.jsonl", job.folder / "failures.jsonl"
        self._failed = len(read_jsonl(self._failures))
        self._tracked = 0.0

    def look(self, screen: "Screen") -> str:
        """The scene's line now; tells the screen about workers that were started again."""
        if not self.started:
            self.started = time.time()
            if kept := latest_checkpoint(self.job.folder / "checkpoints"):
                self._kept = int(kept.name.removeprefix("step_"))
                screen.say(f"{self.job.name}: continues from {self._kept} of {self.job.config.steps}")
        failures = read_jsonl(self._failures)
        for failure in failures[self._failed:]:
            screen.say(f"{self.job.name}: workers started again: {'; '.join(sorted(set(failure['errors'].values())))}")
            self.run.log_metric("train/restarts", len(failures))
        self._failed = len(failures)
        row = self._last_row()
        if row is None:
            return f"{self.job.name:14} starting ({self.seconds():.0f} s)"
        if row["step"] >= row["steps"]:
            return f"{self.job.name:14} evaluating at {row['step']} of {row['steps']}"
        return progress_line(self.job.name, row["step"], row)

    def track(self, now: bool = False) -> None:
        """Now and then, send MLflow the part of the history that it does not have."""
        if not self._tracked:
            self.run.start()
        if now or time.time() - self._tracked > TRACKING_SECONDS:
            self._tracked = time.time()
            self.run.log_history(read_jsonl(self._history))

    def seconds(self) -> float:
        return time.time() - self.started if self.started else 0.0

    def _last_row(self) -> dict[str, Any] | None:
        """The newest line of the history, if it is of this start and not of an earlier one."""
        if self._history.exists() and self._history.stat().st_mtime > self.started:
            rows = read_jsonl(self._history)
            if rows and rows[-1]["step"] > self._kept:
                return rows[-1]
        return None


class Screen:
    """Progress as a block that renews itself on a terminal, elsewhere as a line per scene now and then."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self._shown: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def show(self, lines: dict[str, str], waiting: int) -> None:
        """The state of the scenes that train."""
        if self.live:
            queue = [f"{waiting} more waiting"] if waiting else []
            self.live.update(Text("\n".join([*lines.values(), *queue]), no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        for scene, line in lines.items():
            at, last = self._shown.get(scene, (-PLAIN_SECONDS, ""))
            if line != last and now - at >= PLAIN_SECONDS:
                self._shown[scene] = now, line
                self.say(line)
