"""flexgs doctor: check what a training needs on this machine, and print a line for each check.

A check is a function that returns what it found, and raises Wrong, with the cure, for what would stop a
training. A check that takes more than SECONDS counts as wrong.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote

import psutil

from flexgs import telemetry
from flexgs.errors import UserError
from flexgs.urls import first_line, public

SECONDS = 30.0
"""How long a check may take."""
LEAST_FREE = 5e9
"""Bytes of free disk: a run of a real capture, with checkpoints, cuts and pictures, takes 1 to 4 GB."""
EXTRAS = {"viser": ("view", "the viewer"), "gaussforge": ("export", "SOG, .splat"),
          "gsply": ("export", "SPZ, compressed PLY"), "imageio_ffmpeg": ("view", "videos"),
          "pi_heif": ("capture", "HEIC photographs"), "lpips": ("lpips", "LPIPS")}
"""Optional packages: the extra of flexgs that installs each, and what it is used for."""


class Wrong(Exception):
    """What a check found wrong, and what to do about it."""

    def __init__(self, found: str, cure: str):
        super().__init__(f"{found}: {cure}")


@dataclass(frozen=True)
class Places:
    """The folders and servers that a training would use; see the flags of `flexgs doctor`."""

    storage: Path
    data_root: Path | None = None
    mlflow_uri: str | None = None
    ray_address: str | None = None


def examine(places: Places) -> int:
    """Print a line per check and return the exit code: 1 if any of them is wrong, else 0."""
    checks: dict[str, Callable[[], str]] = {
        "python": python, "torch": torch_build, "gpu": gpu, "backend": backend, "kernels": kernels,
        "threads": threads, "ray": lambda: ray_cluster(places.ray_address),
        "mlflow": lambda: mlflow_server(places.mlflow_uri, places.storage),
        "disk": lambda: disk(places.storage), "captures": lambda: captures(places.data_root), "lpips": lpips,
        "extras": extras}
    broken = 0
    for name, check in checks.items():
        try:
            mark, line = "ok", _in_time(check)
        except (Wrong, UserError) as e:
            mark, line, broken = "WRONG", str(e), 1
        except Exception as e:
            mark, line, broken = "WRONG", f"{type(e).__name__}: {first_line(e)}", 1
        print(f"{mark:5}  {name:8}  {public(' '.join(line.splitlines()))}", flush=True)
    return broken


def _in_time(check: Callable[[], str]) -> str:
    """Run a check in a thread; Wrong if it takes longer than SECONDS, and its thread is then left behind."""
    result: list[str | Exception] = []

    def run() -> None:
        try:
            result.append(check())
        except Exception as e:
            result.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not result:
        raise Wrong(f"no answer within {SECONDS:.0f} s", "look at what it waits for (a network, a disk)")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def python() -> str:
    """Return the versions of Python and flexgs; Wrong unless Python is 3.11, 3.12 or 3.13."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise Wrong(f"Python {platform.python_version()}", "flexgs is made for 3.11, 3.12 and 3.13")
    return f"{platform.python_version()}, flexgs {version('flexgs')}"


def torch_build() -> str:
    """Return the versions of torch, of its CUDA, of nvcc and of gsplat, which is compiled against both."""
    import torch
    from torch.utils import cpp_extension

    torch_cuda, gsplat = torch.version.cuda, installed("gsplat")
    nvcc = Path(cpp_extension.CUDA_HOME or "/usr/local/cuda") / "bin" / "nvcc"
    printed = said([str(nvcc), "--version"]) if nvcc.is_file() else ""
    release = re.search(r"release (\d+\.\d+)", printed)
    compiler = release[1] if release else None
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    compiled = any(Path(extensions).glob("**/gsplat_cuda.so"))
    if torch.cuda.is_available() and (problem := gsplat_problem(torch_cuda, compiler, gsplat, compiled)):
        raise problem
    return (f"{torch.__version__} for {f'CUDA {torch_cuda}' if torch_cuda else 'the CPU'}, nvcc "
            f"{compiler or 'none'}, gsplat {gsplat or 'none'}{' (compiled)' if gsplat and compiled else ''}")


