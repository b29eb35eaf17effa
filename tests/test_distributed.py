"""Two real gloo workers against one."""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flexgs.bench.ddp import MODES, bench_ddp
from flexgs.bench.predict import Measured, Target, Traffic, print_prediction
from flexgs.config import Config, DistributedConfig
from flexgs.distributed import Group, shared_memory
from flexgs.distributed.gradients import summed_gradients
from flexgs.errors import UserError
from flexgs.run import LocalSession, resume
from flexgs.scene import load_scene
from flexgs.seeds import generator
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import NonFiniteLossError, Trainer
from tests.conftest import random_splats

# Workers are forked from a server that has imported what takes them seconds each; the last is what
# torch.testing imports.
multiprocessing.set_forkserver_preload([__name__, "flexgs.training.warmup", "flexgs.image.ssim",
                                        "torch.distributed.tensor"])


def _worker(rank: int, world: int, folder: str, work, arguments) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # through a file: a port that is free now may be taken a moment later
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        work(Group.current(), *arguments)
    finally:
        dist.destroy_process_group()
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    # they abort the process if it ends before them
    assert not [name for name in threads if "gloo" in name], threads


def spawn(world: int, work, *arguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world, folder, work, arguments), nprocs=world,
                           start_method="forkserver")


def _train(group: Group, capture, config: Config, out) -> None:
    trainer = Trainer(config, load_scene(capture, factor=1), group)
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    if group.rank == 0:
        torch.save(dict(trainer.splats.detach().items()) | dict(trainer.transform.state_dict()), out)


@pytest.mark.parametrize(("preset", "rows"), [("default", "all"), ("default", "seen"), ("paper", "all")])
def test_two_workers_equal_one_with_a_batch_of_two(capture, config, tmp_path, preset, rows):
    """40 views of stage 1 (20 steps, three densifications) and 24 of stage 2."""
    config.steps, config.base.stage1_fraction, config.batch, config.distributed.rows = 64, 40 / 64, 2, rows
    config.base.refine_every, config.base.refine_start = 10, 0.2
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
    assert sorted(i for part in group.gather(list(group.my_indices(8))) for i in part) == list(range(8))
    same = {"means": torch.arange(5.0), "scales": torch.ones(2)}
    group.check_equal(iter(same.items()), 7)
    same["scales"][1] += 1e-7 * (group.rank == 2)
    with pytest.raises(RuntimeError, match="step 7: the workers' replicas differ: scales"):
        group.check_equal(iter(same.items()), 7)


def test_collectives_and_the_check_of_replicas():
    spawn(3, _collectives)


def _sums(group: Group, room: Path) -> None:
    """Large tensors, of two dtypes and not all contiguous, then larger ones: the same sum on all workers."""
    shared_memory.ROOM = room
    for n in (40_000, 90_000):
        of = [[torch.randn(n, generator=generator(r, "a")), torch.randn(3, n, generator=generator(r, "b")).T,
               torch.randn(n, generator=generator(r, "c"), dtype=torch.float64)] for r in range(group.world)]
        for got, expected in zip(group.summed(of[group.rank]), map(sum, zip(*of, strict=True)), strict=True):
            if room.is_dir():  # in the order of ranks
                assert torch.equal(got, expected)
            torch.testing.assert_close(got, expected)
            group.check_equal(iter({"sum": got.float()}.items()), 0)
    assert bool(group._memory) == room.is_dir() and not list(room.glob("*"))


@pytest.mark.parametrize("room", ["", "missing"])
def test_sums_go_through_shared_memory_or_else_through_gloo(room, tmp_path):
    spawn(3, _sums, tmp_path / room)


