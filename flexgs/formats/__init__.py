"""What a cut can be stored as, so that quality and bytes are those of one file.

A new format is one entry of FORMATS, and its name in the choices of Evaluation.format (config.py). Whatever
is written is read again before it takes its place, and refused if it is not what was given; whatever is read
is recognised by its first bytes.
"""

import functools
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from flexgs.camera import WORLD
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.formats import gltf, interchange, latents, vq
from flexgs.formats.fidelity import ANY, BITS, Bounds, damage
from flexgs.inputs import regular_file
from flexgs.model.importance import score
from flexgs.ply import checked, in_world, is_wide, local, ply_bytes, read_ply, write_ply
from flexgs.ply_rows import read_head
from flexgs.scene.views import View
from flexgs.splats import SH_C0, Splats, unit_quaternions


@dataclass(frozen=True)
class Format:
    about: str
    """What the protocol says of it."""
    suffix: str
    encode: Callable[[Splats, Path, Sequence[View]], None]
    """Make a file, of a name with this suffix, of finite Gaussians on the CPU and of the training views."""
    read: Callable[[Path], Splats]
    loses: str = "nothing"
    """What it cannot hold."""
    bounds: Bounds = BITS
    """How much it may change."""
    order: Callable[[Splats], torch.Tensor] | None = None
    """[N] indices: in which order Gaussians are encoded, if not in their own."""
    kept: Callable[[Splats], Splats] = lambda splats: splats
    """What it is meant to keep of them."""

    def write(self, splats: Splats, path: Path, views: Sequence[View] = ()) -> Splats:
        """Put splats into a file, given the training views, and return what a reader gets, on the device of
        the original.

        UserError, and the file that was there stays, if splats are not finite or come back as others than
        they were.
        """
        given = checked(splats, path).detach().to("cpu")
        given = given.changed(quats=unit_quaternions(given.quats))
        given = given[self.order(given)] if self.order else given
        with atomic_file(path) as out:
            try:
                # a writer that changes them would be compared with itself
                self.encode(given.clone(), out, views)
                stored = self.read(out)
            except UserError as e:
                raise UserError(str(e).replace(str(out), str(path))) from None
            if wrong := damage(self.kept(given), stored, self.bounds):
                raise UserError(f"{path}: {self.about} cannot hold these Gaussians: {wrong}; expected "
                                "NAME.ply, which loses nothing")
        return stored.to(splats.means.device)


class StoredCut(NamedTuple):
    splats: Splats
    """What a reader of the file gets, on the device of the original."""
    bytes: int
    seconds: float
    """That writing took, with the check of what was written; 0 for a PLY."""


def _encode_vq(splats: Splats, path: Path, views: Sequence[View]) -> None:
    if not views:
        raise UserError(f"{path}: Compressed 3DGS needs the views that the model is for; give "
                        "the capture, --scene")
    vq.write(in_world(splats, path), path, score("c3dgs", splats, views, Group()))


def _shown(splats: Splats) -> Splats:
    """Colours of 0 to 1 that are the same from everywhere."""
    return splats.changed(sh0=splats.sh0.clamp(-0.5 / SH_C0, 0.5 / SH_C0), shN=splats.shN[:, :0])


def _interchange(about: str, kind: str, loses: str, bounds: Bounds = BITS,
                 kept: Callable[[Splats], Splats] = lambda splats: splats) -> Format:
    return Format(about, f".{kind}",
                  lambda splats, path, views: interchange.write(in_world(splats, path), path, kind),
                  functools.partial(interchange.read, kind=kind), loses, bounds,
                  lambda s: vq.morton_order(s.means), kept)


