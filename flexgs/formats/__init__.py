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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from flexgs import ply
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.formats import gltf, gltf_spz, interchange, latents, vq
from flexgs.formats.fidelity import ANY, BITS, Bounds, damage, summary
from flexgs.gaussians import SH_C0, TENSORS, Attributes, Gaussians, unit_quaternions
from flexgs.inputs import regular_file
from flexgs.origin import WORLD
from flexgs.ply import checked, in_world, is_wide, local, ply_bytes, write_ply
from flexgs.ply_rows import read_head

if TYPE_CHECKING:  # torch takes seconds to import
    from flexgs.scene.views import View
    from flexgs.splats import Splats

G = TypeVar("G", bound=Attributes)


@dataclass(frozen=True)
class Format:
    """A file format: how to write and read it, and how much of the Gaussians it may lose."""

    about: str
    """The format's name in messages and in the protocol of results.json."""
    suffix: str
    encode: Callable[[Gaussians, Path, "Sequence[View]"], None]
    """Write a file of this suffix from finite Gaussians and the training views."""
    decode: Callable[[Path], Gaussians]
    """Read such a file; UserError if it is broken."""
    loses: str = "nothing"
    """What the format cannot hold, in words."""
    bounds: Bounds = BITS
    """How far the Gaussians read back may be from those written."""
    order: Callable[[Gaussians], np.ndarray] | None = None
    """Returns the order of encoding as indices [N]; None keeps the order of the Gaussians."""
    kept: Callable[[Gaussians], Gaussians] = lambda given: given
    """Returns the Gaussians without what the format leaves out on purpose."""

    def write(self, gaussians: G, path: Path, views: "Sequence[View]" = ()) -> G:
        """Write Gaussians, given the training views, and return what a reader gets, as such arrays.

        UserError, and an existing file stays, if they are not finite or do not come back as they were.
        """
        given = self._encoded(checked(gaussians, path))
        with atomic_file(path) as out:
            try:
                self.encode(given.map(np.copy), out, views)  # a copy: writers may change what they are given
                stored = self.decode(out)
            except UserError as e:
                raise UserError(str(e).replace(str(out), str(path))) from None
            if wrong := damage(self.kept(given), stored, self.bounds):
                raise UserError(f"{path}: {self.about} cannot hold these Gaussians: {wrong}; expected "
                                "NAME.ply, which loses nothing")
        return gaussians.like(stored)

    def lost(self, gaussians: Attributes, stored: Attributes) -> str:
        """Say in words how far what write() has returned for Gaussians is from them."""
        return summary(self.kept(self._encoded(gaussians)), stored.arrays())

    def _encoded(self, gaussians: Attributes) -> Gaussians:
        """Return the Gaussians as they are encoded: in order, with unit quaternions."""
        given = gaussians.arrays()
        given = given.changed(quats=unit_quaternions(given.quats))
        return given[self.order(given)] if self.order else given

    def read(self, path: Path) -> "Splats":
        """Read a file of this format as tensors on the CPU; UserError if it is broken."""
        from flexgs.splats import Splats

        return Splats.of(self.decode(path))


class StoredCut(NamedTuple):
    """A cut as a file of some format holds it."""

    splats: "Splats"
    """What a reader of the file gets, on the device of the original."""
    bytes: int
    """Size of the file."""
    seconds: float
    """Time to write the file and read it back; 0 for a PLY, which is not written."""


def _encode_vq(gaussians: Gaussians, path: Path, views: "Sequence[View]") -> None:
    from flexgs.distributed import Group
    from flexgs.model.importance import score
    from flexgs.splats import Splats

    if not views:
        raise UserError(f"{path}: Compressed 3DGS needs the views that the model is for; give "
                        "the capture, --scene")
    sensitivity = score("c3dgs", Splats.of(gaussians), views, Group()).numpy()
    vq.write(in_world(gaussians, path), path, sensitivity)


