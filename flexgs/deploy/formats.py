"""What a cut can be stored as, so that quality and bytes are those of one file.

A new format is one entry of FORMATS, and its name in the choices of Evaluation.format.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flexgs.deploy import latents, vq
from flexgs.deploy.export import ply_bytes, read_ply, write_ply
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


class Stored(NamedTuple):
    splats: Splats
    """What a reader of the file gets, on the device of the original."""
    bytes: int
    seconds: float
    """That encoding took; 0 for a PLY."""


FORMATS: Mapping[str, Format] = {
    "ply": Format("standard 3DGS PLY", ".ply", lambda splats, path, views: write_ply(splats, path), read_ply),
    "vq": Format("Compressed 3DGS, not fine-tuned", ".npz",
                 lambda splats, path, views: vq.write(splats, path, score("c3dgs", splats, views, Group())), vq.read),
    "latents": Format("EAGLES, fitted after training", ".npz",
                      lambda splats, path, views: latents.write(splats, path), latents.read),
}


def as_stored(splats: Splats, name: str, views: Sequence[View]) -> Stored:
    """The splats after writing them to a file of this format, a name in FORMATS, and reading it back.

    Each of several workers does it for itself: the encoders are deterministic. A PLY loses nothing and is not written.
    """
    if name not in FORMATS:
        raise UserError(f"--evaluation.format {name}: unknown; expected one of {', '.join(FORMATS)}")
    if name == "ply":
        return Stored(splats, ply_bytes(len(splats), splats.sh_degree), 0.0)
    chosen = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cut{chosen.suffix}"
        start = time.perf_counter()
        chosen.write(splats, path, views)
        seconds = time.perf_counter() - start
        return Stored(chosen.read(path).to(splats.means.device), path.stat().st_size, seconds)