FORMATS: Mapping[str, Format] = {
    "ply": Format("standard 3DGS PLY", ".ply", lambda splats, path, views: write_ply(splats, path), read_ply),
    "compressed_ply": _interchange(
        "PlayCanvas compressed PLY", "compressed.ply",
        "positions and scales to 11, 10, 11 bits per box of 256, the rest to 8"),
    "spz": _interchange("Niantic SPZ 3", "spz", "positions to 1/4096 of a unit or finer in small "
                                                "models, the rest to 8 bits"),
    "sog": _interchange("PlayCanvas SOG", "sog",
                        "positions to 16 bits, harmonics to a palette, the rest to 8 bits",
                        Bounds(harmonics=ANY)),
    "splat": _interchange("antimatter15 .splat", "splat",
                          "view-dependent colour (all harmonics); the rest to 8 bits",
                          kept=_shown),
    "gltf": Format("glTF KHR_gaussian_splatting, uncompressed", ".glb",
                   lambda splats, path, views: gltf.write(in_world(splats, path), path), gltf.read),
    "vq": Format("Compressed 3DGS, not fine-tuned", ".vq.npz", _encode_vq, vq.read,
                 "harmonics and shapes to codebooks",
                 Bounds(shapes=ANY, opacities=0.05, colours=ANY, harmonics=ANY),
                 lambda s: vq.morton_order(s.means)),
    "latents": Format("EAGLES, fitted after training", ".latents.npz",
                      lambda splats, path, views: latents.write(in_world(splats, path), path), latents.read,
                      "attributes but for positions to 8-bit latents",
                      Bounds(shapes=0.2, opacities=0.05, harmonics=ANY)),
}


def save(splats: Splats, path: Path | str, views: Sequence[View] = ()) -> Splats:
    """Write splats to a file of the format that its suffix names; what a reader of it gets. views: those of
    the training.

    UserError, and the file that was there stays, for an unknown suffix and for Gaussians that the format
    cannot hold.
    """
    return FORMATS[format_of(path)].write(splats, Path(path), views)


def read(path: Path | str) -> Splats:
    """The Gaussians of a file of any format; UserError if it is none, or broken."""
    return FORMATS[format_at(path)].read(Path(path))


def format_of(path: Path | str) -> str:
    """The name in FORMATS of what a file is by its suffix, the longest that fits; UserError if there is
    none."""
    name = str(path).lower()
    fitting = [key for key, chosen in FORMATS.items() if name.endswith(chosen.suffix)]
    if not fitting:
        raise UserError(f"{path}: expected a name that ends in one of "
                        f"{' '.join(f.suffix for f in FORMATS.values())}")
    return max(fitting, key=lambda key: len(FORMATS[key].suffix))


def format_at(path: Path | str) -> str:
    """The name in FORMATS of what a file is by its first bytes, which its name may belie, or else by its
    suffix; UserError if it is none."""
    with regular_file(path, "a file of splats").open("rb") as file:
        start = file.read(4)
    if start[:3] == b"ply":
        return "compressed_ply" if read_head(path).element("chunk") else "ply"
    if start[:2] == b"\x1f\x8b" or start == b"NGSP":
        return "spz"
    if start == b"glTF":
        return "gltf"
    names = _packed(path) if start == b"PK\3\4" else set()
    if "meta.json" in names:
        return "sog"
    if "kind.npy" in names:
        return "vq" if "colours.npy" in names else "latents"
    return format_of(path)


def _packed(path: Path | str) -> set[str]:
    """The names of the files in a zip; none if it is broken, which its reader says better."""
    try:
        with zipfile.ZipFile(path) as packed:
            return {Path(name).name for name in packed.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        return set()


def localised(splats: Splats, views: Sequence[View]) -> tuple[Splats, list[View]]:
    """Splats and views in coordinates whose (0, 0, 0) is the splats' origin, which every format can hold."""
    return local(splats), [replace(view, camera=replace(view.camera.at(splats.origin), origin=WORLD))
                           for view in views]


def as_stored(splats: Splats, name: str, views: Sequence[View]) -> StoredCut:
    """The splats after writing them to a file of this format, a name in FORMATS, and reading it back.

    Each of several workers does it for itself: the encoders are deterministic. A PLY loses nothing and is not
    written.
    """
    if name not in FORMATS:
        raise UserError(f"--evaluation.format {name}: unknown; expected one of {', '.join(FORMATS)}")
    if name == "ply":
        return StoredCut(splats, ply_bytes(len(splats), splats.sh_degree, is_wide(splats)), 0.0)
    own, near = localised(splats, views)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cut{FORMATS[name].suffix}"
        start = time.perf_counter()
        stored = FORMATS[name].write(own, path, near)
        seconds = time.perf_counter() - start
        return StoredCut(replace(stored, origin=splats.origin), path.stat().st_size, seconds)