def _fewer_bytes(group: Group) -> None:
    draw, n = generator(group.rank, "gradients"), 4000
    seen = torch.rand(n, generator=draw) < 0.3
    named = {f"splats.{name}": t * seen.view(-1, *[1] * (t.dim() - 1)) for name,
             t in random_splats(n, 3, group.rank).items()}
    named |= {"loss": torch.tensor(1.0), "transform.means": torch.randn(700, 3, generator=draw)}

    def summed(**options):
        return summed_gradients({name: t.clone() for name, t in named.items()}, group,
                                DistributedConfig(**options))

    whole, rows, rounded = summed(), summed(rows="seen"), summed(rows="seen", sh_rest="bfloat16")
    for name, t in whole.items():
        assert torch.equal(t, rows[name]), name
        assert (rounded[name].dtype == t.dtype
                and torch.equal(t, rounded[name]) == (name != "splats.shN")), name
    # each of two terms and their sum is rounded to 8 bits
    size = group.summed([named["splats.shN"].abs()])[0]
    assert bool(((whole["splats.shN"] - rounded["splats.shN"]).abs() <= 2 * 2**-8 * size + 1e-12).all())
    group.check_equal(iter(rounded.items()), 0)


def test_rows_that_were_seen_give_the_same_sums_and_bfloat16_rounds():
    spawn(2, _fewer_bytes)


def _poisoned(group: Group, capture, config: Config, folder) -> None:
    trainer = Trainer(config, load_scene(capture, factor=1), group)
    session = LocalSession(folder, group, lambda step, metrics: None)
    take = trainer.optimizer.take_gradients

    def poisoned() -> list:
        gradients = take()
        if group.rank == 1 and trainer.step == 30:
            gradients[1][5, 2] = float("nan")
        return gradients

    trainer.optimizer.take_gradients = poisoned
    with pytest.raises(NonFiniteLossError,
                       match=r"step 30: the gradient of splats\.quats is not finite") as raised:
        trainer.fit(lambda step, metrics: None, session.checkpoint)
    assert len(set(group.gather(str(raised.value)))) == 1
    assert all(bool(t.isfinite().all()) for _, t in trainer.splats.items())
    again = Trainer(config, trainer.scene, group)
    again.load(next(session.checkpoints()))
    assert again.step == 20 and all(bool(t.isfinite().all()) for _, t in again.splats.items())


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_a_nan_in_one_workers_gradient_ends_all_before_it_is_learned(capture, config, tmp_path, mode):
    config.distributed.mode = mode
    config.batch, config.checkpoint_every, config.base.refine_start = 2, 20, 0.9
    spawn(2, _poisoned, capture, config, tmp_path)


def _resume_copies(group: Group, capture, config: Config, folder: Path) -> None:
    trainer = Trainer(config, load_scene(capture, factor=1), group)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        resume(trainer, LocalSession(folder / str(group.rank), group))
    assert trainer.step == 2
    damaged = f"{folder}/1/checkpoints/step_00000004"
    assert group.rank or (damaged in said.getvalue() and "going on from the views 2" in said.getvalue())


def test_workers_resume_from_a_checkpoint_that_is_whole_for_all(capture, config, tmp_path):
    """Each has a copy, as on machines of their own; the newest of the second one's is damaged."""
    config.batch = 2
    trainer, session = Trainer(config, load_scene(capture, factor=1)), LocalSession(tmp_path / "0", Group())
    for _ in range(2):
        trainer.train_step()
        session.checkpoint(trainer.step, trainer.save)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    os.truncate(tmp_path / "1" / "checkpoints" / "step_00000004" / "state.safetensors", 1000)
    spawn(2, _resume_copies, capture, config, tmp_path)


def _begin(group: Group, capture, config: Config, folder) -> None:
    trainer = Trainer(config, load_scene(capture, factor=1), group)
    trainer.fit(lambda step, metrics: None,
                LocalSession(folder, group, lambda step, metrics: None).checkpoint, until=40)


