"""Changes to the bytes of a file.

What is packed is opened, changed inside, and closed again with right lengths and checksums, so that what lies
behind these is reached too. What is left is changed as what it looks like: JSON, lines of text, or bytes.
"""

import contextlib
import copy
import gzip
import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

INTEGERS = (0, 1, -1, 127, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1,
            2**63, 2**64 - 1)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-310, 0.5, -3.0, 65504.0, 1e19, 1e38, -3.4e38,
          1e300)
STRINGS = ("", " ", ".", "..", "/", "/dev/zero", "\0", "a\nb", "\x1b[31m", "\ud800", "\udcff", "é", "１", "²",
           "1_000", "0x10",
           "1e400", "NaN", "true", "#", "-", "--help", "c" * 300, "d/" * 3000)
MOST = 8 << 20
"""Bytes of a file: readers are to be tried, not disks."""
DEEP, TWICE = "@deep@", "@twice@"
"""What stands for brackets within each other, and for a key that comes a second time, until JSON is
written."""
VALUES: tuple[Any, ...] = (*INTEGERS, *FLOATS, *STRINGS, None, True, False, 10**30, 10**400, [], {}, [[]],
                           [{}], {"a": 1}, [1, 2, 3], [1.0] * 16, DEEP)

Opened = tuple[list[bytes], Callable[[list[bytes]], bytes]]
"""The parts of a packed file, and what packs them again."""


