"""The files of cluster/: what can be known of them without a cloud, Kubernetes, Slurm or Docker. A typo in
any is found."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from flexgs import run
from tests.test_packages import PINS, declared

TOP = Path(__file__).parent.parent
FOLDER = TOP / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


# ---------------------------------------------------------------------- ray up


def check_ray_up(config: dict) -> None:
    """By Ray's own schema, which is not asked by `ray up` until it has an account."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready = prepare_config(config)
    validate_config(ready)
    kinds = config["available_node_types"]
    head = kinds[config["head_node_type"]]
    spot = [name for name, kind in kinds.items() if "spot" in str(kind["node_config"]).lower()]
    assert (config["head_node_type"] not in spot and "GPU" not in head["resources"]
            and head["resources"]["CPU"] == 0)
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) <= config["max_workers"]
    start = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0" in start and all("RAY_AUTH_MODE=token" in command for part in ("head", "worker")
                                           for command in config[f"{part}_start_ray_commands"]
                                           if "ray start" in command)
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        assert (rule["FromPort"], rule["ToPort"]) == (22, 22) and "0.0.0.0" not in str(rule)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up(cloud):
    check_ray_up(read(f"{cloud}.yaml"))
    for change, what in (({"max_workrs": 2}, "max_workrs"), ({"idle_timeout_minutes": "soon"}, "soon")):
        with pytest.raises(ValidationError, match=what):
            check_ray_up(read(f"{cloud}.yaml") | change)


def test_flags_of_ray_start_exist():
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in (*option.opts, *option.secondary_opts)}
    for name in ("aws.yaml", "gcp.yaml", "slurm.sh"):
        text = (FOLDER / name).read_text()
        flags = set(re.findall(r"--[a-z-]+", " ".join(re.findall(r"ray start .*(?:\n    --.*)?", text))))
        if name == "slurm.sh":
            flags = set(re.findall(r"--num-[a-z]+|--disable-[a-z-]+", text))
        assert len(flags) >= 3 and flags <= known, flags - known


# ---------------------------------------------------------------------- KubeRay

# The keys of KubeRay 1.5's v1 API and of Kubernetes' pods that these files may use. A CRD is another
# project's file, not kept here; FLEXGS_KUBERAY_CRDS may name a folder of ray.io_rayclusters.yaml and
# ray.io_rayjobs.yaml to check against.
POD = {"containers": [{"name": str, "image": str, "env": [{"name": str, "value": str}],
                       "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
                       "resources": {"requests": dict, "limits": dict},
                       "securityContext": {"runAsUser": int, "runAsNonRoot": bool,
                                           "allowPrivilegeEscalation": bool},
                       "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}]}],
       "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
                    "emptyDir": {"medium": str, "sizeLimit": str}}],
       "tolerations": [{"key": str, "operator": str, "effect": str}]}
