"""Formats of other projects, written and read by existing libraries (extra `export`).

gsply writes compressed PLY and SPZ: gaussforge 0.6.0 mixes up the harmonics of compressed PLY and leaves 4
bits to those of SPZ, which costs 1.4 to 1.8 dB. gaussforge writes .splat, and reads all but .splat; sog.py
writes SOG, for which gaussforge takes minutes. splat-transform of PlayCanvas, a program for Node.js that is
fetched on first use, writes glTF and streamed SOG, and merges Gaussians.
"""

import functools
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from PIL import Image

from flexgs import bounded
from flexgs.errors import MissingDependencyError, UserError
from flexgs.formats import decode, node, sog, spz
from flexgs.formats.axes import PLY, turned
from flexgs.gaussians import SH_C0, Attributes, Gaussians, unit_quaternions
from flexgs.inputs import Range, parse_json, regular_file, typed
from flexgs.ply import MOST_LOGIT, checked, local, read_gaussians, to_ply, write_ply

G = TypeVar("G", bound=Attributes)
SPLAT_TRANSFORM = Path(__file__).with_name("splat_transform")


def write(gaussians: Gaussians, path: Path, kind: str) -> None:
    """Write Gaussians as compressed.ply, spz, v4.spz, sog or splat, the suffix of the path.

    Gaussians keep their order. Neighbours in space should follow each other, since compressed PLY has one
    bounding box for each 256 of them.
    """
    _WRITERS[kind](gaussians, path)


def _write_spz(gaussians: Gaussians, path: Path, version: int = 3) -> None:
    gsply = _gsply(path)
    if version == 4 and not importlib.util.find_spec("zstandard"):
        raise MissingDependencyError("zstandard", "export", "SPZ 4")
    g = turned(gaussians, spz.AXES)
    gsply.write_spz(path, _gsdata(g, gsply), version=version, fractional_bits=spz.bits(g, path))
    raw = path.read_bytes()
    if version == 3:
        path.write_bytes(raw[:4] + bytes(4) + raw[8:])  # no time in gzip's head: equal splats, equal files


def _write_compressed_ply(gaussians: Gaussians, path: Path) -> None:
    gsply = _gsply(path)
    gsply.plywrite(path, _gsdata(gaussians, gsply), compressed=True)


def _gsply(path: Path) -> Any:
    try:
        import gsply
    except ImportError:
        raise MissingDependencyError("gsply", "export", path.suffix) from None
    return gsply


def _gsdata(gaussians: Gaussians, gsply: Any) -> Any:
    return gsply.GSData(**dict(gaussians.map(np.ascontiguousarray).items()),
                        _format=gsply.create_ply_format(gaussians.sh_degree))  # else guessed from values


def _write_gaussforge(gaussians: Gaussians, path: Path) -> None:
    made = _gaussforge(path.suffix).convert(to_ply(gaussians), "ply", path.suffix[1:])
    if "data" not in made:
        raise UserError(f"{path}: cannot be written ({made.get('error')})")
    path.write_bytes(made["data"])


_WRITERS: dict[str, Callable[[Gaussians, Path], None]] = {
    "compressed.ply": _write_compressed_ply, "spz": _write_spz,
    "v4.spz": functools.partial(_write_spz, version=4), "sog": sog.write, "splat": _write_gaussforge}


def read(path: Path, kind: str) -> Gaussians:
    """Read a file of a kind (see write) from any program; UserError if it is broken.

    The file may come from anywhere and gaussforge is C++: the sizes in the file's head are checked first, and
    then a separate process with bounded memory and time reads it.
    """
    regular_file(path, f"a {kind} file")
    if kind == "splat":
        return _read_splat(path)
    _gaussforge(kind)
    axes = spz.axes(path) if kind == "spz" else PLY
    if kind == "sog":
        _check_sog(path)
    with tempfile.TemporaryDirectory() as folder:
        plain, most = Path(folder) / "read.ply", 10 + path.stat().st_size // 250_000
        try:
            done = bounded.run([sys.executable, "-I", decode.__file__, kind, path, plain, str(most)],
                               seconds=4 * most)
        except subprocess.TimeoutExpired:
            raise _broken(path, kind, f"the reader did not end in {4 * most} s") from None
        if done.returncode:
            said = done.stderr.strip() or f"the reader ended with {done.returncode}"
            raise _broken(path, kind, said.splitlines()[-1])
        try:
            return turned(read_gaussians(plain), axes)
        except UserError as e:
            raise UserError(str(e).replace(str(plain), str(path))) from None


