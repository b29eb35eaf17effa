"""What docs/security.md says: who listens where, and where no secret goes."""

import asyncio
import gzip
import http.client
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from websockets.sync.client import connect

from flexgs import ray_address, telemetry
from flexgs.commands.deploy import Info
from flexgs.commands.guard import guard
from flexgs.commands.machine import Doctor
from flexgs.deploy.serve import application
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.model.elastic import ElasticModel
from flexgs.options import parse
from flexgs.tracking import Tracking, sqlite_uri
from flexgs.urls import public
from flexgs.view.viewer import Viewer
from flexgs.view.visitors import Visitors

TOP = Path(__file__).parent.parent
SMALL = ["--preset", "smoke", "--steps", "80", "--data.factor", "1", "--base.max-splats", "600",
         "--report-every", "20", "--checkpoint-every", "40", "--evaluation.ratios", "0.05", "1"]
CLUSTER = """
import sys, ray
from flexgs.commands.guard import guard
from ray_jobs.cluster import Cluster

def job():
    with Cluster("local", dashboard=True) as cluster:
        cluster.nodes()
        ray.get(ray.remote(lambda: 1).remote())
        print("dashboard", ray._private.worker.get_dashboard_url(), flush=True)
        sys.stdin.read()

sys.exit(guard(job))
"""


def listeners(process: psutil.Popen) -> dict[str, set[str]]:
    """The addresses that a process and all that it has started listen on, by what each is."""
    found: dict[str, set[str]] = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            line = " ".join(one.cmdline())
            name = next((part for part in ("gcs_server", "raylet/raylet", "ray::") if part in line),
                        one.name())
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(name, set()).add(connection.laddr.ip.removeprefix("::ffff:"))
        except psutil.Error:
            continue
    return found


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items()
            if not key.startswith("RAY_")} | {"PYTHONPATH": str(TOP)}


@pytest.mark.ray
def test_ray_on_a_laptop_listens_on_loopback_alone_and_wants_a_token(tmp_path):
    with psutil.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                      stderr=subprocess.PIPE, text=True,
                      env=environment() | {"HOME": str(tmp_path)}) as cluster:
        while (line := cluster.stdout.readline()) and not line.startswith("dashboard"):
            pass
        found, page = listeners(cluster), f"http://{line.split()[1]}/api/jobs/"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(page, timeout=20)
        cluster.terminate()
        # no stack of Ray's
        assert cluster.stderr.read() == "flexgs: interrupted\n" and cluster.wait(60) == 143
    assert {"gcs_server", "raylet/raylet", "ray::"} <= set(found), found
    assert set().union(*found.values()) == {"127.0.0.1"}, found
    assert refused.value.code == 401  # another user of this machine has no token, and cannot read ours
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_a_laptop_listens_on_loopback_alone(capture, tmp_path):
    """Two workers, all the time that it takes."""
    found: set[str] = set()
    with (tmp_path / "out").open("w") as out:
        job = psutil.Popen([
            sys.executable, TOP / "ray_jobs" / "train_all.py", "--data-root", capture.parent, "--storage",
            tmp_path, "--ray-address", "local", "--workers", "2", "--batch", "2", *SMALL], stdout=out,
                           stderr=out, env=environment())
        while job.poll() is None:
            for name, addresses in listeners(job).items():
                found |= {f"{name} {address}" for address in addresses}
            psutil.wait_procs([job], timeout=0.5)
    assert job.returncode == 0, (tmp_path / "out").read_text()
    assert any(name.startswith("ray::")
               for name in found) and {name.split()[-1] for name in found} == {"127.0.0.1"}, found


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Somebody's run, whose parts lead out of it, beside what nobody is to see."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.txt").write_text("private")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    return run


