"""The viewer during training: the model as it is now, drawn anew while it grows."""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from flexgs.callbacks import Callback
from flexgs.camera import Camera
from flexgs.config import Config
from flexgs.errors import MissingDependencyError, UserError
from flexgs.model.budget import cut_to
from flexgs.model.elastic import ElasticModel
from flexgs.scene import Scene
from flexgs.splats import Splats
from flexgs.training.trainer import Trainer
from flexgs.view.viewer import Viewer

EVERY = 2.0
"""Seconds between two drawings of a model that grows."""


def check_ready(port: int) -> None:
    """Raise UserError if the viewer cannot be served at a port of this machine."""
    try:
        from flexgs.view.viser_server import check_free
    except ImportError:
        raise MissingDependencyError("viser", "view", "--view") from None
    check_free("127.0.0.1", port)


class Growing:
    """A model in training that can be cut: the thread that trains makes the cuts, between two steps."""

    def __init__(self, trainer: Trainer):
        """Make it in the thread that trains."""
        self.trainer, self._thread = trainer, threading.get_ident()
        self.trained: ElasticModel | None = None
        self._asked: queue.SimpleQueue[tuple[str | float, Future[Splats]]] = queue.SimpleQueue()
        self._over = False

    @property
    def config(self) -> Config:
        """The settings of the training."""
        return self.trainer.config

    @property
    def cameras(self) -> Sequence[Camera]:
        """The cameras of the training views."""
        return [view.camera for view in self.trainer.scene.train]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics."""
        return self.trainer.splats.sh_degree

    def __len__(self) -> int:
        """Number of Gaussians now."""
        return len(self.trained or self.trainer.splats)

    def cut(self, budget: str | float) -> Splats:
        """Return a cut (see ElasticModel.cut), after the step that is being done now."""
        answer: Future[Splats] = Future()
        self._asked.put((budget, answer))
        if self._over or threading.get_ident() == self._thread:
            self.answer()
        return answer.result()

    def answer(self) -> None:
        """Make the cuts that other threads wait for."""
        with contextlib.suppress(queue.Empty):
            while True:
                budget, answer = self._asked.get_nowait()
                try:
                    answer.set_result(self._cut(budget))
                except UserError as e:
                    answer.set_exception(e)

    def _cut(self, budget: str | float) -> Splats:
        if self.trained:
            return self.trained.cut(budget)
        if self._over:
            raise UserError("the training has ended before its last view")
        made = cut_to(budget, self, lambda kept, ratio: self.trainer.cut(ratio))
        return made.map(torch.clone)  # training goes on in the same memory

    def end(self, trained: ElasticModel | None) -> None:
        """Make cuts from the trained model from now on, or none if there is no such model."""
        self.trained, self._over = trained, True
        self.answer()


class Live(Callback):
    """Serves the viewer on this machine while a scene trains, and then until Ctrl-C."""

    def __init__(self, scene: Scene, port: int, device: str):
        self.scene, self.port, self.device, self.drawn = scene, port, device, 0.0

    def begin(self, trainer: Trainer) -> None:
        """Start the server and print its address."""
        self.model = Growing(trainer)
        self.viewer = Viewer({self.scene.name: self.model}, self.scene, "127.0.0.1", self.port, self.device)
        print(f"watch it grow: {self.viewer.url}", flush=True)

    def step(self, step: int) -> None:
        """Make the cuts that browsers wait for, and have them drawn anew now and then."""
        self.model.answer()
        if self.viewer.visits and time.monotonic() - self.drawn > EVERY:
            self.drawn = time.monotonic()
            self.viewer.refresh()

    def trained(self, model: ElasticModel) -> None:
        """Show the trained model from now on."""
        self.model.end(model)
        self.viewer.refresh()

    def end(self) -> None:
        """Stop the server, unless there is a trained model to look at."""
        if not self.model.trained:
            self.model.end(None)
            self.viewer.stop()

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        print(f"{self.viewer.url} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            self.viewer.stop()
