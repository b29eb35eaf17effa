"""File formats that a cut can be stored in, so that its quality and its bytes are those of one file.

A new format is one entry of FORMATS, and its name in the choices of Evaluation.format (config.py). Every file
is read back before it takes its place, and refused if its Gaussians are not those that were given. A file to
read is recognised by its first bytes.
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
from flexgs.formats import gltf, gltf_spz, interchange, latents, vq
from flexgs.formats.fidelity import ANY, BITS, Bounds, damage
from flexgs.inputs import regular_file
from flexgs.model.importance import score
from flexgs.ply import checked, in_world, is_wide, local, ply_bytes, read_ply, write_ply
from flexgs.ply_rows import read_head
from flexgs.scene.views import View
from flexgs.splats import SH_C0, Splats, unit_quaternions


@dataclass(frozen=True)
class Format:
    """A file format: how to write and read it, and how much of the Gaussians it may lose."""

    about: str
    """The format's name in messages and in the protocol of results.json."""
    suffix: str
    encode: Callable[[Splats, Path, Sequence[View]], None]
    """Write a file of this suffix from finite Gaussians on the CPU and the training views."""
    read: Callable[[Path], Splats]
    loses: str = "nothing"
    """What the format cannot hold, in words."""
    bounds: Bounds = BITS
    """How far the Gaussians read back may be from those written."""
    order: Callable[[Splats], torch.Tensor] | None = None
    """Returns the order of encoding as indices [N]; None keeps the order of the Gaussians."""
    kept: Callable[[Splats], Splats] = lambda splats: splats
    """Returns the Gaussians without what the format leaves out on purpose."""

    def write(self, splats: Splats, path: Path, views: Sequence[View] = ()) -> Splats:
        """Write splats, given the training views, and return what a reader gets, on the splats' device.

        UserError, and an existing file stays, if splats are not finite or do not come back as they were.
        """
        given = checked(splats, path).detach().to("cpu")
        given = given.changed(quats=unit_quaternions(given.quats))
        given = given[self.order(given)] if self.order else given
        with atomic_file(path) as out:
            try:
                self.encode(given.clone(), out, views)  # a clone: writers may change what they are given
                stored = self.read(out)
            except UserError as e:
                raise UserError(str(e).replace(str(out), str(path))) from None
            if wrong := damage(self.kept(given), stored, self.bounds):
                raise UserError(f"{path}: {self.about} cannot hold these Gaussians: {wrong}; expected "
                                "NAME.ply, which loses nothing")
        return stored.to(splats.means.device)


class StoredCut(NamedTuple):
    """A cut as a file of some format holds it."""

    splats: Splats
    """What a reader of the file gets, on the device of the original."""
    bytes: int
    """Size of the file."""
    seconds: float
    """Time to write the file and read it back; 0 for a PLY, which is not written."""


def _encode_vq(splats: Splats, path: Path, views: Sequence[View]) -> None:
    if not views:
        raise UserError(f"{path}: Compressed 3DGS needs the views that the model is for; give "
                        "the capture, --scene")
    vq.write(in_world(splats, path), path, score("c3dgs", splats, views, Group()))


def _shown(splats: Splats) -> Splats:
    """Return the splats with view-independent colours, clamped to [0, 1]."""
    return splats.changed(sh0=splats.sh0.clamp(-0.5 / SH_C0, 0.5 / SH_C0), shN=splats.shN[:, :0])


def _interchange(about: str, kind: str, loses: str, bounds: Bounds = BITS,
                 kept: Callable[[Splats], Splats] = lambda splats: splats) -> Format:
    return Format(about, f".{kind}",
                  encode=lambda splats, path, views: interchange.write(in_world(splats, path), path, kind),
                  read=functools.partial(interchange.read, kind=kind), loses=loses, bounds=bounds,
                  order=lambda s: vq.morton_order(s.means), kept=kept)


_SPZ = _interchange("Niantic SPZ 3", "spz",
                    "positions to 1/4096 of a unit or finer in small models, the rest to 8 bits")
