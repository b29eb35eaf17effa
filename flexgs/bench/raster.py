"""`flexgs bench raster`: how long the CPU rasterizer takes, beside the same image in plain torch.

`flexgs bench step`: what a step of stage 2 costs under each preset, in steps of plain 3DGS.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexgs.camera import Camera, check_cameras
from flexgs.errors import UserError
from flexgs.formats.arrays import load_arrays
from flexgs.splats import SH_C0, Splats

if TYPE_CHECKING:
    from flexgs.scene import Scene

FOV = 60.0  # degrees across the image
ROUND = 8  # steps after which the renders of a step repeat: fast takes two kinds in turn, and every eighth has one more


@dataclass(frozen=True)
class RasterCase:
    """One line of the table."""

    count: int
    width: int
    height: int


CASES = (RasterCase(10_000, 160, 120), RasterCase(20_000, 320, 240), RasterCase(50_000, 320, 240),
         RasterCase(50_000, 640, 480), RasterCase(200_000, 640, 480))  # fmt: skip


def random_splats(count: int, *, sh_degree: int = 3, seed: int = 0, points: np.ndarray | None = None,
                  size: float = 0.6) -> Splats:  # fmt: skip
    """Gaussians in front of a camera at the origin that looks along z, or at `points` [M, 3] (subset, or repeated).

    Standard deviations are `size` times the mean distance to the 3 nearest neighbours, log-normal per axis; opacities
    are uniform in [0.05, 0.95].
    """
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(seed)
    if points is None:
        # Clusters, ground and a far wall, half of it outside the image, as in a real capture.
        centres = rng.uniform([-6, -4, 4], [6, 2, 12], (40, 3))
        near = centres[rng.integers(40, size=count)] + 0.4 * rng.standard_normal((count, 3))
        ground = np.stack([rng.uniform(-14, 14, count), np.full(count, 2.0), rng.uniform(-2, 16, count)], 1)
        wall = np.stack([rng.uniform(-20, 20, count), rng.uniform(-12, 4, count), np.full(count, 18.0)], 1)
        xyz = np.choose(rng.choice(3, (count, 1), p=[0.5, 0.3, 0.2]), [near, ground, wall])
        xyz += 0.02 * rng.standard_normal((count, 3))
    else:
        xyz = points[rng.permutation(len(points))[np.arange(count) % len(points)]].astype(np.float64)
    spacing = cKDTree(xyz).query(xyz, 4)[0][:, 1:].mean(1).clip(1e-4)
    scales = size * spacing[:, None] * np.exp(0.4 * rng.standard_normal((count, 3)))
    opacity = rng.uniform(0.05, 0.95, count)
    arrays = {
        "means": xyz,
        "quats": rng.standard_normal((count, 4)),
        "scales": np.log(scales),
        "opacities": np.log(opacity / (1 - opacity)),
        "sh0": (rng.uniform(0, 1, (count, 3)) - 0.5) / SH_C0,
        "shN": 0.1 * rng.standard_normal((count, (sh_degree + 1) ** 2 - 1, 3)),
    }
    means, quats, scales, opacities, sh0, shN = (torch.from_numpy(a.astype(np.float32)) for a in arrays.values())
    return Splats(means, quats, scales, opacities, sh0, shN)


def front_camera(width: int, height: int) -> Camera:
    """A camera at the origin that looks along z, 60 degrees wide."""
    f = width / (2 * np.tan(np.radians(FOV / 2)))
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]], dtype=torch.float32)
    return Camera(torch.eye(4), K, width, height)


POINTS: dict[str, tuple[int, ...]] = {"means3d": (0, 3), "viewmats": (0, 4, 4), "Ks": (0, 3, 3), "width": (), "height": ()}
"""Shapes of what load_points reads; 0 is any number."""


def load_points(path: Path) -> tuple[np.ndarray, Camera]:
    """Points and the first camera of an .npz with means3d [M, 3], viewmats [C, 4, 4], Ks [C, 3, 3], width, height."""
    arrays = load_arrays(path, POINTS, "points")
    for name, shape in POINTS.items():
        found = arrays[name]
        if (found.dtype.kind not in "fiu" or found.ndim != len(shape) or not found.size or not np.isfinite(found).all()
                or any(size and size != n for size, n in zip(shape, found.shape, strict=True))):
            raise UserError(f"{path}: found {name} of {found.dtype} {found.shape}, expected finite numbers {shape}, 0 for any")
    viewmats, Ks = (torch.from_numpy(arrays[name][:1].astype(np.float32)) for name in ("viewmats", "Ks"))
    width, height = int(arrays["width"]), int(arrays["height"])
    check_cameras(viewmats, Ks, torch.tensor([[width, height]]), str(path))
    return arrays["means3d"], Camera(viewmats[0], Ks[0], width, height)


def _forward(backend: Callable, splats: Splats, camera: Camera) -> None:
    with torch.no_grad():
        backend(splats, camera)


def _both(backend: Callable, splats: Splats, camera: Camera) -> None:
    for _, t in splats.items():
        t.grad = None
    image = backend(splats, camera).image
    image.backward(torch.ones_like(image))


def _milliseconds(step: Callable, args: tuple, repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        step(*args)
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def bench_raster(cases: tuple[RasterCase, ...] = CASES, *, threads: tuple[int, ...] = (1, 2), sh_degree: int = 3,
                 repeats: int = 9, reference_up_to: int = 50_000 * 320 * 240,
                 points: Path | None = None) -> list[dict[str, float]]:  # fmt: skip
    """Time rendering, forward (f) and forward + backward (f+b), print a table, return its rows in milliseconds.

    One thread is timed by CPU time, so that a busy machine disturbs little; more threads by wall clock.

    Args:
        threads: numbers of threads; the plain torch reference (float32, per tile, autograd) has one.
        repeats: the median of so many; of the reference one, after a warm-up.
        reference_up_to: run the reference where splats * pixels does not exceed this; it takes seconds.
        points: an .npz (see load_points) in place of random points.
    """
    from flexgs.raster import render
    from flexgs.raster.cpu.pool import get_num_threads, set_num_threads
    from flexgs.raster.reference import render_reference
    from flexgs.training.warmup import warmup

    warmup()
    cloud, given = load_points(points) if points else (None, None)
    heads = [f"{kind}, {n} thr" for n in threads for kind in ("f", "f+b")] + ["torch f", "torch f+b", "ratio"]
    print(f"ms per image, spherical harmonics of degree {sh_degree}, median of {repeats}")
    print(f"{'splats':>9}{'image':>11}" + "".join(f"{h:>12}" for h in heads))
    before, torch_before = get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for case in cases:
            spread = 1.0 if points else 0.6
            splats = random_splats(case.count, sh_degree=sh_degree, points=cloud, size=spread).requires_grad_()
            camera = given.scaled(case.width, case.height) if given else front_camera(case.width, case.height)
            row: dict[str, float] = {"count": case.count, "width": case.width, "height": case.height}
            args: tuple = (render, splats, camera)
            for n in threads:
                set_num_threads(n)
                clock = time.process_time if n == 1 else time.perf_counter
                _both(*args)
                row[f"f_{n}"] = _milliseconds(_forward, args, repeats, clock)
                row[f"fb_{n}"] = _milliseconds(_both, args, repeats, clock)
            if case.count * case.width * case.height <= reference_up_to:
                args = render_reference, splats, camera
                _forward(*args)
                row["torch_f"] = _milliseconds(_forward, args, 1, time.process_time)
                row["torch_fb"] = _milliseconds(_both, args, 1, time.process_time)
                row["ratio"] = row["torch_fb"] / row[f"fb_{threads[0]}"]
            rows.append(row)
            print(f"{case.count:>9,}{f'{case.width}x{case.height}':>11}"
                  + "".join(f"{value:>12.1f}" for value in list(row.values())[3:]))  # fmt: skip
    finally:
        set_num_threads(before)
        torch.set_num_threads(torch_before)
    return rows


def bench_step(scene: "Scene", checkpoint: Path, methods: Sequence[str], *, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time steps of stage 2 from a checkpoint of stage 1 (`flexgs compare` leaves one), all methods in turn on the same views.

    Prints a table and returns it: {method: {"ms": median CPU time of a step with 1 thread, "ratio": over that of plain 3DGS}}.
    More rows leave one of default's cuts out each, which shows what it costs. Importance, computed when stage 2 begins and
    by GsNet now and then, is not part of a step.
    """
    from flexgs.compare import method_config
    from flexgs.raster.cpu.pool import get_num_threads, set_num_threads
    from flexgs.training.checkpoint import Checkpoint
    from flexgs.training.trainer import Trainer

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
    print(f"{scene.name}, {len(trainers['plain'].splats):,} Gaussians, 1 thread, median of {repeats} times {ROUND} steps")
    for name, value in ms.items():
        print(f"{name:36}{value:8.1f} ms{value / ms['plain']:8.2f}")
    return {name: {"ms": value, "ratio": value / ms["plain"]} for name, value in ms.items()}
