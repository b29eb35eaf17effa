"""Many scenes trained side by side, started and moved by the schedule, and shown on screen and in MLflow."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import harmonic_mean
from typing import Any, Self

import ray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from flexgs.callbacks.progress import progress_line
from flexgs.config import percent
from flexgs.errors import UserError
from flexgs.files import read_jsonl
from flexgs.report.table import mean_ratios, psnr_auc
from flexgs.run import finished, git_sha, history
from flexgs.scene import Scene as Capture
from flexgs.tracking import Run, Tracking, flatten, notes
from ray_jobs.schedule import Placement, SceneState, plan, speedup
from ray_jobs.store import Store
from ray_jobs.train_scene import RESULTS, STOP, SceneJob, train_scene

log = logging.getLogger("flexgs.batch")

PLAIN_SECONDS = 10.0
"""Time between two progress lines of a scene where the output is not a terminal."""
TRACKING_SECONDS = 10.0
"""Time between two messages to MLflow about a scene."""
WAIT_FOR_TRACKING_SECONDS = 60.0
"""How long to wait for an MLflow that cannot be reached when all scenes are trained."""
HISTORY = ("metrics.jsonl", "failures.jsonl", "mlflow.json")
"""Files of a run folder that tell how its training went."""
PULL_SECONDS = 3.0
"""Time between two downloads of a scene's progress from an object store."""
KEEP_SECONDS = 60.0
"""How long to wait for checkpoints when the job is interrupted."""
STEADY = 5
"""Number of reports over which a scene's views per second are averaged."""


