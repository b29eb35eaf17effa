"""Writing that ends at any one of its operations on files: what is there afterwards is whole, the old or the
new."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
from tiny import begun, tiny_config, tiny_scene, tiny_splats

from flexgs import store as store_module
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.files import atomic_folder, write_json
from flexgs.model.elastic import ElasticModel
from flexgs.run import LocalSession
from flexgs.store import Store
from flexgs.training.trainer import Trainer
from tuning.space import Own, space
from tuning.trial import Search, run_trial
from tuning.trial import begun as begin

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_watch: dict = {"folder": None}


def _hook(event: str, args: tuple) -> None:
    """Of Python's own auditing: it sees every operation on files, however the code calls it."""
    folder = _watch["folder"]
    if folder is None or event not in EVENTS or not str(args[0]).startswith(folder):
        return
    _watch["left"] -= 1
    if _watch["left"] < 0:
        then, _watch["folder"] = _watch["then"], None
        then()


sys.addaudithook(_hook)  # it cannot be removed, so it is quiet unless a folder is watched


def stop_at(k: int, folder: Path, then: Callable[[], None], work: Callable[[], None]) -> bool:
    """Do the work, and `then` before its k-th operation on files below folder; whether it came to its end
    before that."""
    _watch.update(folder=str(folder), left=k, then=then)
    try:
        work()
        return _watch["folder"] is not None
    finally:
        _watch["folder"] = None


def killed_at(k: int, folder: Path, work: Callable[[], None]) -> bool:
    """The same in a process of its own that ends as if by SIGKILL: nothing is tidied up."""
    child = os.fork()
    if child == 0:
        stop_at(k, folder, lambda: os._exit(9), work)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def every(work_at: Callable[[int], bool]) -> int:
    """Call with 0, 1, ... until the work comes to its end; how often."""
    k = 0
    while not work_at(k):
        k += 1
        assert k < 500
    return k


def test_a_killed_checkpoint_leaves_a_whole_one(tmp_path):
    config, scene = tiny_config("plain", steps=40), tiny_scene()
    trainer = begun(Trainer(config, scene), tiny_splats())
    session = LocalSession(tmp_path / "run", Group(), lambda step, metrics: None)
    for trainer.step in (2, 4):
        session.checkpoint(trainer.step, trainer.save)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    trainer.step, steps = 6, []

    def attempt(k: int) -> bool:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "before", tmp_path / "run")
        ended = killed_at(k, tmp_path / "run", lambda: session.checkpoint(6, trainer.save))
        again = Trainer(config, scene)
        again.load(next(session.checkpoints()))
        steps.append(again.step)
        session.checkpoint(6, trainer.save)  # the next run is not in the way of what was left
        assert next(session.checkpoints()).name == "step_00000006"
        return ended

    assert every(attempt) > 3 and set(steps) == {4, 6} and steps == sorted(steps)


def test_a_killed_write_leaves_the_old_or_the_new(tmp_path):
    """Of a JSON file, and of a folder that replaces another."""
    model = ElasticModel(tiny_splats(8), Trainer(tiny_config("plain"), tiny_scene()).transform,
                         tiny_config("plain"))
    target, seen = tmp_path / "x" / "state.json", set()

    def attempt(k: int) -> bool:
        write_json(target, {"a": "old"})
        ended = killed_at(k, tmp_path / "x", lambda: write_json(target, {"a": "new" * 50}))
        seen.add(json.loads(target.read_text())["a"][:3])
        return ended

    assert every(attempt) >= 2 and seen == {"old", "new"}
    folder = tmp_path / "y" / "model"

    def replaced() -> None:
        with atomic_folder(folder) as out:
            model.save(out)

    def attempt_folder(k: int) -> bool:
        shutil.rmtree(tmp_path / "y", ignore_errors=True)
        replaced()
        ended = killed_at(k, tmp_path / "y", replaced)
        if folder.exists():  # between two renames there is neither; a run writes it again
            assert len(ElasticModel.load(folder)) == 8
        replaced()
        return ended

    assert every(attempt_folder) > 3


# ---------------------------------------------------------------------- an object store


def kept_store(tmp_path: Path) -> Store:
    """A store as of a bucket, in a folder: the same calls of pyarrow."""
    (tmp_path / "bucket" / "run").mkdir(parents=True, exist_ok=True)
    return Store(tmp_path / "mine", pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()),
                 "bucket/run")


