"""The npm package in web/: its own tests on models that are packed here, and the module of pages."""

import base64
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
from flexgs.deploy.progressive import RATIOS, Progressive
from flexgs.deploy.progressive import write as pack
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
        pack(model, folder / f"{name}.fgs", RATIOS)
        packed, n = Progressive.open(folder / f"{name}.fgs"), len(model)
        cuts = [(ratio, packed.cut(ratio)) for ratio in CUTS]
        widths = [(name, getattr(cuts[0][1], name)[0].numel()) for name in ATTRIBUTES]
        (folder / f"{name}.json").write_text(json.dumps({"attributes": widths, "cuts": [
            {"ratio": ratio, "count": count_at(ratio, n)} for ratio in CUTS]}))
        (folder / f"{name}.bin").write_bytes(b"".join(
            getattr(cut, name).numpy().astype("<f4").tobytes() for _, cut in cuts for name in ATTRIBUTES))


def copied(source: Path, copy: Path) -> Path:
    """A copy of web/ or its examples, with their packages, which a folder of the user's cache keeps."""
    if not shutil.which("npm"):
        pytest.skip("found no Node.js, which the npm package is tested with")
    try:
        kept = node.kept(source, "npm test")
    except UserError as e:
        if UNREACHED not in str(e):
            raise
        pytest.skip(f"the packages of {source.name}/ cannot be fetched here: {e}")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("node_modules", "dist"), dirs_exist_ok=True)
    (copy / "node_modules").symlink_to(kept / "node_modules")
    return copy


def run(folder: Path, program: str, *arguments: str | Path, seconds: float = 60) -> str:
    """What a program prints in a folder."""
    done = bounded.run([shutil.which(program), *arguments], seconds, folder=folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    shutil.copy(WEB.parent / "LICENSE", folder)  # which the build takes from beside the package
    return copied(WEB, folder / "web")


@pytest.fixture(scope="module")
def built(package) -> Path:
    """The package with dist/, and the module of pages beside it."""
    run(package, "node", "build.mjs", package / "page.js")
    return package


def test_npm_test_on_models_that_are_packed_here(package, tmp_path, monkeypatch):
    """Cuts in JavaScript are those of Python, and whatever else the package's own tests say."""
    write_cases(tmp_path, (600, 50))
    monkeypatch.setenv("FLEXGS_DATA", str(tmp_path))
    said = run(package, "npm", "test", seconds=150)
    assert "# fail 0" in said or "ℹ fail 0" in said


def test_the_module_of_pages_is_built_from_its_sources(built):
    fresh, ours = (built / "page.js").read_bytes(), (page.WEB / "flexgs.js").read_bytes()
    assert fresh == ours, "web/ has changed: cd web && npm ci && npm run build writes the module anew"
    assert len(gzip.compress((built / "dist" / "flexgs.js").read_bytes())) < 30_000


USE = """import { open, plyOf, type Budget, type Cut } from "flexgs";
import type { FlexgsView } from "flexgs/view";

export const shown = (view: FlexgsView): number | undefined => view.model?.cut?.count;
const model = await open("data:;base64,MODEL", { budget: "10%" satisfies Budget });
model.on("cut", (cut: Cut) => {
  if (!cut.last) return;
  console.log(cut.count, plyOf(cut).length);
  model.close();
});
"""


def test_the_packed_package_is_installed_and_used_elsewhere(built, tmp_path):
    """What npm publishes: both modules and their types, in a folder that has nothing else of ours."""
    run(built, "npm", "pack", "--ignore-scripts", "--pack-destination", tmp_path)
    [tarball] = tmp_path.glob("flexgs-*.tgz")
    app = tmp_path / "app"
    app.mkdir()
    run(app, "npm", "install", "--offline", "--ignore-scripts", "--no-audit", "--no-fund",
        tarball)
    assert sorted(path.name for path in (app / "node_modules").glob("[!.]*")) == ["flexgs"]
    assert (app / "node_modules/flexgs/LICENSE").read_bytes() == (WEB.parent / "LICENSE").read_bytes()
    pack(elastic(100, 1), app / "model.fgs", RATIOS)
    use = USE.replace("MODEL", base64.b64encode((app / "model.fgs").read_bytes()).decode())
    (app / "use.mts").write_text(use)
    (app / "tsconfig.json").write_text(json.dumps({"files": ["use.mts"], "compilerOptions": {
        "strict": True, "module": "nodenext", "target": "es2022", "lib": ["es2022", "dom"], "types": []}}))
    run(app, "node", built / "node_modules/typescript/bin/tsc")
    count, length = map(int, run(app, "node", "use.mjs").split())
    assert count == 10 and length > 10 * 4 * 23


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
