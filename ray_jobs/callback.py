"""The callback through which Ray Train tells that workers have died."""

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from flexgs.store import Store
from ray_jobs import failures


class Failures(UserCallback):
    """Writes them to failures.jsonl, and ends the run where starting the workers again cannot help.

    Ray Train starts them again after an error of a worker, but not after one of a callback.
    """

    def __init__(self, run: Store, machine: str | None):
        """Prepare for the run in a folder; machine: Ray's id of the machine that the workers must be on."""
        self.run, self.machine = run, machine

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise what failures.note() does."""
        failures.note(self.run, self.machine, worker_exceptions)
