"""Compare methods on every capture of a dataset, with a Ray task for each model, and average the tables.

    python ray_jobs/compare_all.py --data-root ~/captures --methods lightgs default --seeds 0 1 2
    ray job submit --working-dir . -- python ray_jobs/compare_all.py --data-root /captures --storage /runs

The same command continues what is unfinished and skips what is finished. `flexgs compare` writes the same
files in its folder of a scene, so each continues what the other has begun.
"""

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from flexgs import compare, pool
from flexgs.commands.guard import guard
from flexgs.compare import Cell
from flexgs.config import METHODS, Config
from flexgs.dataset_options import DatasetOptions, exit_code, read_all
from flexgs.distributed import Group
from flexgs.errors import UserError, pasted
from flexgs.files import make_folder, only_one
from flexgs.options import parse
from flexgs.record import push_results
from flexgs.report.comparison import Rows, mean_rows
from flexgs.report.published import SCENES, published
from flexgs.report.table import print_table
from flexgs.scene.load import load_capture
from flexgs.store import DESCRIPTION, Store
from flexgs.store_session import StoreSession
from flexgs.tracking import Tracking
from flexgs.training import warmup
from flexgs.urls import describe
from ray_jobs.cluster import Cluster, share_memory


@dataclass
class CompareAll(DatasetOptions):
    """Compare methods on every capture of a dataset. The same command continues what is unfinished."""

    methods: tuple[str, ...] = METHODS
    """Presets, each with settings of its own in quotes: "default --deltas.knots 0.01 0.1"."""
    ratios: tuple[float, ...] = ()
    """Fractions of the Gaussians to compare at; default: --evaluation.ratios."""
    seeds: tuple[int, ...] = ()
    """Random seeds; several give means and spread. Default: --seed."""


@dataclass(frozen=True)
class Task:
    """What one worker trains: stage 1 of a capture and seed, or a cell (method and ratio) that needs it."""

    capture: Path
    common: Config
    store: Store
    """The folder of the capture in the experiment."""
    cell: Cell | None = None

    @property
    def name(self) -> str:
        """The name in messages: capture, seed, and cell or stage 1."""
        return (f"{self.capture.name} seed {self.common.seed} "
                f"{self.cell.folder.name if self.cell else 'stage 1'}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a cell failed, or 2 if the user can mend all that failed."""
    return guard(lambda: compare_all(parse(CompareAll, args, "compare_all.py")))


def compare_all(options: CompareAll) -> int:
    """Train and measure what is missing, print the tables, and return the exit code (see main)."""
    options.config.evaluation.ratios = options.ratios or options.config.evaluation.ratios
    config = options.checked()
    with warmup.in_background() as wait_for_kernels, ExitStack() as locks:
        captures = options.captures()
        scenes, errors = read_all({capture: options.of(capture, config) for capture in captures})
        captures = [capture for capture in captures if capture.name not in errors]
        store = options.store()
        for capture in captures:
            locks.enter_context(only_one(make_folder(store.folder) / capture.name))
        with Cluster(options.ray_address, options.gpu, options.dashboard) as cluster:
            config = options.fitting(config, cluster.has_gpu)
            configs = {capture.name: options.of(capture, config) for capture in captures}
            commons = {name: compare.seeded(own, options.seeds) for name, own in configs.items()}
            cells = {name: [cell for common in own
                            for cell in compare.cells(options.methods, common, store.folder / name)]
                     for name, own in commons.items()}
            tasks = []
            for capture in captures:
                pull(store, cells[capture.name])
                for common in commons[capture.name]:
                    stage1 = Task(capture, common, store / capture.name)
                    missing = [replace(stage1, cell=cell) for cell in cells[capture.name]
                               if cell.config.seed == common.seed
                               and not compare.done(cell, scenes[capture.name])]
                    if missing:
                        tasks.append((stage1, missing))
            if tasks:
                kind = "GPU" if cluster.has_gpu else "CPU"
                beside = max(int(node.get(kind, 0)) for node in cluster.nodes().values())
                if not cluster.has_gpu:
                    wait_for_kernels()
                errors |= _run(tasks, cluster.has_gpu, beside)
                for found in cells.values():
                    pull(store, found)
    return report(options, store, configs, {name: compare.measured(found) for name, found in cells.items()},
                  errors)


def pull(store: Store, cells: Iterable[Cell]) -> None:
    """Pull what is measured of cells, and their stage 1 if it is whole, from the store of the experiment."""
    for cell in cells:
        stage1, own = (store / str(folder.relative_to(store.folder)) for folder in (cell.stage1, cell.folder))
        if stage1.exists(DESCRIPTION):
            stage1.pull("")
        own.pull("config.json", "results.json", "model")


def _run(tasks: Sequence[tuple[Task, Sequence[Task]]], gpu: bool, beside: int) -> dict[str, Exception]:
    """Run every stage 1 and then its cells; return the errors by task, none of which stops other tasks.

    beside: how many tasks there may be at a time on a machine.
    """
    remote = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_retries=2)(_work)
    device, start = "cuda" if gpu else "cpu", time.monotonic()
    running: dict[Any, Task] = {}
    errors: dict[str, Exception] = {}
    for first, rest in tasks:
        stage1 = remote.remote(first, device, beside, None)
        running[stage1] = first
        running |= {remote.remote(task, device, beside, stage1): task for task in rest}
    total = len(running)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done[0])
        try:
            ray.get(done[0])
            how = "done"
        except Exception as e:
            error = e.cause if isinstance(e, ray.exceptions.RayTaskError) else e
            errors[task.name] = error if isinstance(error, UserError) else RuntimeError(describe(error))
            how = f"failed: {errors[task.name]}"
        print(f"{task.name}: {how} ({total - len(running)} of {total}, {time.monotonic() - start:.0f} s)",
              flush=True)
    return errors


