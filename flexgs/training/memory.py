"""What a training run will need in memory and on the disk, before it begins."""

from flexgs.config import Config
from flexgs.scene import Scene

COPIES = 4  # of every float of a Gaussian: itself, its gradient and Adam's two moments


def expected_memory(scene: Scene, config: Config) -> str:
    """One line: the most that images, and Gaussians with their gradient and optimizer, will take, and what to
    turn.

    What a render needs besides depends on the view, and the libraries take some 0.5 GB.
    """
    pixels = sum(3 * view.camera.width * view.camera.height for view in (*scene.train, *scene.test))
    images = min(pixels, scene.train[0].cache.limit)
    splats = COPIES * _bytes(config)
    return (f"at most {images / 1e9:.1f} GB for images ({pixels / 1e9:.1f} GB decoded; --data.cache-gb) and "
            f"{splats / 1e9:.1f} GB for Gaussians and optimizer (--base.max-splats)")


def expected_disk(config: Config) -> int:
    """The most bytes that a run folder takes: three checkpoints, of which one is being written, the model and
    its cuts."""
    checkpoint, model = (COPIES - 1) * _bytes(config), _bytes(config)  # gradients are not kept
    return round(3 * checkpoint + (2 + sum(config.evaluation.ratios)) * model)


def _bytes(config: Config) -> int:
    """Of the most Gaussians: position, rotation, scale, opacity; harmonics."""
    return 4 * (11 + 3 * (config.base.sh_degree + 1) ** 2) * config.base.max_splats
