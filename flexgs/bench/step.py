"""`flexgs bench step`: the time of a step of stage 2 under each preset, relative to plain 3DGS."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flexgs.compare import method_config
from flexgs.pool import get_num_threads, set_num_threads
from flexgs.scene import Scene
from flexgs.training.checkpoint import Checkpoint
from flexgs.training.trainer import Trainer

ROUND = 8
"""Steps after which the renders repeat: `fast` alternates two kinds, and every eighth step has one more."""


def bench_step(scene: Scene, checkpoint: Path, methods: Sequence[str], *,
               repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time steps of stage 2 from a checkpoint of stage 1, such as `flexgs compare` leaves.

    All methods take turns on the same views. Prints a table and returns it: {method: {"ms": median CPU time
    of a step with 1 thread, "ratio": to that of plain 3DGS}}. For `default`, further rows leave out one band
    of cut ratios each, which shows its cost. Computing importance is not part of a step.
    """
    common = Checkpoint(checkpoint).config
    configs = {name: method_config(name, common) for name in ("plain", *methods)}
    bands = configs["default"].ratios.bands if "default" in configs else ()
    for low, high in bands:
        config = method_config("default", common)
        config.ratios.bands = tuple(band for band in bands if band != (low, high))
        configs[f"default without {100 * low:g} to {100 * high:g} %"] = config
    before = get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in configs}
    try:
        trainers = {name: Trainer(config, scene) for name, config in configs.items()}
        for trainer in trainers.values():
            trainer.load(checkpoint)
            trainer.train_step()
            trainer.train_step()
        for _ in range(repeats):
            for name, trainer in trainers.items():
                start = time.process_time()
                for _ in range(ROUND):
                    trainer.train_step()
                times[name].append((time.process_time() - start) / ROUND)
    finally:
        set_num_threads(before[0])
        torch.set_num_threads(before[1])
    ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    print(f"{scene.name}, {len(trainers['plain'].splats):,} Gaussians, 1 thread, median of "
          f"{repeats} times {ROUND} steps")
    for name, value in ms.items():
        print(f"{name:36}{value:8.1f} ms{value / ms['plain']:8.2f}")
    return {name: {"ms": value, "ratio": value / ms["plain"]} for name, value in ms.items()}
