"""flexgs bench | doctor: how fast this machine is, and whether a training would work on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flexgs.commands.deploy import FrameSize
from flexgs.config import DistributedConfig
from flexgs.errors import UserError
from flexgs.inputs import Range
from flexgs.options import RARE, OptionalCapture


@dataclass
class Bench:
    """Time the rasterizer, frames of a model, the steps of stage 2, or training with more workers."""

    what: tyro.conf.Positional[Literal["raster", "frame", "step", "ddp"]] = "raster"
    run: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """frame: run folder, .fgs file or file of splats."""
    size: FrameSize = (1280, 720)
    """frame: width and height in pixels."""
    save: Path | None = None
    """frame: a .json to write the times to, for `flexgs cut --budget 16ms --profile`."""
    points: Path | None = None
    """raster: an .npz of real points to place the Gaussians at; default: random ones."""
    scene: OptionalCapture = None
    """step: folder of the capture that the checkpoint was trained on."""
    checkpoint: Path | None = None
    """step: a checkpoint of stage 1 to start from, such as stage1/done of a comparison."""
    methods: tuple[str, ...] = ("default", "fast", "paper", "official", "mended")
    """step: presets to time, as in `flexgs compare`."""
    workers: Annotated[tuple[Annotated[int, Range(1, 256)], ...], Range(1, 16)] = (1, 2, 4)
    """ddp: numbers of worker processes, of one thread each."""
    splats: Annotated[int, Range(1, 10**8)] = 20_000
    """ddp: number of Gaussians; the images are of 320x240 pixels."""
    rounds: Annotated[int, Range(1, 10**6)] = 15
    """ddp: how often each number of workers takes its turn; medians are printed."""
    gpu_splats: Annotated[int, Range(1, 10**9)] = 3_000_000
    """ddp: number of Gaussians that the speed-up of several GPUs is predicted for."""
    gpu_seen: Annotated[float, Range(0, 1, "(]")] = 0.25
    """ddp: fraction of them that a view sees."""
    gpu_ms: Annotated[float, Range(0, 10**6, "()")] = 30.0
    """ddp: milliseconds of a step of stage 1 on one GPU, with one view; a step of stage 2 is taken to be as
    many times longer as on this machine."""
    distributed: Annotated[DistributedConfig, RARE] = field(default_factory=DistributedConfig)

    def __call__(self) -> None:
        """Print the times; UserError if a file that the benchmark needs was not named."""
        from flexgs.bench.ddp import bench_ddp
        from flexgs.bench.predict import Target
        from flexgs.bench.raster import bench_raster
        from flexgs.bench.step import bench_step
        from flexgs.deploy.source import open_model
        from flexgs.device import pick_device
        from flexgs.model.frame_time import measure_frames
        from flexgs.scene.load import load_capture
        from flexgs.training.checkpoint import Checkpoint

        if self.what == "raster":
            bench_raster(points=self.points)
            return
        if self.what == "frame":
            if not self.run:
                raise UserError("bench frame: expected --run and a model")
            profile = measure_frames(open_model(self.run), self.size, pick_device("auto"))
            print(profile)
            if self.save:
                profile.save(self.save)
            return
        if self.what == "ddp":
            bench_ddp(self.workers, count=self.splats, rounds=self.rounds, options=self.distributed,
                      target=Target(self.gpu_splats, self.gpu_seen, self.gpu_ms))
            return
        if not self.scene or not self.checkpoint:
            raise UserError("bench step: expected --scene and --checkpoint; `flexgs compare SCENE` "
                            "leaves one in stage1/done")
        bench_step(load_capture(self.scene, Checkpoint(self.checkpoint).config), self.checkpoint,
                   self.methods)


@dataclass
class Doctor:
    """Check whether a training would work here, and say the cure of what is wrong (exit code 1)."""

    storage: Path = Path("runs")
    """Folder that runs are to go to."""
    data_root: Path | None = None
    """Folder of captures to check."""
    mlflow_uri: str | None = None
    """MLflow's server or database. Default: $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db."""
    ray_address: str | None = None
    """host:port of a cluster. Default: $RAY_ADDRESS."""

    def __call__(self) -> int:
        """Print a line per check and return the exit code."""
        from flexgs.commands.doctor import Places, examine

        return examine(Places(self.storage, self.data_root, self.mlflow_uri, self.ray_address))
