"""Opening what can be cut: a run, a packed file or its URL, or a file of Gaussians from any program."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flexgs.config import Config
from flexgs.deploy import MAGIC
from flexgs.deploy.merged import MergedModel
from flexgs.errors import UserError
from flexgs.formats import read_gaussians
from flexgs.gaussians import TENSORS
from flexgs.inputs import regular_file
from flexgs.urls import is_url

if TYPE_CHECKING:  # torch takes seconds to import, and a file that is merged needs none
    from flexgs.camera import Camera
    from flexgs.model.elastic import Cuttable
    from flexgs.scene import Scene

By = Literal["merge", "prune"]


def open_model(source: str | Path, scene: "Scene | None" = None, by: By = "merge",
               attributes: Collection[str] = TENSORS) -> "Cuttable":
    """Open a model for cutting.

    Args:
        source: a run folder or a model folder, cut as it was evaluated; a packed .fgs file or its http(s)
            URL, of which cut() reads only what it needs; or a file of Gaussians in any format that flexgs
            reads.
        scene: the capture of a file of Gaussians.
        by: how a file of Gaussians is cut. "merge": neighbours become one Gaussian. "prune": the most
            important ones stay, by LightGaussian's score at the training views of scene, or else by opacity
            and size.
        attributes: which values of a file of Gaussians are needed; a PLY's other ones may be zeros.

    Raises:
        UserError: the source is none of these, or damaged.
    """
    where = str(source)
    if is_url(where) or where.lower().endswith(".fgs"):
        return _packed(source)
    path = Path(source)
    if path.is_dir():
        from flexgs.model.elastic import ElasticModel

        model = ElasticModel.load(path)
        if model.config.evaluation.cuts == "own":
            return model
        from flexgs.evaluate import cut_as

        return cut_as(model, model.config.evaluation)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a run, a .fgs file or "
                        "URL, or a file of splats")
    with regular_file(path, "a file of splats").open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return _packed(source)
    gaussians = read_gaussians(path, attributes)
    merged = MergedModel(gaussians.at(scene.origin) if scene else gaussians, Config.from_preset("plain"),
                        [view.camera for view in scene.train] if scene else (), path)
    return merged if by == "merge" else _pruned(merged, scene)


def _packed(source: str | Path) -> "Cuttable":
    from flexgs.deploy.progressive import Progressive

    return Progressive.open(source)


def _pruned(model: MergedModel, scene: "Scene | None") -> "Cuttable":
    from flexgs.distributed import Group
    from flexgs.model.elastic import ElasticModel
    from flexgs.model.importance import score
    from flexgs.model.transform import Transform

    by_score = score("lightgaussian" if scene else "footprint", model.splats, scene.train if scene else [],
                     Group())
    order = by_score.argsort(descending=True, stable=True)
    return ElasticModel(model.splats[order], Transform(), model.config, model.cameras)


def cameras_of(source: Path) -> "list[Camera]":
    """The training cameras of a run, or all of a capture, whose photographs need not be there."""
    from flexgs.model.elastic import ElasticModel
    from flexgs.scene.load import load_cameras

    if not (Path(source) / "config.json").exists() and not (Path(source) / "model.json").exists():
        return load_cameras(source)
    cameras = list(ElasticModel.load(source).cameras)
    if not cameras:
        raise UserError(f"{source}: found a run without cameras, expected another run or a capture")
    return cameras
