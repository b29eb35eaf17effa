"""One scene trained by two machines that share nothing but a network, with and without the death of one of
them.

    python -m tests.cluster.multinode

Five machines, which are network namespaces (Linux, root; machines.py tells of their traps): a Ray head
without CPUs, two nodes of one CPU, an S3 and an MLflow server. `ray job submit` sends the working folder to
the head, and train_all.py trains with two workers, which find room only on both nodes, into the bucket. Then
again, and one node is killed with SIGKILL in the middle, with all that runs there, and comes back after 10 s.
Both with replicas of the Gaussians on the nodes, and with shards. Prints a table of what was checked; exit
code 1 if anything is not so.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil

from flexgs.demo.synthetic import write_synthetic
from tests.cluster.machines import PATIENCE, RAY, TRAP, Network, kill, unavailable, wait_for

TOP = Path(__file__).parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "not-for-any-log",
        "AWS_DEFAULT_REGION": "us-east-1"}
STEPS, AWAY_SECONDS = 400, 10.0
KILL_AT = 100  # the first checkpoint: it goes into the bucket at once, those after it once a minute
SETTINGS = ["--preset", "smoke", "--steps", str(STEPS), "--batch", "2", "--workers", "2", "--data.factor",
            "1", "--base.max-splats", "2000", "--report-every", "20", "--checkpoint-every", "100",
            "--evaluation.ratios", "0.05", "1"]
NODES = ("one", "two")
SHA = "0123456789ab"


class Cluster:
    """The five machines, and jobs on them."""

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder = network, folder
        self.head, self.s3, self.tracker = (network.addresses[name] for name in ("head", "store", "tracker"))
        write_synthetic("studio", folder / "data" / "studio", views=18, width=64, height=48)
        network.start("store", [sys.executable, "-m", "moto.server", "-H", self.s3, "-p", "9000"],
                      folder / "store.log")
        self.database = f"sqlite:///{folder}/mlflow.db"
        network.start("tracker", [
            Path(sys.executable).with_name("mlflow"), "server", "--host", self.tracker, "--port", "5000",
            "--workers", "1", "--backend-store-uri", self.database, "--artifacts-destination",
            folder / "artifacts", "--allowed-hosts", f"{self.tracker}:5000"], folder / "tracker.log")
        network.start_ray("head", folder / "head.log")
        self.nodes = {node: self.start(node) for node in NODES}
        self.client("create_bucket(Bucket='bucket')")

    def start(self, node: str) -> psutil.Popen:
        return self.network.start_ray(node, self.folder / f"{node}.log", "head", cpus=1)

    def client(self, call: str) -> str:
        """What a call of boto3's S3 client returns, printed by a Python on the head."""
        return self.network.run("head", [sys.executable, "-c", "import boto3, json\n"
                                         f"s3 = boto3.client('s3', endpoint_url='http://{self.s3}:9000')\n"
                                         f"print(json.dumps(s3.{call}, default=str))"])

    def submit(self, name: str, mode: str) -> psutil.Popen:
        environment = {"env_vars": {"FLEXGS_GIT_SHA": SHA,
                                    "MLFLOW_TRACKING_URI": f"http://{self.tracker}:5000"}}
        return self.network.start("head", [
            RAY, "job", "submit", "--address", f"http://{self.head}:8265", "--working-dir", TOP,
            "--submission-id", name, "--runtime-env-json", json.dumps(environment), "--", sys.executable,
            "ray_jobs/train_all.py", "--data-root", self.folder / "data", "--storage",
            f"s3://bucket/{name}?endpoint_override={self.s3}:9000&scheme=http",
            "--experiment", name, *SETTINGS, "--distributed.mode", mode], self.folder / f"{name}.log")

    def workers(self) -> dict[str, int]:
        """How many processes train on each node."""
        return {node: sum("RayTrainWorker" in " ".join(_line(p)) for p in process.children(recursive=True))
                for node, process in self.nodes.items() if process.is_running()}

    def read(self, name: str, file: str) -> str:
        """A file of the run, from the bucket."""
        body = self.client("get_object(Bucket='bucket', "
                           f"Key='{name}/{name}/studio/{file}')['Body'].read().decode()")
        return str(json.loads(body))

    def objects(self, name: str) -> set[str]:
        """The names of what the run has in the bucket."""
        asked = f"list_objects_v2(Bucket='bucket', Prefix='{name}/{name}/studio/')"
        keys = json.loads(self.client(asked))["Contents"]
        return {key["Key"].partition("/studio/")[2] for key in keys}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def train(cluster: Cluster, name: str, mode: str, fatal: bool) -> Iterator[tuple[str, bool, str]]:
    """A job, with the death of a node if it is to be fatal: what is checked, whether it is so, and what was
    found."""
    start, job = time.monotonic(), cluster.submit(name, mode)
    wait_for("two workers", lambda: sum(cluster.workers().values()) == 2 or job.poll() is not None,
             PATIENCE)
    found = cluster.workers()
    yield "the two workers are on different machines", found == {"one": 1, "two": 1}, str(found)
    if fatal:
        wait_for("views", lambda: f"step_{KILL_AT:08d}" in str(cluster.objects(name))
                 or job.poll() is not None, PATIENCE)
        kill(cluster.nodes["two"])
        time.sleep(AWAY_SECONDS)
        cluster.nodes["two"] = cluster.start("two")
    code = job.wait(timeout=PATIENCE)
    yield "the job ends well", code == 0, f"exit code {code} after {time.monotonic() - start:.0f} s"
    if code:
        return
    if fatal:
        said = "workers started again" in cluster.log(name) or "it waits for another" in cluster.log(name)
        yield "it says that it went on", said, ""
    there, last = cluster.objects(name), f"checkpoints/step_{STEPS:08d}"
    expected = {"results.json", "config.json", "metrics.jsonl", f"{last}/state.json",
                f"{last}/state.safetensors", "cuts/studio_005.00pct.ply"}
    yield "all is in the bucket", expected <= there, f"{len(there)} objects"
    steps = [json.loads(line)["step"] for line in cluster.read(name, "metrics.jsonl").splitlines()]
    yield "every report is there once", steps == list(range(20, STEPS + 1, 20)), f"{len(steps)} reports"
    client = mlflow.MlflowClient(cluster.database)
    experiment = client.get_experiment_by_name(name)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'scene'")
    logged = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    yield ("MLflow has the same", run.info.status == "FINISHED" and logged == steps,
           f"{run.info.status}, {len(logged)} reports")
    yield ("the commit of the submitted folder is known", run.data.tags.get("git_sha") == SHA,
           str(run.data.tags.get("git_sha")))
    secret = KEYS["AWS_SECRET_ACCESS_KEY"]
    everywhere = cluster.log(name) + str(run.data) + "".join(cluster.read(name, f)
                                                             for f in ("config.json", "results.json"))
    yield "the key is in no log, run or result", secret not in everywhere, ""