def ask(port: int, path: str, *headers: str, method: str = "GET",
        host: str = "127.0.0.1") -> tuple[int, bytes]:
    """The status and all that comes back, byte for byte as asked."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close", *headers]
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return int(answer.split()[1]), answer


@contextmanager
def served(folder: Path, *names: str, cors: Sequence[str] = ()) -> Iterator[int]:
    """The port at which application() answers while the block runs."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application(folder, Visitors("127.0.0.1", names, cors)), access_log=None)

    async def begin() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
    try:
        yield runner.addresses[0][1]
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_nothing_outside_of_a_run_is_sent(folder, tmp_path):
    secret, outside = tmp_path / "outside" / "private.txt", tmp_path / "outside"
    shutil.rmtree(folder / "cuts")
    (folder / "cuts").symlink_to(outside)
    (folder / "model.fgs").symlink_to(secret)
    with served(folder) as port:
        for path in ("/cuts/", "/cuts", "/cuts/private.txt", "/config.json", "/cuts/../config.json"):
            assert ask(port, path)[0] == 404, path
        status, packed = ask(port, "/model.fgs", "Range: bytes=0-5")
        assert status == 206 and packed.endswith(b"FLEXGS")
        (folder / "model.fgs").unlink()
        (folder / "model.fgs").symlink_to(secret)  # while it is served
        assert ask(port, "/model.fgs")[0] == 404
    assert secret.read_text() == "private"
    shutil.move(folder / "model", outside / "model")
    for link, target in ((folder / ".published", outside), (folder / "model", outside / "model")):
        link.symlink_to(target)
    with pytest.raises(UserError, match="leads out of"):
        application(folder, Visitors("127.0.0.1"))


def test_pages_of_other_servers_that_are_named_may_ask(tmp_path):
    raw = bytes(range(256)) * 8
    (tmp_path / "m.fgs").write_bytes(raw)
    shop = "Origin: https://shop.example"
    with served(tmp_path, cors=("https://shop.example",)) as port:
        for path, expected in (("/m.fgs", 206), ("/none.fgs", 404)):
            status, answer = ask(port, path, shop, "Range: bytes=10-19")
            assert status == expected and b"Access-Control-Allow-Origin: https://shop.example" in answer
            assert b"Access-Control-Expose-Headers: Content-Range, ETag" in answer
        assert ask(port, "/m.fgs", shop, "Range: bytes=10-19")[1].endswith(b"\r\n\r\n" + raw[10:20])
        status, answer = ask(port, "/m.fgs", shop, "Access-Control-Request-Method: GET", method="OPTIONS")
        assert status == 204 and b"Access-Control-Allow-Headers: Range, If-Range" in answer
        for origin in ("https://other.example", "https://shop.example:8443", "null"):
            assert ask(port, "/m.fgs", f"Origin: {origin}")[0] == 403
            assert ask(port, "/m.fgs", f"Origin: {origin}", method="OPTIONS")[0] == 403
        answer = ask(port, "/m.fgs")[1]
        assert b"Access-Control" not in answer and b"Vary: Origin" in answer  # a cache keeps them apart
        (tmp_path / "m.fgs.gz").write_bytes(gzip.compress(raw))
        assert b"Vary: Accept-Encoding, Origin" in ask(port, "/m.fgs", shop, "Accept-Encoding: gzip")[1]
    with served(tmp_path, cors=("*",)) as port:
        assert ask(port, "/m.fgs", "Origin: https://other.example")[0] == 200
    for wrong in ("shop.example", "https://shop.example/", "ftp://shop.example", "", "https://a b"):
        with pytest.raises(UserError, match=f"^--cors {wrong}: expected the origin of a page"):
            Visitors("127.0.0.1", origins=[wrong])