def _work(task: Task, device: str, beside: int, after: None) -> None:
    """Train and measure a task in a worker, unless that is done; Ray starts it once `after` has ended."""
    share_memory(beside)
    if device == "cpu":
        torch.set_num_threads(1)  # a CPU each: tasks that run side by side use all cores
        pool.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="flexgs-") as copy, ExitStack() as sessions:
        store = task.store.copied_to(Path(copy))
        seed = store / f"seed_{task.common.seed}"

        def open_session(folder: Path, start: Path | None) -> StoreSession:
            return sessions.enter_context(closing(StoreSession(seed / folder.name, Group(), start=start)))

        scene = load_capture(task.capture, task.common)
        if done := seed.exists(f"stage1/done/{DESCRIPTION}"):
            seed.pull("stage1/done")
        if task.cell is None:
            compare.train_stage1(scene, task.common, store.folder, device, open_session=open_session)
            if not done:
                seed.push("stage1/done")
            return
        cell = replace(task.cell, folder=seed.folder / task.cell.folder.name)
        own = seed / cell.folder.name
        seed.pull(*seed.find("*/config.json"), *seed.find("*/results.json"))
        own.pull("model", "metrics.jsonl")
        seed.pull(*(f"{folder.name}/checkpoints" for folder in compare.trained_alike(cell)))
        compare.train_cell(cell, scene, device, open_session=open_session)
        push_results(own)


def report(options: CompareAll, store: Store, configs: dict[str, Config], scenes: dict[str, Rows],
           errors: dict[str, Exception]) -> int:
    """Write, print and log the tables of each capture and their mean; return the exit code.

    Args:
        options: the command.
        store: the folder of the experiment.
        configs: the settings of each capture, by name.
        scenes: the measured rows of each capture, by name.
        errors: why captures or tasks failed, by name.
    """
    tracking: Tracking = options.tracking()
    pages = {}
    for name, rows in scenes.items():
        if rows:
            scene = store / name
            print(f"\n{name}")
            for sheet in compare.write(name, rows, published(name) if name in SCENES else None, configs[name],
                                       scene.folder):
                print_table(sheet.rich())
            scene.pull("mlflow.json", "mlflow")
            pages[name] = compare.log_to_mlflow(name, rows, configs[name], scene.folder, tracking)
            scene.push(*compare.TABLES, "mlflow.json", "mlflow")
    measured = [rows for rows in scenes.values() if rows]
    if len(measured) > 1:
        print(f"\nmean of {len(measured)} captures")
        for sheet in compare.write("mean", mean_rows(measured), None, next(iter(configs.values())),
                                   store.folder):
            print_table(sheet.rich())
        store.push(*compare.TABLES)
    print(f"tables and figures: {pasted(store.folder)}/<scene>")
    for name, page in pages.items():
        print(f"MLflow, {name}: {page}")
    return exit_code(errors)


if __name__ == "__main__":
    sys.exit(main())
