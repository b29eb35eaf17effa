"""Shared by all tests: one tiny capture on disk, and random splats."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flexgs.config import Config
from flexgs.demo.synthetic import write_synthetic
from flexgs.scene import load_scene
from flexgs.splats import Splats
from flexgs.tracking import Tracking, Writer, sqlite_uri

torch.set_num_threads(1)  # idle OpenMP threads spin, and the machines that run tests have few cores
# where the tests' servers are, whatever leads outside
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take a minute each")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> object:
    """Whole files to each process, and Ray's to one of them: they take half of the time, and two at once all
    cores."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if "pytest.mark.ray" in (config.rootpath / path).read_text() else path

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes a minute: --slow runs it"))


@pytest.fixture(scope="session")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COLMAP capture of 18 views of 64 x 48 pixels."""
    return write_synthetic("studio", tmp_path_factory.mktemp("captures") / "studio", views=18, width=64,
                           height=48)


@pytest.fixture(scope="session")
def trained(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small model of that capture, not to be changed."""
    from tests.test_cli import SMALL, flexgs

    out = tmp_path_factory.mktemp("trained")
    assert flexgs("train", capture, "--output", out, *SMALL) == 0
    return out / "studio"


@pytest.fixture
def scene(capture: Path):
    return load_scene(capture, factor=1)


@pytest.fixture
def config() -> Config:
    """Both stages, a densification and an opacity reset in 120 views of a few hundred Gaussians."""
    config = Config.from_preset("smoke")
    config.steps, config.data.factor, config.base.max_splats = 120, 1, 1500
    config.base.refine_every, config.base.refine_start = 20, 0.1
    config.report_every, config.checkpoint_every, config.check_every = 20, 40, 20
    return config


@pytest.fixture
def splats() -> Splats:
    return random_splats(500)


def random_splats(n: int, sh_degree: int = 1, seed: int = 0) -> Splats:
    """n Gaussians in a ball at the origin."""
    g = torch.Generator().manual_seed(seed)
    return Splats(means=torch.randn(n, 3, generator=g), quats=torch.randn(n, 4, generator=g),
                  scales=torch.randn(n, 3, generator=g) * 0.4 - 2.5, opacities=torch.randn(n, generator=g),
                  sh0=torch.randn(n, 3, generator=g),
                  shN=torch.randn(n, (sh_degree + 1) ** 2 - 1, 3, generator=g) * 0.1)


def shared(name: str) -> Path:
    """A file or folder of real data, in $FLEXGS_SHARED or in `shared` beside the checkout; the test is
    skipped without it."""
    path = Path(os.environ.get("FLEXGS_SHARED", Path(__file__).resolve().parents[2] / "shared"), name)
    if not path.exists():
        pytest.skip(f"no real data: {path} does not exist (FLEXGS_SHARED names another folder)")
    return path


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of an S3 server on loopback: its URI, with {} for the path in it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}",
                     region_name="us-east-1").create_bucket(Bucket="bucket")
        yield f"s3://bucket/{{}}?endpoint_override={host}:{port}&scheme=http"
    server.stop()


def ended_while_mlflow_comes_back(folder: Path,
                                  begin: Callable[[Tracking], tuple[Writer, Callable]]) -> Tracking:
    """Let something end while MLflow is away, and bring MLflow back once it has missed what it was sent.

    begin: makes, with this MLflow, a writer and the function that ends it.
    """
    assert Tracking(sqlite_uri(folder / "kept" / "mlflow.db"), "test").available()
    (folder / "away").touch()  # no folder with a database
    tracking = Tracking(sqlite_uri(folder / "away" / "mlflow.db"), "test", folder / "artifacts")
    writer, end = begin(tracking)
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    while not (tracking.missed and writer.idle):
        time.sleep(0.05)
    (folder / "away").unlink()
    (folder / "kept").rename(folder / "away")
    ending.join(300)
    return tracking
