"""What goes wrong while a scene trains: who may start its workers again, and what is said of it."""

import contextlib
import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import ray

from flexgs import ray_library
from flexgs.errors import UserError
from flexgs.store import Store
from flexgs.urls import describe, public


class SceneFailedError(Exception):
    """Training a scene failed for a reason other than the user's input; the message is one line."""


class NotStartedError(SceneFailedError):
    """A worker of a scene died, or its machine, before it had begun."""


class MachineGoneError(Exception):
    """The machine of a scene's workers has left the cluster."""


def note(run: Store, machine: str | None, errors: Mapping[int, Exception]) -> None:
    """Write failures of workers to failures.jsonl.

    Args:
        run: the run's folder.
        machine: Ray's id of the machine that the workers must be on.
        errors: by the rank of the worker.

    Raises:
        UserError: one of the errors, where starting the workers again cannot help.
        MachineGoneError: the machine has gone; Ray would wait for it.
    """
    for error in errors.values():
        if isinstance(error, UserError):
            raise error
    with (run.folder / "failures.jsonl").open("a") as lines:
        said = {rank: describe(error) for rank, error in errors.items()}
        lines.write(json.dumps({"time": round(time.time()), "errors": said}) + "\n")
    run.push("failures.jsonl")
    if machine and not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == machine):
        raise MachineGoneError(machine)


def cause_of(error: Exception, run: Store) -> Exception:
    """Return what ended a run whose folder this is: a UserError, MachineGoneError or SceneFailedError.

    A SceneFailedError has one line, which names the last checkpoint; the stack trace is in error.txt.
    """
    if isinstance(error, UserError | MachineGoneError):
        return error
    # Imported only here, since it takes 1.5 s, which a scene of one worker that does not fail need not wait.
    from ray.train import ControllerError, WorkerGroupError

    kind: type[SceneFailedError] = SceneFailedError
    if isinstance(error, ControllerError):
        inner = error.controller_failure
        if isinstance(inner, ray_library.no_room_error()):
            return MachineGoneError("no room")
        if isinstance(inner, UserError | MachineGoneError):
            return inner
        lines = {describe(inner)}
        kind = NotStartedError if isinstance(inner, ray_library.start_error()) else kind
    else:
        lines = ({describe(e) for e in error.worker_failures.values()} if isinstance(error, WorkerGroupError)
                 else {describe(error)})
    details, last = str(run.folder / "error.txt"), "no checkpoint yet"
    with contextlib.suppress(OSError):  # if the storage fails, `lines` say so already
        Path(details).write_text(public("".join(traceback.format_exception(error))))
        run.push("error.txt")  # a search's trial has its copy of an object store in a temporary folder
        details = run.place("error.txt")
        if step := run.latest_step():
            last = f"last checkpoint: {run.place(f'checkpoints/step_{step:08d}')}"
    return kind(f"{'; '.join(sorted(lines))}; {last}; details in {details}")
