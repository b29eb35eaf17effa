"""The README's tree is the order of the house: imports lead upwards in it, and nowhere in a circle."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = re.search(r"```\n(flexgs/.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for folder in ("flexgs", "ray_jobs", "tuning") for path in sorted((ROOT / folder).rglob("*.py"))}
ENTRANCES = ("flexgs", "flexgs.__main__")
"""The package itself, which hands on the names of its public interface, and `python -m flexgs`."""


def rooms() -> list[str]:
    """The files and folders of the tree, from the top: those of flexgs/, then ray_jobs and tuning."""
    found: list[str] = []
    for line in TREE.splitlines():
        if re.match(r"  \S", line):
            names = re.match(r"  ((?:[a-z_0-9]+(?:\.py|/) ?)+)", line)[1].split()
            found += [name.removesuffix(".py").rstrip("/") for name in names]
        elif re.match(r"ray_jobs/", line):
            break
    return [*found, "ray_jobs", "tuning"]


def imported(path: Path) -> Iterator[str]:
    """The modules of the house that a file imports, anywhere in it, but for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield from [name for name in (f"{node.module}.{alias.name}", node.module)
                            if name in MODULES][:1]


ARROWS = {module: set(imported(path)) - {module} for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if module.startswith("flexgs.") else module.split(".")[0]


def test_no_circle():
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names it


def test_imports_lead_upwards_in_the_tree():
    place = {name: i for i, name in enumerate(rooms())}
    assert {room(module) for module in MODULES if module not in ENTRANCES} == set(place)
    wrong = [f"{module} imports {other}" for module, others in ARROWS.items() if module not in ENTRANCES
             for other in others if other not in ENTRANCES and place[room(other)] > place[room(module)]]
    assert not wrong


def test_the_public_interface_is_that_of_the_command_line():
    """What `flexgs` itself imports stands above its commands, so that a program needs none of them."""
    place = {name: i for i, name in enumerate(rooms())}
    assert all(place[room(other)] < place["commands"] for other in ARROWS["flexgs"])
