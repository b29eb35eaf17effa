"""Named arrays in one .npz file: packed with DEFLATE, written atomically, read without trusting the file.

An array [...] of b bytes per number is stored as uint8 [b, ...]: bytes of equal significance pack better side
by side.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.inputs import Layout, regular_file

MOST_PACKED = 16
"""Largest accepted ratio of unpacked to packed bytes: positions hardly pack at all."""


def load_arrays(path: Path | str, names: Iterable[str], kind: str) -> dict[str, np.ndarray]:
    """Read named arrays of any .npz file; UserError, which names the kind of file, if one cannot be read."""
    path = regular_file(path, f"a {kind} file")
    try:
        with zipfile.ZipFile(path) as packed:
            claimed = sum(entry.file_size for entry in packed.infolist())
        if claimed > MOST_PACKED * path.stat().st_size + (1 << 20):  # it could fill the memory
            raise ValueError(f"it claims to hold {claimed} bytes")
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names}  # a member that is no array is bytes
    except Exception as e:  # zipfile, zlib and numpy raise many kinds for broken files
        raise UserError(f"{path}: not a readable {kind} file ({str(e) or type(e).__name__}); "
                        "write it again") from None


def write_arrays(path: Path | str, kind: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays and the kind of the file, such as "vq 1"; equal arrays make equal bytes."""
    planes = {name: np.moveaxis(np.ascontiguousarray(array)[..., None].view(np.uint8), -1, 0)
              for name, array in arrays.items()}
    with atomic_file(Path(path)) as out, out.open("wb") as file:  # numpy would add a suffix to a path
        np.savez_compressed(file, allow_pickle=False, kind=np.array(kind), **planes)


def read_arrays(path: Path | str, kind: str, layout: Layout) -> dict[str, np.ndarray]:
    """Read what write_arrays wrote; UserError if the file is broken, of another kind or another layout."""
    found = str(load_arrays(path, ("kind",), kind.split()[0])["kind"])[:40]
    if found != kind:
        raise UserError(f"{path}: found a file of kind {found!r}, expected {kind!r}; write it again")
    planes = load_arrays(path, layout, kind.split()[0])
    numbers: dict[str, int] = {}

    def fits(size: int, dimension: str | int) -> bool:
        return size == (numbers.setdefault(dimension, size) if isinstance(dimension, str) else dimension)

    arrays = {}
    for name, (dtype, shape) in layout.items():
        array, stored = planes[name], (np.dtype(dtype).itemsize, *shape)
        if array.dtype != np.uint8 or array.ndim != len(stored) or not all(map(fits, array.shape, stored)):
            raise UserError(f"{path}: found {name} of {array.dtype} {array.shape}, expected uint8 "
                            f"{stored}; write it again")
        arrays[name] = np.ndarray(array.shape[1:], dtype, np.moveaxis(array, 0, -1).tobytes()).copy()
    return arrays
