"""What goes wrong while a scene trains: who may start its workers again, and what is said of it."""

import contextlib
import json
import time
import traceback
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import ControllerError, UserCallback, WorkerGroupError

from flexgs import ray_library
from flexgs.errors import UserError
from flexgs.record import SceneRun
from flexgs.urls import describe, public


class SceneFailedError(Exception):
    """Training a scene failed for a reason other than the user's input; the message is one line."""


class MachineGoneError(Exception):
    """The machine of a scene's workers has left the cluster."""


class Failures(UserCallback):
    """A callback of Ray Train that writes worker failures to failures.jsonl.

    It ends the run where starting the workers again cannot help.
    """

    def __init__(self, run: SceneRun, machine: str | None):
        """Prepare for a run; machine: Ray's id of the machine that the workers must be on."""
        self.store, self.machine = run.store, machine

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a UserError of a worker, or MachineGoneError; Ray Train does not retry after these."""
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error  # Ray Train retries after an error of a worker, but not of a callback
        with (self.store.folder / "failures.jsonl").open("a") as lines:
            errors = {rank: describe(error) for rank, error in worker_exceptions.items()}
            lines.write(json.dumps({"time": round(time.time()), "errors": errors}) + "\n")
        self.store.push("failures.jsonl")
        if self.machine and not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.machine):
            raise MachineGoneError(self.machine)  # Ray would wait for the machine


def cause_of(error: Exception, run: SceneRun) -> Exception:
    """Return what ended the training of a scene: a UserError, MachineGoneError or SceneFailedError.

    The last has one line, which names the last checkpoint; the stack trace is in error.txt.
    """
    if isinstance(error, ControllerError):
        inner = error.controller_failure
        if isinstance(inner, ray_library.no_room_error()):
            return MachineGoneError("no room")
        if isinstance(inner, UserError | MachineGoneError):
            return inner
        lines = {describe(inner)}
    elif isinstance(error, UserError | MachineGoneError):
        return error
    else:
        lines = ({describe(e) for e in error.worker_failures.values()} if isinstance(error, WorkerGroupError)
                 else {describe(error)})
    details, last = run.folder / "error.txt", "no checkpoint yet"
    with contextlib.suppress(OSError):  # if the storage fails, `lines` say so already
        details.write_text(public("".join(traceback.format_exception(error))))
        if step := run.store.latest_step():
            last = f"last checkpoint: {run.store.place(f'checkpoints/step_{step:08d}')}"
    return SceneFailedError(f"{'; '.join(sorted(lines))}; {last}; details in {details}")
