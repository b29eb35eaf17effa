"""The options of every command over a dataset: which captures, at which size, where runs go."""

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
from flexgs.sizes import DEMO, LAPTOP, Size, fitting
from flexgs.store import Store, is_remote
from flexgs.tracking import Tracking, sqlite_uri
from flexgs.urls import public

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
"""Whether `ray job submit` started this process, whose working folder is then a temporary copy."""
HOME = Path("~/flexgs-runs")
"""The default folder for runs of submitted jobs, and for local copies of runs in an object store."""


@dataclass
class DatasetOptions:
    """The captures of a folder, the settings to train them with, and where runs go."""

    data_root: Path | None = None
    """Folder of captures. Default: the built-in synthetic scenes; with --dataset, the folder data."""
    dataset: Literal[*DATASETS] | None = None  # type: ignore[valid-type]
    """Train the captures of this dataset that are in DATA_ROOT or DATA_ROOT/<dataset>, with images reduced by
    the factor of the protocol."""
    protocol: Literal[*PROTOCOLS] = "paper"  # type: ignore[valid-type]
    """With --dataset: image factors of the FlexGS paper, or those of most papers; --data.factor overrules
    both."""
    scenes: tuple[str, ...] = ()
    """Only these folders of DATA_ROOT."""
    storage: str | None = None
    """Runs go to STORAGE/EXPERIMENT/<scene>, on a cluster a folder that all machines share, or
    s3://bucket/path or gs://bucket/path, with a copy in ~/flexgs-runs/bucket/path. Default: runs, and
    ~/flexgs-runs under `ray job submit`."""
    experiment: str | None = None
    """Name of the folder and of MLflow's experiment. Default: flexgs-<dataset>, flexgs-<name of DATA_ROOT>,
    or flexgs-demo."""
    mlflow_uri: str | None = None
    """MLflow's server or database. Default: $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db."""
    ray_address: str | None = None
    """host:port of a cluster, or local. Default: $RAY_ADDRESS, else the cluster of `ray start`, else this
    machine."""
    dashboard: bool = False
    """Start Ray's dashboard too where Ray is started on this machine; it takes some 10 s."""
    gpu: bool = False
    """Train on GPUs although none may be there yet: the cluster's autoscaler is asked for them."""
    config_file: ConfigFile = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Recorded = field(default_factory=Typed, init=False)

    @property
    def name(self) -> str:
        """The name of the experiment."""
        where = self.data_root.expanduser().resolve().name if self.data_root else "demo"
        return self.experiment or f"flexgs-{self.dataset or where}"

    @property
    def folder(self) -> Path:
        """The folder of the experiment, or its local copy, with a run folder for each scene."""
        return storage_folder(self.storage) / self.name

    def store(self) -> Store:
        """Open the folder of the experiment for writing; UserError if it cannot be written to."""
        make_folder(self.folder.parent)
        return (Store.open(self.storage, self.folder.parent) / self.name if is_remote(self.storage)
                else Store(self.folder))

    def tracking(self) -> Tracking:
        """Return the experiment in MLflow."""
        storage = storage_folder(self.storage)
        uri = self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(storage / "mlflow.db")
        return Tracking(uri, self.name, storage / "mlartifacts")

    def captures(self) -> list[Path]:
        """Return the folders of the captures; built-in ones are made if they are missing."""
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
        """Return the settings, checked; built-in scenes, whose images are small, have the factor 1."""
        config = self.config.check()
        return config if self.data_root or self.dataset else self._at(1, config)

    def fitting(self, config: Config, gpu: bool) -> Config:
        """Return the settings, with the limits of a laptop where there is no GPU."""
        return fitting(config, gpu, self.typed, self.limits)

    @property
    def limits(self) -> Size:
        """The size of a scene without a GPU."""
        return LAPTOP if self.data_root or self.dataset else DEMO

    def of(self, capture: Path, config: Config) -> Config:
        """Return the settings for one capture: with --dataset, images at the factor of the protocol."""
        if not self.dataset:
            return config
        return self._at(CATALOG[capture.name].factor_of(self.protocol), config)

    def _at(self, factor: int, config: Config) -> Config:
        """Return the settings with images reduced by factor, unless the user has chosen a factor."""
        if self.typed.has("--data.factor", "--config"):
            return config
        return replace(config, data=replace(config.data, factor=factor))


def storage_folder(storage: str | None) -> Path:
    """Return the absolute path of the folder of --storage, or of the local copy of an object store."""
    if is_remote(storage):
        return HOME.expanduser() / storage.partition("://")[2].partition("?")[0].strip("/")
    folder = (Path(storage) if storage else HOME if IN_JOB else Path("runs")).expanduser()
    if IN_JOB and not folder.is_absolute():
        raise UserError(f"--storage {storage}: expected an absolute path; the folder that ray job submit "
                        "runs in is temporary")
    return folder.absolute()


def read_all(captures: Mapping[Path, Config]) -> tuple[dict[str, Scene], dict[str, Exception]]:
    """Load all captures before any is trained.

    Returns:
        The captures that could be loaded, and the errors of the others, both by name.

    Raises:
        UserError: no capture could be loaded.
    """
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
    """Print the errors by name; return 0 without any, 2 if the user can mend all of them, else 1."""
    sys.stdout.flush()
    for name, error in errors.items():
        print(f"flexgs: {name} failed: {one_line(public(str(error)))}", file=sys.stderr)
    return 0 if not errors else 2 if all(isinstance(e, UserError) for e in errors.values()) else 1