def test_a_run_of_two_workers_goes_on_with_one(capture, config, tmp_path):
    config.steps, config.base.stage1_fraction, config.batch, config.checkpoint_every = 64, 0.5, 2, 40
    config.base.refine_every, config.base.refine_start = 10, 0.2
    spawn(2, _begin, capture, config, tmp_path)
    scene = load_scene(capture, factor=1)
    resumed, alone = Trainer(config, scene), Trainer(config, scene)
    resumed.load(latest_checkpoint(tmp_path / "checkpoints"))
    assert resumed.step == 40
    for trainer in (resumed, alone):
        trainer.fit(lambda step, metrics: None, lambda step, write: None)
    for (name, ours), (_, theirs) in zip(resumed.splats.items(), alone.splats.items(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_bench_ddp_measures_both_stages_and_modes_and_predicts(capsys):
    rows = bench_ddp((2,), count=300, width=33, height=25, rounds=1, steps=1, target=Target(600, 1.0, 50.0))
    out = capsys.readouterr().out
    bound = re.search(r"unequal cost leave: (\d\.\d\d) with 2 workers", out)
    assert bound and 1 <= float(bound[1]) <= 2
    assert [(row["stage"], row["workers"], row["mode"]) for row in rows] == [
        (stage, *crew) for stage in (1, 2)
        for crew in ((1, "apart"), (2, "apart"), (2, "replicated"), (2, "sharded"))]
    one, apart, two, shards, _, _, cuts, cut_shards = rows
    assert apart["mb_sent"] == apart["comm_ms"] == 0 and apart["mb_held"] == one["mb_held"]
    bytes_of_stage_1 = 4 * (300 * 59 + 1)  # the gradient and the loss; two workers send each byte once
    assert two["mb_sent"] * 1e6 == pytest.approx(bytes_of_stage_1) and one["mb_sent"] == 0
    assert cuts["mb_sent"] > two["mb_sent"]  # stage 2 has deltas
    assert shards["mb_held"] == pytest.approx(one["mb_held"] / 2, rel=1e-3)
    assert cut_shards["mb_held"] > shards["mb_held"] and two["mb_held"] == one["mb_held"]
    assert 0 < shards["mb_sent"] * 1e6 < 150 * 88 + 200  # of half of them, 13 floats and the gradients of 9
    predicted = [line.split() for line in out.partition("speed-up predicted for 600 ")[2].splitlines()[3:]]
    assert [line[:2] for line in predicted] == [[stage, mode] for stage in "12" for mode in MODES]
    for line in predicted:  # a slower link, or more GPUs with the same traffic, gain less
        step, *speed_ups = float(line[2]), *map(float, line[5:])
        assert (step == 50) == (line[0] == "1") and len(speed_ups) == 6
        assert 8 >= speed_ups[0] >= speed_ups[2] >= speed_ups[4] and speed_ups[1] >= speed_ups[0]
    for option, bad in {"workers": {"workers": (0,)}, "rounds": {"rounds": 0}}.items():
        with pytest.raises(UserError, match=f"--{option}: found 0"):
            bench_ddp(**bad)
    with pytest.raises(UserError, match=r"--distributed\.mode: found sharded, .* both modes are timed"):
        bench_ddp(options=DistributedConfig("sharded"))


def test_predicted_speed_ups_are_those_of_the_formula(capsys):
    """For 8 GPUs on Ethernet: 708 MB of gradients are summed, or 88 bytes of 750,000 Gaussians go round."""
    sums, swaps = Traffic(2 * 4.72e6, 1, 0), Traffic(88 * 10_000, 0, 4)
    measured = [Measured(1, "replicated", sums, 1.0), Measured(1, "sharded", swaps, 1.0)]
    print_prediction(Target(), measured, 20_000, 0.5)
    replicas, shards = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (replicas[3], shards[3]) == ("1239", "58")
    wait = 7 / 8 * 2 * 708e6 / 11e9 + 2 * 7 * 30e-6
    assert replicas[9] == f"{8 * 0.03 / (0.03 + wait):.1f}" == "1.7"
    wait = 7 / 8 * 88 * 750_000 / 11e9 + 4 * 7 * 30e-6
    assert shards[9] == f"{8 * 0.03 / (0.03 + wait):.1f}" == "6.7"
