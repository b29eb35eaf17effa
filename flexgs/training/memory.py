"""Estimates of the memory and the disk space that a training run will need."""

from flexgs.config import Config
from flexgs.scene import Scene

COPIES = 4
"""Copies of every parameter of a Gaussian: itself, its gradient and Adam's two moments."""


def expected_memory(scene: Scene, config: Config) -> str:
    """Say in one line how much memory images and Gaussians take at most, and which settings change that.

    Renders need more, depending on the view, and libraries some 0.5 GB.
    """
    pixels = sum(3 * view.camera.width * view.camera.height for view in (*scene.train, *scene.test))
    images = min(pixels, scene.train[0].cache.limit)
    splats = COPIES * _bytes(config)
    return (f"at most {images / 1e9:.2f} GB for images ({pixels / 1e9:.2f} GB decoded; --data.cache-gb) and "
            f"{splats / 1e9:.2f} GB for Gaussians and optimizer (--base.max-splats)")


def expected_disk(config: Config) -> int:
    """Return the most bytes of a run folder: three checkpoints (one being written), the model, its cuts."""
    checkpoint, model = (COPIES - 1) * _bytes(config), _bytes(config)  # gradients are not kept
    return round(3 * checkpoint + (2 + sum(config.evaluation.ratios)) * model)


def _bytes(config: Config) -> int:
    """Return the bytes of max_splats Gaussians: 11 floats of shape and opacity, and the harmonics."""
    return 4 * (11 + 3 * (config.base.sh_degree + 1) ** 2) * config.base.max_splats
