"""ElasticModel: splats in a nested order and the transform of those that stay; a cut is a prefix, transform baked in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexgs.camera import WORLD, Camera, Origin
from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.files import write_json
from flexgs.inputs import shown, typed
from flexgs.model.transform import Transform, make_transform
from flexgs.splats import Splats

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """Where a model is, and how large, as its files say beside their tensors; those of older versions do not."""

    origin: Origin = WORLD
    """Where (0, 0, 0) of positions and cameras is in the capture's own coordinates."""
    unit: float = 1.0
    """The length that the transform counts in."""
    near: float = 0.01
    """Of all cameras."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "origin": list(self.origin)}

    @staticmethod
    def of(about: dict[str, Any], where: str) -> "Place":
        """The one that a description from a file has among other things; UserError names where."""
        place: Place = typed(Place, {key: about[key] for key in ("origin", "unit", "near") if key in about}, where)
        for name in ("unit", "near"):
            if not 1e-30 < getattr(place, name) < 1e30:
                raise UserError(f"{where}: found {name} {shown(getattr(place, name))}, expected a length; the file is damaged")
        return place


@dataclass(eq=False)
class ElasticModel:
    """Cut it with cut(); save() and load() use safetensors and JSON only."""

    splats: Splats
    """In the order in which they are kept: a cut at e is the first floor(e N)."""
    transform: Transform
    config: Config
    cameras: Sequence[Camera] = ()
    """Those of the training views, if it has any: where the model is worth looking at from."""

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
        """Plain Gaussians for a budget: a ratio in (0, 1] or "5%", "500k", "20MB" (see deploy/budget.py).

        Deterministic, nested and of exact count; the transform is baked in. At ratio 1 it is the base model.
        """
        if isinstance(budget, str):
            from flexgs.deploy.budget import fitting  # the one look ahead: only deploy knows the size of files

            return fitting(budget, len(self), self.sh_degree, self.first)
        return self.first(count_at(budget, len(self)), float(budget))

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
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
        write_json(folder / "model.json", {"format": FORMAT, "splats": len(self.splats), "config": self.config.to_dict(),
                                          **self.place.to_dict()})

    def to(self, device: str) -> "ElasticModel":
        return ElasticModel(self.splats.to(device), self.transform.to(device), self.config,
                            [camera.to(device) for camera in self.cameras])

    @staticmethod
    def load(folder: Path) -> "ElasticModel":
        """Read what save() wrote; folder may also be the run folder around it."""
        folder = Path(folder)
        folder = folder / "model" if (folder / "model").is_dir() else folder
        path = folder / "model.safetensors"
        try:
            about = json.loads((folder / "model.json").read_text())
            with safe_open(path, "pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, json.JSONDecodeError, SafetensorError) as e:
            raise UserError(f"{folder}: not a flexgs model ({e}); expected model.safetensors and model.json") from None
        if about.get("format") != FORMAT:
            raise UserError(f"{folder}: model format {about.get('format')}, this version reads {FORMAT}")
        config = Config.from_dict(about["config"], str(folder / "model.json"))
        place = Place.of(about, str(folder / "model.json"))
        splats = Splats(**{k.removeprefix("splats."): t for k, t in tensors.items() if k.startswith("splats.")},
                        origin=place.origin)
        transform = make_transform(config, splats, unit=place.unit).stored()
        transform.load_state_dict({k.removeprefix("transform."): t for k, t in tensors.items()
                                   if k.startswith("transform.")})
        cameras = [Camera(viewmat, K, int(size[0]), int(size[1]), place.near, place.origin) for viewmat, K, size in
                   zip(*(tensors.get(f"cameras.{part}", ()) for part in ("viewmat", "K", "size")), strict=True)]
        return ElasticModel(splats, transform, config, cameras)
