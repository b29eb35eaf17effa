"""Checkpoints: one folder of tensors and JSON (see stored.py) that any number of workers can continue."""

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
    """Raised for a checkpoint that is incomplete or damaged."""


class Checkpoint(Stored):
    """A checkpoint: description, settings, and tensors on demand; DamagedError if it is not whole."""

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
    """List the step_* folders, newest first. A folder is renamed into place when it is complete."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)),
                  reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint folder, or None."""
    return next(iter(checkpoints(folder)), None)
