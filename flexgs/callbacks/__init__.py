"""What is told how a training goes: bars and lines for a person, loggers for services, viewers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgs.model.elastic import ElasticModel
    from flexgs.training.trainer import Trainer


class Callback:
    """Is told how a training goes; a subclass overrides what it needs, since nothing happens here.

    Of several workers, the first one tells. An error in a callback ends the training.

    >>> import flexgs
    >>> class Halves(flexgs.Callback):
    ...     def report(self, step, metrics):
    ...         print(step, metrics["stage"])
    >>> config = flexgs.Config.from_preset("smoke", steps=40, report_every=20)
    >>> model = flexgs.train("captures/garden", config, callbacks=[Halves()])
    20 1
    40 2
    """

    def begin(self, trainer: "Trainer") -> None:
        """Take note that a training begins or continues at trainer.step."""

    def step(self, step: int) -> None:
        """Take note of an optimizer step; step counts training views."""

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the figures of a progress line, every config.report_every views (Trainer.metrics)."""

    def trained(self, model: "ElasticModel") -> None:
        """Take the trained model; a run measures it next."""

    def measured(self, results: Mapping[str, Any], folder: Path) -> None:
        """Take the contents of results.json and the run folder; flexgs.train() measures nothing."""

    def end(self) -> None:
        """Let go of everything: the training is over, or has failed."""


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self.callbacks = callbacks

    @contextmanager
    def told(self, trainer: "Trainer") -> Iterator[None]:
        """Tell the callbacks that the training begins, and at the end of the block that it has ended."""
        begun: list[Callback] = []
        with ExitStack() as ends:  # if one fails at the end, the others end all the same
            try:
                for callback in self.callbacks:
                    callback.begin(trainer)
                    begun.append(callback)
                yield
            finally:
                for callback in reversed(begun):  # the stack ends the first one first
                    ends.callback(callback.end)

    def step(self, step: int) -> None:
        """Tell all."""
        for callback in self.callbacks:
            callback.step(step)

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tell all."""
        for callback in self.callbacks:
            callback.report(step, metrics)

    def trained(self, model: "ElasticModel") -> None:
        """Tell all."""
        for callback in self.callbacks:
            callback.trained(model)

    def measured(self, results: Mapping[str, Any], folder: Path) -> None:
        """Tell all."""
        for callback in self.callbacks:
            callback.measured(results, folder)
