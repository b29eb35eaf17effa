"""ElasticModel: splats in a nested order and the transform of those that stay; a cut is a prefix, transform
baked in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from flexgs import stored
from flexgs.camera import WORLD, Camera, check_cameras
from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.extensions import named
from flexgs.files import newest
from flexgs.inputs import Layout, Range, typed
from flexgs.model.budget import fitting
from flexgs.model.deltas import Deltas
from flexgs.model.field import Field
from flexgs.model.transform import Transform
from flexgs.splats import Splats
from flexgs.stored import SPLATS, Stored, layout_of, part, splats_of

DAMAGED = "the model is damaged: copy it again; a run without results.json makes it again"
CAMERAS: Layout = {"cameras.viewmat": ("float32", ("cameras", 4, 4)),
                   "cameras.K": ("float32", ("cameras", 3, 3)),
                   "cameras.size": ("int64", ("cameras", 2))}

Length = Annotated[float, Range(1e-30, 1e30)]
Coordinate = Annotated[float, Range(-1e30, 1e30)]
"""What float32 still holds, and so do its differences."""


@dataclass(frozen=True)
class Place:
    """Where a model is, and how large, as its files say beside their tensors; those of older versions do
    not."""

    origin: tuple[Coordinate, Coordinate, Coordinate] = WORLD
    """Where (0, 0, 0) of positions and cameras is in the capture's own coordinates."""
    unit: Length = 1.0
    """The length that the transform counts in."""
    near: Length = 0.01
    """Of all cameras."""

    def to_dict(self) -> dict[str, Any]:
        return {"origin": list(self.origin), "unit": self.unit, "near": self.near}

    @staticmethod
    def of(about: dict[str, Any], where: str) -> "Place":
        """The one that a description from a file has among other things; UserError names where."""
        return typed(Place, {key: about[key] for key in ("origin", "unit", "near") if key in about}, where)


class Cuttable(Protocol):
    """What can be cut to any budget: an ElasticModel, or one that is packed in a file
    (deploy/progressive.py)."""

    @property
    def config(self) -> Config: ...
    @property
    def cameras(self) -> Sequence[Camera]:
        """From where the model is worth looking at; may be empty."""
    @property
    def sh_degree(self) -> int: ...
    def __len__(self) -> int:
        """The number of Gaussians of the whole."""
    def cut(self, budget: str | float) -> Splats:
        """Plain Gaussians for a budget; see ElasticModel.cut."""


@dataclass(eq=False)
class ElasticModel:
    """Cut it with cut(); save() and load() use safetensors and JSON only."""

    splats: Splats
    """In the order in which they are kept: a cut at e is the first floor(e N)."""
    transform: Transform
    config: Config
    cameras: Sequence[Camera] = ()
    """Those of the training views, if it has any: where the model is worth looking at from."""
    capture: str | None = None
    """The digest of what it was trained on (scene/identity.py), if it knows."""

    def __len__(self) -> int:
        """The number of Gaussians of the whole."""
        return len(self.splats)

    @property
    def sh_degree(self) -> int:
        return self.splats.sh_degree

    @property
    def place(self) -> Place:
        """What files have to say beside the tensors."""
        near = {"near": self.cameras[0].near} if self.cameras else {}
        return Place(self.splats.origin, self.transform.unit, **near)

    def cut(self, budget: str | float) -> Splats:
        """Plain Gaussians for a budget: a ratio up to 1, of which 1 is all, or "5%", "500k", "20MB" (see
        model/budget.py).

        Deterministic, nested and of exact count; the transform is baked in. At ratio 1 it is the base model.
        """
        return fitting(budget, len(self), self.sh_degree, self.first)

    def first(self, kept: int, ratio: float) -> Splats:
        """The first so many Gaussians, as the transform makes them at a ratio."""
        n = len(self)
        return self.transform(self.splats[:kept], ratio).detach() if kept < n else self.splats.detach()

    def save(self, folder: Path) -> None:
        """Write model.safetensors and model.json into an existing folder."""
        tensors = {f"splats.{name}": t for name, t in self.splats.items()}
        tensors |= {f"transform.{name}": t for name, t in self.transform.state_dict().items()}
        if self.cameras:
            cameras = [camera.at(self.splats.origin) for camera in self.cameras]
            tensors |= {"cameras.viewmat": torch.stack([c.viewmat.float() for c in cameras]),
                        "cameras.K": torch.stack([c.K for c in cameras]),
                        "cameras.size": torch.tensor([(c.width, c.height) for c in cameras])}
        stored.save(folder, "model", tensors, {"splats": len(self.splats), "config": self.config.to_dict(),
                                               "capture": self.capture, **self.place.to_dict()})

    def to(self, device: str) -> "ElasticModel":
        return replace(self, splats=self.splats.to(device), transform=self.transform.to(device),
                       cameras=[camera.to(device) for camera in self.cameras])

    @staticmethod
    def load(folder: Path) -> "ElasticModel":
        """Read what save() wrote; folder may also be the run folder around it. UserError for anything
        else."""
        folder = Path(folder)
        folder = inner if (inner := newest(folder, "model")).is_dir() else folder
        if not (folder / "model.json").exists():
            raise UserError(f"{folder}: not a flexgs model; expected a folder with "
                            "model.safetensors and model.json")
        file = Stored(folder, "model", {"splats": int, "config": dict}, DAMAGED)
        config = Config.from_dict(file.about["config"], str(folder / "model.json"))
        place = Place.of(file.about, str(folder / "model.json"))
        splats = splats_of(file.heads, str(file.file), Gaussians=file.about["splats"])
        with torch.device("meta"):  # its sizes, without memory for them
            transform = make_transform(config, splats, unit=place.unit).stored()
        optional = CAMERAS if CAMERAS.keys() & file.heads.keys() else {}
        tensors = file.tensors({**SPLATS, **layout_of(transform, "transform."), **optional})
        transform.load_state_dict(part(tensors, "transform."), assign=True)
        if optional:
            check_cameras(tensors["cameras.viewmat"], tensors["cameras.K"], tensors["cameras.size"],
                          str(file.file))
        cameras = [Camera(viewmat, K, int(size[0]), int(size[1]), place.near, place.origin) for viewmat, K,
                   size in
                   zip(*(tensors.get(name, ()) for name in CAMERAS), strict=True)]
        splats = Splats(**part(tensors, "splats."), origin=place.origin)
        return ElasticModel(splats, transform, config, cameras, file.about.get("capture"))


TRANSFORMS: Mapping[str, type[Transform]] = {"none": Transform, "deltas": Deltas, "field": Field}


def transform_kind(config: Config) -> type[Transform]:
    """The class of transform that config.transform.kind names. UserError if there is none."""
    return named("--transform.kind", config.transform.kind, TRANSFORMS, Transform)


def make_transform(config: Config, splats: Splats, points: Tensor | None = None,
                   unit: float = 1.0) -> Transform:
    """The transform that config.transform.kind names, initialised to change nothing unless config says
    otherwise.

    points [M, 3] of the capture are the other choice for the field's box; a transform that is loaded needs
    none.
    """
    return transform_kind(config).make(config, splats, points, unit)
