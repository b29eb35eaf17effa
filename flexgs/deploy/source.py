"""What can be cut: a run, a packed file or its URL, and any file of splats that somebody else made."""

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
    """The model of a run folder or a model folder; of a .fgs file or an http(s) URL, of which cut() reads
    what it needs; or of a file of splats, in the order of their importance: for the training views of scene,
    else by their opacity and size alone.

    UserError if it is none of these, or broken.
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
    by = score("lightgaussian", splats, scene.train,
               Group()) if scene else score("footprint", splats, [], Group())
    config = Config.from_preset("plain")
    config.transform.kind = "none"
    ordered = splats[by.argsort(descending=True, stable=True)]
    return ElasticModel(ordered, Transform(), config, [view.camera for view in scene.train] if scene else ())