def test_versions_of_a_file_are_told_apart_and_connections_kept(tmp_path):
    raw = bytes(range(256)) * 8
    (tmp_path / "m.fgs").write_bytes(raw)
    (tmp_path / "index.html").write_text("<title>page</title>")
    (tmp_path / "x.js").write_text("plain")
    (tmp_path / "x.js.gz").write_bytes(gzip.compress(b"packed"))
    with served(tmp_path) as port:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

        def get(path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
            line.request("GET", path, headers={name.replace("_", "-"): headers[name] for name in headers})
            answer = line.getresponse()
            return answer.status, answer.read(), answer.headers

        status, _, headers = get("/m.fgs")
        kept, tag = line.sock, headers["ETag"]
        assert status == 200 and tag.startswith('"')
        assert get("/m.fgs", If_None_Match=tag)[0] == 304
        assert get("/m.fgs", Range="bytes=5-9", If_Range=tag)[:2] == (206, raw[5:10])
        for other in ('"other"', f"W/{tag}", "Mon, 01 Jan 2001 00:00:00 GMT"):
            assert get("/m.fgs", Range="bytes=5-9", If_Range=other)[:2] == (200, raw)
        assert get("/", Accept="text/html")[1] == b"<title>page</title>"
        assert get("/x.js")[1] == b"plain"
        status, body, headers = get("/x.js", Accept_Encoding="gzip")
        assert gzip.decompress(body) == b"packed" and headers["Content-Encoding"] == "gzip"
        assert line.sock is kept


def test_what_is_served_is_made_of_the_model_that_is_there(folder):
    """Whichever of the two is newer: clocks are set back, and runs are copied with their times."""
    with served(folder) as port:
        first = ask(port, "/model.fgs")[1]
    model = folder / "model"
    splats = ElasticModel.load(model)
    splats.splats.means.add_(1.0)
    splats.save(model)
    os.utime(model / "model.safetensors", (1, 1))
    with served(folder) as port:
        assert ask(port, "/model.fgs")[1] != first
    before = (folder / "model.fgs").stat()
    with served(folder):  # and only then
        assert (folder / "model.fgs").stat().st_ino == before.st_ino


def test_nothing_outside_of_a_folder_is_sent(tmp_path, caplog):
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "private.txt").write_text("private")
    (top / "a.txt").write_text("public")
    (top / "same.txt").symlink_to("a.txt")
    (top / "out.txt").symlink_to(tmp_path / "private.txt")
    (top / "out").symlink_to("/etc")
    (top / "circle").symlink_to("circle")
    with served(top) as port:
        assert ask(port, "/same.txt")[1].endswith(b"public")
        outside = ["/out.txt", "/out/", "/out/hostname", "/circle", "/../private.txt", "/%2e%2e/private.txt",
                   "/..%2fprivate.txt", "/out%2fhostname", "/a%00.txt", f"/{'x' * 5000}", f"/{'x/' * 2000}",
                   "//etc/hostname"]
        for path in outside:
            status, answer = ask(port, path)
            assert status in (400, 403, 404) and b"private" not in answer, path
        assert ask(port, "/a.txt", method="HEAD")[0] == 200 and ask(port, "/a.txt", method="DELETE")[0] == 405
        assert ask(port, "/a.txt", "Range: bytes=900-")[0] == 416
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("bound", "host", "origin", "answered"), [
    ("127.0.0.1", "127.0.0.1:80", None, True), ("127.0.0.1", "localhost:9000", None, True),
    ("::1", "[::1]:80", None, True), ("127.0.0.1", "evil.example:80", None, False),
    ("127.0.0.1", "127.0.0.1.evil.example", None, False),
    ("127.0.0.1", "localhost.", None, False), ("127.0.0.1", "", None, False), ("127.0.0.1", "[", None, False),
    ("127.0.0.1", "me@evil.example", None, False), ("127.0.0.1", "10.0.0.7", None, False),
    ("0.0.0.0", "10.0.0.7:80", None, True), ("0.0.0.0", "evil.example", None, False),
    ("::", "[fd00::1]:80", None, True), ("lab", "LAB:80", None, True), ("lab", "proxy.example", None, True),
    ("lab", "localhost", None, False), ("127.0.0.1", "localhost:80", "http://localhost:80", True),
    ("127.0.0.1", "localhost:80", "http://localhost:81", False),
    ("127.0.0.1", "localhost:80", "http://evil.example", False), ("127.0.0.1", "localhost:80", "null", False),
    ("127.0.0.1", "localhost:80", "http://[", False),
    ("127.0.0.1", "localhost:80", "chrome-extension://localhost:80", False),
    ("127.0.0.1", "evil@localhost", None, False), ("127.0.0.1", "localhost:80, evil", None, False),
    ("127.0.0.1", "localhost:evil", None, False), ("127.0.0.1", "localhost/x", None, False),
])
def test_who_is_answered(bound, host, origin, answered):
    refusal = Visitors(bound, ["proxy.example"]).refusal([host], [origin] if origin else [])
    assert (refusal is None) == answered and (answered or refusal.count("\n") == 1)
    assert Visitors(bound).refusal([host, host], []) and Visitors(bound).refusal([], [])


def test_serve_asks_who_is_there(folder):
    with served(folder, "proxy.example") as port:
        assert ask(port, "/", host="proxy.example")[0] == 200
        assert ask(port, "/", host="evil.example")[0] == 403
        assert ask(port, "/", "Origin: http://evil.example")[0] == 403


