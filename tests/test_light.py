"""What newcomers do first starts fast: files are read, merged and written without importing torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_splats

from flexgs import ply
from flexgs.formats import save
from tests.test_cli import flexgs

HEAVY = ("torch", "ray", "mlflow", "sklearn")
RUN = f"""import sys
from flexgs import cli
try:
    cli.main()
finally:
    print("imported", *(name for name in {HEAVY} if name in sys.modules))"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("light") / "x.ply"
    save(random_splats(400, 3), path)
    return path


def imported(*args: object) -> str:
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, args)], capture_output=True, text=True,
                          check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("args", [("info",), ("cut", "--budget", "10%", "-o", "y.ply"),
                                  ("cut", "--budget", "10%", "-o", "y.spz"),
                                  ("cut", "--budget", "10%", "-o", "y.splat"),
                                  ("cut", "--budget", "4kB", "-o", "y.ply"),
                                  ("cut", "--lod", "50", "25", "-o", "levels")])
def test_torch_is_not_imported(file, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert imported(args[0], file, *args[1:]) == "imported"


def test_other_formats_are_read_without_torch(tmp_path):
    for suffix in ("splat", "compressed.ply", "spz", "sog", "latents.npz"):
        save(random_splats(50), tmp_path / f"x.{suffix}")
        assert imported("info", tmp_path / f"x.{suffix}") == "imported"


def test_attributes_that_nobody_wants_take_no_memory_but_are_checked(file, tmp_path):
    whole, some = ply.read_gaussians(file), ply.read_gaussians(file, ("means", "scales"))
    assert np.array_equal(some.means, whole.means) and np.array_equal(some.scales, whole.scales)
    assert some.shN.shape == whole.shN.shape and some.shN.strides == (0, 0, 0) and not some.shN.any()
    broken = bytearray(file.read_bytes())
    at = len(broken) - 400 * 248 + 20 * 4  # a harmonic of the first Gaussian
    broken[at:at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "x.ply").write_bytes(broken)
    assert flexgs("info", tmp_path / "x.ply") == 2
    with pytest.raises(ply.UserError, match="found NaN or infinite shN"):
        ply.read_gaussians(tmp_path / "x.ply", ("means",))


def test_blocks_of_a_file_are_joined(file, monkeypatch):
    whole = ply.read_gaussians(file)
    monkeypatch.setattr("flexgs.ply_rows.BLOCK", 7)
    assert all(np.array_equal(a, getattr(ply.read_gaussians(file), name)) for name, a in whole.items())


def test_a_text_file_takes_no_memory_for_what_it_claims(tmp_path):
    path = tmp_path / "x.ply"
    properties = "".join(f"property float {name}\n" for name in ply.ply_properties(0))
    path.write_text(f"ply\nformat ascii 1.0\nelement vertex 99999999999\n{properties}end_header\n1 2 3\n")
    with pytest.raises(ply.UserError, match="bytes, too few for its 99,999,999,999 vertex rows"):
        ply.read_gaussians(path)


def test_a_distant_model_of_boundless_gaussians_is_no_warning(recwarn):
    huge = replace(random_splats(10).arrays(), origin=(1e7, 0.0, 0.0))
    huge.scales[:] = 1e4
    assert not ply.is_wide(huge) and not recwarn.list
