"""What a cut can be stored as, so that quality and bytes are those of one file.

A new format is one entry of FORMATS, and its name in the choices of Evaluation.format (config.py).
"""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from flexgs.camera import WORLD
from flexgs.deploy import gltf, interchange, latents, vq
from flexgs.deploy.export import in_world, is_wide, local, ply_bytes, read_ply, write_ply
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.model.importance import score
from flexgs.scene.views import View
from flexgs.splats import Splats


@dataclass(frozen=True)
class Format:
    about: str
    """What the protocol says of it."""
    suffix: str
    write: Callable[[Splats, Path, Sequence[View]], None]
    """Given the training views."""
    read: Callable[[Path], Splats]
    loses: str = "nothing"
    """What it cannot hold."""


class Stored(NamedTuple):
    splats: Splats
    """What a reader of the file gets, on the device of the original."""
    bytes: int
    seconds: float
    """That encoding took; 0 for a PLY."""


def _write_vq(splats: Splats, path: Path, views: Sequence[View]) -> None:
    if not views:
        raise UserError(f"{path}: Compressed 3DGS needs the views that the model is for; give the capture, --scene")
    vq.write(in_world(splats, path), path, score("c3dgs", splats, views, Group()))


def _interchange(about: str, kind: str, loses: str) -> Format:
    return Format(about, f".{kind}", lambda splats, path, views: interchange.write(in_world(splats, path), path, kind),
                  functools.partial(interchange.read, kind=kind), loses)


FORMATS: Mapping[str, Format] = {
    "ply": Format("standard 3DGS PLY", ".ply", lambda splats, path, views: write_ply(splats, path), read_ply),
    "compressed_ply": _interchange(
        "PlayCanvas compressed PLY", "compressed.ply", "positions and scales to 11, 10, 11 bits per box of 256, the rest to 8"),
    "spz": _interchange("Niantic SPZ 3", "spz", "positions to 1/4096 of a unit, the rest to 8 bits"),
    "sog": _interchange("PlayCanvas SOG", "sog", "positions to 16 bits, harmonics to a palette, the rest to 8 bits"),
    "splat": _interchange("antimatter15 .splat", "splat", "view-dependent colour (all harmonics); the rest to 8 bits"),
    "gltf": Format("glTF KHR_gaussian_splatting, uncompressed", ".glb",
                   lambda splats, path, views: gltf.write(in_world(splats, path), path), gltf.read),
    "vq": Format("Compressed 3DGS, not fine-tuned", ".vq.npz", _write_vq, vq.read, "harmonics and shapes to codebooks"),
    "latents": Format("EAGLES, fitted after training", ".latents.npz",
                      lambda splats, path, views: latents.write(in_world(splats, path), path), latents.read,
                      "attributes but for positions to 8-bit latents"),
}


def format_of(path: Path | str) -> str:
    """The name in FORMATS of what a file is by its suffix, the longest that fits; UserError if there is none."""
    name = str(path).lower()
    fitting = [key for key, chosen in FORMATS.items() if name.endswith(chosen.suffix)]
    if not fitting:
        raise UserError(f"{path}: expected a name that ends in one of {' '.join(f.suffix for f in FORMATS.values())}")
    return max(fitting, key=lambda key: len(FORMATS[key].suffix))


def localised(splats: Splats, views: Sequence[View]) -> tuple[Splats, list[View]]:
    """Splats and views in coordinates whose (0, 0, 0) is the splats' origin, which every format can hold."""
    return local(splats), [replace(view, camera=replace(view.camera.at(splats.origin), origin=WORLD)) for view in views]


def as_stored(splats: Splats, name: str, views: Sequence[View]) -> Stored:
    """The splats after writing them to a file of this format, a name in FORMATS, and reading it back.

    Each of several workers does it for itself: the encoders are deterministic. A PLY loses nothing and is not written.
    """
    if name not in FORMATS:
        raise UserError(f"--evaluation.format {name}: unknown; expected one of {', '.join(FORMATS)}")
    if name == "ply":
        return Stored(splats, ply_bytes(len(splats), splats.sh_degree, is_wide(splats)), 0.0)
    chosen = FORMATS[name]
    own, near = localised(splats, views)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cut{chosen.suffix}"
        start = time.perf_counter()
        chosen.write(own, path, near)
        seconds = time.perf_counter() - start
        return Stored(replace(chosen.read(path), origin=splats.origin).to(splats.means.device), path.stat().st_size, seconds)
