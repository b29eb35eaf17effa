"""Formats that others define, through the libraries that their makers or users keep.

Extra `export`: gsply writes compressed PLY and SPZ (gaussforge 0.6.0 mixes up the harmonics of the one and leaves 4 bits to
those of the other, which costs 1.4 to 1.8 dB); gaussforge writes SOG and .splat, and reads all four. splat-transform of
PlayCanvas, which Node's npx fetches on first use, writes glTF and streamed SOG.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from flexgs.deploy import decode
from flexgs.deploy.export import read_ply, to_ply
from flexgs.deploy.node import npx
from flexgs.errors import MissingDependencyError, UserError
from flexgs.splats import Splats

SPLAT_TRANSFORM = "@playcanvas/splat-transform@3.7.0"


def write(splats: Splats, path: Path, kind: str) -> None:
    """splats, on the CPU, as a file of a kind: compressed.ply, spz, sog or splat, which is the suffix of path.

    They are packed in their order: compressed PLY has a box for each 256, so neighbours in space should come after each other.
    """
    _WRITERS[kind](splats, path)


def _write_gsply(splats: Splats, path: Path) -> None:
    try:
        import gsply
    except ImportError:
        raise MissingDependencyError("gsply", "export", path.suffix) from None
    s = splats.map(lambda t: t.contiguous())
    data = gsply.GSData(means=s.means.numpy(), scales=s.scales.numpy(), opacities=s.opacities.numpy(), sh0=s.sh0.numpy(),
                        shN=s.shN.numpy(), quats=torch.nn.functional.normalize(s.quats, dim=1).numpy())
    if path.suffix == ".spz":
        gsply.write_spz(path, data)
        raw = path.read_bytes()
        path.write_bytes(raw[:4] + bytes(4) + raw[8:])  # gzip's time of writing: equal splats make equal files
    else:
        gsply.plywrite(path, data, compressed=True)


def _write_gaussforge(splats: Splats, path: Path) -> None:
    made = _gaussforge(path.suffix).convert(to_ply(splats), "ply", path.suffix[1:])
    if "data" not in made:
        raise UserError(f"{path}: cannot be written ({made.get('error')})")
    path.write_bytes(made["data"])


_WRITERS = {"compressed.ply": _write_gsply, "spz": _write_gsply, "sog": _write_gaussforge, "splat": _write_gaussforge}


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
        raise MissingDependencyError("gaussforge", "export", kind) from None
    return GaussForge()
