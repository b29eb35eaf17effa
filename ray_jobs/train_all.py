"""Train every scene of a dataset on a Ray cluster, or on this machine; ends with the table over scenes and ratios.

    python ray_jobs/train_all.py                                        # the built-in demo scenes
    python ray_jobs/train_all.py --data-root ~/captures --scenes garden bicycle
    ray job submit --working-dir . -- python ray_jobs/train_all.py --data-root /shared/captures --storage /shared/runs

The same command continues what is unfinished and skips what is finished.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python itself adds only the folder of the script

import tyro

from flexgs.cli import AnyConfig, guard, last_value, parse
from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.evaluate.table import print_results
from flexgs.files import make_folder
from flexgs.scene import SYNTHETIC, ensure_synthetic, find_scenes
from flexgs.tracking import Tracking, sqlite_uri
from ray_jobs import warm_up
from ray_jobs.batch import Batch
from ray_jobs.cluster import IN_JOB, Cluster, share_out
from ray_jobs.train_scene import SceneJob, read_scene


class Size(NamedTuple):
    """The most that a scene gets where there is no GPU, unless the user chooses: minutes on a laptop."""

    steps: int
    splats: int


LAPTOP = Size(steps=6000, splats=30_000)
DEMO = Size(steps=4000, splats=20_000)


@dataclass
class TrainAll:
    """Train every scene of a dataset with Ray Train. The same command continues unfinished scenes and skips finished ones."""

    data_root: Path | None = None
    """Folder of captures. Default: the built-in synthetic scenes."""
    scenes: tuple[str, ...] = ()
    """Only these folders of DATA_ROOT."""
    storage: Path | None = None
    """Runs go to STORAGE/EXPERIMENT/<scene>, on a cluster a folder that all machines share. Default: runs, and
    ~/flexgs-runs under `ray job submit`."""
    experiment: str | None = None
    """Default: flexgs-<name of DATA_ROOT>, or flexgs-demo."""
    workers: int | None = None
    """Workers per scene, one GPU each. Default: one; more GPUs than scenes are shared out among them."""
    max_failures: int = 2
    """How often a scene is started again, from its last checkpoint, after a worker died."""
    mlflow_uri: str | None = None
    """Default: $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db."""
    ray_address: str | None = None
    """host:port of a cluster, or local. Default: $RAY_ADDRESS, else the cluster of `ray start`, else this machine."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)


