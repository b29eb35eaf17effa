"""Figures of a training for MLflow, TensorBoard and Weights & Biases."""

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flexgs.callbacks import Callback
from flexgs.errors import MissingDependencyError, UserError, pasted
from flexgs.files import make_folder, write_json
from flexgs.inputs import read_json
from flexgs.tracking import Tracking, flatten, sqlite_uri

if TYPE_CHECKING:
    from flexgs.training.trainer import Trainer

LEFT_OUT = ("steps", "eta_seconds", "ratios")
"""Figures of a progress line that no curve is drawn of."""


def logger(service: str, folder: Path) -> Callback:
    """Return the logger of a service (mlflow, tensorboard or wandb) for the run in a folder."""
    return {"mlflow": MLflow, "tensorboard": TensorBoard, "wandb": WandB}[service](folder)


def curves(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a progress line as curves: {"train/loss": 0.1, "train/test_psnr_0.05": 21.3}.

    Those by ratio that config.eval_every asks for are named as at the end.
    """
    return {**{f"train/{key}": value for key, value in metrics.items() if key not in LEFT_OUT},
            **(by_ratio(metrics["ratios"]) if "ratios" in metrics else {})}


def by_ratio(ratios: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured figures of each ratio: {"psnr/ratio_0.05": 23.1}; those not computed left out."""
    return {f"{name}/ratio_{ratio}": value for ratio, row in ratios.items()
            for name, value in row.items() if value is not None}


class MLflow(Callback):
    """Logs to $MLFLOW_TRACKING_URI, or else to the database mlflow.db beside the run folder."""

    def __init__(self, folder: Path):
        uri = os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(folder.parent / "mlflow.db")
        self.folder, self.tracking = folder, Tracking(uri, "flexgs", folder.parent / "mlartifacts")

    def begin(self, trainer: "Trainer") -> None:
        """Start the run, or continue that of the folder."""
        config = trainer.config
        self.run, self.ended = self.tracking.run(
            self.folder, trainer.scene.name, kind="scene", params=flatten(config.to_dict()),
            tags={"scene": trainer.scene.name, "preset": config.preset}), False
        self.run.start()

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the figures as train/<name>."""
        self.run.log_history([{"step": step, "time": time.time(), **metrics}])

    def measured(self, results: Mapping[str, Any], folder: Path) -> None:
        """Log figures, pictures, cuts and the model."""
        self.ended = self.run.log_results(results, folder)

    def end(self) -> None:
        """Mark a run that was not measured as killed, and say how to look at it."""
        if not self.ended:
            self.run.finish("KILLED")
        print(f"MLflow: {self.tracking.how_to_open()}")


class TensorBoard(Callback):
    """Writes event files into RUN/tensorboard."""

    def __init__(self, folder: Path):
        try:
            import tensorboardX
        except ImportError:
            raise MissingDependencyError("tensorboardX", "tensorboard", "--log tensorboard") from None
        self.folder, self.writer = folder / "tensorboard", tensorboardX.SummaryWriter

    def begin(self, trainer: "Trainer") -> None:
        """Open a file; curves of an interrupted run go on where its checkpoint was."""
        self.file = self.writer(str(self.folder), purge_step=trainer.step)
        self.file.add_text("config", f"```json\n{json.dumps(trainer.config.to_dict(), indent=1)}\n```", 0)

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the figures as train/<name>."""
        for name, value in curves(metrics).items():
            self.file.add_scalar(name, value, step)

    def measured(self, results: Mapping[str, Any], folder: Path) -> None:
        """Write the figures of the cuts, and the picture of their renders."""
        for name, value in by_ratio(results["ratios"]).items():
            self.file.add_scalar(name, value, results["steps"])
        self.file.add_image("renders", _grid(folder), results["steps"], dataformats="HWC")

    def end(self) -> None:
        """Close the file, and say how to look at it."""
        self.file.close()
        print(f"TensorBoard: tensorboard --logdir {pasted(self.folder)}")


class WandB(Callback):
    """Logs to Weights & Biases, as its own settings say (wandb login, WANDB_MODE=offline, WANDB_PROJECT)."""

    def __init__(self, folder: Path):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or it reports its own errors to its makers
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", "wandb", "--log wandb") from None
        self.folder, self.wandb = make_folder(folder), wandb

    def begin(self, trainer: "Trainer") -> None:
        """Start a run, or continue that of the folder, whose id is in wandb.json."""
        known = self.folder / "wandb.json"
        if not known.exists():
            write_json(known, {"run_id": uuid.uuid4().hex[:8]})
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "flexgs"), name=trainer.scene.name,
                id=read_json(known, dict[str, str]).get("run_id"), resume="allow", dir=str(self.folder),
                config=flatten(trainer.config.to_dict()),
                settings=self.wandb.Settings(console="off", quiet=True))
        except self.wandb.errors.Error as e:
            raise UserError(f"--log wandb: {e}; `wandb login`, or WANDB_MODE=offline") from None

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the figures as train/<name>."""
        self.run.log(curves(metrics), step=step)

    def measured(self, results: Mapping[str, Any], folder: Path) -> None:
        """Log the figures of the cuts as the run's summary, and the picture of their renders."""
        self.run.summary.update(by_ratio(results["ratios"]))
        self.run.log({"renders": self.wandb.Image(_grid(folder))}, step=results["steps"])

    def end(self) -> None:
        """End the run, and say where it is."""
        self.run.finish()
        there = f"wandb sync {pasted(Path(self.run.dir).parent)}" if self.run.offline else self.run.url
        print(f"Weights & Biases: {there}")


def _grid(folder: Path) -> np.ndarray:
    """Return renders/grid.png of a run folder, [height, width, 3]."""
    with Image.open(folder / "renders" / "grid.png") as image:
        return np.asarray(image.convert("RGB"))