def checkpoint(store: Store, step: int) -> None:
    folder = store.folder / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    store.files.create_dir(f"{store.root}/checkpoints/step_{step:08d}")  # which buckets need not have
    (folder / "state.safetensors").write_text(f"tensors of {step}")
    (folder / "state.json").write_text(json.dumps({"step": step}))


def test_a_checkpoint_whose_push_breaks_does_not_count(tmp_path, monkeypatch):
    """The description goes last: wherever it is, the tensors are."""
    copy, order = pafs.copy_files, []

    def attempt(k: int) -> bool:
        root = tmp_path / str(k)
        store = kept_store(root)
        checkpoint(store, 40)
        store.push_checkpoint("step_00000040")
        checkpoint(store, 80)
        left = [k]

        def failing(source, *rest, **options):
            if not left[0]:
                raise OSError("the network has gone")
            left[0] -= 1
            order.append(Path(source).name)
            copy(source, *rest, **options)

        ended = True
        monkeypatch.setattr(store_module.pafs, "copy_files", failing)
        try:
            store.push_checkpoint("step_00000080")
        except OSError:
            ended = False
        monkeypatch.setattr(store_module.pafs, "copy_files", copy)
        step, other = store.latest_step(), store.copied_to(root / "other")
        other.pull(f"checkpoints/step_{step:08d}")
        folder = other.folder / "checkpoints" / f"step_{step:08d}"
        assert json.loads((folder / "state.json").read_text()) == {"step": step}
        assert (folder / "state.safetensors").read_text() == f"tensors of {step}"
        assert step == (80 if ended else 40)
        return ended

    assert every(attempt) == 2 and order[-2:] == ["state.safetensors", "state.json"]


def test_a_file_of_equal_size_may_be_another(tmp_path):
    store = kept_store(tmp_path)
    other = store.copied_to(tmp_path / "other")
    store.folder.mkdir()
    for text in ("aaaa", "bbbb"):
        (store.folder / "metrics.jsonl").write_text(text)
        store.push("metrics.jsonl")
        other.pull("metrics.jsonl")
        assert (other.folder / "metrics.jsonl").read_text() == text
        time.sleep(0.02)  # the clock of files is not finer everywhere
    assert not (other.folder / "nothing").exists()


def test_of_older_checkpoints_the_description_goes_first(tmp_path):
    store = kept_store(tmp_path)
    for step in (40, 80):
        checkpoint(store, step)
        store.push_checkpoint(f"step_{step:08d}")
    shutil.rmtree(store.folder / "checkpoints" / "step_00000040")
    store.push_checkpoint("step_00000080")
    assert store.latest_step() == 80 and {Path(name).parent.name
                                          for name in store._kept("checkpoints")} == {"step_00000080"}


# ---------------------------------------------------------------------- a trial


def test_a_trial_that_the_disk_fails_at_any_moment_goes_on_to_the_same_figures(tmp_path):
    config, scene = tiny_config(steps=16), tiny_scene()
    config.evaluation = replace(config.evaluation, ratios=(0.1, 1.0))
    own = Own(config)
    space(own, config)

    def trial(folder: Path) -> Search:
        search = Search(tmp_path / "capture", Store(folder), config)
        begin(search, own.params, 0)
        return search

    def work(search: Search) -> None:
        run_trial(search, own.params, scene, "cpu", Group(), lambda figures: None)

    def fail() -> None:
        raise OSError("no space left")

    def measured(search: Search) -> dict:
        (found,) = search.records()
        assert found.status == "finished"
        return {rung: at["psnr_auc"] for rung, at in found.rungs.items()}

    whole = trial(tmp_path / "whole")
    work(whole)
    expected = measured(whole)
    assert set(expected) == {"1", "2", "4"}
    k, ended = 0, False
    while not ended:
        search = trial(tmp_path / f"at{k}")
        try:
            ended = stop_at(k, search.trial(own.params).folder, fail, lambda search=search: work(search))
        except (OSError, UserError):  # the latter where it was read
            (found,) = search.records()
            # the latter where only its checkpoints were left to remove
            assert found.status in ("interrupted", "finished")
        if not ended:
            work(search)
            assert measured(search) == expected
        folder = search.trial(own.params).folder
        assert ({"trial.json", "model"} <= {p.name for p in folder.iterdir()}
                and not (folder / "checkpoints").exists())
        assert len(ElasticModel.load(folder / "model")) == 40
        shutil.rmtree(search.folder)
        k += 5
    assert k > 20