def study(folder: Path) -> Iterator[tuple[str, str, bool, str]]:
    """Run, what is checked, whether it is so, and what was found."""
    with Network(["head", *NODES, "store", "tracker"], "flexgs-nodes-", **KEYS) as network:
        for node in NODES:
            ask = "import socket; print(socket.gethostbyname(socket.gethostname()))"
            name, there = (network.run(node, [sys.executable, "-c", ask]).strip(),
                           network.run(node, ["ip", "-o", "-4", "addr"]))
            yield ("traps", f"on {node} the name is loopback, and docker0 is up",
                   name == "127.0.1.1" and TRAP in there, f"{socket.gethostname()} is {name}")
        cluster = Cluster(network, folder)
        for mode in ("replicated", "sharded"):
            counts = []
            for fatal in (False, True):
                name = f"{mode}-{'killed' if fatal else 'usual'}"
                for check in train(cluster, name, mode, fatal):
                    yield name, *check
                ratios = json.loads(cluster.read(name, "results.json"))["ratios"]
                counts.append([(row["splats"], row["psnr"]) for row in ratios.values()])
            yield name, "counts and PSNR are those without a death", counts[0] == counts[1], str(counts[1])


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def main() -> int:
    if why := unavailable():
        print(f"tests.cluster.multinode: {why}", file=sys.stderr)
        return 2
    os.environ.pop("RAY_ADDRESS", None)
    folder, good = Path(tempfile.mkdtemp(prefix="flexgs-nodes-")), True
    print("| run | checked | found | |\n|---|---|---|---|", flush=True)
    for run, what, so, found in study(folder):
        print(f"| {run} | {what} | {found} | {'yes' if so else 'NO'} |", flush=True)
        good &= so
    print("" if good else f"see {folder}")
    if good:
        shutil.rmtree(folder)
    return not good


if __name__ == "__main__":
    sys.exit(main())
