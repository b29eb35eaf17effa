"""Writes glTF whose Gaussians are an SPZ file, as the viewers of 3D Tiles have it (CesiumJS).

The extension is KHR_gaussian_splatting_compression_spz_2, a draft of Khronos
(https://github.com/KhronosGroup/glTF/pull/2531): a buffer view holds an SPZ file of version 2, and accessors
without a buffer view say what is in it. The axes of glTF are LUF, and those of the SPZ file RUB, as always:
the draft has readers convert them.
"""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np

from flexgs.formats import interchange, spz
from flexgs.formats.axes import turned
from flexgs.formats.gltf import CHUNK, HEAD, NAME, PREFIX
from flexgs.gaussians import Gaussians

EXTENSION = f"{NAME}_compression_spz_2"
FLOAT, BYTE = 5126, 5121
POINTS = 0


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians in their order; equal ones make equal bytes."""
    step = 2.0 ** -spz.bits(gaussians, path)
    packed = version_2(gaussians)
    means = np.rint(turned(gaussians, "LUF").means / step) * step
    accessors = {
        "POSITION": {"type": "VEC3", "componentType": FLOAT, "min": means.min(0).tolist(),
                     "max": means.max(0).tolist()},
        "COLOR_0": {"type": "VEC4", "componentType": BYTE, "normalized": True},
        PREFIX + "SCALE": {"type": "VEC3", "componentType": FLOAT},
        PREFIX + "ROTATION": {"type": "VEC4", "componentType": FLOAT},
        **{f"{PREFIX}SH_DEGREE_{l}_COEF_{m}": {"type": "VEC3", "componentType": FLOAT}
           for l in range(1, gaussians.sh_degree + 1) for m in range(2 * l + 1)}}
    about = {
        "asset": {"version": "2.0", "generator": "flexgs"},
        "extensionsUsed": [NAME, EXTENSION], "extensionsRequired": [NAME, EXTENSION],
        "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{
            "mode": POINTS, "attributes": {name: i for i, name in enumerate(accessors)},
            "extensions": {NAME: {"kernel": "ellipse", "colorSpace": "srgb_rec709_display",
                                  "extensions": {EXTENSION: {"bufferView": 0}}}}}]}],
        "accessors": [{"count": len(gaussians), **accessor} for accessor in accessors.values()],
        "bufferViews": [{"buffer": 0, "byteLength": len(packed)}], "buffers": [{"byteLength": len(packed)}]}
    text = json.dumps(about).encode()
    parts = ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", packed + bytes(-len(packed) % 4)))
    body = b"".join(CHUNK.pack(len(part), kind) + part for kind, part in parts)
    path.write_bytes(HEAD.pack(b"glTF", 2, HEAD.size + len(body)) + body)


def version_2(gaussians: Gaussians) -> bytes:
    """Return SPZ 2: as version 3, which gsply writes, but with rotations of 3 bytes, x, y, z of w >= 0."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.spz"
        interchange.write(gaussians, file, "spz")
        raw = gzip.decompress(file.read_bytes())
    before, after = 16 + 16 * len(gaussians), 16 + 20 * len(gaussians)
    quats = turned(gaussians, spz.AXES).quats
    xyz = np.where(quats[:, :1] < 0, -1, 1) * quats[:, 1:]  # q and -q are the same rotation
    rotations = np.rint(127.5 + 127.5 * xyz).astype(np.uint8)
    return gzip.compress(raw[:4] + (2).to_bytes(4, "little") + raw[8:before] + rotations.tobytes()
                         + raw[after:], mtime=0)
