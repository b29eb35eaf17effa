"""Many scenes trained side by side, when and where Ray has room, and shown on screen and in MLflow."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import harmonic_mean
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from flexgs.callbacks.progress import Screen, progress_line
from flexgs.config import percent
from flexgs.errors import UserError
from flexgs.files import read_jsonl
from flexgs.report.table import mean_ratios, psnr_auc
from flexgs.run import finished, git_sha, history
from flexgs.scene import Scene as Capture
from flexgs.store import Store
from flexgs.tracking import SLOW, Run, Tracking, Writer, flatten, notes
from ray_jobs.cluster import SAY_SECONDS, Allocation
from ray_jobs.neighbours import holders
from ray_jobs.schedule import Running, growth
from ray_jobs.train_scene import RESULTS, STOP, SceneJob, train_scene

log = logging.getLogger("flexgs.batch")

TRACKING_SECONDS = 10.0
"""Time between two messages to MLflow about a scene."""
WAIT_FOR_TRACKING_SECONDS = 60.0
"""How long to wait for an MLflow that cannot be reached when all scenes are trained."""
HISTORY = ("metrics.jsonl", "failures.jsonl")
"""Files of a run folder that tell how its training went."""
PULL_SECONDS = 3.0
"""Time between two downloads of a scene's progress from an object store."""
KEEP_SECONDS = 60.0
"""How long to wait for checkpoints when the job is interrupted."""
LEAST_SECONDS = 10.0
"""Time after which scenes ask for one CPU per worker, where none trains since others hold the rest."""
STEADY = 5
"""Number of reports over which a scene's views per second are averaged."""


