"""Checkpoints: one folder of safetensors and JSON for all workers, independent of their number."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexgs.errors import UserError
from flexgs.files import write_json

FORMAT = 1


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Fill an existing folder with state.safetensors and state.json."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "state.safetensors")
    write_json(folder / "state.json", {"format": FORMAT, **about})


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description; UserError if the folder is incomplete or of another version."""
    try:
        about = json.loads((folder / "state.json").read_text())
        with safe_open(folder / "state.safetensors", "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, json.JSONDecodeError, SafetensorError) as e:
        raise UserError(f"{folder}: not a readable checkpoint ({e}); remove it to go on from an older one") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {about.get('format')}, this version reads {FORMAT}; "
                        "choose another output folder")
    return tensors, about


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest step_* folder, or None. Folders are renamed into place when complete, so the newest is whole."""
    return max(folder.glob("step_*"), default=None)
