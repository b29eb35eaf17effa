"""Opening what can be cut: a run, a packed file or its URL, or a file of Gaussians from any program."""

from pathlib import Path

from flexgs.config import Config
from flexgs.deploy.progressive import MAGIC, Progressive
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.formats import read
from flexgs.inputs import regular_file
from flexgs.model.elastic import ElasticModel
from flexgs.model.importance import score
from flexgs.model.transform import Transform
from flexgs.scene import Scene
from flexgs.urls import is_url


def open_model(source: str | Path, scene: Scene | None = None) -> ElasticModel | Progressive:
    """Open a model for cutting.

    Args:
        source: a run folder or a model folder; a packed .fgs file or its http(s) URL, of which cut() reads
            only what it needs; or a file of Gaussians in any format that flexgs reads.
        scene: for a file of Gaussians, the capture whose training views decide their order (LightGaussian's
            score); without it they are ordered by opacity and size.

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
    by = (score("lightgaussian", splats, scene.train, Group()) if scene
          else score("footprint", splats, [], Group()))
    config = Config.from_preset("plain")
    config.transform.kind = "none"
    ordered = splats[by.argsort(descending=True, stable=True)]
    return ElasticModel(ordered, Transform(), config, [view.camera for view in scene.train] if scene else ())
