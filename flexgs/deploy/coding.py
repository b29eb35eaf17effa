"""Columns of small integers as bytes: planes of equal significance, coded with LZMA.

LZMA's literal coder is an adaptive arithmetic coder, one of few in the standard library: it comes close to
the entropy of a column without tables, which small chunks have no room for, and spends less than a bit on a
number that is nearly always 0. Matches are of no use here, so the window is small.
"""

import lzma
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer]

FILTERS = [{"id": lzma.FILTER_LZMA1, "lc": 0, "lp": 0, "pb": 0, "dict_size": 4096, "mode": lzma.MODE_NORMAL,
            "mf": lzma.MF_BT2, "nice_len": 64, "depth": 1}]
MEMORY = 1 << 20
"""The most bytes of memory that a file may ask the decoder to take; ours ask for a twentieth of it."""
MOST_SHRUNK = 8000
"""The largest factor by which LZMA can shrink data."""
MOST_WIDTH = 4
"""The most bytes of an integer."""


def compress(raw: bytes) -> bytes:
    """Return the bytes as a file of the format .lzma."""
    return lzma.compress(raw, lzma.FORMAT_ALONE, filters=FILTERS)


def decompress(body: bytes, most: int) -> bytes:
    """Undo compress(); ValueError if that fails, or gives more than `most` bytes."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, MEMORY)
    try:
        raw = decoder.decompress(body, most + 1)
        while not decoder.eof and not decoder.needs_input and len(raw) <= most:
            raw += decoder.decompress(b"", most + 1 - len(raw))
    except (lzma.LZMAError, EOFError) as e:
        raise ValueError(f"no LZMA data: {str(e).lower()}") from None
    if not decoder.eof or decoder.unused_data or len(raw) > most:
        raise ValueError(f"of another length than its at most {most:,} bytes compressed")
    return raw


def possible(size: int, least: int, most: int) -> bool:
    """Whether so many bytes can be what `least` to `most` bytes are compressed to."""
    return least <= MOST_SHRUNK * size and size <= most + most // 32 + 64


def planes(columns: Sequence[Integers]) -> tuple[bytes, bytes]:
    """Return the width of each column, 1 to 4 bytes, and its values.

    A value v is stored as 2 v, or as -2 v - 1 if it is negative; of a column first the highest byte of every
    value, then the next one of every value. ValueError if one needs more than four bytes.
    """
    widths, out = [], []
    for column in columns:
        values = column.astype(np.int64)
        folded = (values << 1) ^ (values >> 63)
        width = max(1, (int(folded.max(initial=0)).bit_length() + 7) // 8)
        if width > MOST_WIDTH:
            raise ValueError
        widths.append(width)
        out += [(folded >> 8 * i).astype(np.uint8).tobytes() for i in reversed(range(width))]
    return bytes(widths), b"".join(out)


def columns_of(widths: bytes, raw: bytes, rows: Sequence[int]) -> Iterator[Integers]:
    """Yield the columns that planes() has made bytes of, of so many rows each; raw is as long as they ask."""
    at = 0
    for width, count in zip(widths, rows, strict=True):
        folded = np.zeros(count, np.int64)
        for _ in range(width):
            folded = folded << 8 | np.frombuffer(raw, np.uint8, count, at)
            at += count
        yield (folded >> 1) ^ -(folded & 1)
