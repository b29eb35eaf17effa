"""Peak memory and step time of a capture larger than its cache; by hand: python tests/large_capture.py VIEWS STEPS."""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from flexgs.config import Config
from flexgs.scene import load_scene, write_synthetic
from flexgs.scene.views import View
from flexgs.training.trainer import Trainer


def main(views: int, steps: int, cache_mb: int = 256, width: int = 1600, height: int = 1200) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_synthetic("studio", Path(folder) / "large", views=views, width=8, height=6)
        noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        one = root / "one.jpg"
        Image.fromarray(noise).resize((width, height)).save(one, quality=92)
        for file in (root / "images").iterdir():
            os.link(one, file.with_suffix(".jpg"))
            file.unlink()
        scene = load_scene(root, cache_bytes=cache_mb << 20)
        config = Config(steps=10_000)
        trainer = Trainer(config, scene)
        step, taken, none = View.prefetch, {True: [], False: []}, lambda view: None
        process, peak, start = psutil.Process(), 0, psutil.Process().memory_info().rss
        for i in range(steps):
            View.prefetch = step if (i // 2) % 2 else none  # the second step of a pair finds its view as the first asked for it
            before = time.perf_counter()
            trainer.train_step()
            if i % 2:
                taken[bool((i // 2) % 2)].append(time.perf_counter() - before)
            peak = max(peak, process.memory_info().rss)
        print(f"{len(scene.train)} views, cache {cache_mb} MB: {start / 1e6:.0f} MB before the first step, "
              f"at most {peak / 1e6:.0f} MB; step {1e3 * statistics.median(taken[True]):.0f} ms with prefetch, "
              f"{1e3 * statistics.median(taken[False]):.0f} ms without")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
