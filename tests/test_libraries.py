"""What is private in a library, or patched, is in the file of that library, and is still there."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch.distributed

ROOT = Path(__file__).parents[1]
LIBRARIES = {"ray", "torch", "mlflow", "numba", "pycolmap", "optuna", "gsplat", "torchmetrics"}
SOURCES = sorted(path for folder in ("flexgs", "ray_jobs", "tuning")
                 for path in (ROOT / folder).rglob("*.py"))


def private(path: Path) -> list[str]:
    """Imports of private names of LIBRARIES, and what is assigned to their modules."""
    found, names = [], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names
                      if a.name.split(".")[0] in LIBRARIES}
            parts = [part for a in node.names for part in a.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(a.name for a in node.names)]
        else:
            continue
        if parts[0] in LIBRARIES and any(part.startswith("_") for part in parts):
            found.append(ast.unparse(node))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            mine = isinstance(root, ast.Name) and root.id in names | {"study"}
            if mine and (isinstance(node.ctx, ast.Store) or (node.attr.startswith("_")
                         and not node.attr.startswith("__"))):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
            found.append(ast.unparse(node))
    return found


def test_private_names_are_in_the_file_of_their_library():
    assert {str(p.relative_to(ROOT)): names for p in SOURCES
            if (names := private(p)) and not p.stem.endswith("_library")} == {}


def test_the_scan_finds_them():
    assert private(ROOT / "flexgs" / "ray_library.py") and private(ROOT / "flexgs" / "torch_library.py")


@pytest.mark.parametrize("name, loss", [
    ("started_address", "without --ray-address, no cluster of `ray start` is found"),
    ("listen_on_loopback", "a local Ray listens on all interfaces"),
    ("without_dashboard", "a local Ray takes seconds longer to start"),
    ("draining_nodes", "scenes start on machines that are about to leave"),
    ("free_resources", "scenes are moved to devices that others hold"),
    ("no_room_error", "a scene whose machine is full fails, in place of waiting"),
    ("start_error", "a scene whose machine dies before its workers have begun fails")])
def test_ray_still_has(name, loss):
    from flexgs import ray_library

    for node in ast.walk(ast.parse(inspect.getsource(getattr(ray_library, name)).strip())):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, a.name) for a in node.names), loss
    if name == "listen_on_loopback":
        from ray._private import ray_constants

        assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), loss
        assert isinstance(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, str), loss
    if name == "without_dashboard":
        from ray._private import services, utils

        theirs = services.start_api_server, utils.get_dashboard_dependency_error
        with ray_library.without_dashboard():
            assert services.start_api_server not in theirs, loss
        assert theirs == (services.start_api_server, utils.get_dashboard_dependency_error)


def test_torch_still_takes_a_socket_for_its_store():
    """Without it, whoever is in the network can reach the store of a run on one machine."""
    assert "TCPStore(" in inspect.getsource(sys.modules["torch.distributed.rendezvous"])
    assert "master_listen_fd" in (torch.distributed.TCPStore.__init__.__doc__ or "")
