"""The wheel, installed where there is no checkout: it has all files, and its commands and library work."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin/ of an environment with the wheel; other packages are those of the tests' environment."""
    pytest.importorskip("setuptools", minversion="77", reason="no setuptools to build the wheel with")
    at = tmp_path_factory.mktemp("wheel")
    for name in ("flexgs", "ray_jobs", "tuning"):
        shutil.copytree(ROOT / name, at / "source" / name,
                        ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, at / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", at / "dist", at / "source"], check=True)
    wheel, = (at / "dist").glob("flexgs-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", at / "venv"], check=True)
    python = at / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    site = next((at / "venv" / "lib").glob("python3*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(installed: Path, cwd: Path, *words: object) -> str:
    """What a program of the environment prints, in an environment with nothing else."""
    environment = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(cwd)}
    done = subprocess.run([installed / str(words[0]), *map(str, words[1:])], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_trains_and_cuts_outside_the_checkout(installed, capture, tmp_path):
    where = run(installed, tmp_path, "python", "-c",
                "import flexgs, ray_jobs, tuning; print(flexgs.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "flexgs", "--version") == "flexgs 0.1.0\n"
    run(installed, tmp_path, "flexgs", "train", capture, "--preset", "smoke", "--steps", "20",
        "--data.factor", "1", "--base.max-splats", "400", "--evaluation.lpips")
    said = run(installed, tmp_path, "flexgs", "cut", "runs/flexgs/studio", "--budget", "10%",
               "-o", "small.spz")
    assert "40 of 400 Gaussians" in said
    assert (tmp_path / "small.spz").read_bytes().startswith(b"\x1f\x8b")
    run(installed, tmp_path, "flexgs", "cut", "runs/flexgs/studio", "--web", "page", "--html", "page.html")
    program = (ROOT / "flexgs" / "deploy" / "web" / "flexgs.js").read_text()
    assert (tmp_path / "page" / "flexgs.js").read_text() == program
    assert program in (tmp_path / "page.html").read_text()


def test_the_wheel_has_every_file_that_the_code_reads(installed):
    site = next((installed.parent / "lib").glob("python3*/site-packages"))
    try:
        tracked = subprocess.run(["git", "ls-files", "flexgs", "ray_jobs", "tuning"], cwd=ROOT, check=True,
                                 capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    assert tracked and [name for name in tracked if not (site / name).is_file()] == []