def _shown(given: Gaussians) -> Gaussians:
    """Return the Gaussians with view-independent colours, clamped to [0, 1]."""
    return given.changed(sh0=given.sh0.clip(-0.5 / SH_C0, 0.5 / SH_C0), shN=given.shN[:, :0])


def _interchange(about: str, kind: str, loses: str, bounds: Bounds = BITS,
                 kept: Callable[[Gaussians], Gaussians] = lambda given: given) -> Format:
    return Format(about, f".{kind}",
                  encode=lambda given, path, views: interchange.write(in_world(given, path), path, kind),
                  decode=functools.partial(interchange.read, kind=kind), loses=loses, bounds=bounds,
                  order=lambda given: vq.morton_order(given.means), kept=kept)


_SPZ = _interchange("Niantic SPZ 3", "spz",
                    "positions to 1/4096 of a unit or finer in small models, the rest to 8 bits")
FORMATS: Mapping[str, Format] = {
    "ply": Format("standard 3DGS PLY", ".ply", lambda given, path, views: write_ply(given, path),
                  ply.read_gaussians),
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
                   lambda given, path, views: gltf.write(in_world(given, path), path), gltf.read),
    "gltf_spz": replace(
        _SPZ, about="glTF KHR_gaussian_splatting, compressed as SPZ 2", suffix=".spz.glb",
        bounds=Bounds(shapes=0.2),  # w of a rotation is computed from x, y and z, which have 8 bits
        encode=lambda given, path, views: gltf_spz.write(in_world(given, path), path), decode=gltf.read),
    "vq": Format("Compressed 3DGS, not fine-tuned", ".vq.npz", _encode_vq, vq.read,
                 "harmonics and shapes to codebooks",
                 Bounds(shapes=ANY, opacities=0.05, colours=ANY, harmonics=ANY),
                 lambda given: vq.morton_order(given.means)),
    "latents": Format("EAGLES, fitted after training", ".latents.npz",
                      lambda given, path, views: latents.write(in_world(given, path), path), latents.read,
                      "attributes but for positions to 8-bit latents",
                      Bounds(shapes=0.2, opacities=0.05, harmonics=ANY)),
}


def save(gaussians: G, path: Path | str, views: "Sequence[View]" = ()) -> G:
    """Write Gaussians in the format of the path's suffix, given the training views; return what is read.

    UserError, and an existing file stays, for an unknown suffix or Gaussians that the format cannot hold.
    """
    return FORMATS[format_of(path)].write(gaussians, Path(path), views)


def read(path: Path | str) -> "Splats":
    """Read the Gaussians of a file of any format as tensors on the CPU; see read_gaussians."""
    return FORMATS[format_at(path)].read(Path(path))


def read_gaussians(path: Path | str, attributes: Collection[str] = TENSORS) -> Gaussians:
    """Read the Gaussians of a file of any format; UserError if the format is unknown or the file broken.

    Of a PLY, attributes that are not wanted may be zeros that take no memory.
    """
    name = format_at(path)
    return ply.read_gaussians(path, attributes) if name == "ply" else FORMATS[name].decode(Path(path))


def format_of(path: Path | str) -> str:
    """Return the key in FORMATS whose suffix is the longest that the path ends in; UserError if none is."""
    name = str(path).lower()
    fitting = [key for key, chosen in FORMATS.items() if name.endswith(chosen.suffix)]
    if not fitting:
        raise UserError(f"{path}: expected a name that ends in one of "
                        f"{' '.join(f.suffix for f in FORMATS.values())}; a whole model is packed as .fgs")
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


def localised(gaussians: G, views: "Sequence[View]") -> "tuple[G, list[View]]":
    """Return Gaussians and views in coordinates relative to the Gaussians' origin, which all formats hold."""
    return local(gaussians), [replace(view, camera=replace(view.camera.at(gaussians.origin), origin=WORLD))
                           for view in views]


def as_stored(splats: "Splats", name: str, views: "Sequence[View]") -> StoredCut:
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
