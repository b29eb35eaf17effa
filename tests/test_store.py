"""Stores: a shared folder, and an object store, which is a real S3 server on loopback."""

from pathlib import Path
from threading import Event

import pytest

from flexgs import dataset_options, store_session
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.store import Store
from flexgs.store_session import StoreSession
from flexgs.training.checkpoint import checkpoints
from tests.test_distributed import spawn


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_one_process_pushes_another_pulls(s3, tmp_path):
    mine = Store.open(s3.format("a/b"), tmp_path / "mine") / "scene"
    theirs = mine.copied_to(tmp_path / "theirs")
    write(mine.folder, metrics_jsonl="1\n", model__a="aa", model__deep__b="b")
    mine.push("metrics.jsonl", "model", "missing")
    theirs.pull("metrics.jsonl", "model", "missing")
    assert tree(theirs.folder) == tree(mine.folder)
    assert mine.exists("metrics.jsonl") and not mine.exists("missing")
    before = (theirs.folder / "model" / "a").stat().st_ino
    theirs.pull("metrics.jsonl", "model")
    assert (theirs.folder / "model" / "a").stat().st_ino == before  # not transferred again

    for store in (mine, Store(mine.folder)):
        assert store.find("*/a") == ["model/a"] and store.find("*/b") == [] == store.find("none/*/b")

    (mine.folder / "model" / "deep" / "b").unlink()
    write(mine.folder, metrics_jsonl="1\n2\n", model__c="c")
    mine.push("metrics.jsonl", "model")
    theirs.pull("metrics.jsonl", "model")
    assert (tree(theirs.folder) == tree(mine.folder)
            and set(tree(theirs.folder)) == {"metrics.jsonl", "model/a", "model/c"})


def test_a_checkpoint_counts_when_all_of_it_is_there(s3, tmp_path):
    store = Store.open(s3.format("c"), tmp_path / "mine") / "scene"
    assert store.latest_step() == 0
    for step in (40, 80, 120):
        write(store.folder / "checkpoints" / f"step_{step:08d}", state_json="{}", state_safetensors=str(step))
        if step == 120:  # as LocalSession does: the oldest goes
            for file in (store.folder / "checkpoints" / "step_00000040").iterdir():
                file.unlink()
        store.push_checkpoint(f"step_{step:08d}")
        assert store.latest_step() == step
    other = store.copied_to(tmp_path / "other")
    other.pull("checkpoints")
    assert {Path(name).parent.name for name in tree(other.folder)} == {"step_00000080", "step_00000120"}
    # a worker that dies while it pushes: what comes first is the tensors
    write(store.folder / "checkpoints" / "step_00000160", state_safetensors="160")
    store.push("checkpoints/step_00000160/state.safetensors")
    assert store.latest_step() == 120


def test_a_shared_folder_is_left_alone(tmp_path):
    store = Store(tmp_path) / "scene"
    write(store.folder, metrics_jsonl="1\n", checkpoints__step_00000040__state="x")
    before = tree(tmp_path)
    store.push("metrics.jsonl", "missing")
    store.pull("metrics.jsonl", "missing", "checkpoints")
    assert tree(tmp_path) == before and store.exists("metrics.jsonl") and not store.remote
    assert store.copied_to(tmp_path / "elsewhere") == store and store.place("x") == f"{tmp_path}/scene/x"


@pytest.mark.parametrize("uri", ["s3://nobody-has-this{}", "s3://", "gs://"])
def test_storage_that_cannot_be_written_is_one_line(s3, tmp_path, uri):
    options = s3.partition("?")[1] + s3.partition("?")[2]
    with pytest.raises(UserError, match=r"--storage [sg][s3]://.*: cannot be written \(.*; expected "
                                        r"a bucket that exists") as e:
        Store.open(uri.format("/x") + (options if "nobody" in uri else ""), tmp_path)
    assert "\n" not in str(e.value)


def test_copies_of_an_object_store_have_a_folder():
    assert (dataset_options.storage_folder("s3://bucket/some/runs/?scheme=http")
            == Path.home() / "flexgs-runs" / "bucket/some/runs")


def keep(session: StoreSession, step: int) -> None:
    session.checkpoint(step, lambda folder: write(folder, state_json="{}", state_safetensors=str(step)))


def sent(session: StoreSession) -> None:
    """Wait until what is being sent is there; the session may have noticed it already."""
    if session._sent:
        session._sent.result()


def test_checkpoints_are_sent_in_seconds_not_in_steps(s3, tmp_path, monkeypatch):
    """However fast they are written: the first at once, then the newest when it is time, and the last."""
    monkeypatch.setattr(store_session, "SEND_SECONDS", 1e6)
    store = Store.open(s3.format("sent"), tmp_path / "mine") / "scene"
    session = StoreSession(store, Group())
    for step in (40, 80, 120, 160):
        keep(session, step)
        session.stop(True)
    sent(session)
    assert store.steps() == [40]
    monkeypatch.setattr(store_session, "SEND_SECONDS", 0.0)
    session.stop(True)
    sent(session)
    assert store.steps()[0] == 160 and 80 not in store.steps()
    monkeypatch.setattr(store_session, "SEND_SECONDS", 1e6)
    keep(session, 200)
    session.close()
    assert store.steps() == [200, 160]


def test_training_does_not_wait_while_a_checkpoint_is_sent(s3, tmp_path, monkeypatch):
    """What is being sent stays on the disk meanwhile, however many come after it."""
    monkeypatch.setattr(store_session, "SEND_SECONDS", 0.0)
    store, go_on, begun = Store.open(s3.format("slow"), tmp_path / "mine") / "scene", Event(), Event()
    push = Store.push_checkpoint

    def slow(self: Store, name: str) -> None:
        begun.set()
        assert go_on.wait(60)
        push(self, name)

    monkeypatch.setattr(Store, "push_checkpoint", slow)
    session = StoreSession(store, Group())
    keep(session, 40)
    assert begun.wait(60)
    for step in (80, 120, 160):
        keep(session, step)
    assert [path.name for path in checkpoints(session.folder)] == [
        "step_00000160", "step_00000120", "step_00000040"]
    go_on.set()
    session.close()
    assert store.latest_step() == 160


def test_a_storage_that_fails_ends_the_training(s3, tmp_path, monkeypatch):
    def away(self: Store, name: str) -> None:
        raise OSError("no bucket")

    monkeypatch.setattr(Store, "push_checkpoint", away)
    session = StoreSession(Store.open(s3.format("away"), tmp_path) / "scene", Group())
    keep(session, 40)
    with pytest.raises(OSError, match="no bucket"):
        session.close()


def _pulled(group: Group, store: Store, folders: list[Path]) -> None:
    """Resume as a worker with a copy of its own."""
    session = StoreSession(store.copied_to(folders[group.rank]), group)
    newest = next(session.checkpoints())
    assert (newest / "state.safetensors").read_text() == "80"
    group.gather(None)
    session.close()


def test_workers_of_a_machine_pull_a_checkpoint_once(s3, tmp_path):
    """And the older one, which is for damage, only when it is asked for."""
    store = Store.open(s3.format("once"), tmp_path / "mine") / "scene"
    session = StoreSession(store, Group())
    for step in (40, 80):
        keep(session, step)
    session.close()
    assert store.steps() == [80, 40]
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    spawn(2, _pulled, store, folders)
    assert list(tree(folders[0])) == [f"checkpoints/step_00000080/{n}"
                                      for n in ("state.json", "state.safetensors")]
    assert not tree(folders[1])