def changed(raw: bytes, draw: Random) -> bytes:
    """The bytes of a file with one to four changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        new = _change(raw, draw)
        raw = new if len(new) <= MOST else raw
    return raw


def _change(raw: bytes, draw: Random) -> bytes:
    if draw.random() < 0.85 and (packed := opened(raw)) and packed[0]:
        parts, close = packed
        i = draw.randrange(len(parts))
        parts[i] = _change(parts[i], draw)
        with contextlib.suppress(Exception):  # parts that cannot be packed any more
            return close(parts)
    if draw.random() < 0.9:
        for change in (_json, _text):
            with contextlib.suppress(Exception):  # it is none
                return change(raw, draw)
    return _bytes(raw, draw)


# -- packed files
# ---------------------------------------------------------------------------------------------------------

def opened(raw: bytes) -> Opened | None:
    """None for what is not packed, and for what an earlier change has broken."""
    for start, opener in OPENERS.items():
        if raw.startswith(start):
            with contextlib.suppress(Exception):
                return opener(raw)
    if raw[8:10] == b'{"':
        return _safetensors(raw)
    return None


def _gzip(raw: bytes) -> Opened:
    return [gzip.decompress(raw)], lambda parts: gzip.compress(parts[0], 1, mtime=0)


def _zlib(raw: bytes) -> Opened:
    return [zlib.decompress(raw)], lambda parts: zlib.compress(parts[0], 1)


def _zip(raw: bytes) -> Opened:
    """The first part is the list of names as JSON: members are renamed, left out and written twice there."""
    with zipfile.ZipFile(io.BytesIO(raw)) as packed:
        infos = packed.infolist()
        contents = [packed.read(info) for info in infos]

    def close(parts: list[bytes]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as packing:
            for name, info, content in zip(json.loads(parts[0]), infos, parts[1:], strict=False):
                packing.writestr(zipfile.ZipInfo(name), content, info.compress_type, 1)
        return out.getvalue()

    return [json.dumps([info.filename for info in infos]).encode(), *contents], close


def _fgs(raw: bytes) -> Opened:
    """The head, and each chunk inflated. Only a chunk that is changed gets a new length and checksum in the
    head."""
    kind, version, length, _ = struct.unpack_from("<6sHII", raw)
    head, at = raw[16:16 + length], 16 + length
    if version == 2:
        return _fgs2(zlib.decompress(head), raw[at:])
    bodies = []
    for chunk in json.loads(head)["chunks"]:
        bodies.append(raw[at:at + chunk["bytes"]])
        at += chunk["bytes"]
    before = [zlib.decompress(body) for body in bodies]

    def close(parts: list[bytes]) -> bytes:
        head, *contents = parts
        for i, content in enumerate(contents):
            if content != before[i]:
                bodies[i] = zlib.compress(content, 1)
                about = json.loads(head)
                about["chunks"][i] |= {"bytes": len(bodies[i]), "crc32": zlib.crc32(bodies[i])}
                head = json.dumps(about).encode()
        return struct.pack("<6sHII", kind, version, len(head), zlib.crc32(head)) + head + b"".join(bodies)

    return [head, *before], close


def _fgs2(head: bytes, raw: bytes) -> Opened:
    """The same of version 2, with the part behind the chunks."""
    about, bodies, at = json.loads(head), [], 0
    for size in [*(chunk[1] for chunk in about["chunks"]), about["last"][0]]:
        bodies.append(raw[at:at + size])
        at += size
    before = [*map(lzma.decompress, bodies[:-1]), zlib.decompress(bodies[-1])]

    def close(parts: list[bytes]) -> bytes:
        head, *contents = parts
        for i, content in enumerate(contents):
            if content != before[i]:
                last = i == len(bodies) - 1
                bodies[i] = zlib.compress(content, 1) if last else lzma.compress(content, lzma.FORMAT_ALONE)
                about = json.loads(head)
                (about["last"] if last else about["chunks"][i])[-2:] = len(bodies[i]), zlib.crc32(bodies[i])
                head = json.dumps(about).encode()
        head = zlib.compress(head)
        return struct.pack("<6sHII", b"FLEXGS", 2, len(head), zlib.crc32(head)) + head + b"".join(bodies)

    return [head, *before], close


def _glb(raw: bytes) -> Opened:
    length = struct.unpack_from("<I", raw, 12)[0]

    def close(parts: list[bytes]) -> bytes:
        text, body = parts[0] + b" " * (-len(parts[0]) % 4), parts[1]
        return (struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + len(body), len(text), 0x4E4F534A) + text
                + struct.pack("<II", len(body), 0x004E4942) + body)

    return [raw[20:20 + length], raw[28 + length:]], close


def _png(raw: bytes) -> Opened:
    at, kinds, parts = 8, [], []
    while at < len(raw):
        length, kind = struct.unpack_from(">I4s", raw, at)
        kinds.append(kind)
        parts.append(raw[at + 8:at + 8 + length])
        at += 12 + length
    return parts, lambda parts: raw[:8] + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in zip(kinds, parts, strict=True))


def _npy(raw: bytes) -> Opened:
    length = struct.unpack_from("<H", raw, 8)[0]
    return ([raw[10:10 + length], raw[10 + length:]],
            lambda parts: raw[:8] + struct.pack("<H", len(parts[0])) + parts[0] + parts[1])


def _ply(raw: bytes) -> Opened:
    end = raw.index(b"end_header\n") + len(b"end_header\n")
    return [raw[:end], raw[end:]], b"".join


def _safetensors(raw: bytes) -> Opened:
    length = struct.unpack_from("<Q", raw)[0]
    return ([raw[8:8 + length], raw[8 + length:]],
            lambda parts: struct.pack("<Q", len(parts[0])) + parts[0] + parts[1])


OPENERS: dict[bytes, Callable[[bytes], Opened]] = {
    b"\x1f\x8b": _gzip, b"\x78": _zlib, b"PK\3\4": _zip, b"FLEXGS": _fgs, b"glTF": _glb, b"\x89PNG": _png,
    b"\x93NUMPY": _npy, b"ply\n": _ply}


# -- what is not packed
# -----------------------------------------------------------------------------------------------------

def _json(raw: bytes, draw: Random) -> bytes:
    """A value in a tree replaced, removed, renamed, repeated, wrapped, or made of another type."""
    tree = [json.loads(raw) if raw.lstrip()[:1] in (b"{", b"[") else _no_json()]
    holder, key = draw.choice(list(_spots(tree)))
    value = holder[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match draw.choice(("replaced", "replaced", "number", "number", "removed", "renamed", "twice", "another's",
                       "wrapped", "text")):
        case "number" if number:
            holder[key] = draw.choice((value + 1, value - 1, -value, 2 * value, value / 3,
                                       value * 10**6, *INTEGERS, *FLOATS))
        case "removed":
            del holder[key]
        case "renamed" if isinstance(holder, dict):
            holder[draw.choice((key + "x", *STRINGS))] = holder.pop(key)
        case "twice" if isinstance(holder, dict):
            holder[TWICE] = draw.choice(VALUES)
        case "twice":
            holder.insert(key, copy.deepcopy(value))
        case "another's":
            other, at = draw.choice(list(_spots(tree)))
            holder[key] = copy.deepcopy(other[at])
        case "wrapped":
            holder[key] = draw.choice(([value], {"a": value}, [value] * 3))
        case "text":
            holder[key] = str(value)
        case _:
            holder[key] = draw.choice(VALUES)
    text = json.dumps(tree[0], ensure_ascii=draw.random() < 0.8) if tree else ""
    text = text.replace(f'"{DEEP}"', draw.choice(("[" * 40 + "]" * 40, "[" * 100_000, '{"a":' * 20_000)))
    return text.replace(TWICE, str(key)).encode("utf-8", "surrogatepass")


def _no_json() -> None:
    raise ValueError


def _spots(tree: Any) -> Any:
    """(holder, key) of every value in lists and objects."""
    level = [tree]
    while level:
        holder = level.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            yield holder, key
            if isinstance(value, dict | list):
                level.append(value)


def _text(raw: bytes, draw: Random) -> bytes:
    """A line or a word in it removed, repeated, exchanged or replaced."""
    if b"\0" in raw or not raw:
        raise ValueError
    lines = raw.decode().splitlines(keepends=True)
    i = draw.randrange(len(lines))
    words = lines[i].split(" ")
    j = draw.randrange(len(words))
    end = "\n" if lines[i].endswith("\n") else ""
    match draw.choice(("line removed", "line twice", "lines exchanged", "line cut", "ends", "word", "word",
                       "word", "word removed", "word twice", "blank", "encoding", "long")):
        case "line removed":
            del lines[i]
        case "line twice":
            lines.insert(draw.randrange(len(lines)), lines[i])
        case "lines exchanged":
            k = draw.randrange(len(lines))
            lines[i], lines[k] = lines[k], lines[i]
        case "line cut":
            lines[i] = lines[i][:draw.randrange(len(lines[i]) + 1)]
        case "ends":
            lines = [line.replace("\n", draw.choice(("\r\n", "\r", "\n\n", "\x85", " \n"))) for line in lines]
        case "word":
            words[j] = draw.choice((str(draw.choice(INTEGERS)), repr(draw.choice(FLOATS)),
                                    draw.choice(STRINGS))) + (
end if j == len(words) - 1 else "")
            lines[i] = " ".join(words)
        case "word removed":
            lines[i] = " ".join(words[:j] + words[j + 1:]) + (end if j == len(words) - 1 else "")
        case "word twice":
            lines[i] = " ".join(words[:j] + [words[j].rstrip("\n")] * draw.choice((2, 3, 50)) + words[j:])
        case "blank":
            lines.insert(i, draw.choice(("\n", "\ufeff", "\t\n", "# a comment\n", "comment é\n")))
        case "encoding":
            return "".join(lines).encode(draw.choice(("utf-16", "utf-8-sig")), "surrogatepass")
        case "long":
            lines[i] = lines[i].rstrip("\n") * 3000 + end
    return "".join(lines).encode("utf-8", "surrogatepass")


def _bytes(raw: bytes, draw: Random) -> bytes:
    """Bits turned, numbers replaced by extreme ones, blocks removed, repeated, exchanged; the end cut off or
    moved. Half of all this happens in the first 64 bytes, where heads are."""
    size = len(raw)
    at = draw.randrange(min(size, 64) if draw.random() < 0.5 else size) if size else 0
    to = min(size, at + draw.choice((1, 4, 16, 64, 1024)))
    other = draw.randrange(size) if size else 0
    match draw.choice(("bit", "bit", "run", "integer", "integer", "float", "float", "cut", "more", "removed",
                       "twice", "exchanged")):
        case "bit" if size:
            return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1:]
        case "run":
            return raw[:at] + draw.choice((b"\0", b"\xff", draw.randbytes(1))) * (to - at) + raw[to:]
        case "integer":
            width, order = draw.choice((1, 2, 4, 4, 8)), draw.choice(("little", "little", "big"))
            return _put(raw, at, (draw.choice(INTEGERS) % 2 ** (8 * width)).to_bytes(width, order))
        case "float":
            return _put(raw, at, _float(draw.choice(FLOATS), draw.choice("efd")))
        case "cut":
            return raw[:at]
        case "more":
            return raw + draw.choice((bytes(to - at + 1), draw.randbytes(8), raw[at:to]))
        case "removed":
            return raw[:at] + raw[to:]
        case "twice":
            return raw[:to] + raw[at:]
        case "exchanged":
            return _put(_put(raw, at, raw[other:other + to - at]), other, raw[at:to])
    return raw


def _put(raw: bytes, at: int, new: bytes) -> bytes:
    """new over what is there, at a multiple of its length, up to the end of the file."""
    at -= at % len(new) if len(new) in (2, 4, 8) else 0
    return (raw[:at] + new + raw[at + len(new):])[:len(raw)]


def _float(value: float, kind: str) -> bytes:
    try:
        return struct.pack(f"<{kind}", value)
    except OverflowError:
        return struct.pack(f"<{kind}", math.copysign(math.inf, value))
