"""flexgs: train a 3D Gaussian Splatting scene once, cut it to any budget.

The whole library in five lines:

    scene = flexgs.load_scene("data/berlin", factor=4)
    model = flexgs.train(scene, flexgs.Config.from_preset("default"))
    small = model.cut("20MB")
    flexgs.save(small, "berlin_20mb.ply")                # or .spz, .sog, .splat, .glb: the suffix chooses
    flexgs.load("runs/flexgs/berlin").cut(0.05)
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgs.callbacks import Callback
from flexgs.config import Config
from flexgs.errors import UserError

if TYPE_CHECKING:
    from flexgs.gaussians import Attributes
    from flexgs.model.elastic import Cuttable, ElasticModel
    from flexgs.scene import Scene, View

_HOMES = {"ElasticModel": "flexgs.model.elastic", "Scene": "flexgs.scene", "Splats": "flexgs.splats",
          "load_scene": "flexgs.scene", "render": "flexgs.raster"}
"""Public names that are imported on first use, since torch and numba take seconds, and their modules."""
__all__ = ["Callback", "Config", "ElasticModel", "Scene", "Splats", "UserError", "__version__", "load",
           "load_scene", "render", "save", "train"]


def train(scene: "Scene | Path | str", config: Config | None = None, device: str = "auto",
          callbacks: Sequence[Callback] | None = None) -> "ElasticModel":
    """Train a scene and return its elastic model; nothing is written to disk.

    Args:
        scene: the capture, from load_scene(), or its folder, which is then read as config.data says.
        config: all settings; None: those of the preset default.
        device: cpu, cuda, or auto: cuda where there is one. On the CPU torch is set to one thread, since the
            rasterizer has threads of its own.
        callbacks: what is told how the training goes. None: a live bar, or lines where none can be drawn;
            empty: nothing is printed.

    Raises:
        UserError: a setting is out of its range, or the capture cannot be read.

    >>> import flexgs
    >>> config = flexgs.Config.from_preset("smoke", steps=40, report_every=20)
    >>> model = flexgs.train("captures/garden", config, callbacks=[])
    >>> flexgs.render(model.cut("10%"), model.cameras[0]).image.shape
    torch.Size([12, 16, 3])
    """
    from flexgs.callbacks import Callbacks
    from flexgs.callbacks.progress import progress
    from flexgs.device import pick_device
    from flexgs.formats import read
    from flexgs.scene.load import load_capture
    from flexgs.training.trainer import Trainer

    config = (config or Config.from_preset("default")).check()
    if isinstance(scene, Path | str):
        scene = load_capture(Path(scene), config)
    base = read(config.base.ply) if config.base.ply else None
    trainer = Trainer(config, scene, device=pick_device(device), base=base)
    told = Callbacks([progress(scene.name)] if callbacks is None else callbacks)

    def stop(reported: bool) -> bool:
        told.step(trainer.step)
        return False

    with told.told(trainer):
        trainer.fit(told.report, lambda step, write: None, stop=stop)
        model = trainer.model()
        told.trained(model)
    return model


def load(source: str | Path) -> "Cuttable":
    """Open a model for cutting: a run folder, a packed file (.fgs) or its URL, or a file of Gaussians.

    Files of Gaussians of all formats are read, and are cut by merging.

    >>> import flexgs
    >>> model = flexgs.load("runs/flexgs/garden")
    >>> stored = flexgs.save(model.cut(0.5), "half.spz")
    >>> theirs = flexgs.load("half.spz")
    >>> len(theirs), len(theirs.cut("10%"))
    (400, 40)
    """
    from flexgs.deploy.source import open_model

    return open_model(source)


def save(what: "Attributes | ElasticModel", path: str | Path,
         views: "Sequence[View]" = ()) -> "Attributes | Cuttable":
    """Write a cut or a whole model in the format of the path's suffix: .ply, .spz, .sog, .splat, .glb, .fgs.

    Args:
        what: the Gaussians of a cut; or a trained model, which .fgs packs with all its cuts, and of which
            other formats hold the whole.
        path: the file; docs/formats.md has all suffixes.
        views: training views of the capture, which the format .vq.npz needs.

    Returns:
        What a reader of the file gets, since most formats round.

    Raises:
        UserError: no format has this suffix, or it cannot hold these Gaussians; an existing file stays.

    >>> import flexgs
    >>> model = flexgs.load("runs/flexgs/garden")
    >>> len(flexgs.save(model.cut("10kB"), "small.splat"))
    90
    >>> packed = flexgs.save(model, "garden.fgs")
    >>> len(packed.cut("1%"))
    8
    >>> flexgs.save(model, "garden.obj")
    Traceback (most recent call last):
        ...
    flexgs.errors.UserError: garden.obj: expected a name that ends in one of .ply ...
    """
    from flexgs import formats
    from flexgs.deploy.progressive import write
    from flexgs.model.elastic import ElasticModel

    if Path(path).suffix.lower() == ".fgs":
        if not isinstance(what, ElasticModel):
            raise UserError(f"{path}: found a cut, expected a trained model, of which .fgs has all cuts")
        write(what, Path(path))
        return load(path)
    return formats.save(what.cut(1.0) if isinstance(what, ElasticModel) else what, path, views)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("flexgs")
    if name not in _HOMES:
        raise AttributeError(f"module 'flexgs' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
