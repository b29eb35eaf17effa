"""Many scenes trained side by side, when and where Ray has room, and shown on screen."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from statistics import harmonic_mean
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from flexgs.callbacks.progress import Screen, progress_line
from flexgs.files import read_jsonl
from flexgs.record import HISTORY, RESULTS, BatchRecord
from flexgs.run import history
from flexgs.store import storage_may_be_away
from flexgs.store_session import STOP
from flexgs.tracking import Run, Writer
from ray_jobs.cluster import SAY_SECONDS, Allocation
from ray_jobs.neighbours import holders
from ray_jobs.schedule import Running, growth
from ray_jobs.train_scene import SceneJob, train_scene

TRACKING_SECONDS = 10.0
"""Time between two messages to MLflow about a scene."""
PULL_SECONDS = 3.0
"""Time between two downloads of a scene's progress from an object store."""
KEEP_SECONDS = 60.0
"""How long to wait for checkpoints when the job is interrupted."""
LEAST_SECONDS = 10.0
"""Time after which scenes ask for one CPU per worker, where none trains since others hold the rest."""
STEADY = 5
"""Number of reports over which a scene's views per second are averaged."""


def train_side_by_side(jobs: Sequence[SceneJob], allocation: Allocation,
                       free: Callable[[], Mapping[str, int]], record: BatchRecord) -> None:
    """Train the scenes; one that fails does not disturb the others.

    Args:
        jobs: the scenes.
        allocation: the workers that a scene may have.
        free: returns how many more workers each machine has room for.
        record: where results and errors go.
    """
    watches = {job.name: Watch(job, record.run_of(job), record.mlflow) for job in jobs}
    running: dict[Future, Watch] = {}
    pool = ThreadPoolExecutor(len(jobs) + 1)
    said = busy = time.monotonic()

    def start(job: SceneJob) -> None:
        running[pool.submit(_train, job)] = watches[job.name]

    record.begin()
    try:
        with Screen() as screen:
            while watches:
                busy = time.monotonic() if running else busy
                least = time.monotonic() - busy > LEAST_SECONDS
                asked = replace(allocation, cpus=1) if least else allocation
                for watch in watches.values():
                    if not watch.workers and (job := watch.reserved(asked, screen)):
                        record.started(job, watch.run)
                        start(job)
                waiting = [name for name, watch in watches.items() if not watch.workers]
                screen.show({watch.job.name: watch.poll(screen) for watch in running.values()}, waiting)
                states = [watch.state() for watch in running.values()]
                if running and not waiting and all(states):
                    for name, workers in growth(free(), [s for s in states if s], allocation.sizes).items():
                        watches[name].grow(workers, screen)
                if waiting and time.monotonic() - said > SAY_SECONDS:
                    pool.submit(_say, waiting, asked, len(running), screen)
                    said = time.monotonic()
                for watch in running.values():
                    watch.send_history()
                if not running:
                    time.sleep(0.1)
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    watch = running.pop(future)
                    if future.exception() or future.result():
                        watch.release()
                        screen.log(watch.ended(future, record))
                        del watches[watch.job.name]
                    elif again := watch.stopped(screen):
                        start(again)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            _keep(running)
        record.killed([watch.run for watch in watches.values() if watch.started])
        ray.shutdown()  # ends the threads that wait for Ray, which would keep Python from exiting
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
        room = placement_group_table(self._room)
        if room.get("state") != "CREATED":  # a new one may not be in the table yet
            return None
        machine = None if allocation.spread else room["bundles_to_node_id"][0]
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
        with storage_may_be_away():
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

    def ended(self, future: Future, record: BatchRecord) -> str:
        """Record how the scene ended, and return the line to show."""
        (self.job.folder / STOP).unlink(missing_ok=True)  # the scene may have ended before it saw the file
        with storage_may_be_away():
            self.job.store.push(STOP)
        error = future.exception()
        if error is None:
            figures = record.succeeded(self.job, self.run, future.result())
            return f"{self.job.name}: finished in {self.seconds():.0f} s: {figures}"
        if not isinstance(error, Exception):
            raise error
        self.send_history(now=True)
        record.failed(self.job, self.run, error)
        return f"{self.job.name}: failed after {self.seconds():.0f} s: {error}"

    def seconds(self) -> float:
        """Return the time since the scene was first started."""
        return time.time() - self.started if self.started else 0.0

    def _rows(self) -> list[dict[str, Any]]:
        """Return the lines of the history that the present workers, not earlier ones, have written."""
        if time.monotonic() - self._pulled > PULL_SECONDS:
            with storage_may_be_away():
                self.job.store.pull("metrics.jsonl")
            self._pulled = time.monotonic()
        if self._history.exists() and self._history.stat().st_mtime > self._since:
            return [row for row in history(self._history) if row["step"] > self._kept]
        return []


def _train(job: SceneJob) -> dict[str, Any] | None:
    """Train a scene (see train_scene), and copy its results to this machine, also if MLflow is away."""
    results = train_scene(job)
    if results:
        with storage_may_be_away():
            job.store.pull(*HISTORY, *RESULTS)
    return results


def _keep(running: Mapping[Future, Watch]) -> None:
    """Stop the running scenes at their next report, with a checkpoint; a second Ctrl-C ends at once."""
    print(f"flexgs: waits up to {KEEP_SECONDS:.0f} s for checkpoints; Ctrl-C ends at once", file=sys.stderr,
          flush=True)
    for watch in running.values():
        watch.stop()
    with suppress(KeyboardInterrupt):
        wait(running, timeout=KEEP_SECONDS)
    for watch in running.values():
        if step := watch.job.store.latest_step():
            print(f"{watch.job.name}: the checkpoint of {step:,} of {watch.job.config.steps:,} views is kept",
                  flush=True)


def _say(waiting: Sequence[str], allocation: Allocation, running: int, screen: Screen) -> None:
    """Say what the waiting scenes wait for, unless it is for other scenes of this batch."""
    kind = "GPU" if allocation.gpu else "CPU"
    held = holders(kind)
    if held or not running:
        count = allocation.sizes[0] * (1 if allocation.gpu else allocation.cpus)
        screen.log(f"{waiting[0]} waits for {count} {kind}{'s' * (count > 1)}; "
                   + ("others hold " + "; ".join(held) if held else "see ray status"))


def _with(workers: int) -> str:
    return f" with {workers} worker{'s' * (workers > 1)}"
