"""The points of a PLY file, as nerfstudio and photogrammetry programs write them beside their cameras."""

import warnings
from pathlib import Path

import numpy as np

from flexgs.errors import UserError
from flexgs.ply_rows import AXES, colours, read_element

GREY = 128


@np.errstate(invalid="ignore")  # of NaN that signal
def read_points(file: Path, doubts: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(xyz float64 [M, 3], rgb uint8 [M, 3]) of the vertices of a PLY file.

    Grey where there are no colours that flexgs.ply_rows knows. Points whose position is no number are left out.
    doubts: where to put what had to be assumed, a line each; without it, each is a warning.
    UserError if the file is absent, no regular file, not such a PLY or shorter than its head says.
    """
    said: list[str] = []
    try:
        rows = read_element(file, "vertex")
        if missing := set(AXES).difference(rows.dtype.names or ()):
            raise UserError(f"{file}: not a PLY of points: found no property {min(missing)}, expected x y z; export it again")
    except UserError as e:
        raise UserError(f"{e}; or delete ply_file_path from transforms.json to start from random points") from e
    xyz = np.stack([rows[axis] for axis in AXES], 1).astype(np.float64)
    rgb = colours(rows, file, said)
    if rgb is None:
        said.append(f"{file}: has no colours (red, green, blue), so grey points are assumed; it has "
                    f"{', '.join(rows.dtype.names or ())}")
        rgb = np.full(xyz.shape, float(GREY))
    elif (wrong := np.isnan(rgb).any(1)).any():
        said.append(f"{file}: {wrong.sum()} of {len(rows)} points have colours that are none of 0 to 255, 0 to 65535 or 0 to "
                    "1, so grey is assumed for them")
        rgb = np.nan_to_num(rgb, nan=GREY)
    finite = np.isfinite(xyz).all(1)
    if not finite.all():
        said.append(f"{file}: {np.sum(~finite)} of {len(xyz)} points have a position that is no number and are left out")
    if doubts is None:
        for line in said:
            warnings.warn(line, stacklevel=2)
    else:
        doubts += said
    return xyz[finite], rgb[finite].round().astype(np.uint8)
