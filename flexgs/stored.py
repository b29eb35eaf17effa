"""Tensors with their description, as models and checkpoints: NAME.safetensors and NAME.json in a folder.

The JSON has a SHA-256 of both, so that a single changed bit is noticed. No memory is taken for a tensor
before its name, dtype and shape in the header of the file have been checked. Nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flexgs.errors import UserError
from flexgs.files import write_json
from flexgs.inputs import Layout, check_tensors, read_json, regular_file, shown, typed
from flexgs.origin import WORLD
from flexgs.splats import Splats

FORMAT = 1
DTYPES = {"F32": "float32", "F16": "float16", "F64": "float64", "I64": "int64", "BF16": "bfloat16"}
"""The dtypes in use: safetensors' name -> torch's name."""

SPLATS: Layout = {"splats.means": ("float32", ("Gaussians", 3)),
                  "splats.quats": ("float32", ("Gaussians", 4)),
                  "splats.scales": ("float32", ("Gaussians", 3)),
                  "splats.opacities": ("float32", ("Gaussians",)),
                  "splats.sh0": ("float32", ("Gaussians", 3)),
                  "splats.shN": ("float32", ("Gaussians", "harmonics", 3))}


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write NAME.safetensors and NAME.json into an existing folder."""
    file, about = folder / f"{name}.safetensors", {"format": FORMAT, **about}
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, file)
    write_json(folder / f"{name}.json", {**about, "sha256": _digest(about, file)})


class VersionError(UserError):
    """The files are whole, but of another format version."""


class Stored:
    """Tensors and their description, as save() has written them.

    The description (`about`) and the tensors' dtypes and shapes (`heads`) are read at once, the values by
    tensors(). UserError for files that are damaged, of another version, or of something else.
    """

    def __init__(self, folder: Path, name: str, kinds: Mapping[str, Any], advice: str):
        """Open `name` in folder; kinds: keys of the JSON and their types; advice: what to do about errors."""
        self.folder, self.file, self.advice = folder, folder / f"{name}.safetensors", advice
        description = folder / f"{name}.json"
        self._written: dict[str, Any] = read_json(description, advice=advice)
        if (version := self._written.get("format")) != FORMAT:
            raise VersionError(f"{description}: found format {shown(version)}, this version reads "
                               f"{FORMAT}; get a version of flexgs that reads it")
        if missing := [key for key in kinds if key not in self._written]:
            raise UserError(f"{description}: found no {missing[0]}; {advice}")
        self.about = self._written | {key: typed(kind, self._written[key], f"{description}: {key}")
                                      for key, kind in kinds.items()}
        """The contents of the JSON file."""
        try:
            with safe_open(regular_file(self.file), "pt") as file:
                heads = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
                self.heads = {key: torch.empty(head.get_shape(),
                                               dtype=getattr(torch, DTYPES[head.get_dtype()]), device="meta")
                              for key, head in heads.items()}
                """The tensors without their values."""
        except (OSError, SafetensorError, KeyError, RuntimeError) as e:
            raise UserError(f"{self.file}: not readable ({e}); {advice}") from None

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        """Read the tensors; UserError unless they match the layout and the SHA-256."""
        check_tensors(self.heads, layout, str(self.file))
        about = {key: value for key, value in self._written.items() if key != "sha256"}
        # files of early versions have no SHA-256
        if "sha256" in self._written and self._written["sha256"] != _digest(about, self.file):
            raise UserError(f"{self.folder}: found other bytes than were written (SHA-256 "
                            f"differs); {self.advice}")
        with safe_open(self.file, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in layout}
        check_tensors(tensors, layout, str(self.file))
        return tensors


def splats_of(heads: Mapping[str, Tensor], where: str, prefix: str = "splats.", **numbers: int) -> Splats:
    """Return the Gaussians among the tensors of a file, on the meta device if those are.

    UserError if they are not valid Gaussians. Their names begin with the prefix; `numbers` may fix how many
    "Gaussians" or "harmonics" there must be.
    """
    mine = {name: t for name, t in heads.items() if name.startswith(prefix)}
    layout = {name.replace("splats.", prefix): kind for name, kind in SPLATS.items()}
    check_tensors(mine, layout, where, numbers)
    if numbers["harmonics"] not in (0, 3, 8, 15):
        raise UserError(f"{where}: found {numbers['harmonics']} harmonics, expected 0, 3, 8 or "
                        "15; the file is damaged")
    return Splats(**part(mine, prefix), origin=WORLD)


def layout_of(module: nn.Module, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the layout of a module's state, which may be on the meta device."""
    return {prefix + name: (str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in module.state_dict().items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with prefix, under the rest of their name."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _digest(about: Mapping[str, Any], file: Path) -> str:
    with file.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256")
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()
