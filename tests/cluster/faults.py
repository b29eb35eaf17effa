"""Faults at random moments of jobs on a Ray cluster of three machines, and what they change in the results.

    python -m tests.cluster.faults --rounds 30

The machines are network namespaces (Linux, root): a head without CPUs, where the job and MLflow's server run,
and two of two CPUs. A job trains two scenes with one worker each (a task of Ray), or one scene with two
workers (Ray Train), which hold replicas or shards of the Gaussians, or searches the settings of one scene
with two trials at a time.
Every round runs a job into an empty storage, kills something with SIGKILL at a random moment, starts again
what a supervisor or a person would (the machine, the server, the command), and compares with the run of that
job without a fault: files of the models, counts, PSNR and SSIM bit for bit, every metric step once, in
metrics.jsonl and in MLflow, and the runs in MLflow. Of a search the number of trials has to be the same, and
a trial that any two rounds have in common has to have the same figures in both: which settings are tried
depends on what was known when the command was started. Prints the table of docs/reliability.md; exit code 1
if anything differs.

The moment is when the scenes together have seen a random number of views, or the trials were measured a
random number of times, and in every fifth round a random one of the first 20 seconds, when Ray starts the
workers.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil

from flexgs.demo.synthetic import write_synthetic
from flexgs.files import read_jsonl
from tests.cluster.machines import PATIENCE, RAY, Network, kill, unavailable, wait_for

FAULTS = {
    "worker": "one of the processes that train",
    "machine": "the raylet of one of the two machines and all that runs there; back after 10 s",
    "notice": "the same, 15 s after Ray was told that the machine is to be taken away",
    "driver": "the job; the same command again",
    "MLflow": "the MLflow server; back after 10 s",
    "cluster": "the head, both machines, the job and the MLflow server; the cluster and the command again",
}
AWAY_SECONDS = 10.0
NOTICE_SECONDS = 15.0
MACHINES = ("one", "two")
SCENES = {"first": "studio", "second": "courtyard"}
STEPS = 400
SETTINGS = ["--preset", "smoke", "--steps", str(STEPS), "--batch", "2", "--data.factor", "1",
            "--base.max-splats", "1500", "--report-every", "20", "--checkpoint-every", "80",
            "--evaluation.ratios", "0.05", "1", "--evaluation.lpips"]
TRIALS = 3


@dataclass(frozen=True)
class Job:
    """A command of the study."""

    command: tuple[str, ...]
    process: str
    """What the titles of the processes that train have in them."""
    scenes: tuple[str, ...] = ("first",)

    @property
    def most(self) -> int:
        """The greatest sum of progress()."""
        return 3 * TRIALS if "tuning/search.py" in self.command else len(self.scenes) * STEPS

    def progress(self, folder: Path) -> list[int]:
        """How many views each scene has seen, or how often each trial was measured."""
        if "tuning/search.py" in self.command:
            return [len(rungs) for rungs in trials(folder / "trials").values()]
        rows = [read_jsonl(folder / scene / "metrics.jsonl") for scene in self.scenes]
        return [r[-1]["step"] if r else 0 for r in rows]


JOBS = {
    "tasks": Job(("ray_jobs/train_all.py", "--workers", "1"), "ray::train_worker", tuple(SCENES)),
    "replicas": Job(("ray_jobs/train_all.py", "--workers", "2", "--scenes", "first"), "RayTrainWorker"),
    "shards": Job(("ray_jobs/train_all.py", "--workers", "2", "--scenes", "first", "--distributed.mode",
                   "sharded"), "RayTrainWorker"),
    "search": Job(("tuning/search.py", "--scene", "first", "--trials", str(TRIALS), "--max-concurrent", "2",
                   "--confirm", "1"), "ray::ImplicitFunc"),
}


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

    def start_job(self, job: Job, storage: Path) -> psutil.Popen:
        return self.network.start("head", [
            sys.executable, *job.command, "--data-root", self.data, "--storage", storage,
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

    def workers(self, job: Job) -> list[psutil.Process]:
        """The processes that train."""
        processes = [p for machine in MACHINES for p in self.nodes[machine].children(recursive=True)]
        return [p for p in processes if job.process in _title(p)]


@dataclass
class Outcome:
    """What a run has left."""

    seconds: float
    left: dict[str, Any] = field(default_factory=dict)
    """What must be the same with and without a fault, by name."""
    trials: dict[str, Any] = field(default_factory=dict)
    """Figures that must be the same wherever the same trial was measured, by its folder and rung."""
    restarts: int = 0
    """Of workers, by Ray Train or the job."""

    def differences(self, other: "Outcome", known: dict[str, Any]) -> list[str]:
        """What is not as in the other, or as in known, which gets the trials that are not in it."""
        return [*(name for name in sorted(self.left.keys() | other.left.keys())
                  if self.left.get(name) != other.left.get(name)),
                *(name for name, figures in self.trials.items()
                  if known.setdefault(name, figures) != figures)]


def look(cluster: Cluster, job: Job, storage: Path, seconds: float) -> Outcome:
    """Read it, MLflow's part from the database itself."""
    outcome, folder = Outcome(seconds), storage / storage.name
    client = mlflow.MlflowClient(cluster.database)
    experiment = client.get_experiment_by_name(storage.name)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    outcome.left["runs in MLflow"] = sorted((r.info.run_name, r.info.status) for r in runs)
    steps = {f"{r.info.run_name}: {name}": [m.step for m in client.get_metric_history(r.info.run_id, name)]
             for r in runs for name in r.data.metrics
             if not name.startswith("system/") and name != "train/restarts"}
    outcome.left["twice in MLflow"] = [name for name, at in steps.items() if len(set(at)) < len(at)]
    if job is JOBS["search"]:
        _look_at_search(outcome, folder)
    else:
        outcome.left["steps in MLflow"] = steps
        _look_at_scenes(outcome, folder, job.scenes)
    return outcome


