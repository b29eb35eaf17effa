"""The npm package in web/: its own tests on models that are packed here, and the module of pages."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flexgs import bounded
from flexgs.config import Config, count_at
from flexgs.deploy import page
from flexgs.deploy.progressive import RATIOS, Progressive, write
from flexgs.errors import UserError
from flexgs.formats import node
from flexgs.formats.node import UNREACHED
from flexgs.model.elastic import ElasticModel, make_transform
from flexgs.model.transform import Transform
from tests.conftest import random_splats

WEB = Path(__file__).parents[1] / "web"
CUTS = (0.004, 0.01, 0.02, 0.032, 0.05, 0.1, 0.15, 0.25, 0.32, 0.5, 0.73, 1.0)
ATTRIBUTES = ("means", "quats", "scales", "opacities", "sh0", "shN")


def elastic(n: int, sh_degree: int) -> ElasticModel:
    """A model whose changes are as large as trained ones."""
    config, splats = Config.from_preset("default"), random_splats(n, sh_degree=sh_degree)
    transform = make_transform(config, splats, unit=2.5)
    with torch.no_grad():
        for values in transform.parameters():
            values.normal_(0, 0.05, generator=torch.Generator().manual_seed(n))
    return ElasticModel(splats, transform.stored(), config)


def write_cases(folder: Path, sizes: tuple[int, int]) -> None:
    """Packed models, and the cuts that Python makes of them: NAME.fgs, NAME.json and NAME.bin."""
    changed = elastic(sizes[0], 3)
    plain = ElasticModel(random_splats(sizes[1], sh_degree=0), Transform(), Config.from_preset("plain"))
    for name, model in {"deltas": changed, "none": plain}.items():
        write(model, folder / f"{name}.fgs", RATIOS)
        packed, n = Progressive.open(folder / f"{name}.fgs"), len(model)
        cuts = [(ratio, packed.cut(ratio)) for ratio in CUTS]
        widths = [(name, getattr(cuts[0][1], name)[0].numel()) for name in ATTRIBUTES]
        (folder / f"{name}.json").write_text(json.dumps({"attributes": widths, "cuts": [
            {"ratio": ratio, "count": count_at(ratio, n)} for ratio in CUTS]}))
        (folder / f"{name}.bin").write_bytes(b"".join(
            getattr(cut, name).numpy().astype("<f4").tobytes() for _, cut in cuts for name in ATTRIBUTES))


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of web/ with its packages; a folder of the user's cache keeps them."""
    if not shutil.which("npm"):
        pytest.skip("found no Node.js, which the npm package is tested with")
    try:
        kept = node.kept(WEB, "npm test")
    except UserError as e:
        if UNREACHED not in str(e):
            raise
        pytest.skip(f"the packages of web/ cannot be fetched here: {e}")
    copy = tmp_path_factory.mktemp("npm") / "web"
    shutil.copytree(WEB, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    (copy / "node_modules").symlink_to(kept / "node_modules")
    return copy


def test_npm_test_on_models_that_are_packed_here(package, tmp_path, monkeypatch):
    """Cuts in JavaScript are those of Python, and whatever else the package's own tests say."""
    write_cases(tmp_path, (600, 50))
    monkeypatch.setenv("FLEXGS_DATA", str(tmp_path))
    done = bounded.run([shutil.which("npm"), "test"], 150, folder=package)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "# fail 0" in done.stdout or "ℹ fail 0" in done.stdout


def test_the_module_of_pages_is_built_from_its_sources(package, tmp_path):
    done = bounded.run([shutil.which("node"), "build.mjs", tmp_path / "flexgs.js"], 60, folder=package)
    assert done.returncode == 0, done.stderr[-2000:]
    fresh, ours = (tmp_path / "flexgs.js").read_bytes(), (page.WEB / "flexgs.js").read_bytes()
    assert fresh == ours, "web/ has changed: cd web && npm ci && npm run build writes the module anew"
    assert len(gzip.compress((package / "dist" / "flexgs.js").read_bytes())) < 30_000


@pytest.mark.parametrize("name", ["spark.html", "playcanvas.html"])
def test_examples_parse_and_import_what_the_package_exports(name, tmp_path):
    page = (WEB / "examples" / name).read_text()
    (tmp_path / "x.mjs").write_text(re.findall(r'<script type="module">(.*?)</script>', page, re.S)[0])
    imported = re.findall(r'import \{ (.*?) \} from "flexgs"', page)[0].split(", ")
    exported = re.findall(r"^export .*$", (WEB / "src" / "index.ts").read_text(), re.M)
    for wanted in imported:
        assert any(re.search(rf"\b{wanted}\b", line) for line in exported), wanted
    if not shutil.which("node"):
        pytest.skip("found no Node.js, which the examples are parsed with")
    done = bounded.run([shutil.which("node"), "--check", tmp_path / "x.mjs"], 60)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":  # python -m tests.test_web: the models that `npm test` takes by itself
    write_cases(WEB / "test" / "data", (60, 20))
