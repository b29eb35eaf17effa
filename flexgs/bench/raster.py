"""`flexgs bench raster`: times of the CPU rasterizer, beside those of the reference in plain torch."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgs.bench.scenes import front_camera, load_points, random_splats
from flexgs.camera import Camera
from flexgs.pool import get_num_threads, set_num_threads
from flexgs.raster import render
from flexgs.raster.reference import render_reference
from flexgs.splats import Splats
from flexgs.training.warmup import warmup


@dataclass(frozen=True)
class RasterCase:
    """Number of Gaussians and size of the image in pixels for one line of the table."""

    count: int
    width: int
    height: int


CASES = (RasterCase(10_000, 160, 120), RasterCase(20_000, 320, 240), RasterCase(50_000, 320, 240),
         RasterCase(50_000, 640, 480), RasterCase(200_000, 640, 480))  # fmt: skip


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


def bench_raster(cases: tuple[RasterCase, ...] = CASES, *, threads: tuple[int, ...] = (1, 2),
                 sh_degree: int = 3, repeats: int = 9, reference_up_to: int = 50_000 * 320 * 240,
                 points: Path | None = None) -> list[dict[str, float]]:
    """Time rendering, forward (f) and forward + backward (f+b), print a table, return its rows in ms.

    One thread is timed by CPU time, which a busy machine disturbs little; more threads by wall clock.

    Args:
        cases: numbers of Gaussians and image sizes.
        threads: numbers of threads; the plain torch reference (float32, per tile, autograd) has one.
        sh_degree: degree of the spherical harmonics.
        repeats: number of renders whose median is taken; the reference has one, after a warm-up.
        reference_up_to: largest splats * pixels at which the reference, which takes seconds, is run.
        points: an .npz file (see load_points) in place of random points.
    """
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
            splats = random_splats(case.count, sh_degree=sh_degree, points=cloud,
                                   size=spread).requires_grad_()
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