def gsplat_problem(torch_cuda: str | None, compiler: str | None, gsplat: str | None,
                   compiled: bool) -> Wrong | None:
    """Say why gsplat would not render on this machine's GPU, judged by versions; None if it would.

    Args:
        torch_cuda: the version of CUDA that torch was built for, such as 12.4.
        compiler: the version of nvcc; None if there is no nvcc.
        gsplat: the version of gsplat; None if it is not installed.
        compiled: whether gsplat's kernels are compiled already, so that nvcc is not needed.
    """
    if gsplat is None:
        return Wrong("a GPU, but no gsplat", "pip install 'flexgs[cuda]'")
    if compiled:
        return None
    if compiler is None:
        return Wrong("gsplat is not compiled, and there is no nvcc",
                     f"install the CUDA {torch_cuda} toolkit, or take the image of cluster/Dockerfile")
    if compiler.split(".")[0] != str(torch_cuda).split(".")[0]:
        return Wrong(f"torch is for CUDA {torch_cuda}, nvcc is {compiler}",
                     f"gsplat compiles against both: install the toolkit {torch_cuda} and set CUDA_HOME")
    return None


def gpu() -> str:
    """Return the GPUs that torch can use, or that only the driver sees."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
        return f"{len(found)} visible to torch: {names}"
    driver = said(["nvidia-smi", "-L"]).splitlines() if shutil.which("nvidia-smi") else []
    if driver:
        return (f"none for torch, although the driver has {len(driver)}: install a torch for CUDA to "
                f"train on {driver[0][:60]}")
    return "none visible to torch"


def backend() -> str:
    """Return the rasterizer that --device auto would use."""
    import torch

    if torch.cuda.is_available():
        return "gsplat, as torch finds a CUDA device (--device cpu: numba)"
    return "numba on the CPU, as torch finds no CUDA device"


def kernels() -> str:
    """Return numba's cache of the compiled CPU kernels; Wrong if no folder can hold it."""
    try:
        from flexgs.raster.cpu.kernels import project_fwd
    except RuntimeError as e:
        raise Wrong(f"no place for compiled kernels ({str(e).splitlines()[0]})",
                    "set NUMBA_CACHE_DIR to a folder that can be written") from None
    place, asked = Path(str(project_fwd.stats.cache_path)), os.environ.get("NUMBA_CACHE_DIR")
    with tempfile.TemporaryFile(dir=place):
        pass
    if asked and not place.is_relative_to(Path(asked).absolute()):
        return f"kept in {place}; NUMBA_CACHE_DIR={asked} cannot be written"
    there = any(place.glob("*.nbc"))
    return f"kept in {place}, {'compiled' if there else 'compiled at the first start, 20 s'}"


def threads() -> str:
    """Return the CPU rasterizer's threads and the free memory; Wrong for a bad FLEXGS_NUM_THREADS."""
    if (value := os.environ.get("FLEXGS_NUM_THREADS")) and not value.isdecimal():
        raise Wrong(f"FLEXGS_NUM_THREADS={value}", "expected a number")
    from flexgs.pool import get_num_threads

    free = psutil.virtual_memory().available
    # the cores that this process may use, where the system can say
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (f"{get_num_threads()} of {cores} cores for the rasterizer on the CPU, "
            f"{free / 1e9:.1f} GB of memory free")


def ray_cluster(address: str | None) -> str:
    """Return what the Ray cluster at address has; UserError if an address was named and none answers."""
    from flexgs.ray_address import find

    if (found := find(address)) is None:
        return f"{version('ray')}; no cluster named: jobs start Ray on this machine"
    machines = f"{found.machines} machine{'s' * (found.machines > 1)}"
    return (f"{version('ray')}; {found.address} has {machines}, {found.cpus:.0f} CPUs and "
            f"{found.gpus:.0f} GPUs")