def test_the_viewer_asks_who_is_there(trained, caplog):
    """If this fails with another version of viser, it starts its server in another way:
    flexgs/view/viser_server.py."""
    viser = pytest.importorskip("viser", reason="viser is not installed")
    viewer = Viewer({"a": open_model(trained)}, None, "127.0.0.1", 0, "cpu")
    socket_headers = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                      "Sec-WebSocket-Key: MDAwMDAwMDAwMDAwMDAwMA==",
                      f"Sec-WebSocket-Protocol: viser-v{viser.__version__}")
    try:
        port = viewer.server.get_port()
        assert ask(port, "/")[0] == 200 and ask(port, "/", host="evil.example")[0] == 403
        for path in ("/../x", "/%00", f"/{'x' * 5000}"):
            assert ask(port, path)[0] == 404
        for headers in (("Origin: http://evil.example",), ("Origin: null",),
                        (f"Origin: http://localhost:{port}",)):
            assert ask(port, "/", *socket_headers, *headers)[0] == 403
        assert ask(port, "/", *socket_headers, host="evil.example")[0] == 403
        with connect(f"ws://127.0.0.1:{port}", origin=f"http://127.0.0.1:{port}",
                     subprotocols=[f"viser-v{viser.__version__}"]):
            pass
        assert viewer.server.request_share_url() is None  # which any browser may ask for
    finally:
        viewer.stop()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("text", "shown"), [
    ("https://me:hush@mlflow.example/x", "https://mlflow.example/x"),
    ("postgresql://me:hush@db/mlflow: no such host", "postgresql://db/mlflow: no such host"),
    ("postgresql://me:hu@sh@db/x", "postgresql://db/x"),
    ("postgresql://me:hu/sh@db/x", "postgresql://db/x"),
    ("postgresql://me:hu?s#h@db/x", "postgresql://db/x"),
    ("--mlflow-uri 'postgresql://me:hu sh@db/x' --steps 4", "--mlflow-uri 'postgresql://db/x' --steps 4"),
    ("redis://:hush@h/0 and https://hush@h/x", "redis://h/0 and https://h/x"),
    ("could not parse 'postgresql://me:hush", "could not parse 'postgresql://me"),
    ("http://me:12/hush@h", "http://h"),
    ("p+q://db/x?user=hush&password=hush&a=1", "p+q://db/x?user=***&password=***&a=1"),
    ("https://h/x#access_token=hush", "https://h/x#access_token=***"),
    ("https://h/x#hush", "https://h/x#***"),
    ("https://h/x?X-Amz-Signature=hush&sig=hush", "https://h/x?X-Amz-Signature=***&sig=***"),
    ("s3://b/x?access_key=hush&endpoint_override=me:hush@h:9000&scheme=http",
     "s3://b/x?access_key=***&endpoint_override=h:9000&scheme=http"),
    ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhush", "mssql+pyodbc:///?odbc_connect=***"),
    ("s3://b?endpoint_override=http%3A%2F%2Fme%3Ahush%40h", "s3://b?endpoint_override=http://h"),
    ("connection failed: host=db password=hush", "connection failed: host=db password=***"),
    ("AWS_SECRET_ACCESS_KEY=hush python x --token hush", "AWS_SECRET_ACCESS_KEY=*** python x --token ***"),
    ("Authorization: Bearer hushhush", "Authorization: Bearer ***"),
    ("{'password': 'hush'}", "{'password': ***}"),
    ("x-api-key: hush\nA: b", "x-api-key: ***\nA: b"),
    ("aws_secret_access_key = hush", "aws_secret_access_key = ***"),
    ("Set-Cookie: sid=hush; Path=/", "Set-Cookie: ***"),
    ("Authorization: token hush", "Authorization: ***"),
    ("https://h/x?code=hush&a=1", "https://h/x?code=***&a=1"),
    ("no access for hf_hushhushhushhushhush", "no access for ***"),
    *((same, same) for same in (
        "sqlite:////data/mlflow.db", "file:///tmp/x@y/z", "http://127.0.0.1:5000/x@y", "http://[::1]:5000/x",
        "databricks://profile", "http://127.0.0.1:5000 cannot be written (mail a@b)", "runs//a:b/c.ply",
        "sqlite:////data/a%20b.db",
        "http://mlflow:5000/#/experiments/1", "s3://b/x?endpoint_override=127.0.0.1:9000&scheme=http",
        "https://h/a/@b/c", "/etc/passwd: File exists", "token.json: no such file")),
])
def test_what_is_shown_of_a_text_has_no_secret(text, shown):
    assert public(text) == shown


