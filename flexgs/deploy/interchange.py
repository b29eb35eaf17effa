"""Formats that others define, through the libraries that their makers or users keep.

gaussforge (extra `export`) writes and reads compressed PLY, SPZ, SOG, .splat and .ksplat; PlayCanvas's splat-transform, which
Node's npx fetches on first use, writes glTF and streamed SOG.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flexgs.deploy import decode
from flexgs.deploy.export import read_ply, to_ply
from flexgs.deploy.node import npx
from flexgs.deploy.vq import morton_order
from flexgs.errors import MissingDependencyError, UserError
from flexgs.files import atomic_file
from flexgs.splats import Splats

SPLAT_TRANSFORM = "@playcanvas/splat-transform@3.7.0"


def write(splats: Splats, path: Path, kind: str) -> None:
    """splats as a file of a kind that gaussforge knows: compressed.ply, spz, sog, splat or ksplat.

    Neighbours in space come after each other: compressed PLY has a box for each 256, and all of them pack better.
    """
    splats = splats[morton_order(splats.means)]
    if kind == "compressed.ply":  # gaussforge 0.6.0 writes harmonics by coefficient; the format, and its own reader, by channel
        splats = replace(splats, shN=splats.shN.transpose(1, 2).reshape(splats.shN.shape))
    made = _gaussforge(kind).convert(to_ply(splats), "ply", kind)
    if "data" not in made:
        raise UserError(f"{path}: cannot be written as {kind} ({made.get('error')})")
    with atomic_file(path) as out:
        out.write_bytes(made["data"])


def read(path: Path, kind: str) -> Splats:
    """What write() wrote, or any other file of the kind; UserError if it is broken.

    Such a file may come from anywhere and the library is C++, so a process of its own with bounded memory reads it.
    """
    _gaussforge(kind)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "read.ply"
        done = subprocess.run([sys.executable, "-I", decode.__file__, kind, path, plain], capture_output=True, text=True,
                              check=False, errors="replace")
        if done.returncode:
            last = (done.stderr.strip() or f"the reader ended with {done.returncode}").splitlines()[-1]
            raise UserError(f"{path}: not a readable {kind} file ({last}); get or export it again")
        try:
            return read_ply(plain)
        except UserError as e:
            raise UserError(str(e).replace(str(plain), str(path))) from None


def splat_transform(inputs: Sequence[str | Path], output: Path) -> None:
    """Let splat-transform make output, of a kind that its suffix says, from PLY files and options between them."""
    npx(SPLAT_TRANSFORM, "splat-transform", "--quiet", "--overwrite", *_without_gpu(), *inputs, output)


@functools.cache
def _without_gpu() -> tuple[str, ...]:
    """Without a GPU splat-transform wants to be told, and its k-means takes minutes: one iteration costs some 0.03 dB."""
    none = "No GPU adapters" in npx(SPLAT_TRANSFORM, "splat-transform", "--list-gpus")
    return ("--gpu", "cpu", "--sh-iterations", "1") if none else ()


def _gaussforge(kind: str):
    try:
        from gaussforge import GaussForge
    except ImportError:
        raise MissingDependencyError("gaussforge", "export", f"the format {kind}") from None
    return GaussForge()
