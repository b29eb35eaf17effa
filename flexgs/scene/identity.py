"""Digest of a capture, equal on every machine, that also tells in what two captures differ.

In 24-6f1c9ab2-90b4c1f2-1d20e85b the parts are the number of images, and hashes of their names, of the cameras
(poses and camera models), and of the sizes of the image files.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexgs.errors import UserError
from flexgs.inputs import typed
from flexgs.origin import WORLD
from flexgs.scene.views import View

GIVE_SCENE = "give the capture that it was made from with --scene"
OTHER_OUTPUT = "choose another --output, or give the capture that it was made from"
PARTS = ("number of images", "names of images", "poses or lenses", "sizes of image files")


def capture_digest(views: Sequence[View]) -> str:
    """Compute the digest of a capture from its views, in their order, without opening an image."""
    cameras = (repr((v.lens.model, v.camera.width, v.camera.height, *map(_rounded, (
        v.lens.params, v.camera.viewmat[:3, :3].flatten().tolist(), v.camera.viewmat[:3, 3].tolist())),
        *(v.camera.origin if v.camera.origin != WORLD else ()))) for v in views)
    files = (repr([file.stat().st_size for file in (v.path, v.mask_path) if file]) for v in views)
    return "-".join([str(len(views)), _digest(v.name for v in views), _digest(cameras), _digest(files)])


def check_same_capture(known: str | None, ours: str | None, where: Path, advice: str) -> None:
    """Raise a UserError that says what differs if two captures have different digests.

    Args:
        known: Digest of the capture that where was made from; None or a digest of another form is accepted,
            as older runs have it.
        ours: Digest of the capture at hand.
        where: File or folder that the error names.
        advice: What the user can do, the end of the error.
    """
    was, now = ((typed(str | None, digest, f"{where}: the digest of a capture") or "").split("-")
                for digest in (known, ours))
    if len(was) == len(now) == len(PARTS) and was != now:
        differing = [name for name, a, b in zip(PARTS, was, now, strict=True) if a != b]
        if was[0] != now[0]:
            differing[0] += f" ({was[0]}, here {now[0]})"
        raise UserError(f"{where}: was made from another capture, with other "
                        f"{', '.join(differing)}; {advice}")


def _rounded(numbers: Sequence[float]) -> list[float]:
    """Round to the digits that every machine computes alike: five significant ones of the largest number."""
    largest = max((abs(x) for x in numbers if math.isfinite(x)), default=0)
    digits = 4 - math.floor(math.log10(largest or 1))
    return [round(x, digits) + 0.0 for x in numbers]  # + 0.0 turns -0.0 into 0.0


def _digest(texts: Iterable[str]) -> str:
    # Short, since MLflow limits a dataset's digest to 36 characters.
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=4).hexdigest()
