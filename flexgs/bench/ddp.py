"""`flexgs bench ddp`: the speed-up of training steps with more workers on this machine, and on many GPUs.

Workers that hold replicas and workers that hold shards (--distributed.mode) are measured side by side.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flexgs import pool
from flexgs.bench.predict import Measured, Target, Traffic, print_prediction
from flexgs.bench.scenes import front_camera, random_splats
from flexgs.camera import Camera
from flexgs.config import Config, DistributedConfig
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.raster import project, render
from flexgs.scene import Points, Scene
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.views import ImageCache, View
from flexgs.splats import Splats
from flexgs.training.trainer import Trainer
from flexgs.training.warmup import warmup

VIEWS = 16
APART, MODES = "apart", ("replicated", "sharded")
"""Workers that each train a model of their own, one view a step, and those that train one together. What
workers apart are short of their number is the machine's doing: they share its memory and its clock."""


def modes(world: int) -> tuple[str, ...]:
    """Return the modes that so many workers are timed in."""
    return (APART, *MODES) if world > 1 else (APART,)


def ring_bytes(size: float, world: int) -> float:
    """Return the bytes that each worker sends in a ring all-reduce of `size` (Patarasuk and Yuan 2009)."""
    return 2 * (world - 1) / world * size


def bench_scene(count: int, width: int, height: int) -> Scene:
    """Return a scene of VIEWS cameras near the origin, looking along z at `count` random Gaussians."""
    truth, cache, views = random_splats(count, seed=1), ImageCache(1 << 30), []
    lens = CameraModel("PINHOLE", width, height, (1.0, 1.0, width / 2, height / 2))
    draw = np.random.default_rng(0)
    for i in range(VIEWS):
        viewmat = torch.eye(4)
        viewmat[:3, 3] = torch.from_numpy(draw.uniform(-0.3, 0.3, 3)).float()
        camera = Camera(viewmat, front_camera(width, height).K, width, height)
        pixels = (255 * render(truth, camera).image.clamp(0, 1)).byte().numpy()
        view = View(str(i), camera, Path(str(i)), None, lens, cache)
        cache.get((view.path, "image"), pixels.copy)
        views.append(view)
    points = Points(truth.means, torch.zeros(count, 3, dtype=torch.uint8))
    return Scene("bench", Path(), views, views[:1], points, 5.0)


class _Trainer(Trainer):
    """A trainer that starts from random Gaussians of all shapes and opacities, not from round ones."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.costs: list[float] = []
        """CPU seconds of each view."""

    def _initial_splats(self) -> Splats:
        return random_splats(len(self.scene.points))

    def _view_loss(self, position: int) -> Tensor:
        start = time.process_time()
        loss = super()._view_loss(position)
        self.costs.append(time.process_time() - start)
        return loss


def imbalance(world: int, *, count: int = 20_000, width: int = 320, height: int = 240, views: int = 96,
              preset: str = "default") -> float:
    """Return the speed-up that unequal views alone would leave to so many workers in stage 2.

    Measured in this process, a view after another: every worker of a step waits for the slowest, so that the
    bound is the sum of all costs over the sum of the largest cost of each step.
    """
    config = Config.from_preset(preset)
    config.base.max_splats, config.batch = count, world
    trainer = _Trainer(config, bench_scene(count, width, height))
    trainer.step = trainer.base_steps
    trainer.train_step()  # begins stage 2
    trainer.costs = []
    for _ in range(views // world):
        trainer.train_step()
    steps = [trainer.costs[i:i + world] for i in range(0, len(trainer.costs), world)]
    return sum(trainer.costs) / sum(map(max, steps))


@torch.no_grad()
def in_sight(scene: Scene) -> float:
    """Return the fraction of the scene's Gaussians that a view sees, on average."""
    splats = random_splats(len(scene.points))
    return statistics.fmean(float((project(splats, view.camera).radii > 0).all(1).float().mean())
                            for view in scene.train)


