"""Which capture it is: a short digest that says what differs between two, the same on every machine.

    24-6f1c9ab2-90b4c1f2-1d20e85b: number of images, names, cameras (poses and lenses), sizes of the image
    files
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexgs.camera import WORLD
from flexgs.errors import UserError
from flexgs.inputs import typed
from flexgs.scene.views import View

GIVE_SCENE = "give the capture that it was made from with --scene"
OTHER_OUTPUT = "choose another --output, or give the capture that it was made from"
PARTS = ("number of images", "names of images", "poses or lenses", "sizes of image files")


def capture_digest(views: Sequence[View]) -> str:
    """The digest of the views of a capture, in their order. No image is opened."""
    cameras = (repr((v.lens.model, v.camera.width, v.camera.height, *map(_rounded, (
        v.lens.params, v.camera.viewmat[:3, :3].flatten().tolist(), v.camera.viewmat[:3, 3].tolist())),
        *(v.camera.origin if v.camera.origin != WORLD else ()))) for v in views)
    files = (repr([file.stat().st_size for file in (v.path, v.mask_path) if file]) for v in views)
    return "-".join([str(len(views)), _digest(v.name for v in views), _digest(cameras), _digest(files)])


def check_same_capture(known: str | None, ours: str | None, where: Path, advice: str) -> None:
    """UserError, which says what differs, unless two captures have one digest. where: what has been made from
    the known one.

    What was made before there were such digests is taken as it is.
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
    """To the digits that every machine computes alike: five of the largest."""
    largest = max((abs(x) for x in numbers if math.isfinite(x)), default=0)
    digits = 4 - math.floor(math.log10(largest or 1))
    return [round(x, digits) + 0.0 for x in numbers]  # -0.0 + 0.0 is 0.0


def _digest(texts: Iterable[str]) -> str:
    # MLflow takes 36 letters in all
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=4).hexdigest()
