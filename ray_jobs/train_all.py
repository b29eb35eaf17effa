"""Train every scene of a dataset on a Ray cluster, or on this machine, and print a table of the results.

    python ray_jobs/train_all.py                         # the built-in demo scenes
    python ray_jobs/train_all.py --data-root ~/captures --scenes garden bicycle
    python ray_jobs/train_all.py --dataset mipnerf360    # its captures that are in data/ (`flexgs data get`)
    ray job submit --working-dir . -- python ray_jobs/train_all.py --data-root /captures --storage /runs

The same command continues what is unfinished and skips what is finished.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from flexgs import ray_library
from flexgs.commands.guard import guard
from flexgs.config import Config
from flexgs.dataset_options import DatasetOptions, exit_code, read_all
from flexgs.errors import pasted
from flexgs.files import only_one
from flexgs.options import parse
from flexgs.record import BatchRecord
from flexgs.report.table import print_results
from flexgs.sizes import fitting
from flexgs.store import Store
from flexgs.training import warmup
from flexgs.training.memory import expected_memory
from ray_jobs.batch import train_side_by_side
from ray_jobs.cluster import Cluster, Workers, allocate
from ray_jobs.train_scene import SceneJob


@dataclass
class TrainAll(DatasetOptions):
    """Train every scene of a dataset on Ray; the same command continues unfinished scenes."""

    workers: str | None = None
    """Workers per scene, one GPU each, that share the views of a step (--batch): a number, or MIN:MAX to give
    scenes the GPUs that others leave. Default: 1:8, as far as --batch can be divided, and 1 without a GPU.
    It changes how fast a scene trains, and what comes out only by rounding."""
    max_failures: int = 2
    """How often a scene is started again, from its last checkpoint, after a worker died."""
    full_size: bool = False
    """Without a GPU: as many views and Gaussians, and images as large, as with one. This may take days."""

    def sized(self, capture: Path, config: Config, cluster: Cluster, run: Store) -> Config:
        """Return the settings for one capture, at its size; a run that has begun keeps the size it has."""
        run.pull("config.json")
        return fitting(self.of(capture, config), cluster.has_gpu or self.full_size, self.typed, self.limits,
                       capture, run.folder)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a scene failed, or 2 if the user can mend all that failed."""
    return guard(lambda: train_all(parse(TrainAll, args, "train_all.py")))


def train_all(options: TrainAll) -> int:
    """Train the scenes that are not finished, print the table, and return the exit code (see main)."""
    config = options.checked()
    workers = Workers.parse(options.workers, config.batch) if options.workers is not None else None
    least = workers.least if workers else 1
    with warmup.in_background() as wait_for_kernels, ExitStack() as locks:
        captures, store = options.captures(), options.store()
        for capture in captures:  # before MLflow hears of them: another command may be training them
            locks.enter_context(only_one(store.folder / capture.name))
        with Cluster(options.ray_address, options.gpu, options.dashboard) as cluster:
            if not all((store.folder / capture.name / "results.json").exists() for capture in captures):
                cluster.start(least)  # while the captures are read
            configs = {c: options.sized(c, config, cluster, store / c.name) for c in captures}
            scenes, wrong = read_all(configs)
            jobs = [SceneJob(capture, store / capture.name, configs[capture],
                             max_failures=options.max_failures) for capture in captures
                    if capture.name not in wrong]
            record = BatchRecord(store, options.tracking(), options.typed.command("ray_jobs/train_all.py"))
            jobs = [job for job in jobs if not record.skip(job, scenes[job.name])]
            if jobs:
                cluster.wait_for_gpus(least)
                allocation = allocate(cluster.nodes(least), len(jobs), workers, config.batch)
                print(f"{len(jobs)} scene{'s' * (len(jobs) > 1)}, {allocation}; runs go to {store.place()}",
                      flush=True)
                for job in jobs:
                    print(f"{job.name}: {expected_memory(scenes[job.name], job.config)}", flush=True)
                if not allocation.gpu:
                    wait_for_kernels()
                beside = min(max(allocation.room(cluster.nodes()).values()), len(jobs) * allocation.sizes[-1])
                train_side_by_side([replace(job, gpu=allocation.gpu, beside=beside) for job in jobs],
                                   allocation, lambda: allocation.room(ray_library.free_resources()), record)
            record.finish()
    return report(options, record, [capture.name for capture in captures], wrong | record.errors)


def report(options: TrainAll, record: BatchRecord, scenes: Sequence[str],
           errors: Mapping[str, Exception]) -> int:
    """Print the table, where the cuts are, and how to continue failed scenes; return the exit code."""
    if record.results:
        print_results([record.results[scene] for scene in scenes if scene in record.results])
        print(f"cuts: {pasted(record.store.folder)}/<scene>/cuts/*.ply")
    if page := record.tracking.how_to_open():
        print(f"MLflow: {page}")
    if errors:
        print(f"{len(errors)} of {len(scenes)} scenes failed: {', '.join(errors)}. To continue them:\n"
              f"{options.typed.command('ray_jobs/train_all.py')}")
    return exit_code(errors)


if __name__ == "__main__":
    sys.exit(main())