def main(args: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 if a scene failed, 2 if all that is wrong is the user's to mend."""
    args = sys.argv[1:] if args is None else args
    code = 0

    def body() -> None:
        nonlocal code
        code = train_all(parse(TrainAll, args, "train_all.py"), args)

    return guard(body) or code


def train_all(options: TrainAll, args: Sequence[str]) -> int:
    """The whole command; args tell which settings the user has chosen."""
    config = options.config.check()
    if options.workers is not None and (options.workers < 1 or (config.batch or 0) % options.workers):
        raise UserError(f"--workers {options.workers}: expected at least 1, and a divisor of --batch if that is given")
    if options.data_root is None and not any(last_value(flag, args) for flag in ("--data.factor", "--config")):
        config = replace(config, data=replace(config.data, factor=1))  # the demo's images are small already
    root, storage = options.data_root and options.data_root.expanduser().absolute(), storage_folder(options.storage)
    experiment = options.experiment or f"flexgs-{root.resolve().name if root else 'demo'}"
    folder = storage / experiment
    uri = options.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(storage / "mlflow.db")
    with warm_up.in_background() as wait_for_kernels:
        captures = find_scenes(root, list(options.scenes) or None) if root else demo_captures(storage, options.scenes)
        unreadable = check_captures(captures, folder, config)
        make_folder(storage)
        with Cluster(options.ray_address) as cluster:
            if not cluster.has_gpu:
                config = laptop_size(config, LAPTOP if root else DEMO, args)
            jobs = [SceneJob(capture, folder / capture.name, config, max_failures=options.max_failures)
                    for capture in captures if capture.name not in unreadable]
            batch = Batch(folder, Tracking(uri, experiment, storage / "mlartifacts"))
            jobs = [job for job in jobs if not batch.skip(job)]
            if jobs:
                share = share_out(cluster.nodes(options.workers), len(jobs), options.workers, config.batch)
                print(f"{len(jobs)} scene{'s' * (len(jobs) > 1)}, {share}; runs go to {folder}", flush=True)
                if not share.gpu:
                    wait_for_kernels()
                batch.train([replace(job, workers=share.workers, cpus=share.cpus, gpu=share.gpu) for job in jobs], share.slots)
            batch.finish()
    return report(batch, [capture.name for capture in captures], unreadable | batch.errors)


def report(batch: Batch, scenes: Sequence[str], errors: Mapping[str, Exception]) -> int:
    """Print the table, where things are, and what failed; the exit code."""
    if batch.results:
        print_results([batch.results[scene] for scene in scenes if scene in batch.results])
        print(f"cuts: {batch.folder}/<scene>/cuts/*.ply")
    if page := batch.tracking.how_to_open():
        print(f"MLflow: {page}")
    sys.stdout.flush()
    for scene, error in errors.items():
        print(f"flexgs: {scene} failed: {error}", file=sys.stderr)
    return 0 if not errors else 2 if all(isinstance(e, UserError) for e in errors.values()) else 1


def storage_folder(storage: Path | None) -> Path:
    """The absolute path of the folder that runs go to."""
    storage = (storage or Path("~/flexgs-runs" if IN_JOB else "runs")).expanduser()
    if IN_JOB and not storage.is_absolute():
        raise UserError(f"--storage {storage}: expected an absolute path; the folder that ray job submit runs in is temporary")
    return storage.absolute()


def demo_captures(storage: Path, names: Sequence[str]) -> list[Path]:
    """The built-in synthetic captures, made in storage if they are not there, or those of these names."""
    if unknown := set(names) - set(SYNTHETIC):
        raise UserError(f"--scenes {' '.join(sorted(unknown))}: the built-in scenes are {', '.join(SYNTHETIC)}; "
                        "--data-root names a folder of captures")
    make_folder(storage)
    folder = storage / "demo-data"
    if not all((folder / name).is_dir() for name in SYNTHETIC):
        print(f"making the demo scenes {', '.join(SYNTHETIC)} in {folder}", flush=True)
    ensure_synthetic(folder)
    return find_scenes(folder, list(names) or None)


def check_captures(captures: Sequence[Path], folder: Path, config: Config) -> dict[str, Exception]:
    """What is wrong with captures that have no results yet: better said now than when their turn comes."""
    wrong: dict[str, Exception] = {}
    for capture in captures:
        if not (folder / capture.name / "results.json").exists():
            try:
                read_scene(capture, config)
            except UserError as e:
                wrong[capture.name] = e
    if wrong and len(wrong) == len(captures):
        raise UserError("; ".join(str(e) for e in wrong.values()))
    for name, error in wrong.items():
        print(f"{name}: left out: {error}", flush=True)
    return wrong


def laptop_size(config: Config, size: Size, args: Sequence[str]) -> Config:
    """The config cut down to size, except for what the user has chosen; says so."""
    if last_value("--config", args) is not None:
        return config
    steps = min(config.steps, size.steps) if last_value("--steps", args) is None else config.steps
    splats = config.base.max_splats
    if last_value("--base.max-splats", args) is None:
        splats = min(splats, size.splats)
    smaller = replace(config, steps=steps, base=replace(config.base, max_splats=splats))
    if smaller != config:
        print(f"no GPU: laptop size, {steps:,} views and at most {splats:,} Gaussians per scene; "
              "--steps and --base.max-splats change that", flush=True)
    return smaller


if __name__ == "__main__":
    sys.exit(main())
