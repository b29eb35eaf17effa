"""Peak memory of training on a capture that is larger than its cache; by hand: python -m tests.large_capture
--views 3000."""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro
from PIL import Image

from flexgs.config import Config
from flexgs.demo.synthetic import write_synthetic
from flexgs.scene import load_scene
from flexgs.training.trainer import Trainer


@dataclass
class LargeCapture:
    """Train on views of one photograph under many names."""

    views: int = 3000
    steps: int = 160
    cache_mb: int = 256
    size: tuple[int, int] = (1600, 1200)

    def run(self) -> tuple[int, int]:
        """(bytes of memory before the first step, the most after any)."""
        with tempfile.TemporaryDirectory() as folder:
            root = write_synthetic("studio", Path(folder) / "large", views=self.views, width=8, height=6)
            noise = np.random.default_rng(0).integers(0, 255, (self.size[1] // 8, self.size[0] // 8, 3),
                                                      np.uint8)
            one = root / "one.jpg"
            Image.fromarray(noise).resize(self.size).save(one, quality=92)
            for file in (root / "images").iterdir():
                os.link(one, file.with_suffix(".jpg"))
                file.unlink()
            scene = load_scene(root, cache_bytes=self.cache_mb << 20)
            trainer, process, seconds = Trainer(Config(steps=10_000), scene), psutil.Process(), []
            before = peak = process.memory_info().rss
            for _ in range(self.steps):
                start = time.perf_counter()
                trainer.train_step()
                seconds.append(time.perf_counter() - start)
                peak = max(peak, process.memory_info().rss)
        decoded = 3 * self.size[0] * self.size[1] * self.views
        print(f"{self.views} images of {self.size[0]}x{self.size[1]}, {decoded / 1e9:.1f} GB decoded, "
              f"cache {self.cache_mb} MB: {before / 1e6:.0f} MB before the first step, at most "
              f"{peak / 1e6:.0f} MB; a step {1e3 * statistics.median(seconds):.0f} ms")
        return before, peak


if __name__ == "__main__":
    tyro.cli(LargeCapture).run()