class Batch:
    """The scenes of an experiment folder, whose `results` and `errors`, by scene, grow while they train."""

    def __init__(self, store: Store, tracking: Tracking, command: str):
        """Prepare the parent run in MLflow; command: the command line that repeats the batch."""
        self.store, self.tracking, self.command, self.sha = store, tracking, command, git_sha()
        store.pull("mlflow.json")
        self.run = tracking.run(store.folder, "all scenes", kind="batch", tags={"git_sha": self.sha})
        self.results: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}
        self._untold: list[SceneJob] = []
        """Finished scenes whose results MLflow has not taken yet."""

    def skip(self, job: SceneJob, scene: Capture) -> bool:
        """Whether not to train: the scene is finished, or its folder holds other settings or another capture.

        The results of a finished scene are sent to MLflow, which may have missed them.
        """
        job.store.pull("config.json", "results.json", "model/model.json", *HISTORY)
        try:
            results = finished(job.folder, job.config, scene)
        except UserError as e:
            self.errors[job.name] = e
            return True
        if results is None:
            return False
        print(f"{job.name}: already finished, {results['steps']} views", flush=True)
        self.results[job.name] = results
        self._report(job, self._run_of(job))
        return True

    def _report(self, job: SceneJob, run: Run) -> None:
        """Send MLflow what it does not have of a finished scene."""
        with _storage_may_be_away():
            job.store.pull(*HISTORY, *RESULTS)
        run.log_history(history(job.folder / "metrics.jsonl"))
        if not run.log_results(self.results[job.name], job.folder):
            self._untold.append(job)

    def train(self, jobs: Sequence[SceneJob], sizes: Sequence[int],
              machines: Callable[[int], Mapping[str, int]]) -> None:
        """Train the scenes; one that fails does not disturb the others.

        Args:
            jobs: the scenes.
            sizes: the numbers of workers that a scene may have, rising.
            machines: called with the number of scenes that wait; returns how many workers each machine has
                room for now.
        """
        watches = {job.name: Watch(job, self._run_of(job)) for job in jobs}
        running: dict[Future, Watch] = {}
        watched = False
        pool = ThreadPoolExecutor(len(jobs))
        try:
            with Screen() as screen:
                while watches:
                    there = machines(sum(not watch.place for watch in watches.values()))
                    for watch in running.values():
                        if watch.place and watch.place.machine not in there:
                            watch.drain(screen)
                    for name, place in plan(there, [watch.scene() for watch in watches.values()],
                                            sizes).items():
                        watch = watches[name]
                        if watch.place:
                            watch.move(place, screen)
                        else:
                            running[pool.submit(train_scene, watch.start(place, screen))] = watch
                    screen.show({watch.job.name: watch.poll(screen) for watch in running.values()},
                                [name for name, watch in watches.items() if not watch.place])
                    if not watched:  # MLflow takes seconds to open: Ray starts the workers meanwhile
                        self.run.start()
                        with _storage_may_be_away():
                            self.store.push("mlflow.json")
                        self.run.watch_machine()
                        watched = True
                    for watch in running.values():
                        watch.send_history()
                    if not running:
                        time.sleep(1.0)  # no machine is left, but the cluster may get one
                    done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        watch = running.pop(future)
                        if not future.exception() and future.result() is None:
                            if again := watch.stopped():
                                running[pool.submit(train_scene, watch.start(again, screen))] = watch
                        else:
                            screen.log(self._ended(watch, future))
                            del watches[watch.job.name]
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                self._keep(running)
            for watch in watches.values():
                if watch.started:
                    watch.run.finish("KILLED")
            self.run.finish("KILLED")
            ray.shutdown()  # ends the threads that wait for Ray, which would keep Python from exiting
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, running: Mapping[Future, "Watch"]) -> None:
        """Stop the running scenes at their next report, with a checkpoint; a second Ctrl-C ends at once."""
        print(f"flexgs: waits up to {KEEP_SECONDS:.0f} s for checkpoints; Ctrl-C ends at once",
              file=sys.stderr, flush=True)
        for watch in running.values():
            watch.stop()
        with suppress(KeyboardInterrupt):
            wait(running, timeout=KEEP_SECONDS)
        for watch in running.values():
            if step := watch.job.store.latest_step():
                print(f"{watch.job.name}: the checkpoint of {step:,} of "
                      f"{watch.job.config.steps:,} views is kept", flush=True)

    def finish(self) -> None:
        """End the parent run in MLflow, with the means over scenes.

        If MLflow cannot be reached, scenes that it misses are sent again for WAIT_FOR_TRACKING_SECONDS.
        """
        waited_from = time.monotonic()
        if self._untold:
            print(f"MLflow is away, waiting for it up to {WAIT_FOR_TRACKING_SECONDS:.0f} s", flush=True)
        while self._untold and time.monotonic() - waited_from < WAIT_FOR_TRACKING_SECONDS:
            time.sleep(2.0)
            self.tracking.retry()
            untold, self._untold = self._untold, []
            for job in untold:
                self._report(job, self._run_of(job))
        if self._untold:
            print(f"MLflow has not got {', '.join(job.name for job in self._untold)}; the "
                  "same command sends it", flush=True)
        if self.results:
            results = [self.results[scene] for scene in sorted(self.results)]
            means = mean_ratios(results)
            self.run.log_summary(means, max(r["steps"] for r in results),
                                 {"psnr_auc": psnr_auc(means)} if means else {},
                                 max(r.get("time", 0) for r in results))
            self.run.describe(notes.batch(results, self.command))
        self.run.finish("FAILED" if self.errors else "FINISHED")

    def _ended(self, watch: "Watch", future: Future) -> str:
        """Record how a scene ended, and return the line to show."""
        job, run = watch.job, watch.run
        (job.folder / STOP).unlink(missing_ok=True)  # the scene may have ended before it saw the file
        with _storage_may_be_away():
            job.store.push(STOP)
        error = future.exception()
        if error is None:
            results = self.results[job.name] = future.result()
            self._report(job, run)
            figures = ", ".join(f"{row['psnr']:.2f} dB at {percent(ratio)}"
                                for ratio, row in results["ratios"].items())
            return f"{job.name}: finished in {watch.seconds():.0f} s: {figures}"
        if not isinstance(error, Exception):
            raise error
        self.errors[job.name] = error
        watch.send_history(now=True)
        run.finish("FAILED", str(error))
        return f"{job.name}: failed after {watch.seconds():.0f} s: {error}"

    def _run_of(self, job: SceneJob) -> Run:
        return self.tracking.run(job.folder, job.name, kind="scene", parent=self.run,
                                 params=flatten(job.config.to_dict()),
                                 tags={"scene": job.name, "preset": job.config.preset, "git_sha": self.sha})