SECRETS = ("http://me:hu@sh@127.0.0.1:9/x?token=hush", "postgresql://me:hu/sh@127.0.0.1:9/x",
           "nothing+p://db/x?user=hush&password=hush",
           "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhush")


@pytest.mark.parametrize("uri", SECRETS)
def test_no_password_is_printed(uri, tmp_path, capfd, caplog, monkeypatch):
    """By doctor, by the warnings of a training that MLflow does not answer, and by a command that goes
    wrong."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    guard(lambda: parse(Doctor, ["--storage", str(tmp_path), "--mlflow-uri", uri, "--ray-address", uri],
                        "doctor")())
    run = Tracking(uri, "flexgs-test").run(tmp_path / "fox", "fox", kind="scene")
    run.start()
    assert guard(lambda: parse(Info, [uri], "info")()) == 2
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "mlflow" in printed and not re.search("hush|hu@sh|hu/sh", printed), printed


def test_no_password_is_kept_by_mlflow(tmp_path):
    secret = f"train --storage '{SECRETS[1]}' {SECRETS[2]}"
    run = Tracking(sqlite_uri(tmp_path / "mlflow.db"), "flexgs-test").run(
        tmp_path / "fox", "fox", kind="scene", tags={"command": secret}, params={"where": secret})
    run.start()
    run.describe(secret)
    assert run.finish("FAILED", secret)
    assert (b"train --storage" in (kept := (tmp_path / "mlflow.db").read_bytes())
            and not re.search(b"hush|hu/sh", kept))


def test_nobody_is_told(monkeypatch):
    """As MLflow and Ray themselves read their settings; all that is shipped starts them so."""
    from mlflow.telemetry import utils
    from ray._common.usage import usage_lib

    for name in telemetry.OFF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(utils, "_IS_IN_CI_ENV_OR_TESTING", False)
    assert not utils.is_telemetry_disabled()
    assert guard(lambda: 0) == 0
    assert utils.is_telemetry_disabled() and not usage_lib.usage_stats_enabled()
    for name in telemetry.OFF:
        monkeypatch.delenv(name)
    files = {path: path.read_text() for path in (TOP / "cluster").rglob("*") if path.is_file()}
    for path, text in files.items():
        if path.suffix != ".md" and " server --host 127.0.0.1" in text:
            assert "MLFLOW_DISABLE_TELEMETRY" in text, path
        for start in re.findall(r"ray start(?:.*\n?.*)", text if path.suffix != ".md" else ""):
            assert "--disable-usage-stats" in start, path
    tracking = Tracking("sqlite:////x.db", "e")
    tracking.id = "1"
    assert ("MLFLOW_DISABLE_TELEMETRY=true" in tracking.how_to_open()
            and "--allowed-hosts" in tracking.how_to_open())


@pytest.mark.parametrize("address", [
    "garbage", "localhost", "http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1:9", "127.0.0.1:0",
    "127.0.0.1:99999", "me:hush@127.0.0.1:9", "auto", "[::1:9", "nothing here:1"])
def test_what_is_no_ray_cluster_is_refused_at_once(address, monkeypatch):
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"^RAY_ADDRESS .*expected host:port|run ray start") as refused:
        ray_address.find(None)
    assert "\n" not in str(refused.value) and "hush" not in str(refused.value)


def test_what_answers_and_is_not_ray_is_given_up(monkeypatch):
    monkeypatch.setattr(ray_address, "SECONDS", 4.0)
    with (socket.create_server(("127.0.0.1", 0)) as silent,
          pytest.raises(UserError, match="something answers there, but not as Ray does")):
        ray_address.find(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_cluster_is_not_refused_because_this_machine_is_busy(monkeypatch):
    """Python and Ray may take their time to start: only the answer has an end."""
    monkeypatch.setattr(ray_address, "SECONDS", 2.0)
    monkeypatch.setattr(ray_address, "_ASK", "import time; time.sleep(2.5); print('imported', flush=True)\n"
                                             "print([1, 2, 0])")
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        assert ray_address.find(address) == ray_address.Found(address, 1, 2, 0)
