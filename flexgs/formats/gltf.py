"""glTF binary files with the extension KHR_gaussian_splatting, of splat-transform, gltf_spz.py or others."""

import struct
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np

from flexgs.errors import UserError
from flexgs.formats import interchange
from flexgs.formats.axes import turned
from flexgs.gaussians import Gaussians
from flexgs.inputs import Range, parse_json, regular_file, typed
from flexgs.ply import checked, write_ply

Entry = Annotated[int, Range(0, 2**40)]
NAME = "KHR_gaussian_splatting"
PREFIX = f"{NAME}:"
SPZ = f"{NAME}_compression_spz"
"""How the names of its extension for SPZ data begin: a draft, whose versions add _2 or nothing."""
HEAD, CHUNK = struct.Struct("<4sII"), struct.Struct("<I4s")


def write(gaussians: Gaussians, path: Path) -> None:
    """Write an uncompressed file, along the axes of glTF: y up."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "cut.ply"
        write_ply(gaussians, plain)
        interchange.splat_transform([plain], path)


def read(path: Path) -> Gaussians:
    """Read the first mesh of Gaussians, with float accessors or as SPZ, into the axes of a PLY: y down."""
    raw = regular_file(path, "a .glb file of Gaussians").read_bytes()
    try:
        return checked(_read(raw, str(path)), path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error) as e:
        raise UserError(f"{path}: not a readable .glb file of Gaussians "
                        f"({e or type(e).__name__}); export it again") from None


@np.errstate(divide="ignore", invalid="ignore")  # checked() refuses what is not finite
def _read(raw: bytes, where: str) -> Gaussians:
    magic, version, _ = HEAD.unpack_from(raw)
    length, kind = CHUNK.unpack_from(raw, HEAD.size)
    if magic != b"glTF" or version != 2 or kind != b"JSON":
        raise ValueError("its head is not that of glTF 2")
    start = HEAD.size + CHUNK.size
    about, body = parse_json(raw[start:start + length], where), memoryview(raw)[start + length + CHUNK.size:]
    found = [p for mesh in about["meshes"] for p in mesh["primitives"] if NAME in p.get("extensions", ())]
    if not found:
        raise ValueError("it holds no Gaussians")
    for name, packed in found[0]["extensions"][NAME].get("extensions", {}).items():
        if name.startswith(SPZ):
            view = typed(dict, about["bufferViews"][typed(Entry, packed["bufferView"], where)],
                         f"{where}: buffer of SPZ")
            at, size = (typed(Entry, view.get(key, 0), f"{where}: {key} of SPZ")
                        for key in ("byteOffset", "byteLength"))
            return _unpacked(body[at:at + size], where)
    attributes = found[0]["attributes"]

    def column(name: str, width: int) -> np.ndarray:
        accessor = typed(dict, about["accessors"][typed(Entry, attributes[name], where)],
                         f"{where}: accessor of {name}")
        view = typed(dict, about["bufferViews"][typed(Entry, accessor["bufferView"], where)],
                     f"{where}: buffer of {name}")
        floats = accessor["componentType"] == 5126
        vectors = accessor.get("type", f"VEC{width}") in (f"VEC{width}", "SCALAR")
        dense = view.get("byteStride", 4 * width) == 4 * width and "sparse" not in accessor
        if not (floats and vectors and dense):
            raise ValueError(f"{name} is not of {width} plain floats each")
        at = sum(typed(Entry, part.get("byteOffset", 0), f"{where}: byteOffset of {name}")
                 for part in (view, accessor))
        count = typed(Entry, accessor["count"], f"{where}: count of {name}")
        return np.frombuffer(body, "<f4", count * width, at).reshape(-1, width).copy()

    means, rotations = column("POSITION", 3), column(PREFIX + "ROTATION", 4)
    degree = max(l for l in range(4) if f"{PREFIX}SH_DEGREE_{l}_COEF_0" in attributes)
    rest = [column(f"{PREFIX}SH_DEGREE_{l}_COEF_{m}", 3) for l in range(1, degree + 1)
            for m in range(2 * l + 1)]
    if any(len(one) != len(means) for one in rest):
        raise ValueError("its harmonics differ in length")
    opacities = column(PREFIX + "OPACITY", 1)[:, 0].clip(1e-7, np.float32(1 - 1e-7))
    gaussians = Gaussians(means=means, quats=rotations[:, [3, 0, 1, 2]],
                          scales=np.log(column(PREFIX + "SCALE", 3)),
                          opacities=np.log(opacities) - np.log1p(-opacities),
                          sh0=column(PREFIX + "SH_DEGREE_0_COEF_0", 3),
                          shN=np.stack(rest, axis=1) if rest else np.zeros((len(means), 0, 3), np.float32))
    if len({len(values) for _, values in gaussians.items()}) > 1:
        raise ValueError("its attributes differ in length")
    return turned(gaussians, "LUF")


def _unpacked(spz: memoryview, where: str) -> Gaussians:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.spz"
        file.write_bytes(spz)
        try:
            return interchange.read(file, "spz")
        except UserError as e:
            raise UserError(str(e).replace(str(file), where)) from None
