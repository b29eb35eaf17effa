"""The options that every job over a dataset shares: which captures, at which size, where results go."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flexgs.config import Config
from flexgs.datasets.catalog import CATALOG, DATASETS, PROTOCOLS, find_dataset, find_scenes, say_absent
from flexgs.demo.synthetic import SYNTHETIC, ensure_synthetic
from flexgs.errors import UserError, one_line
from flexgs.files import make_folder
from flexgs.options import AnyConfig, ConfigFile, Recorded, Typed
from flexgs.scene import Scene
from flexgs.scene.load import load_capture
from flexgs.sizes import DEMO, LAPTOP, fitting
from flexgs.tracking import Tracking, sqlite_uri
from flexgs.urls import public
from ray_jobs.cluster import IN_JOB, Cluster
from ray_jobs.store import Store, is_remote

HOME = Path("~/flexgs-runs")
"""Of runs that have no other: those of submitted jobs, and copies of an object store."""


@dataclass
class DatasetOptions:
    """Captures in a folder, and the settings to train them with."""

    data_root: Path | None = None
    """Folder of captures. Default: the built-in synthetic scenes, and with --dataset data."""
    dataset: Literal[*DATASETS] | None = None  # type: ignore[valid-type]
    """The captures of this dataset that are in DATA_ROOT or DATA_ROOT/<dataset>, each at its factor of the
    protocol."""
    protocol: Literal[*PROTOCOLS] = "paper"  # type: ignore[valid-type]
    """With --dataset: the factors of FlexGS, or those that the field usually takes; --data.factor overrules
    both."""
    scenes: tuple[str, ...] = ()
    """Only these folders of DATA_ROOT."""
    storage: str | None = None
    """Runs go to STORAGE/EXPERIMENT/<scene>, on a cluster a folder that all machines share, or
    s3://bucket/path or gs://bucket/path, with a copy in ~/flexgs-runs/bucket/path. Default: runs, and
    ~/flexgs-runs under `ray job submit`."""
    experiment: str | None = None
    """Default: flexgs-<dataset>, flexgs-<name of DATA_ROOT>, or flexgs-demo."""
    mlflow_uri: str | None = None
    """Default: $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db."""
    ray_address: str | None = None
    """host:port of a cluster, or local. Default: $RAY_ADDRESS, else the cluster of `ray start`, else this
    machine."""
    gpu: bool = False
    """Train on GPUs although none may be there yet: the cluster's autoscaler is asked for them."""
    config_file: ConfigFile = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Recorded = field(default_factory=Typed, init=False)

    @property
    def name(self) -> str:
        """Of the experiment."""
        where = self.data_root.expanduser().resolve().name if self.data_root else "demo"
        return self.experiment or f"flexgs-{self.dataset or where}"

    @property
    def folder(self) -> Path:
        """Where the runs go, or their copies: a folder for each scene."""
        return storage_folder(self.storage) / self.name

    def store(self) -> Store:
        """Where the runs go, ready to be written to."""
        make_folder(self.folder.parent)
        return (Store.open(self.storage, self.folder.parent) / self.name if is_remote(self.storage)
                else Store(self.folder))

    def tracking(self) -> Tracking:
        storage = storage_folder(self.storage)
        uri = self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(storage / "mlflow.db")
        return Tracking(uri, self.name, storage / "mlartifacts")

    def captures(self) -> list[Path]:
        """The folders of the captures; the built-in ones are made if they are not there."""
        names = list(self.scenes) or None
        if self.dataset:
            root = (self.data_root or Path("data")).expanduser().absolute()
            captures, absent = find_dataset(root, self.dataset, self.scenes)
            if absent and not self.scenes:
                print(say_absent(self.dataset, absent, root), flush=True)
            return captures
        if self.data_root:
            return find_scenes(self.data_root.expanduser().absolute(), names)
        if unknown := set(self.scenes) - set(SYNTHETIC):
            raise UserError(f"--scenes {' '.join(sorted(unknown))}: the built-in scenes are "
                            f"{', '.join(SYNTHETIC)}; --data-root names a folder of captures")
        folder = make_folder(storage_folder(self.storage)) / "demo-data"
        if not all((folder / name).is_dir() for name in SYNTHETIC):
            print(f"making the demo scenes {', '.join(SYNTHETIC)} in {folder}", flush=True)
        ensure_synthetic(folder)
        return find_scenes(folder, names)

    def checked(self) -> Config:
        """The settings; the images of the demo, which are small already, at their full size."""
        config = self.config.check()
        return config if self.data_root or self.dataset else self._at(1, config)

    def fitting(self, config: Config, cluster: Cluster) -> Config:
        """The settings at a size for what the cluster has."""
        return fitting(config, cluster.has_gpu, self.typed,
                       LAPTOP if self.data_root or self.dataset else DEMO)

    def of(self, capture: Path, config: Config) -> Config:
        """The settings for one capture: with --dataset at its factor of the protocol."""
        if not self.dataset:
            return config
        return self._at(CATALOG[capture.name].factor_of(self.protocol), config)

    def _at(self, factor: int, config: Config) -> Config:
        """The settings with images at 1/factor, unless the user has chosen a factor."""
        if self.typed.has("--data.factor", "--config"):
            return config
        return replace(config, data=replace(config.data, factor=factor))


def storage_folder(storage: str | None) -> Path:
    """The absolute path of the folder that runs go to, or their copies."""
    if is_remote(storage):
        return HOME.expanduser() / storage.partition("://")[2].partition("?")[0].strip("/")
    folder = (Path(storage) if storage else HOME if IN_JOB else Path("runs")).expanduser()
    if IN_JOB and not folder.is_absolute():
        raise UserError(f"--storage {storage}: expected an absolute path; the folder that ray job submit "
                        "runs in is temporary")
    return folder.absolute()


def read_all(captures: Mapping[Path, Config]) -> tuple[dict[str, Scene], dict[str, Exception]]:
    """(the captures, what is wrong with others): better said now than when their turn comes. UserError if all
    are wrong."""
    scenes: dict[str, Scene] = {}
    wrong: dict[str, Exception] = {}
    for capture, config in captures.items():
        try:
            scenes[capture.name] = load_capture(capture, config)
            print(scenes[capture.name].summary(), flush=True)
        except UserError as e:
            wrong[capture.name] = e
    if wrong and len(wrong) == len(captures):
        raise UserError("; ".join(str(e) for e in wrong.values()))
    for name, error in wrong.items():
        print(f"{name}: left out: {public(str(error))}", flush=True)
    return scenes, wrong


def exit_code(errors: Mapping[str, Exception]) -> int:
    """Say what failed, by name; 0, 1, or 2 if all that is wrong is the user's to mend."""
    sys.stdout.flush()
    for name, error in errors.items():
        print(f"flexgs: {name} failed: {one_line(public(str(error)))}", file=sys.stderr)
    return 0 if not errors else 2 if all(isinstance(e, UserError) for e in errors.values()) else 1
