"""Two real gloo workers against one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.scene import load_scene
from flexgs.training.trainer import Trainer


def _worker(rank: int, world: int, port: int, work, arguments) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        work(Group.current(), *arguments)
    finally:
        dist.destroy_process_group()


def spawn(world: int, work, *arguments) -> None:
    port = 20000 + os.getpid() % 20000
    mp.spawn(_worker, (world, port, work, arguments), nprocs=world, join=True)


def _train(group: Group, capture, config: Config, out) -> None:
    trainer = Trainer(config, load_scene(capture, factor=1), group)
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    if group.rank == 0:
        torch.save(dict(trainer.splats.detach().items()) | dict(trainer.transform.state_dict()), out)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_two_workers_equal_one_with_a_batch_of_two(capture, config, tmp_path, preset):
    """40 views of stage 1 (20 steps, three densifications) and 24 of stage 2."""
    config.steps, config.base.share, config.batch = 64, 40 / 64, 2
    config.base.grow_every, config.base.grow_from = 10, 0.2
    config.order, config.transform = Config.from_preset(preset).order, Config.from_preset(preset).transform
    config.ratios, config.field.resolution = Config.from_preset(preset).ratios, (8, 8, 8, 8)
    _train(Group(), capture, config, tmp_path / "one.pt")
    spawn(2, _train, capture, config, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["means"]) != len(load_scene(capture, factor=1).points.xyz)  # it did densify
    for name in one:
        assert one[name].shape == two[name].shape, name
        error = (one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)
        assert float(error) < 1e-6, name


def _collectives(group: Group) -> None:
    a, b, c = torch.full((3,), group.rank + 1.0), torch.full((2, 2), 10.0), torch.ones(2, dtype=torch.float64)
    group.sum_([a, b, c])
    assert a.tolist() == [6.0] * 3 and b.tolist() == [[30.0] * 2] * 2 and c.tolist() == [3.0, 3.0]
    assert group.gather(group.rank * 2) == [0, 2, 4]
    assert sorted(i for part in group.gather(list(group.share(8))) for i in part) == list(range(8))
    same = {"means": torch.arange(5.0), "scales": torch.ones(2)}
    group.check_equal(iter(same.items()), 7)
    same["scales"][1] += 1e-7 * (group.rank == 2)
    with pytest.raises(RuntimeError, match="step 7: the workers' replicas differ: scales"):
        group.check_equal(iter(same.items()), 7)


def test_collectives_and_the_check_of_replicas():
    spawn(3, _collectives)
