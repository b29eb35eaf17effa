"""What is imported is declared, what is declared is imported, and all that is installed has a version, a hash
and a lock."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name,
          lines in PROJECT["optional-dependencies"].items()}
DECLARED = {"": [Requirement(line) for line in PROJECT["dependencies"]], **EXTRAS}
"""What each extra brings, and '' always."""
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "xdist": "pytest-xdist"}
"""The package of a module that is named otherwise."""
NOT_IMPORTED = {
    "ninja": "torch compiles gsplat with it",
    "zstandard": "gsply compresses SPZ 4 with it",
    "nvidia-ml-py": "MLflow reads the load of GPUs with it",
    "google-api-python-client": "Ray starts machines with it",
    "google-auth": "Ray starts machines with it",
    "psycopg2-binary": "MLflow's server reaches Postgres with it",
    "flask": "moto's server needs it", "flask-cors": "moto's server needs it", "ruff": "a program",
    "mypy": "a program", "check-jsonschema": "a program", "tensorboard": "a program",
    "ipykernel": "nbclient runs notebooks with it", "setuptools": "pip builds the wheel with it"}
"""What is declared for somebody else who imports it."""


def pins(name: str) -> list[Requirement]:
    """The lines of a file of requirements, without hashes."""
    text = re.sub(r"\s*\\\n\s*--hash=\S+", "", (TOP / name).read_text())
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


PINS = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins("constraints.txt")
        if not pin.marker or pin.marker.evaluate()}
"""The version of every package that this machine may need."""


def imported(*folders: str) -> dict[str, Path]:
    """The packages that Python files in folders import, each with one that does."""
    files = [file for folder in folders for file in (TOP / folder).rglob("*.py")]
    ours = {"flexgs", "ray_jobs", "tuning", "tests",
            "conftest", *(file.stem for file in (TOP / "tests").glob("*.py"))}
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                       [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level
                       else [])
            for module in {module.partition(".")[0] for module in modules} - ours - sys.stdlib_module_names:
                found[canonicalize_name(NAMES.get(module, module))] = file
    return found


def declared(*extras: str) -> set[str]:
    return {canonicalize_name(r.name) for extra in extras for r in DECLARED[extra]} - {"flexgs"}


def test_imported_is_declared_and_the_reverse():
    """Packages that others bring today are gone tomorrow; those that nobody imports are installed in vain."""
    product, all_of_it = imported("flexgs", "ray_jobs", "tuning"), imported("flexgs", "ray_jobs", "tuning",
                                                                            "tests", "docs")
    assert len(product) > 20
    assert {name: file for name, file in product.items()
            if name not in declared(*(extra for extra in DECLARED if extra != "dev"))} == {}
    assert {name: file for name, file in all_of_it.items() if name not in declared(*DECLARED)} == {}
    assert declared(*DECLARED) - set(all_of_it) == set(NOT_IMPORTED)


def test_the_document_names_what_is_declared():
    """Each package in a row of its own, with the extras that bring it; those of `dev` alone in a sentence."""
    text = (TOP / "docs" / "dependencies.md").read_text()
    always, extras, left_out = (text.index(f"## {title}") for title in ("Always", "Extras", "Considered"))
    assert re.findall(r"^\| `([\w-]+)` \|", text[always:extras], re.M) == [r.name for r in DECLARED[""]]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \|", text[extras:left_out], re.M)
    named = {(name, extra) for name, brought in rows for extra in re.findall(r"`(\w+)`", brought)}
    sentence = re.search(r"^`dev`, .*?\n\n", text, re.M | re.S)[0]
    named |= {(name, "dev") for name in re.findall(r"`([\w-]+)`", sentence)} - {("dev", "dev")}
    assert named == {(r.name, extra) for extra, brought in EXTRAS.items() for r in brought
                     if r.name != "flexgs"}


def installed() -> set[str]:
    """All that flexgs with its extras has brought into this environment, and what that has brought."""
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirements in DECLARED.values() for requirement in requirements
               if requirement.name != "flexgs"]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), wanted
            if key in found:
                continue
            try:
                waiting += [(Requirement(line), wanted) for line in requires(requirement.name) or ()]
            except PackageNotFoundError:  # of an extra that is not installed here
                continue
            found.add(key)
    return {name for name, _ in found}


def test_all_that_is_installed_is_pinned():
    names = installed()
    assert len(names) > 100 and {"torch", "ray", "pandas"} < names
    assert sorted(names - set(PINS)) == []
    assert sorted(declared(*DECLARED) - set(PINS)) == []


def test_pins_are_what_is_declared():
    # one for each
    assert len(PINS) == len([pin for pin in pins("constraints.txt") if not pin.marker
                             or pin.marker.evaluate()])
    for requirement in (r for requirements in DECLARED.values() for r in requirements if r.name != "flexgs"):
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_every_pin_has_its_hashes():
    """The two files are made by one command; neither says where from, as that is another place for
    everyone."""
    assert list(map(str, pins("requirements-hashes.txt"))) == list(map(str, pins("constraints.txt")))
    text = (TOP / "requirements-hashes.txt").read_text()
    packages = re.split(r"\n(?=\S)", text.strip())[2:]
    assert len(packages) == len(pins("constraints.txt"))
    assert [p for p in packages
            if not re.fullmatch(r"\S+==\S+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", p)] == []


def test_the_hashes_without_those_of_torch(tmp_path):
    """By the command of docs/security.md, for another build of it."""
    (command,) = re.findall(r"`(sed -E .* > others.txt)`", (TOP / "docs" / "security.md").read_text())
    shutil.copy(TOP / "requirements-hashes.txt", tmp_path)
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    files = "requirements-hashes.txt", "others.txt"
    paragraphs, others = (re.split(r"\n(?=\S)", (tmp_path / name).read_text()) for name in files)
    kept = {paragraph.partition("==")[0] for paragraph in others}
    gone = {pin.name for pin in pins("constraints.txt")} - kept
    assert {"torch", "torchvision", "triton", "nvidia-cublas", "cuda-toolkit"} < gone
    assert {name.partition("-")[0] for name in gone} == {"torch", "torchvision", "triton", "nvidia", "cuda"}
    assert ({"torchmetrics", "nvidia-ml-py"} < kept
            and {p.strip() for p in others} < {p.strip() for p in paragraphs})


@pytest.mark.parametrize("name", ["web", "web/examples", "flexgs/formats/splat_transform"])
def test_locks_of_npm(name):
    about, lock = (json.loads((TOP / name / f"package{end}.json").read_text()) for end in ("", "-lock"))
    kind = "devDependencies" if name == "web" else "dependencies"  # what flexgs needs to run is none
    wanted = about[kind]
    root, *packages = lock["packages"].items()
    assert root[0] == "" and root[1][kind] == wanted
    locked = {where.removeprefix("node_modules/"): package for where, package in packages}
    for package, version in wanted.items():
        assert re.fullmatch(r"[\d.]+", version) and locked[package]["version"] == version
    assert all(package["integrity"].startswith("sha512-") and "resolved" not in package for _,
               package in packages)
