"""The points of a PLY file, as nerfstudio writes them beside its cameras."""

from pathlib import Path

import numpy as np

from flexgs.errors import UserError

TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
         "float32": "f4", "float64": "f8"}
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}


def read_points(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(xyz float64 [M, 3], rgb uint8 [M, 3]) of the first element, which must be the vertices; grey without colours.

    UserError if the file is absent, not such a PLY or shorter than its head says.
    """
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"{file}: the point cloud named in transforms.json cannot be read ({e.strerror}): copy it to "
                        "there, or delete ply_file_path to start from random points") from e
    head, end, body = data.replace(b"end_header\r\n", b"end_header\n", 1).partition(b"end_header\n")
    try:
        lines = [line.split() for line in head.decode("ascii").splitlines()]
        order = ORDERS[next(line[1] for line in lines if line[:1] == ["format"])]
        elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]]
        _, name, count = lines[elements[0]]
        properties = [line for line in lines[elements[0]:(elements + [None])[1]] if line[0] == "property"]
        kind = np.dtype([(line[2], order + TYPES[line[1]]) for line in properties])
        if not end or name != "vertex" or not {"x", "y", "z"} <= set(kind.names or ()):
            raise ValueError("no vertices")
        rows = (np.frombuffer(body, kind, int(count)) if order else
                np.array([tuple(line.split()) for line in body.decode("ascii").splitlines()[:int(count)]], kind))
        if len(rows) != int(count):
            raise ValueError(f"{len(rows)} of {count} points")
    except (ValueError, KeyError, IndexError, StopIteration, TypeError) as e:
        raise UserError(f"{file}: damaged, or not a PLY file of points with x, y, z ({e}): export it again, or delete "
                        "ply_file_path from transforms.json to start from random points") from e
    xyz = np.stack([rows[axis] for axis in "xyz"], 1).astype(np.float64)
    colours = ("red", "green", "blue")
    rgb = (np.stack([rows[colour] for colour in colours], 1).astype(np.uint8) if set(colours) <= set(rows.dtype.names or ())
           else np.full(xyz.shape, 128, np.uint8))
    finite = np.isfinite(xyz).all(1)
    return xyz[finite], rgb[finite]