class Batch:
    """The scenes of an experiment folder, whose `results` and `errors`, by scene, grow while they train."""

    def __init__(self, store: Store, tracking: Tracking, command: str):
        """Prepare the parent run in MLflow; command: the command line that repeats the batch."""
        self.store, self.tracking, self.command, self.sha = store, tracking, command, git_sha()
        store.pull("mlflow.json")
        self.run = tracking.run(store.folder, "all scenes", kind="batch", tags={"git_sha": self.sha})
        self.mlflow = Writer()
        self.results: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}
        self._untold: list[SceneJob] = []
        """Finished scenes whose results MLflow has not taken yet."""

    def skip(self, job: SceneJob, scene: Capture) -> bool:
        """Whether not to train: the scene is finished, or its folder holds other settings or another capture.

        The results of a finished scene are sent to MLflow, which may have missed them.
        """
        job.store.pull("config.json", "results.json", "model/model.json", "mlflow.json", *HISTORY)
        try:
            results = finished(job.folder, job.config, scene)
        except UserError as e:
            self.errors[job.name] = e
            return True
        if results is None:
            return False
        print(f"{job.name}: already finished, {results['steps']} views", flush=True)
        with _storage_may_be_away():
            job.store.pull(*RESULTS)
        self.results[job.name] = results
        self.mlflow.put(self._report, job, self._run_of(job))
        return True

    def _report(self, job: SceneJob, run: Run) -> None:
        """Send MLflow what it does not have of a finished scene."""
        run.log_history(history(job.folder / "metrics.jsonl"))
        if not run.log_results(self.results[job.name], job.folder):
            self._untold.append(job)
        with _storage_may_be_away():
            job.store.push("mlflow.json")  # the run may have been made only now

    def _open(self, run: Run, store: Store) -> None:
        """Show a run as running in MLflow; its id goes to the store."""
        run.start()
        with _storage_may_be_away():
            store.push("mlflow.json")

    def train(self, jobs: Sequence[SceneJob], allocation: Allocation,
              free: Callable[[], Mapping[str, int]]) -> None:
        """Train the scenes; one that fails does not disturb the others.

        Args:
            jobs: the scenes.
            allocation: the workers that a scene may have.
            free: returns how many more workers each machine has room for.
        """
        watches = {job.name: Watch(job, self._run_of(job), self.mlflow) for job in jobs}
        running: dict[Future, Watch] = {}
        pool = ThreadPoolExecutor(len(jobs) + 1)
        said = busy = time.monotonic()

        def start(job: SceneJob) -> None:
            running[pool.submit(_train, job)] = watches[job.name]

        self.mlflow.put(self._open, self.run, self.store)
        self.mlflow.put(self.run.watch_machine)
        try:
            with Screen() as screen:
                while watches:
                    busy = time.monotonic() if running else busy
                    least = time.monotonic() - busy > LEAST_SECONDS
                    asked = replace(allocation, cpus=1) if least else allocation
                    for watch in watches.values():
                        if not watch.workers and (job := watch.reserved(asked, screen)):
                            self.mlflow.put(self._open, watch.run, watch.job.store)
                            start(job)
                    waiting = [name for name, watch in watches.items() if not watch.workers]
                    screen.show({watch.job.name: watch.poll(screen) for watch in running.values()}, waiting)
                    states = [watch.state() for watch in running.values()]
                    if running and not waiting and all(states):
                        for name, workers in growth(free(), [s for s in states if s],
                                                    allocation.sizes).items():
                            watches[name].grow(workers, screen)
                    if waiting and time.monotonic() - said > SAY_SECONDS:
                        pool.submit(_say, waiting, asked, len(running), screen)
                        said = time.monotonic()
                    for watch in running.values():
                        watch.send_history()
                    if not running:
                        time.sleep(0.5)
                    done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        watch = running.pop(future)
                        if future.exception() or future.result():
                            watch.release()
                            screen.log(self._ended(watch, future))
                            del watches[watch.job.name]
                        elif again := watch.stopped(screen):
                            start(again)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                self._keep(running)
            for run in (*(watch.run for watch in watches.values() if watch.started), self.run):
                self.mlflow.put(run.finish, "KILLED")
            with suppress(KeyboardInterrupt):
                self.mlflow.drain(SAY_SECONDS)
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
        if self.results:
            results = [self.results[scene] for scene in sorted(self.results)]
            means = mean_ratios(results)
            self.mlflow.put(self.run.log_summary, means, max(r["steps"] for r in results),
                            {"psnr_auc": psnr_auc(means)} if means else {},
                            max(r.get("time", 0) for r in results))
            self.mlflow.put(self.run.describe, notes.batch(results, self.command))
        self.mlflow.put(self.run.finish, "FAILED" if self.errors else "FINISHED")
        if not self.mlflow.wait(10.0) or self._untold:
            print(SLOW.format(WAIT_FOR_TRACKING_SECONDS), flush=True)
        until = time.monotonic() + WAIT_FOR_TRACKING_SECONDS
        while self.mlflow.wait(WAIT_FOR_TRACKING_SECONDS) and self._untold and time.monotonic() < until:
            time.sleep(2.0)
            self.tracking.retry()
            untold, self._untold = self._untold, []
            for job in untold:
                self.mlflow.put(self._report, job, self._run_of(job))
            self.mlflow.put(self.run.finish, "FAILED" if self.errors else "FINISHED")
        if self._untold or not self.mlflow.idle:
            names = ", ".join(job.name for job in self._untold) or "the end of the batch"
            print(f"MLflow has not got {names}; the same command sends it", flush=True)

    def _ended(self, watch: "Watch", future: Future) -> str:
        """Record how a scene ended, and return the line to show."""
        job, run = watch.job, watch.run
        (job.folder / STOP).unlink(missing_ok=True)  # the scene may have ended before it saw the file
        with _storage_may_be_away():
            job.store.push(STOP)
        error = future.exception()
        if error is None:
            results = self.results[job.name] = future.result()
            self.mlflow.put(self._report, job, run)
            figures = ", ".join(f"{row['psnr']:.2f} dB at {percent(ratio)}"
                                for ratio, row in results["ratios"].items())
            return f"{job.name}: finished in {watch.seconds():.0f} s: {figures}"
        if not isinstance(error, Exception):
            raise error
        self.errors[job.name] = error
        watch.send_history(now=True)
        self.mlflow.put(run.finish, "FAILED", str(error))
        return f"{job.name}: failed after {watch.seconds():.0f} s: {error}"

    def _run_of(self, job: SceneJob) -> Run:
        return self.tracking.run(job.folder, job.name, kind="scene", parent=self.run,
                                 params=flatten(job.config.to_dict()),
                                 tags={"scene": job.name, "preset": job.config.preset, "git_sha": self.sha})