FORMATS: Mapping[str, Format] = {
    "ply": Format("standard 3DGS PLY", ".ply", lambda splats, path, views: write_ply(splats, path), read_ply),
    "compressed_ply": _interchange(
        "PlayCanvas compressed PLY", "compressed.ply",
        "positions and scales to 11, 10, 11 bits per box of 256, the rest to 8"),
    "spz": _SPZ,
    "spz4": replace(
        _SPZ, about="Niantic SPZ 4", suffix=".v4.spz",
        encode=lambda splats, path, views: interchange.write(in_world(splats, path), path, "v4.spz")),
    "sog": _interchange(
        "PlayCanvas SOG", "sog",
        "positions to 16 bits, the rest to 8; of more than 65,536 Gaussians harmonics to a palette",
        Bounds(harmonics=ANY)),
    "splat": _interchange(
        "antimatter15 .splat", "splat", "view-dependent colour (all harmonics); the rest to 8 bits",
        kept=_shown),
    "gltf": Format("glTF KHR_gaussian_splatting, uncompressed", ".glb",
                   lambda splats, path, views: gltf.write(in_world(splats, path), path), gltf.read),
    "gltf_spz": replace(
        _SPZ, about="glTF KHR_gaussian_splatting, compressed as SPZ 2", suffix=".spz.glb",
        bounds=Bounds(shapes=0.2),  # w of a rotation is computed from x, y and z, which have 8 bits
        encode=lambda splats, path, views: gltf_spz.write(in_world(splats, path), path), read=gltf.read),
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
    """Write splats in the format of the path's suffix, given the training views; return what a reader gets.

    UserError, and an existing file stays, for an unknown suffix or Gaussians that the format cannot hold.
    """
    return FORMATS[format_of(path)].write(splats, Path(path), views)


def read(path: Path | str) -> Splats:
    """Read the Gaussians of a file of any format; UserError if the format is unknown or the file broken."""
    return FORMATS[format_at(path)].read(Path(path))


def format_of(path: Path | str) -> str:
    """Return the key in FORMATS whose suffix is the longest that the path ends in; UserError if none is."""
    name = str(path).lower()
    fitting = [key for key, chosen in FORMATS.items() if name.endswith(chosen.suffix)]
    if not fitting:
        raise UserError(f"{path}: expected a name that ends in one of "
                        f"{' '.join(f.suffix for f in FORMATS.values())}")
    return max(fitting, key=lambda key: len(FORMATS[key].suffix))


def format_at(path: Path | str) -> str:
    """Return the key in FORMATS of a file by its first bytes, or else by its suffix; UserError if unknown."""
    with regular_file(path, "a file of splats").open("rb") as file:
        start = file.read(1 << 16)
    if start[:3] == b"ply":
        return "compressed_ply" if read_head(path).element("chunk") else "ply"
    if start[:2] == b"\x1f\x8b":
        return "spz"
    if start[:4] == b"NGSP":
        return "spz4"
    if start[:4] == b"glTF":
        return "gltf_spz" if gltf.SPZ.encode() in start else "gltf"
    names = _packed(path) if start[:4] == b"PK\3\4" else set()
    if "meta.json" in names:
        return "sog"
    if "kind.npy" in names:
        return "vq" if "colours.npy" in names else "latents"
    return format_of(path)


def _packed(path: Path | str) -> set[str]:
    """Return the names of the files in a zip; none of a broken zip, which its reader explains better."""
    try:
        with zipfile.ZipFile(path) as packed:
            return {Path(name).name for name in packed.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        return set()


def localised(splats: Splats, views: Sequence[View]) -> tuple[Splats, list[View]]:
    """Return splats and views in coordinates relative to the splats' origin, which every format can hold."""
    return local(splats), [replace(view, camera=replace(view.camera.at(splats.origin), origin=WORLD))
                           for view in views]


def as_stored(splats: Splats, name: str, views: Sequence[View]) -> StoredCut:
    """Return the splats as they come back from a file of the format `name`, a key of FORMATS.

    Each of several workers writes a file of its own, since the encoders are deterministic. A PLY loses
    nothing and is not written.
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
