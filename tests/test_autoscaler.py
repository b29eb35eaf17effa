"""--gpu on a real autoscaler, Ray's, whose machines are processes in a network namespace with GPUs that are
only counted."""

import json
import sys
from pathlib import Path

import pytest
import torch

from flexgs.errors import UserError
from ray_jobs.cluster import Cluster, Workers, allocate
from tests.cluster.machines import RAY, Network, unavailable, wait_for

HEAD = "f" * 51 + "00000"
LISTS = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
         "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
         "worker_start_ray_commands")
CONFIG = {
    "cluster_name": "counted", "max_workers": 2, "idle_timeout_minutes": 0.05, "upscaling_speed": 100.0,
    "auth": {}, "provider": {"type": "external",
                             "module": "ray.autoscaler._private.fake_multi_node.node_provider."
                                       "FakeMultiNodeProvider",
                 "gcs_address": "10.77.0.1:6379", "head_node_id": HEAD, "launch_multiple": True,
                 "disable_node_updaters": True, "disable_launch_config_check": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 100 << 20}, "node_config": {},
                "max_workers": 2}},
    "head_node_type": "ray.head.default", "file_mounts": {}, "file_mounts_sync_continuously": False,
    **{name: [] for name in LISTS},
}
DRIVER = """
import time
from ray.util.placement_group import remove_placement_group
from ray_jobs.cluster import Cluster, allocate

def gpus():
    return int(sum(node.get("GPU", 0) for node in cluster.nodes().values()))

with Cluster("10.77.0.1:6379", gpu=True) as cluster:
    print("gpu", cluster.has_gpu, gpus())
    cluster.wait_for_gpus(1)
    allocation = allocate(cluster.nodes(), 2)
    print("first", gpus(), allocation)
    waiting = [allocation.reserve() for _ in range(2)]
    while not all(room.wait(1) for room in waiting):
        pass
    wanted = {name: int("GPU" in node) for name, node in cluster.nodes().items()}
    print("second", allocation.room(cluster.nodes()) == wanted)
    for room in waiting:
        remove_placement_group(room)
    while gpus():
        time.sleep(0.2)
    print("idle", len(cluster.nodes()))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_machines_come_when_scenes_wait_and_go_when_none_does(tmp_path, monkeypatch):
    if why := unavailable():
        pytest.skip(why)
    (tmp_path / "cluster.json").write_text(json.dumps(CONFIG))
    for name, value in {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD,
                        "PYTHONPATH": str(Path(__file__).parent.parent)}.items():
        monkeypatch.setenv(name, value)
    with Network(["head"], "flexgs-grows-") as network:
        log, out = tmp_path / "head", tmp_path / "driver"
        head = network.start("head", [RAY, "start", "--head", "--port=6379", "--node-ip-address=10.77.0.1",
                                      "--num-cpus=0", "--block", "--object-store-memory=100000000",
                                      f"--autoscaling-config={tmp_path}/cluster.json"], log)
        wait_for("Ray", lambda: "Ray runtime started." in log.read_text(), process=head)
        driver = network.start("head", [sys.executable, "-c", DRIVER], out)
        wait_for("the driver", lambda: driver.poll() is not None, process=head)
        assert driver.returncode == 0, out.read_text()
    said = out.read_text()
    lines = [line for line in said.splitlines() if not line.startswith(("Ray:", "\x1b"))]
    assert lines == ["gpu True 0", "first 1 each with 1 worker of 2 CPUs and a GPU", "second True",
                     "idle 1"], said


def test_gpus_that_can_never_come_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu: found none on this machine, expected --ray-address"):
        Cluster("local", gpu=True)
    with pytest.raises(UserError, match=r"found 0 CPUs on 1 machine, .*; --gpu waits for those "
                                        r"that an autoscaler adds"):
        allocate({"head": {"memory": 1.0}}, 1, Workers(1, 8))