CLUSTER = {"rayVersion": str, "authOptions": {"mode": str}, "enableInTreeAutoscaling": bool,
           "autoscalerOptions": {"idleTimeoutSeconds": int},
           "headGroupSpec": {"rayStartParams": dict, "template": {"spec": POD}},
           "workerGroupSpecs": [{"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                                 "rayStartParams": dict, "template": {"spec": POD}}]}
KUBERAY = {
    "raycluster": {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": CLUSTER},
    "rayjob": {"apiVersion": str, "kind": str, "metadata": {"generateName": str}, "spec": {
        "entrypoint": str, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
        "backoffLimit": int, "rayClusterSpec": CLUSTER}},
}


def unknown(value: Any, shape: Any, where: str = "") -> list[str]:
    """The keys and values that shape does not know."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return [line for key, inner in value.items() for line in (
            unknown(inner, shape[key], f"{where}.{key}") if key in shape else [f"{where}.{key}: unknown"])]
    if isinstance(shape, list) and isinstance(value, list):
        return [line for i, inner in enumerate(value) for line in unknown(inner, shape[0], f"{where}[{i}]")]
    return [] if isinstance(shape, type) and isinstance(value, shape) else [f"{where}: {value!r}"]


@pytest.mark.parametrize("name", list(KUBERAY))
def test_kuberay(name):
    from ray.scripts.scripts import start

    config = read(f"kuberay/{name}.yaml")
    assert unknown(config, KUBERAY[name]) == []
    spec = config["spec"]["rayClusterSpec"] if name == "rayjob" else config["spec"]
    assert (config["apiVersion"] == "ray.io/v1" and config["kind"].lower() == name
            and spec["authOptions"] == {"mode": "token"})
    flags = {f"--{flag}" for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
             for flag in group["rayStartParams"]}
    assert flags <= {name for option in start.params for name in option.opts}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {m["name"] for c in pod["containers"]
                for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (gpus,) = spec["workerGroupSpecs"]
    assert gpus["minReplicas"] == gpus["replicas"] == 0 < gpus["maxReplicas"]
    spec["workerGroupSpecs"][0]["maxReplica"], spec["rayVersion"] = 3, 2.6
    complaints = unknown(config, KUBERAY[name])
    assert [line.partition(":")[0].rpartition(".")[2] for line in complaints] == ["rayVersion", "maxReplica"]


def test_both_kuberay_clusters_are_one():
    assert read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == read("kuberay/raycluster.yaml")["spec"]


@pytest.mark.parametrize("name", list(KUBERAY))
def test_kuberay_by_its_own_schema(name):
    folder = os.environ.get("FLEXGS_KUBERAY_CRDS")
    if not folder:
        pytest.skip("FLEXGS_KUBERAY_CRDS names no folder of KubeRay's CRDs")
    crd = yaml.safe_load((Path(folder) / f"ray.io_{name}s.yaml").read_text())
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    Draft202012Validator(_closed(schema)).validate(read(f"kuberay/{name}.yaml"))


def _closed(schema: Any) -> Any:
    """The schema, which takes no key that it does not name."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(inner) for key, inner in schema.items()}
    named = (isinstance(schema.get("properties"), dict)
             and "x-kubernetes-preserve-unknown-fields" not in schema)
    return closed | ({"additionalProperties": False} if named and schema.get("type") == "object" else {})


# ---------------------------------------------------------------------- compose


def check_compose(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema",
                           "vendor.compose-spec", path],
                          capture_output=True, text=True, check=False)


def test_compose(tmp_path):
    done = check_compose(FOLDER / "compose.yaml")
    assert done.returncode == 0, done.stdout
    text = (FOLDER / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("depends_on", "depend_on", 1))
    assert check_compose(tmp_path / "compose.yaml").returncode == 1
    config = read("compose.yaml")
    for name, service in config["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.fullmatch(r"[^:]+:(?!latest).*\d.*", service["image"]), name
        assert set(service.get("depends_on", {})) <= set(config["services"])
        # no secret has a value, or a default, in the file
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|_KEY|URI|MC_HOST", key):
                secrets = re.findall(r"\$\{(\w+)(:\?[^}]*)?\}", value)
                assert secrets and all(required for _, required in secrets), key
    mlflow = config["services"]["mlflow"]
    (installed,) = re.findall(r"install --no-cache-dir -c /tmp/constraints.txt (.+) &&",
                              mlflow["build"]["dockerfile_inline"])
    assert {"mlflow"} < set(installed.split()) <= declared("", "cluster") <= set(PINS)
    assert mlflow["image"] == f"flexgs-mlflow:{PINS['mlflow']}" and mlflow["build"]["context"] == ".."


# ---------------------------------------------------------------------- Slurm

STUB = """#!/bin/bash
case $(basename "$0") in
  scontrol) printf 'node1\\nnode2\\n';;
  srun) case " $* " in *" hostname "*) echo 10.1.2.3 10.9.9.9;; *) exec "$@";; esac;;
  ray) stat -c %a "$RAY_AUTH_TOKEN_PATH"; wc -c < "$RAY_AUTH_TOKEN_PATH"
       printf '%s\\n' "$@"; exit "${STUB_CODE:-0}";;
esac
"""


@pytest.mark.parametrize("code", [0, 1])
def test_slurm(tmp_path, code):
    """With Slurm's programs and Ray replaced by what prints what it was given."""
    for name in ("scontrol", "srun", "ray"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "77", "JOB_NODELIST": "node[1-2]", "NNODES": "2",
             "CPUS_PER_TASK": "32", "GPUS_PER_NODE": "4"}
    done = subprocess.run(["bash", FOLDER / "slurm.sh", "/captures", "/my runs", "--preset", "fast"],
                          check=False, text=True, capture_output=True, env={
                              "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
                              "HOME": str(tmp_path),
                              "STUB_CODE": str(code), **{f"SLURM_{name}": value for name,
                                                         value in slurm.items()}})
    assert done.returncode == code, done.stderr
    mode, length, *command = done.stdout.splitlines()
    # a token, which goes with the job
    assert (mode, length) == ("600", "64") and not list((tmp_path / ".ray").iterdir())
    assert command == shlex.split(
        "symmetric-run --address 10.1.2.3:20077 --min-nodes 2 --num-cpus 32 --num-gpus 4 "
        "--disable-usage-stats -- python -u ray_jobs/train_all.py --data-root /captures --storage "
        "'/my runs' --preset fast")
    from ray.scripts.symmetric_run import symmetric_run

    assert {"--address", "--min-nodes"} <= {name for option in symmetric_run.params for name in option.opts}
    assert (FOLDER / "slurm.sh").stat().st_mode & stat.S_IXUSR
    assert (TOP / "ray_jobs" / "train_all.py").exists()


def test_slurm_says_what_it_needs():
    done = subprocess.run(["bash", FOLDER / "slurm.sh", "/captures"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch cluster/slurm.sh CAPTURES RUNS")


# ---------------------------------------------------------------------- the image, and versions in all files


def test_the_image_gets_all_that_it_copies():
    text = (FOLDER / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)", text, re.M) for name in line.split()[:-1]]
    kept = [line.removeprefix("!") for line in (TOP / ".dockerignore").read_text().splitlines()
            if line.startswith("!")]
    assert sorted(copied) == sorted(kept) and all((TOP / name).exists() for name in copied)
    needed = {"ray_jobs", "tuning", "flexgs", "README.md", "LICENSE"}  # the readme: setuptools reads it
    assert needed <= set(copied) and "-c constraints.txt" in text
    assert (text.rindex("USER ray") > text.rindex("apt-get")
            and "USER root" not in text.partition("USER ray")[2])


def test_versions_are_those_of_the_constraints():
    """Ray, torch and flexgs, wherever a file names one."""
    project = re.search(r'^version = "(.*)"', (TOP / "pyproject.toml").read_text(), re.M)
    assert project
    found = set()
    for path in FOLDER.rglob("*"):
        if path.is_file():
            text = path.read_text()
            named = {"ray": r'rayVersion: "(.*)"|against Ray (\d[\d.]*\d)|ray==([\d.]+)',
                     "torch": r"pytorch:([\d.]+)-|torch==([\d.]+)", "flexgs": r"REGISTRY/flexgs:([\d.]*\d)"}
            for package, pattern in named.items():
                for groups in re.findall(pattern, text):
                    version = groups if isinstance(groups, str) else "".join(groups)
                    assert version == (PINS | {"flexgs": project[1]})[package], (path, package)
                    found.add(package)
    assert found == {"ray", "torch", "flexgs"}


def test_the_commit_of_an_image_or_a_submitted_job(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    monkeypatch.delenv("FLEXGS_GIT_SHA", raising=False)
    assert run.git_sha() is None
    monkeypatch.setenv("FLEXGS_GIT_SHA", "0123456789ab")
    assert run.git_sha() == "0123456789ab"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert run.git_sha() == "0123456789ab"
