"""Faults at random moments of a run of two scenes on a Ray cluster of three machines, and what they change in
the results.

    python -m tests.cluster.faults --rounds 20

The machines are network namespaces (Linux, root): a head without CPUs, where the job and MLflow's server run,
and two of two CPUs, each of which trains a scene with two workers. Every round runs train_all.py into an
empty storage, kills something with SIGKILL at a random moment, starts again what a supervisor or a person
would (the machine, the server, the command), and compares with the run without a fault: files of the models,
counts, PSNR and SSIM bit for bit, and every metric step once, in metrics.jsonl and in MLflow. Prints the
table of docs/reliability.md; exit code 1 if anything differs.

The moment is when both scenes together have seen a random number of views, and in every fourth round a random
one of the first 20 seconds, when Ray starts the workers.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil

from flexgs.demo.synthetic import write_synthetic
from flexgs.files import read_jsonl
from tests.cluster.machines import RAY, Network, kill, unavailable, wait_for

FAULTS = {
    "worker": "one of the four processes that train",
    "machine": "the raylet of one of the two machines and all that runs there; back after 10 s",
    "notice": "the same, 15 s after Ray was told that the machine is to be taken away",
    "driver": "the job; the same command again",
    "MLflow": "the MLflow server; back after 10 s",
    "cluster": "the head, both machines, the job and the MLflow server; the cluster and the command again",
}
AWAY_SECONDS = 10.0
NOTICE_SECONDS = 15.0
PATIENCE_SECONDS = 400.0
"""A run that takes longer counts as hung."""
MACHINES = ("one", "two")
SCENES = {"first": "studio", "second": "courtyard"}
SETTINGS = ["--preset", "smoke", "--steps", "600", "--batch", "2", "--workers", "2", "--data.factor", "1",
            "--base.max-splats", "3000", "--report-every", "20", "--checkpoint-every", "100",
            "--evaluation.ratios", "0.05", "1"]


class Cluster:
    """A head and two machines of Ray, and MLflow's server."""

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder, self.data = network, folder, folder / "data"
        self.address = network.addresses["head"]
        self.database = f"sqlite:///{folder / 'mlflow.db'}"
        (folder / "logs").mkdir()
        self.start()

    def start(self) -> None:
        self.nodes = {"head": self.network.start_ray("head", self.log("head"))}
        self.start_mlflow()
        for machine in MACHINES:
            self.start_machine(machine)

    def start_machine(self, machine: str) -> None:
        self.nodes[machine] = self.network.start_ray(machine, self.log(machine), "head", cpus=2)

    def start_mlflow(self) -> None:
        self.mlflow = self.network.start("head", [
            Path(sys.executable).with_name("mlflow"), "server", "--host", self.address, "--port", "5000",
            "--workers", "1", "--backend-store-uri", self.database, "--artifacts-destination",
            self.folder / "artifacts", "--allowed-hosts", f"{self.address}:5000"], self.log("mlflow"))

    def start_job(self, storage: Path) -> psutil.Popen:
        return self.network.start("head", [
            sys.executable, "ray_jobs/train_all.py", "--data-root", self.data, "--storage", storage,
            "--experiment", storage.name, "--ray-address", f"{self.address}:6379", "--mlflow-uri",
            f"http://{self.address}:5000", *SETTINGS],
            self.log(storage.name))

    def give_notice(self, machine: str) -> None:
        """What a cloud does before it takes a spot machine away."""
        found = json.loads(self.network.run(machine,
                                            [RAY, "list", "nodes", "--format", "json", "--limit", "1000",
                                             "--address", f"http://{self.address}:8265"]))
        (node,) = (n["node_id"] for n in found if n["node_ip"] == self.network.addresses[machine]
                   and n["state"] == "ALIVE")
        self.network.run("head",
                         [RAY, "drain-node", "--address", f"{self.address}:6379", "--node-id", node,
                          "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                          "--deadline-remaining-seconds", str(int(NOTICE_SECONDS))])

    def log(self, name: str) -> Path:
        return self.folder / "logs" / name

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        processes = [p for machine in MACHINES for p in self.nodes[machine].children(recursive=True)]
        return [p for p in processes if "RayTrainWorker" in _title(p)]


@dataclass
class Outcome:
    """What a run has left."""

    seconds: float
    left: dict[str, Any] = field(default_factory=dict)
    """What must be the same with and without a fault, by name."""
    restarts: int = 0
    """Of workers, by Ray Train."""

    def differences(self, other: "Outcome") -> list[str]:
        return [name for name in sorted(self.left.keys() | other.left.keys())
                if self.left.get(name) != other.left.get(name)]


def look(cluster: Cluster, storage: Path, seconds: float) -> Outcome:
    """Read it, MLflow's part from the database itself."""
    outcome, folder = Outcome(seconds), storage / storage.name
    client = mlflow.MlflowClient(cluster.database)
    experiment = client.get_experiment_by_name(storage.name)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    outcome.left["runs in MLflow"] = sorted((r.info.run_name, r.info.status) for r in runs)
    for r in runs:
        for name in r.data.metrics:
            if not name.startswith("system/") and name != "train/restarts":
                history = client.get_metric_history(r.info.run_id, name)
                outcome.left[f"{r.info.run_name}: steps of {name} in MLflow"] = [m.step for m in history]
    for scene in SCENES:
        rows, run = read_jsonl(folder / scene / "metrics.jsonl"), folder / scene
        outcome.left[f"{scene}: metrics.jsonl"] = [(row["step"], row["loss"], row["splats"], row["workers"])
                                                   for row in rows]
        outcome.restarts += len(read_jsonl(run / "failures.jsonl"))
        if (run / "results.json").exists():
            ratios = json.loads((run / "results.json").read_text())["ratios"]
            outcome.left[f"{scene}: results"] = [[row[key] for key in ("splats", "psnr", "ssim")]
                                                 for row in ratios.values()]
            files = [*sorted((run / "model").glob("*.safetensors")), *sorted((run / "cuts").iterdir())]
            whole = b"".join(file.read_bytes() for file in files)
            outcome.left[f"{scene}: model and cuts"] = hashlib.sha256(whole).hexdigest()
    return outcome


def run(cluster: Cluster, name: str, fault: str | None = None, seconds: float = 0.0,
        views: int = 0) -> tuple[Outcome, list[int]]:  # fmt: skip
    """Train both scenes, with a fault so many seconds after the start and when the scenes have seen so many
    views.

    Returns the outcome, and the views that each had seen.
    """
    storage, start, seen = cluster.folder / name, time.monotonic(), [0] * len(SCENES)
    job = cluster.start_job(storage)
    if fault:
        time.sleep(seconds)
        if fault == "worker":  # if there is none yet, the first
            wait_for("a worker", lambda: cluster.workers() or job.poll() is not None, 60)
        while True:
            rows = [read_jsonl(storage / name / scene / "metrics.jsonl") for scene in SCENES]
            seen = [r[-1]["step"] if r else 0 for r in rows]
            if sum(seen) >= views or job.poll() is not None:
                break
            time.sleep(0.1)
        job = inject(cluster, fault, job, storage)
    code = job.wait(timeout=PATIENCE_SECONDS)
    outcome = look(cluster, storage, time.monotonic() - start)
    outcome.left["exit code"] = code
    return outcome, seen


def inject(cluster: Cluster, fault: str, job: psutil.Popen, storage: Path) -> psutil.Popen:
    """Kill, wait, start again; the job that goes on."""
    machine = random.choice(MACHINES)
    if fault == "worker" and (workers := cluster.workers()):
        random.choice(workers).kill()
    if fault in ("driver", "cluster"):
        kill(job)
    if fault in ("MLflow", "cluster"):
        kill(cluster.mlflow)
    if fault == "notice":
        cluster.give_notice(machine)
        time.sleep(NOTICE_SECONDS)
    for node in {"machine": [machine], "notice": [machine], "cluster": cluster.nodes}.get(fault, []):
        kill(cluster.nodes[node])
    if fault in ("machine", "notice", "MLflow"):
        time.sleep(AWAY_SECONDS)
    if fault in ("machine", "notice"):
        cluster.start_machine(machine)
    if fault == "MLflow":
        cluster.start_mlflow()
    if fault == "cluster":
        cluster.start()
    return cluster.start_job(storage) if fault in ("driver", "cluster") else job


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := unavailable():
        print(f"tests.cluster.faults: {why}", file=sys.stderr)
        return 2
    random.seed(options.seed)
    folder, bad = Path(tempfile.mkdtemp(prefix="flexgs-faults-")), 0
    for scene, stage in SCENES.items():
        write_synthetic(stage, folder / "data" / scene, views=18, width=96, height=72)
    with Network(["head", *MACHINES]) as network:
        cluster = Cluster(network, folder)
        run(cluster, "warm")  # compiles
        usual, _ = run(cluster, "usual")
        print(f"without a fault: {usual.seconds:.0f} s\n\n"
              "| round | killed | after | views seen | workers started again | the run "
              "took, s | differs in |\n|---|---|---|---|---|---|---|", flush=True)
        for i in range(options.rounds):
            fault = options.faults[i % len(options.faults)]
            seconds, views = (random.uniform(0, 20), 0) if i % 4 == 3 else (random.uniform(0, 2),
                                                                            random.randrange(1, 1150))
            try:
                outcome, seen = run(cluster, f"round_{i + 1:02}", fault, seconds, views)
                differences = outcome.differences(usual)
            except (psutil.TimeoutExpired, TimeoutError) as e:
                outcome, seen, differences = Outcome(PATIENCE_SECONDS), [], [f"hung: {e}"]
            bad += bool(differences)
            moment = f"{views} views" if views else f"{seconds:.0f} s"
            print(f"| {i + 1} | {fault} | {moment} | {' and '.join(map(str, seen))} | {outcome.restarts} | "
                  f"{outcome.seconds:.0f} | {'; '.join(differences) or 'nothing'} |", flush=True)
    print(f"\n{options.rounds - bad} of {options.rounds} runs ended as the one without a fault"
          + (f"; see {folder}" if bad else ""))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
