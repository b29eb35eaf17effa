"""What a training step needs in memory, and how it grows with the number of Gaussians."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch

from flexgs.training.memory import COPIES
from tests.gpu.record import Part, Row, Study, peak_memory
from tests.gpu.speed import WITHOUT_GPU
from tests.gpu.steps import STEPS, scene_of, start, steps

FLOATS = 11 + 3 * 16  # position, rotation, scale, opacity; harmonics of degree 3


@dataclass
class Memory(Study):
    """Peaks of the steps that `speed` times, each by itself. On the CPU: of the whole process, which never
    shrinks."""

    sizes: tuple[int, ...] = (200_000, 1_000_000, 3_000_000)
    """Gaussians, in rising order."""
    image: tuple[int, int] = (1297, 840)
    """Width and height."""

    TINY: ClassVar[Row] = {"sizes": (300, 500), "image": (64, 48)}

    def parts(self) -> Iterable[Part]:
        smaller = dict(pairwise(reversed(self.sizes)))
        for name in STEPS:
            for count in self.sizes:
                yield f"{name}, {count:,} Gaussians", partial(self.peaks, name, count, smaller.get(count))

    def peaks(self, name: str, count: int, smaller: int | None) -> list[Row]:
        """The bytes per Gaussian are the slope from the next smaller number."""
        cpu = self.device == "cpu"
        if cpu and name == "gsplat":
            return [{"remark": WITHOUT_GPU}]
        scene = scene_of(self.image)
        start(count)
        gc.collect()
        if not cpu:
            torch.cuda.empty_cache()
        peak_memory(self.device)
        method = steps(name, scene, count, self.device)
        method.train_step()
        first = peak_memory(self.device)
        for _ in range(3):
            method.train_step()
        peak = peak_memory(self.device)
        (before,) = self.rows.get(f"{name}, {smaller:,} Gaussians", [{}]) if smaller else [{}]
        column = "process MB" if cpu else "GPU MB"
        slope = ((peak / 1e6 - before[column]) * 1e6 / (count - smaller) if smaller and column in before
                 else None)
        return [{f"{column}, first step": first / 1e6, column: peak / 1e6, "bytes per Gaussian": slope,
                 "estimate": float(4 * FLOATS * COPIES), "remark": "peak of the process" if cpu else None}]