def _read_splat(path: Path) -> Gaussians:
    """Read rows of 32 bytes: position and standard deviations (float32), RGB, opacity, rotation (bytes)."""
    row = np.dtype([("means", "<f4", 3), ("sizes", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])
    if (size := path.stat().st_size) % row.itemsize or not size:
        raise _broken(path, "splat", f"found {size:,} bytes, expected a multiple of {row.itemsize}")
    rows = np.fromfile(path, row)
    if not (np.isfinite(rows["means"]).all() and np.isfinite(rows["sizes"]).all()
            and (rows["sizes"] > 0).all()):
        raise _broken(path, "splat", "found positions or sizes that are not finite or not above 0")
    rgb, opacities = rows["rgba"][:, :3] / np.float32(255), rows["rgba"][:, 3] / 255
    with np.errstate(divide="ignore"):  # 0 and 255 are infinite logits
        logits = np.log(opacities) - np.log1p(-opacities)
    return checked(Gaussians(
        means=rows["means"].astype(np.float32), scales=np.log(rows["sizes"]),
        quats=unit_quaternions((rows["quats"].astype(np.float32) - 128) / 128),
        sh0=(rgb - np.float32(0.5)) / np.float32(SH_C0), shN=np.zeros((len(rows), 0, 3), np.float32),
        opacities=logits.clip(-MOST_LOGIT, MOST_LOGIT).astype(np.float32)), path)


def _check_sog(path: Path) -> None:
    """Raise UserError if meta.json of a SOG file claims more Gaussians than the images have pixels."""
    try:
        with zipfile.ZipFile(path) as packed:
            names = {Path(name).name: name for name in packed.namelist()}
            about = typed(dict, parse_json(_entry(packed, names, "meta.json"), str(path)), str(path))
            count = about.get("count", typed(dict, about["means"], str(path)).get("shape", [None])[0])
            bands = typed(dict, about.get("shN") or {}, str(path)).get("bands", 0)
            file = typed(list[str], about["means"]["files"], str(path))[0]
            width, height = Image.open(io.BytesIO(_entry(packed, names, file))).size  # reads only the head
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, NotImplementedError, RuntimeError,
            zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as e:
        raise _broken(path, "sog", str(e) or type(e).__name__) from None
    typed(Annotated[int, Range(1, width * height)], count, f"{path}: count of its Gaussians")
    typed(Annotated[int, Range(0, 3)], bands, f"{path}: bands of its harmonics")


def _entry(packed: zipfile.ZipFile, names: dict[str, str], name: str) -> bytes:
    with packed.open(names[name]) as file:
        return file.read(64 << 20)


def _broken(path: Path, kind: str, why: str) -> UserError:
    return UserError(f"{path}: not a readable {kind} file ({why}); get or export it again")


def splat_transform(inputs: Sequence[str | Path], output: Path) -> None:
    """Run splat-transform on PLY files, with options between them; the suffix of output says its format."""
    seconds = 600 + sum(part.stat().st_size for part in inputs if isinstance(part, Path)) / 50_000
    _splat_transform("--quiet", "--overwrite", *_without_gpu(), *inputs, output, seconds=seconds)


def decimate(gaussians: G, count: int) -> G:
    """Merge Gaussians to exactly `count` with splat-transform."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole.ply", Path(folder) / "cut.ply"
        write_ply(local(gaussians), whole)
        splat_transform([whole, "--decimate", str(count)], cut)
        return replace(gaussians.like(read_gaussians(cut)), origin=gaussians.origin)


@functools.cache
def _without_gpu() -> tuple[str, ...]:
    """Return splat-transform's options for a machine without a GPU.

    Its k-means takes minutes there; a single iteration costs some 0.03 dB.
    """
    none = "No GPU adapters" in _splat_transform("--list-gpus", seconds=60)
    return ("--gpu", "cpu", "--sh-iterations", "1") if none else ()


def _splat_transform(*args: str | Path, seconds: float) -> str:
    doing = "splat-transform"
    return node.run(node.kept(SPLAT_TRANSFORM, doing), doing, *args, seconds=seconds, doing=doing)


def _gaussforge(kind: str):
    try:
        from gaussforge import GaussForge
    except ImportError:
        raise MissingDependencyError("gaussforge", "export", kind) from None
    return GaussForge()