def mlflow_server(uri: str | None, storage: Path) -> str:
    """Write a run with a file to MLflow and delete it; Wrong if that fails. No database is created."""
    from flexgs.tracking import sqlite_uri

    telemetry.turn_off()
    for key, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}.items():
        os.environ.setdefault(key, value)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(storage / "mlflow.db")
    if (uri.startswith("sqlite:///")
        and not (database := Path(unquote(uri.removeprefix("sqlite:///")))).exists()):
        _writable(database.parent)
        return f"{version('mlflow')}; {uri}, made by the first job"
    cure = ("correct MLFLOW_TRACKING_URI or --mlflow-uri, or start it; trainings go on without, and send it "
            "later what it missed")
    try:
        import logging

        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        client = mlflow.MlflowClient(uri)
        (experiment,) = client.search_experiments(max_results=1)
        run = client.create_run(experiment.experiment_id, run_name="flexgs doctor").info.run_id
        try:
            if not uri.startswith("sqlite:"):  # beside a database, files go to a folder that a job chooses
                client.log_text(run, "written by flexgs doctor\n", "doctor.txt")
        finally:
            client.delete_run(run)
    except Exception as e:
        raise Wrong(f"{uri} cannot be written ({first_line(e)})", cure) from None
    return f"{version('mlflow')}; {uri}, written to"


def disk(storage: Path) -> str:
    """Return the free space where runs go; Wrong if the folder cannot be written or has under LEAST_FREE."""
    there = _writable(storage)
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise Wrong(f"{free / 1e9:.1f} GB free in {storage.absolute()}",
                    "free some, or choose another with --storage; a run needs up to "
                    f"{LEAST_FREE / 1e9:.0f} GB")
    return f"{free / 1e9:.0f} GB free in {storage.absolute()}"


def captures(data_root: Path | None) -> str:
    """Return the captures in data_root, or the built-in ones; Wrong if data_root holds none."""
    from flexgs.datasets.catalog import find_scenes
    from flexgs.demo.synthetic import SYNTHETIC

    if data_root is None:
        return f"no --data-root named: the built-in {' and '.join(SYNTHETIC)}"
    try:
        names = [scene.name for scene in find_scenes(data_root.expanduser())]
    except UserError as e:
        raise Wrong(str(e), "correct --data-root") from None
    return f"{len(names)} in {data_root}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"


def lpips() -> str:
    """Return where LPIPS has its weights; Wrong if a named folder of weights cannot be read."""
    from flexgs.image.lpips import FILES, WEIGHTS_VARIABLE, load, unavailable

    if folder := os.environ.get(WEIGHTS_VARIABLE):
        try:
            for net in ("vgg", "alex"):
                if any((Path(folder) / name).exists() for name in FILES[net]) or net == "vgg":
                    load(net, folder)  # type: ignore[arg-type]
        except UserError as e:
            raise Wrong(str(e), f"correct {WEIGHTS_VARIABLE}, or unset it: LPIPS is then left out") from None
    if reason := unavailable():
        return f"left out: {reason}"
    return f"weights in {folder}" if folder else "torchvision downloads the weights at their first use"


def extras() -> str:
    """Return which optional packages are installed; a missing one is never wrong."""
    found = []
    for name, (extra, what) in EXTRAS.items():
        cure = f"no ({what}: pip install flexgs[{extra}])"
        found.append(f"{name} {'yes' if importlib.util.find_spec(name) else cure}")
    node = "yes" if shutil.which("node") else "no (splat-transform: streamed formats)"
    return ", ".join([*found, f"node {node}"])


def installed(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _writable(folder: Path) -> Path:
    """Return the folder, or the nearest existing one above it; Wrong unless it can be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as e:
        raise Wrong(f"{folder.absolute()} cannot be written ({e.strerror})",
                    "choose another with --storage") from None


def said(command: Sequence[str]) -> str:
    """Return what a program prints; an empty text if it cannot be started or takes over 10 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
