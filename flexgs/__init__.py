"""flexgs: train a 3D Gaussian Splatting scene once, cut it to any budget.

The whole library in five lines:

    scene = flexgs.load_scene("data/berlin", factor=4)
    model = flexgs.train(scene, flexgs.Config.from_preset("default"))
    small = model.cut("20MB")
    flexgs.save(small, "berlin_20mb.ply")                # or .spz, .sog, .splat, .glb: the suffix chooses
    flexgs.load("runs/flexgs/berlin").cut(0.05)
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgs.config import Config
from flexgs.errors import UserError

if TYPE_CHECKING:
    from flexgs.model.elastic import Cuttable, ElasticModel
    from flexgs.scene import Scene

__all__ = ["Config", "UserError", "load", "load_scene", "render", "save", "train"]


def train(scene: "Scene", config: Config, device: str = "auto",
          progress: Callable[[str], None] | None = print) -> "ElasticModel":
    """Train a scene and return its elastic model; nothing is written to disk.

    Args:
        scene: the capture, from load_scene().
        config: all settings; checked first (UserError).
        device: cpu, cuda, or auto: cuda where there is one. On the CPU torch is set to one thread, since the
            rasterizer has threads of its own.
        progress: called with a line of text every config.report_every views; None: silent.
    """
    from flexgs.device import pick_device
    from flexgs.formats import read
    from flexgs.run import progress_line
    from flexgs.training.trainer import Trainer

    config.check()
    base = read(config.base.ply) if config.base.ply else None
    trainer = Trainer(config, scene, device=pick_device(device), base=base)

    def report(step: int, metrics: dict[str, Any]) -> None:
        if progress:
            progress(progress_line(scene.name, step, metrics))

    trainer.fit(report, lambda step, write: None)
    return trainer.model()


def load(source: str | Path) -> "Cuttable":
    """Open a model for cutting: a run folder, a packed file (.fgs) or its URL, or a file of Gaussians."""
    from flexgs.deploy.source import open_model

    return open_model(source)


def __getattr__(name: str) -> Any:
    """Import the other public names on first use: torch and numba take seconds to import."""
    from importlib import import_module

    homes = {"load_scene": ("flexgs.scene", "load_scene"), "render": ("flexgs.raster", "render"),
             "save": ("flexgs.formats", "save")}
    if name not in homes:
        raise AttributeError(f"module 'flexgs' has no attribute {name!r}")
    module, attribute = homes[name]
    return getattr(import_module(module), attribute)
