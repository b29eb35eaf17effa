"""Checkpoints: one folder of tensors and JSON for all workers, independent of their number; see stored.py."""

import re
from pathlib import Path
from typing import Any

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.stored import Stored, VersionError

STATE = "state"
KINDS: dict[str, Any] = {"scene": str, "step": int, "base_steps": int, "elastic": bool, "seconds": float,
                         "config": dict}


class DamagedError(UserError):
    """A checkpoint that is not whole."""


class Checkpoint(Stored):
    """A checkpoint's description, with its settings, and its tensors on demand. DamagedError if it is not
    whole."""

    def __init__(self, folder: Path):
        try:
            super().__init__(folder, STATE, KINDS, "the checkpoint is damaged")
            self.config = Config.from_dict(self.about["config"], str(folder / "state.json"))
            named = re.fullmatch(r"step_(\d+)", folder.name)
            if named and int(named[1]) != self.about["step"]:
                raise UserError(f"{folder}: found the views {self.about['step']} in state.json; the "
                                "checkpoint is damaged")
        except VersionError:
            raise
        except UserError as e:
            raise DamagedError(str(e)) from None


def checkpoints(folder: Path) -> list[Path]:
    """The step_* folders, the newest first. They are renamed into place when complete."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)),
                  reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest of them, or None."""
    return next(iter(checkpoints(folder)), None)