class Watch:
    """Follows one scene while it trains, by the files that its workers write."""

    def __init__(self, job: SceneJob, run: Run):
        self.job, self.run = job, run
        self.place: Placement | None = None
        """Where the scene trains; None while it waits."""
        self.started = 0.0
        """Seconds since 1970 when the scene was first started; 0 if it has not been."""
        self._going: Placement | None = None
        self._rate: float | None = None
        self._gave = self._draining = False
        self._since, self._kept = 0.0, job.store.latest_step()
        self._history, self._failures = job.folder / "metrics.jsonl", job.folder / "failures.jsonl"
        self._failed = len(read_jsonl(self._failures))
        self._tracked = self._pulled = 0.0

    def scene(self) -> SceneState:
        """Return the state of the scene for the schedule."""
        rows = self._rows() if self.place else []
        if rows and self.place:
            rate = harmonic_mean([row["views_per_second"] for row in rows[-STEADY:]])
            self._rate = rate / speedup(self.place.workers) or None
        views = self.job.config.steps - (rows[-1]["step"] if rows else self._kept)
        return SceneState(self.job.name, max(0, views), self._rate, self.place, self._going, bool(rows),
                          self._gave)

    def start(self, place: Placement, screen: "Screen") -> SceneJob:
        """Record that the scene starts at a place, and return the job to train there."""
        self._draining = False
        self.place, self._since, self._kept = place, time.time(), self.job.store.latest_step()
        self.started = self.started or self._since
        if self._kept:
            screen.log(f"{self.job.name}: continues from {self._kept} of "
                       f"{self.job.config.steps}{_with(place)}")
        return replace(self.job, workers=place.workers, machine=place.machine or None)

    def move(self, place: Placement, screen: "Screen") -> None:
        """Ask the workers to stop at their next report, so that the scene can continue at another place."""
        assert self.place
        self._going, self._gave = place, self._gave or place.workers < self.place.workers
        self.stop()
        screen.log(f"{self.job.name}: is going to continue{_with(place)}")

    def drain(self, screen: "Screen") -> None:
        """Ask the workers to stop at their next report, since their machine is leaving; asks only once."""
        if not self._draining:
            self._draining = True
            self.stop()
            screen.log(f"{self.job.name}: its machine is going, it waits for another")

    def stop(self) -> None:
        """Ask the workers to stop at their next report, by a file in the run folder."""
        (self.job.folder / STOP).touch()
        with _storage_may_be_away():
            self.job.store.push(STOP)

    def stopped(self) -> Placement | None:
        """Record that the scene has stopped, and return the place where it was asked to continue, if any."""
        self.place, self._going, going = None, None, self._going
        return going

    def poll(self, screen: "Screen") -> str:
        """Return the scene's progress line, and log on the screen why workers were started again."""
        failures = read_jsonl(self._failures, "errors")
        for failure in failures[self._failed:]:
            screen.log(f"{self.job.name}: workers started again: "
                       f"{'; '.join(sorted(set(failure['errors'].values())))}")
            self.run.log_metric("train/restarts", len(failures))
        self._failed = len(failures)
        rows, name = self._rows(), f"{self.job.name} x{self.place.workers if self.place else 0}"
        if not rows:
            return f"{name:14} starting ({time.time() - self._since:.0f} s)"
        row = rows[-1]
        if row["step"] >= row["steps"]:
            return f"{name:14} evaluating at {row['step']} of {row['steps']}"
        return progress_line(name, row["step"], row)

    def send_history(self, now: bool = False) -> None:
        """Send MLflow the new part of the history, at most every TRACKING_SECONDS unless `now`."""
        if not self._tracked:
            self.run.start()
            with _storage_may_be_away():
                self.job.store.push("mlflow.json")
        if now or time.time() - self._tracked > TRACKING_SECONDS:
            self._tracked = time.time()
            self.run.log_history(history(self._history))

    def seconds(self) -> float:
        """Return the time since the scene was first started."""
        return time.time() - self.started if self.started else 0.0

    def _rows(self) -> list[dict[str, Any]]:
        """Return the lines of the history that the present workers, not earlier ones, have written."""
        if time.monotonic() - self._pulled > PULL_SECONDS:
            with _storage_may_be_away():
                self.job.store.pull("metrics.jsonl")
            self._pulled = time.monotonic()
        if self._history.exists() and self._history.stat().st_mtime > self._since:
            return [row for row in history(self._history) if row["step"] > self._kept]
        return []


@contextmanager
def _storage_may_be_away() -> Iterator[None]:
    """Turn an error of the storage into a warning: this process only watches, and the workers would fail."""
    try:
        yield
    except OSError as e:
        log.warning("the storage does not answer: %s", str(e).splitlines()[0][:300])


def _with(place: Placement) -> str:
    return f" with {place.workers} worker{'s' * (place.workers > 1)}"


class Screen:
    """Progress of the scenes: a block that is redrawn on a terminal, else lines every PLAIN_SECONDS."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.live = (Live(console=self.console, auto_refresh=False, transient=True)
                     if self.console.is_terminal else None)
        self._shown: dict[str, tuple[float, str]] = {}

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def log(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def show(self, lines: dict[str, str], waiting: Sequence[str]) -> None:
        """Show the progress line of each scene that trains, and the names of those that wait."""
        if waiting:
            lines = lines | {"": f"{len(waiting)} waiting: {', '.join(waiting)}"}
        if self.live:
            self.live.update(Text("\n".join(lines.values()), no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        for scene, line in lines.items():
            at, last = self._shown.get(scene, (-PLAIN_SECONDS, ""))
            if line != last and now - at >= PLAIN_SECONDS:
                self._shown[scene] = now, line
                self.log(line)
