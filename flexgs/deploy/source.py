"""Opening what can be cut: a run, a packed file or its URL, or a file of Gaussians from any program."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from flexgs.camera import Camera
from flexgs.config import Config
from flexgs.deploy.progressive import MAGIC, Progressive
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.formats import read
from flexgs.inputs import regular_file
from flexgs.model.budget import fitting
from flexgs.model.elastic import Cuttable, ElasticModel
from flexgs.model.importance import score
from flexgs.model.merge_tree import MergeTree
from flexgs.model.transform import Transform
from flexgs.model.viewpoints import at_detail, viewpoints
from flexgs.scene import Scene
from flexgs.scene.load import load_cameras
from flexgs.splats import Splats
from flexgs.urls import is_url

SEARCHED = 20_000
"""Gaussians that viewpoints are searched with."""
By = Literal["merge", "prune"]


def open_model(source: str | Path, scene: Scene | None = None, by: By = "merge") -> Cuttable:
    """Open a model for cutting.

    Args:
        source: a run folder or a model folder; a packed .fgs file or its http(s) URL, of which cut() reads
            only what it needs; or a file of Gaussians in any format that flexgs reads.
        scene: the capture of a file of Gaussians.
        by: how a file of Gaussians is cut. "merge": neighbours become one Gaussian. "prune": the most
            important ones stay, by LightGaussian's score at the training views of scene, or else by opacity
            and size.

    Raises:
        UserError: the source is none of these, or damaged.
    """
    where = str(source)
    if is_url(where) or where.lower().endswith(".fgs"):
        return Progressive.open(source)
    path = Path(source)
    if path.is_dir():
        return ElasticModel.load(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a run, a .fgs file or "
                        "URL, or a file of splats")
    with regular_file(path, "a file of splats").open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return Progressive.open(source)
    splats = read(path)
    splats = splats.at(scene.origin) if scene else splats
    config = Config.from_preset("plain")
    cameras = [view.camera for view in scene.train] if scene else ()
    if by == "merge":
        return MergedModel(splats, config, cameras)
    by_score = score("lightgaussian" if scene else "footprint", splats, scene.train if scene else [], Group())
    return ElasticModel(splats[by_score.argsort(descending=True, stable=True)], Transform(), config, cameras)


def cameras_of(source: Path) -> list[Camera]:
    """The training cameras of a run, or all of a capture, whose photographs need not be there."""
    if not (Path(source) / "config.json").exists() and not (Path(source) / "model.json").exists():
        return load_cameras(source)
    cameras = list(ElasticModel.load(source).cameras)
    if not cameras:
        raise UserError(f"{source}: found a run without cameras, expected another run or a capture")
    return cameras


@dataclass(eq=False)
class MergedModel:
    """A model that is not elastic: its Gaussians are merged to a cut (model/merge_tree.py)."""

    splats: Splats
    config: Config
    cameras: Sequence[Camera] = ()

    @cached_property
    def _tree(self) -> MergeTree:
        return MergeTree(self.splats)

    @cached_property
    def viewpoints(self) -> Sequence[Camera]:
        """The cameras, or else some that are searched for, at the size that shows the model's detail."""
        return at_detail(self.splats, self.cameras or viewpoints(self._tree.cut(SEARCHED)))

    @property
    def sh_degree(self) -> int:
        """The degree of the spherical harmonics, 0 to 3."""
        return self.splats.sh_degree

    def __len__(self) -> int:
        """The number of Gaussians of the whole."""
        return len(self.splats)

    def cut(self, budget: str | float) -> Splats:
        """Return exactly as many Gaussians as a budget says (see ElasticModel.cut); cuts are not nested."""
        return fitting(budget, len(self), self.sh_degree, lambda kept, ratio: self._tree.cut(kept))
