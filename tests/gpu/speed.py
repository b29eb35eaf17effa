"""What a training step takes, beside gsplat's own, and where the time of an elastic step goes."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from flexgs.bench.step import ROUND
from flexgs.device import clock
from flexgs.raster import render
from flexgs.raster.contract import Contributions, Projection
from flexgs.splats import Splats
from flexgs.training import trainer as module
from flexgs.training.trainer import Trainer
from tests.gpu.record import Part, Row, Study
from tests.gpu.steps import STEPS, scene_of, start, steps, trainer

TARGETS = {"plain": 1.05, "default": 2.0}
"""Times gsplat's step, at most. Default renders the whole and four cuts of each view."""
CUT_MS = {1_000_000: 130.0}
"""Number of Gaussians -> milliseconds of a cut to 10 %, at most: what FlexGS's paper has on an A100."""
WITHOUT_GPU = "gsplat: left out, needs a GPU"


@dataclass
class Speed(Study):
    """Steps of gsplat, of stage 1 and of stage 2, in turns; and the pieces of the default's elastic step."""

    sizes: tuple[int, ...] = (200_000, 1_000_000, 3_000_000)
    """Gaussians, in rising order."""
    image: tuple[int, int] = (1297, 840)
    """Width and height: a quarter of an outdoor image of Mip-NeRF 360."""
    repeats: int = 7
    """Rounds of 8 steps of each method; medians are told."""

    TINY: ClassVar[Row] = {"sizes": (500,), "image": (64, 48), "repeats": 1}

    def parts(self) -> Iterable[Part]:
        for count in self.sizes:
            yield f"{count:,} Gaussians", partial(self.compared, count)
        for count in self.sizes:
            yield f"{count:,} Gaussians, default in pieces", partial(self.in_pieces, count)
            yield f"{count:,} Gaussians, one image", partial(self.one_image, count)
            yield f"{count:,} Gaussians, one cut", partial(self.one_cut, count)

    def compared(self, count: int) -> Iterator[Row]:
        scene, device = scene_of(self.image), torch.device(self.device)
        methods = {name: steps(name, scene, count, self.device) for name in STEPS if name != "gsplat"
                   or device.type == "cuda"}
        times: dict[str, list[float]] = {name: [] for name in methods}
        for repeat in range(self.repeats + 1):
            for name, method in methods.items():
                begun = clock(device)
                for _ in range(ROUND):
                    method.train_step()
                if repeat:  # the first warms up, and begins stage 2
                    times[name].append((clock(device) - begun) / ROUND)
        seconds = {name: statistics.median(t) for name, t in times.items()}
        for name in STEPS:
            if name not in seconds:
                yield {"step": name, "remark": WITHOUT_GPU}
                continue
            ratio = seconds[name] / seconds["gsplat"] if "gsplat" in seconds else None
            target = TARGETS.get(name) if ratio else None
            yield {"step": name, "ms": 1e3 * seconds[name], "views/s": 1 / seconds[name], "of gsplat": ratio,
                   "target": target, **({"pass": ratio <= target} if ratio and target else {})}

    def in_pieces(self, count: int) -> Iterator[Row]:
        """Each piece begins and ends with a synchronisation, so that all are a little more than the step
        without them."""
        device, method = torch.device(self.device), trainer("default", scene_of(self.image), start(count),
                                                            self.device)
        method.train_step()
        method.train_step()
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.repeats):
            with pieces(method) as seconds:
                begun = clock(device)
                method.train_step()
                whole = clock(device) - begun
            for name, value in {**seconds, "the rest": whole - sum(seconds.values()), "all": whole}.items():
                found[name].append(value)
        for name, values in found.items():
            yield {"step": name, "ms": 1e3 * statistics.median(values)}

    @torch.no_grad()
    def one_image(self, count: int) -> list[Row]:
        """Forward only. The contributions are what importance costs per view: once, and for GsNet every 1000
        views.

        Only LightGaussian's score and that of FlexGS's code need all of them.
        """
        kinds: dict[str, Contributions | None] = {
            "render": None, "render, with sums of alpha T": "weight", "render, with all contributions": "all"}
        device, times = torch.device(self.device), defaultdict(list)
        splats, camera = start(count).to(device), scene_of(self.image).train[0].camera.to(device)
        for _ in range(self.repeats + 1):
            for name, contributions in kinds.items():
                begun = clock(device)
                render(splats, camera, contributions=contributions)
                times[name].append(clock(device) - begun)
        return [{"step": name, "ms": 1e3 * statistics.median(values[1:])} for name, values in times.items()]

    def one_cut(self, count: int) -> list[Row]:
        """A model of `default` on the device, cut to 10 %."""
        model, device, times = trainer("default", scene_of(self.image), start(count),
                                       self.device).model(), torch.device(self.device), []
        for _ in range(self.repeats + 1):
            begun = clock(device)
            model.cut(0.1)
            times.append(1e3 * (clock(device) - begun))
        ms, target = statistics.median(times[1:]), CUT_MS.get(count)
        verdict = {"target": target, "pass": ms <= target} if target else {}
        return [{"step": "cut to 10 %", "ms": ms, **verdict}]


@contextmanager
def pieces(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Seconds by piece of the elastic steps that are done inside the block."""
    seconds = dict.fromkeys(("selection", "transform", "whole render", "elastic renders", "loss", "backward",
                             "Adam"), 0.0)

    def timed(name: Callable[..., str], function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            begun = clock(trainer.device)
            result = function(*args, **options)
            seconds[name(*args)] += clock(trainer.device) - begun
            return result

        return call

    def rendered(gaussians: Splats | Projection, *_: Any) -> str:
        rows = gaussians.means2d if isinstance(gaussians, Projection) else gaussians
        return "whole render" if len(rows) == len(trainer.splats) else "elastic renders"

    places = {"selection": (trainer.order, "select"), "transform": (trainer.transform, "forward"),
              "loss": (module, "photometric"), "backward": (torch.Tensor, "backward"),
              "Adam": (trainer.optimizer, "step")}
    with ExitStack() as patches:
        for name in ("project", "rasterize"):
            patches.enter_context(patch.object(module, name, timed(rendered, getattr(module, name))))
        for piece, (owner, name) in places.items():
            patches.enter_context(patch.object(owner, name,
                                               timed(lambda *_, piece=piece: piece, getattr(owner, name))))
        yield seconds