class Watch:
    """Follows one scene while it waits and trains, by the files that its workers write."""

    def __init__(self, job: SceneJob, run: Run, mlflow: Writer):
        self.job, self.run, self.mlflow = job, run, mlflow
        self.workers = 0
        """The number of workers that train the scene; 0 while it waits."""
        self.started = 0.0
        """Seconds since 1970 when the scene was first started; 0 if it has not been."""
        self._room: PlacementGroup | None = None
        self._cpus = 0
        """CPUs per worker that Ray keeps, or is asked for."""
        self._machine: str | None = None
        self._more = 0
        """The number of workers to go on with after a stop; 0 for none but to wait."""
        self._since, self._kept = 0.0, job.store.latest_step()
        self._history, self._failures = job.folder / "metrics.jsonl", job.folder / "failures.jsonl"
        self._failed = len(read_jsonl(self._failures))
        self._tracked = self._pulled = 0.0

    def reserved(self, allocation: Allocation, screen: Screen) -> SceneJob | None:
        """Ask Ray for room for the fewest workers, and return the job to train there once there is room."""
        if self._cpus != allocation.cpus:
            self.release()
        self._room, self._cpus = self._room or allocation.reserve(), allocation.cpus
        if not self._room.wait(0):
            return None
        machine = None if allocation.spread else placement_group_table(self._room)["bundles_to_node_id"][0]
        return self._start(allocation.sizes[0], machine, screen)

    def _start(self, workers: int, machine: str | None, screen: Screen) -> SceneJob:
        if workers > 1:
            self.release()  # Ray Train reserves its workers' room itself
        self.workers, self._machine = workers, machine
        self._since, self._kept = time.time(), self.job.store.latest_step()
        self.started = self.started or self._since
        if self._kept:
            screen.log(f"{self.job.name}: continues from {self._kept} of "
                       f"{self.job.config.steps}{_with(workers)}")
        return replace(self.job, workers=workers, machine=machine, room=self._room, cpus=self._cpus)

    def release(self) -> None:
        """Give back the room that Ray keeps for the scene."""
        if self._room:
            remove_placement_group(self._room)
        self._room = None

    def state(self) -> Running | None:
        """Return the state of the scene for the schedule, once its present workers have reported."""
        if self._more or not self._machine or not (rows := self._rows()):
            return None
        rate = harmonic_mean([row["views_per_second"] for row in rows[-STEADY:]])
        views = max(0, self.job.config.steps - rows[-1]["step"])
        return Running(self.job.name, self._machine, self.workers, views / rate if rate else 0.0)

    def grow(self, workers: int, screen: Screen) -> None:
        """Ask the workers to stop at their next report, so that more can go on."""
        self._more = workers
        self.stop()
        screen.log(f"{self.job.name}: is going to continue{_with(workers)}")

    def stop(self) -> None:
        """Ask the workers to stop at their next report, by a file in the run folder."""
        (self.job.folder / STOP).touch()
        with _storage_may_be_away():
            self.job.store.push(STOP)

    def stopped(self, screen: Screen) -> SceneJob | None:
        """Record that the scene has stopped, and return the job to go on with if it gets more workers."""
        more, self._more = self._more, 0
        self.release()
        if more:
            return self._start(more, self._machine, screen)
        self.workers = 0
        screen.log(f"{self.job.name}: its machine has gone or has no room left, it waits for another")
        return None

    def poll(self, screen: Screen) -> str:
        """Return the scene's progress line, and log on the screen why workers were started again."""
        failures = read_jsonl(self._failures, "errors")
        for failure in failures[self._failed:]:
            screen.log(f"{self.job.name}: workers started again: "
                       f"{'; '.join(sorted(set(failure['errors'].values())))}")
            self.mlflow.put(self.run.log_metric, "train/restarts", len(failures))
        self._failed = len(failures)
        rows, name = self._rows(), f"{self.job.name} x{self.workers}"
        if not rows:
            return f"{name:14} starting ({time.time() - self._since:.0f} s)"
        row = rows[-1]
        if row["step"] >= row["steps"]:
            return f"{name:14} evaluating at {row['step']} of {row['steps']}"
        return progress_line(name, row["step"], row)

    def send_history(self, now: bool = False) -> None:
        """Send MLflow the new part of the history, at most every TRACKING_SECONDS unless `now`.

        What MLflow is too slow for is sent with a later part.
        """
        if now or (time.time() - self._tracked > TRACKING_SECONDS and self.mlflow.idle):
            self._tracked = time.time()
            self.mlflow.put(self.run.log_history, history(self._history))

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


def _train(job: SceneJob) -> dict[str, Any] | None:
    """Train a scene (see train_scene), and copy its results to this machine, also if MLflow is away."""
    results = train_scene(job)
    if results:
        with _storage_may_be_away():
            job.store.pull(*HISTORY, *RESULTS)
    return results


def _say(waiting: Sequence[str], allocation: Allocation, running: int, screen: Screen) -> None:
    """Say what the waiting scenes wait for, unless it is for other scenes of this batch."""
    kind = "GPU" if allocation.gpu else "CPU"
    held = holders(kind)
    if held or not running:
        count = allocation.sizes[0] * (1 if allocation.gpu else allocation.cpus)
        screen.log(f"{waiting[0]} waits for {count} {kind}{'s' * (count > 1)}; "
                   + ("others hold " + "; ".join(held) if held else "see ray status"))


@contextmanager
def _storage_may_be_away() -> Iterator[None]:
    """Turn an error of the storage into a warning: this process only watches, and the workers would fail."""
    try:
        yield
    except OSError as e:
        log.warning("the storage does not answer: %s", str(e).splitlines()[0][:300])


def _with(workers: int) -> str:
    return f" with {workers} worker{'s' * (workers > 1)}"