class _Timed(Group):
    """A group that counts messages and bytes, and the seconds they take with the wait for slower workers."""

    def __init__(self, rank: int, world: int):
        super().__init__(rank, world)
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.seconds, self.bytes, self.sums, self.exchanges = 0.0, 0.0, 0, 0

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        start = time.perf_counter()
        totals = super().summed(tensors)
        self.seconds += time.perf_counter() - start
        self.bytes += ring_bytes(sum(t.nbytes for t in tensors), self.world)
        self.sums += len({t.dtype for t in tensors})
        return totals

    def swapped(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        start = time.perf_counter()
        received = super().swapped(rows, send, receive)
        self.seconds += time.perf_counter() - start
        self.bytes += rows.nbytes - rows.split(send)[self.rank].nbytes
        self.exchanges += 1
        return received


def _worker(rank: int, world: int, store: str, count: int, width: int, height: int,
            options: DistributedConfig, line: Connection) -> None:
    """Answer each (stage, mode, steps) that comes over `line` with a Round, until None comes.

    options: how replicas send gradients.
    """
    torch.set_num_threads(1)
    pool.set_num_threads(1)
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    together, scene, trainers = _Timed(rank, world), bench_scene(count, width, height), {}
    for stage, mode in product((1, 2), modes(world)):
        group = _Timed(0, 1) if mode == APART else together
        distributed = DistributedConfig("sharded") if mode == "sharded" else options
        config = Config(distributed=distributed, batch=group.world)
        config.base.max_splats, config.base.refine_start = count, 1.0  # the number of Gaussians stays
        trainers[stage, mode] = trainer = _Trainer(config, scene, group)
        trainer.step = trainer.base_steps // 2 if stage == 1 else trainer.base_steps
        trainer.train_step()
    line.send(None)
    while order := line.recv():
        (stage, mode, steps), times = order, []
        trainer = trainers[stage, mode]
        group = cast(_Timed, trainer.group)
        group.reset()
        cpu = time.process_time()
        for _ in range(steps):
            start = time.perf_counter()
            trainer.train_step()
            times.append(time.perf_counter() - start)
        optimizer = trainer.optimizer
        held = (2 * sum(p.nbytes for _, p in optimizer.parameters())  # and their gradients
                + sum(t.nbytes for t in optimizer.moments().values()))
        line.send(Round(times, (time.process_time() - cpu) / steps, group.seconds / steps,
                        group.bytes / steps, group.sums / steps, group.exchanges / steps, held))
    if world > 1:
        dist.destroy_process_group()


class Round(NamedTuple):
    """What a worker measured in a round of steps."""

    steps: list[float]
    """Seconds of each step."""
    cpu: float
    """CPU seconds of a step in all threads, which hardly depend on what else the machine does."""
    communication: float
    """Seconds of a step spent in messages between the workers."""
    sent: float
    """Bytes that this worker sends in a step; for sums, as many as a ring all-reduce would."""
    sums: float
    """Number of sums over the workers in a step."""
    exchanges: float
    """Number of all-to-alls in a step."""
    held: int
    """Bytes of this worker's parameters, their gradients and Adam's moments."""

    @property
    def step(self) -> float:
        """Mean seconds of a step."""
        return sum(self.steps) / len(self.steps)


class _Workers:
    """Processes, `world` in number, that train together when asked to."""

    def __init__(self, world: int, folder: Path, *args: Any):
        context, self.lines = multiprocessing.get_context("spawn"), []
        for rank in range(world):
            ours, theirs = context.Pipe()
            store = str(folder / f"store_{world}")
            context.Process(target=_worker, args=(rank, world, store, *args, theirs), daemon=True).start()
            theirs.close()  # so that recv() raises when the worker dies
            self.lines.append(ours)

    def answers(self) -> list:
        """Wait for the next message of each worker."""
        return [line.recv() for line in self.lines]

    def ask(self, order: tuple[int, str, int] | None) -> None:
        """Send (stage, mode, steps) to all workers, or None to end them."""
        for line in self.lines:
            line.send(order)


def bench_ddp(workers: Sequence[int] = (1, 2, 4), *, count: int = 20_000, width: int = 320, height: int = 240,
              rounds: int = 15, steps: int = 16, options: DistributedConfig | None = None,
              target: Target | None = None) -> list[dict[str, Any]]:
    """Time steps of both stages with several numbers of workers, print tables and return the rows measured.

    Workers are processes of one thread. The numbers of workers, and their modes, take turns in each round, so
    that a busy machine disturbs all alike. Speed-ups are within a round; all figures are medians over the
    rounds. Rows of mode "apart" are of workers that each train a model of their own: no others can be faster
    on this machine. The second table is a prediction: see flexgs.bench.predict.

    Args:
        workers: the numbers of workers; 1 is always measured.
        count: number of Gaussians.
        width: width of the images in pixels.
        height: height of the images in pixels.
        rounds: number of rounds.
        steps: number of steps in each round.
        options: how replicas send their gradients.
        target: what to predict the speed-up of; None: a Target() of the defaults.
    """
    options = options or DistributedConfig()
    if options.mode == "sharded":
        raise UserError("bench ddp --distributed.mode: found sharded, expected none, since both modes are "
                        "timed")
    smallest = {"workers": min(workers, default=0), "splats": count, "rounds": rounds, "steps": steps}
    for option, value in smallest.items():
        if value < 1:
            raise UserError(f"bench ddp --{option}: found {value}, expected at least 1")
    warmup()
    worlds = sorted({1, *workers})
    measured = _measured(worlds, rounds, steps, count, width, height, options)
    print(f"{count:,} Gaussians, {width}x{height}, {rounds} rounds of {steps} steps, {os.cpu_count()} "
          "cores, a thread each")
    heads = ("stage", "workers", "mode", "step, ms", "views/s", "speed-up", "CPU, ms", "of CPU", "comm., ms",
             "share", "MB sent", "MB held")
    rows = []
    print("".join(f"{head:>11}" for head in heads))
    for (stage, world, mode), ours in measured.items():
        pairs = list(zip(measured[stage, 1, APART], ours, strict=True))
        row = {"stage": stage, "workers": world, "mode": mode,
               "ms": 1e3 * _median(t for r in ours for t in r.steps),
               "views_per_second": _median(world / r.step for r in ours),
               "speed_up": _median(world * one.step / r.step for one, r in pairs),
               "cpu_ms": 1e3 * _median(r.cpu for r in ours),
               "cpu_speed_up": _median(world * one.cpu / r.cpu for one, r in pairs),
               "comm_ms": 1e3 * _median(r.communication for r in ours),
               "share": _median(r.communication / r.step for r in ours),
               "mb_sent": ours[0].sent / 1e6, "mb_held": ours[0].held / 1e6}
        rows.append(row)
        form = ("d", "d", "", ".1f", ".1f", ".2f", ".1f", ".2f", ".2f", ".1%", ".2f", ".1f")
        print("".join(f"{format(value, f):>11}" for value, f in zip(row.values(), form, strict=True)))
    print("speed-up: in views per second over one worker in the same round; of CPU: what it would be if "
          "no worker ever waited")
    if len(worlds) == 1:
        return rows
    bounds = {world: imbalance(world, count=count, width=width, height=height) for world in worlds[1:]}
    print("stage 2, the most that views of unequal cost leave: "
          + ", ".join(f"{bound:.2f} with {world} workers" for world, bound in bounds.items()))
    stage_1 = _median(r.cpu for r in measured[1, 1, APART])
    counted, world = [], worlds[-1]
    for stage, mode in product((1, 2), MODES):
        of = measured[stage, world, mode][0]
        counted.append(Measured(stage, mode, Traffic(of.sent * world / (world - 1), of.sums, of.exchanges),
                                _median(r.cpu for r in measured[stage, 1, APART]) / stage_1))
    print_prediction(target or Target(), counted, count, in_sight(bench_scene(count, width, height)))
    return rows


def _measured(worlds: Sequence[int], rounds: int, steps: int,
              *args: Any) -> dict[tuple[int, int, str], list[Round]]:
    """Return the rounds of the first worker, by stage, number of workers and mode; args: those of _worker."""
    measured: dict[tuple[int, int, str], list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder:
        crews = {world: _Workers(world, Path(folder), *args) for world in worlds}
        for crew in crews.values():
            crew.answers()
        for stage in (1, 2):
            for _ in range(rounds):
                for world, crew in crews.items():
                    for mode in modes(world):
                        crew.ask((stage, mode, steps))
                        measured.setdefault((stage, world, mode), []).append(crew.answers()[0])
        for crew in crews.values():
            crew.ask(None)
    return measured


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
