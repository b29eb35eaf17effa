"""ElasticModel: Gaussians in a nested order, with the transform that changes the ones a cut keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from flexgs import stored
from flexgs.camera import Camera, check_cameras
from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.extensions import named
from flexgs.files import make_folder, newest
from flexgs.inputs import Layout, Range, typed
from flexgs.model.budget import cut_to
from flexgs.model.deltas import Deltas
from flexgs.model.field import Field
from flexgs.model.transform import Transform
from flexgs.origin import WORLD
from flexgs.splats import Splats
from flexgs.stored import SPLATS, Stored, layout_of, part, splats_of

DAMAGED = "the model is damaged: copy it again; a run without results.json makes it again"
CAMERAS: Layout = {"cameras.viewmat": ("float32", ("cameras", 4, 4)),
                   "cameras.K": ("float32", ("cameras", 3, 3)),
                   "cameras.size": ("int64", ("cameras", 2))}

Length = Annotated[float, Range(1e-30, 1e30)]
Coordinate = Annotated[float, Range(-1e30, 1e30)]
"""A coordinate in world units that float32 can hold, and whose differences it can hold too."""


@dataclass(frozen=True)
class Place:
    """Where a model lies and how large it is; files of older versions leave this out."""

    origin: tuple[Coordinate, Coordinate, Coordinate] = WORLD
    """Where (0, 0, 0) of positions and cameras lies in the capture's own coordinates."""
    unit: Length = 1.0
    """Length in world units in which the transform counts positions and sizes."""
    near: Length = 0.01
    """Near plane of all cameras, in world units."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON holds them."""
        return {"origin": list(self.origin), "unit": self.unit, "near": self.near}

    @staticmethod
    def of(about: dict[str, Any], where: str) -> "Place":
        """Read a place from the description in a file; UserError says where a value is wrong."""
        return typed(Place, {key: about[key] for key in ("origin", "unit", "near") if key in about}, where)


class Cuttable(Protocol):
    """Anything that can be cut to a budget: an ElasticModel, or the packed file of deploy/progressive.py."""

    @property
    def config(self) -> Config:
        """The settings that the model was trained with."""
    @property
    def cameras(self) -> Sequence[Camera]:
        """Cameras from which the model is worth looking at; may be empty."""
    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics."""
    def __len__(self) -> int:
        """Number of Gaussians of the whole model."""
    def cut(self, budget: str | float) -> Splats:
        """Plain Gaussians for a budget; see ElasticModel.cut."""


@dataclass(eq=False)
class ElasticModel:
    """A trained model that can be cut to any budget; its files are safetensors and JSON only."""

    splats: Splats
    """All N Gaussians, in the order in which they are kept: a cut at ratio e has the first floor(e N)."""
    transform: Transform
    config: Config
    cameras: Sequence[Camera] = ()
    """Cameras of the training views: from there the model is worth looking at. May be empty."""
    capture: str | None = None
    """Digest of the capture that the model was trained on (scene/identity.py), where it is known."""

    def __len__(self) -> int:
        """Number of Gaussians of the whole model."""
        return len(self.splats)

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics."""
        return self.splats.sh_degree

    @property
    def place(self) -> Place:
        """Where the model lies, which files state beside the tensors."""
        near = {"near": self.cameras[0].near} if self.cameras else {}
        return Place(self.splats.origin, self.transform.unit, **near)

    def cut(self, budget: str | float) -> Splats:
        """Cut to a budget, see model/budget.py for all of them.

        Args:
            budget: a ratio up to 1, a number of Gaussians above 1, or text: "5%", "500k", "20MB" (as PLY),
                "16ms" (per frame of 1280x720, measured now on this machine), or a device such as "quest".

        Returns:
            Plain Gaussians with the transform baked in. Cuts are deterministic, nested and of exact count;
            at ratio 1 the cut is the base model, unchanged.

        Raises:
            UserError: the budget is none, or too small for one Gaussian.

        >>> import flexgs
        >>> model = flexgs.load("runs/flexgs/garden")
        >>> [len(model.cut(budget)) for budget in (1.0, 0.05, "5%", 200, "20kB")]
        [800, 40, 40, 200, 186]
        """
        return cut_to(budget, self, self.first)

    def first(self, kept: int, ratio: float) -> Splats:
        """Return the first `kept` Gaussians as the transform changes them at a ratio; all N are unchanged."""
        n = len(self)
        return self.transform(self.splats[:kept], ratio).detach() if kept < n else self.splats.detach()

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and model.json into a folder, which is made if it is not there.

        >>> import flexgs
        >>> flexgs.load("runs/flexgs/garden").save("my model")
        >>> len(flexgs.load("my model"))
        800
        """
        folder = make_folder(Path(folder))
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
        """Return a copy on a device."""
        return replace(self, splats=self.splats.to(device), transform=self.transform.to(device),
                       cameras=[camera.to(device) for camera in self.cameras])

    @staticmethod
    def load(folder: Path | str) -> "ElasticModel":
        """Read what save() wrote, from its folder or the run folder around it; UserError if there is none."""
        folder = Path(folder)
        inner = newest(folder, "model")
        folder = inner if inner.is_dir() else folder
        if not (folder / "model.json").exists():
            raise UserError(f"{folder}: not a flexgs model; expected a folder with "
                            "model.safetensors and model.json")
        file = Stored(folder, "model", {"splats": int, "config": dict}, DAMAGED)
        config = Config.from_dict(file.about["config"], str(folder / "model.json"))
        place = Place.of(file.about, str(folder / "model.json"))
        splats = splats_of(file.heads, str(file.file), Gaussians=file.about["splats"])
        with torch.device("meta"):  # shapes only, without memory
            transform = make_transform(config, splats, unit=place.unit).stored()
        optional = CAMERAS if CAMERAS.keys() & file.heads.keys() else {}
        tensors = file.tensors({**SPLATS, **layout_of(transform, "transform."), **optional})
        transform.load_state_dict(part(tensors, "transform."), assign=True)
        if optional:
            check_cameras(tensors["cameras.viewmat"], tensors["cameras.K"], tensors["cameras.size"],
                          str(file.file))
        stacks = [tensors.get(name, ()) for name in CAMERAS]
        cameras = [Camera(viewmat, K, int(size[0]), int(size[1]), place.near, place.origin)
                   for viewmat, K, size in zip(*stacks, strict=True)]
        splats = Splats(**part(tensors, "splats."), origin=place.origin)
        return ElasticModel(splats, transform, config, cameras, file.about.get("capture"))


TRANSFORMS: Mapping[str, type[Transform]] = {"none": Transform, "deltas": Deltas, "field": Field}


def transform_kind(config: Config) -> type[Transform]:
    """Return the transform class that config.transform.kind names; UserError if there is none."""
    return named("--transform.kind", config.transform.kind, TRANSFORMS, Transform)


def make_transform(config: Config, splats: Splats, points: Tensor | None = None,
                   unit: float = 1.0) -> Transform:
    """Make the transform that config.transform.kind names, for training or to load tensors into.

    Args:
        config: all settings of the run.
        splats: the Gaussians that it changes.
        points: [M, 3] points of the capture, which field.box may name; loading needs none.
        unit: length in world units in which it counts positions and sizes.
    """
    return transform_kind(config).make(config, splats, points, unit)