def _look_at_scenes(outcome: Outcome, folder: Path, scenes: Sequence[str]) -> None:
    for scene in scenes:
        rows, run = read_jsonl(folder / scene / "metrics.jsonl"), folder / scene
        outcome.left[f"{scene}: metrics.jsonl"] = [(row["step"], row["loss"], row["splats"], row["workers"])
                                                   for row in rows]
        outcome.restarts += len(read_jsonl(run / "failures.jsonl"))
        if (run / "results.json").exists():
            ratios = json.loads((run / "results.json").read_text())["ratios"]
            outcome.left[f"{scene}: results"] = _figures(ratios)
            outcome.left[f"{scene}: model and cuts"] = _digest(run / "model", run / "cuts")


def _look_at_search(outcome: Outcome, folder: Path) -> None:
    outcome.left["best.json and report.md"] = [(folder / n).exists() for n in ("best.json", "report.md")]
    outcome.left["trials"] = len(trials(folder / "trials"))
    for trial, rungs in trials(folder).items():
        outcome.trials |= {f"{trial}: {rung}": _figures(rungs[rung]["ratios"]) for rung in rungs}
        if json.loads((folder / trial / "trial.json").read_text())["number"] == 0:
            outcome.left[f"{trial}: model"] = _digest(folder / trial / "model")


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each trial below a folder, by rung."""
    return {str(file.parent.relative_to(folder)): json.loads(file.read_text())["rungs"]
            for file in sorted(folder.rglob("trial.json")) if not file.parent.name.startswith(".")}


def _figures(ratios: dict[str, Any]) -> list[list[float]]:
    return [[row[key] for key in ("splats", "psnr", "ssim")] for row in ratios.values()]


def _digest(*folders: Path) -> str:
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.name != "model.json"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run(cluster: Cluster, job: Job, name: str, fault: str | None = None, seconds: float = 0.0,
        moment: int = 0) -> tuple[Outcome, list[int]]:  # fmt: skip
    """Run a job, with a fault so many seconds after the start and once its progress adds up to the moment.

    Returns the outcome, and the progress at the fault.
    """
    storage, start, seen = cluster.folder / name, time.monotonic(), [0]
    process = cluster.start_job(job, storage)
    if fault:
        time.sleep(seconds)
        if fault == "worker":  # if there is none yet, the first
            wait_for("a worker", lambda: cluster.workers(job) or process.poll() is not None, PATIENCE)
        while True:
            seen = job.progress(storage / name) or [0]
            if sum(seen) >= moment or process.poll() is not None:
                break
            time.sleep(0.1)
        process = inject(cluster, fault, job, process, storage)
    try:
        code = process.wait(timeout=PATIENCE)
    finally:
        kill(process)
    outcome = look(cluster, job, storage, time.monotonic() - start)
    outcome.left["exit code"] = code
    return outcome, seen


def inject(cluster: Cluster, fault: str, job: Job, process: psutil.Popen, storage: Path) -> psutil.Popen:
    """Kill, wait, start again; the process of the job that goes on."""
    machine = random.choice(MACHINES)
    if fault == "worker" and (workers := cluster.workers(job)):
        random.choice(workers).kill()
    if fault in ("driver", "cluster"):
        kill(process)
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
    return cluster.start_job(job, storage) if fault in ("driver", "cluster") else process


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := unavailable():
        print(f"tests.cluster.faults: {why}", file=sys.stderr)
        return 2
    random.seed(options.seed)
    folder, bad = Path(tempfile.mkdtemp(prefix="flexgs-faults-")), 0
    for scene, stage in SCENES.items():
        write_synthetic(stage, folder / "data" / scene, views=18, width=64, height=48)
    with Network(["head", *MACHINES]) as network:
        cluster, known = Cluster(network, folder), {}
        run(cluster, JOBS["tasks"], "warm")  # compiles
        usual = {name: run(cluster, JOBS[name], f"usual_{name}")[0] for name in options.jobs}
        for outcome in usual.values():
            known |= outcome.trials
        print("without a fault:", ", ".join(f"{name} {one.seconds:.0f} s" for name, one in usual.items()))
        print("\n| round | job | killed | after | done by then | workers started again | the run took, s | "
              "differs in |\n|---|---|---|---|---|---|---|---|", flush=True)
        for i in range(options.rounds):
            n = len(options.faults)
            fault, name = options.faults[i % n], options.jobs[(i + i // n) % len(options.jobs)]
            job = JOBS[name]
            seconds, moment = (random.uniform(0, 20), 0) if i % 5 == 4 else (
                random.uniform(0, 2), max(1, round(random.random() * 0.96 * job.most)))
            try:
                outcome, seen = run(cluster, job, f"round_{i + 1:02}", fault, seconds, moment)
                differences = outcome.differences(usual[name], known)
            except psutil.TimeoutExpired as e:
                outcome, seen, differences = Outcome(PATIENCE), [], [f"hung: {e}"]
            bad += bool(differences)
            kind = "measurements" if name == "search" else "views"
            after = f"{moment} {kind}" if moment else f"{seconds:.0f} s"
            print(f"| {i + 1} | {name} | {fault} | {after} | {' and '.join(map(str, seen))} | "
                  f"{outcome.restarts} | {outcome.seconds:.0f} | {'; '.join(differences) or 'nothing'} |",
                  flush=True)
    print(f"\n{options.rounds - bad} of {options.rounds} runs ended as the one without a fault"
          + (f"; see {folder}" if bad else ""))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
