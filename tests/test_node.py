"""Programs of npm, from a registry on loopback: what is locked is what runs, and what cannot be is one
line."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flexgs.errors import UserError
from flexgs.formats import node

TOP = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("npm"), reason="Node.js is not installed")
PROGRAM = """#!/usr/bin/env node
const [what] = process.argv.slice(2)
if (what == "fail") { console.error("first\\n\\n  the reason  \\n"); process.exit(3) }
if (what == "hang") setInterval(() => {}, 1000)
else console.log("hello", what, "in", process.cwd())
"""


def package() -> bytes:
    """A package whose program greets, and which would like to install itself."""
    about = {"name": "greet", "version": "1.0.0", "bin": {"greet": "greet.js"},
             "scripts": {"postinstall": "touch was-run"}}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, text in (("package.json", json.dumps(about)), ("greet.js", PROGRAM)):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that wants greet 1.0.0, in an environment of its own with a registry that has it."""
    raw = package()
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(raw).digest()).decode()

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = {"name": "greet", "version": "1.0.0", "bin": {"greet": "greet.js"},
                       "hasInstallScript": True,
                       "dist": {"tarball": f"{url}/greet.tgz", "integrity": integrity}}
            body = raw if self.path.endswith(".tgz") else json.dumps(
                {"name": "greet", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.lower().startswith("npm_config_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": tmp_path, "XDG_CACHE_HOME": tmp_path / "cache",
                        "npm_config_registry": url}.items():
        monkeypatch.setenv(name, str(value))
    folder = tmp_path / "greeter"
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": {"greet": "1.0.0"}}))
    locked = {"version": "1.0.0", "integrity": integrity, "hasInstallScript": True,
              "bin": {"greet": "greet.js"}}
    (folder / "package-lock.json").write_text(json.dumps({"lockfileVersion": 3, "requires": True,
                                                          "packages": {
"": {"dependencies": {"greet": "1.0.0"}}, "node_modules/greet": locked}}))
    yield folder
    server.shutdown()
    server.server_close()


def refused(source: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        node.kept(source, "a test")
    assert all(word in str(error.value) for word in ("a test: ", *words)) and "\n" not in str(error.value)
    assert not [path for path in (node.cache() / "npm").glob("*") if path.name != ".lock"]


def test_two_at_once_fetch_it_once(source):
    code = ("from pathlib import Path; from flexgs.formats import node; f = "
            f"node.kept(Path({str(source)!r}), 'a test'); print(f, node.run(f, 'greet', 'you', "
            "seconds=20, doing='a test'))")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=TOP, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    folder = node.kept(source, "a test")
    assert said == 2 * [f"{folder} hello you in {TOP}\n\n"]
    assert not list(folder.rglob("was-run"))  # what comes from the registry installs nothing by itself
    assert [path.name for path in folder.parent.iterdir() if path.name != ".lock"] == [folder.name]


def test_what_a_program_says_and_does(source, monkeypatch):
    folder = node.kept(source, "a test")
    monkeypatch.chdir(source)
    assert node.run(folder, "greet", "a b", seconds=20, doing="a test") == f"hello a b in {source}\n"
    with pytest.raises(UserError, match=r"^a test failed: the reason$"):
        node.run(folder, "greet", "fail", seconds=20, doing="a test")
    with pytest.raises(UserError, match=r"^a test: greet did not end in 1 s"):
        node.run(folder, "greet", "hang", seconds=1, doing="a test")


def test_what_is_not_what_was_locked(source):
    lock = source / "package-lock.json"
    whole = lock.read_text()
    lock.write_text(re.sub("sha512-..", "sha512-00", whole))
    refused(source, "Integrity", "something else than package-lock.json names")
    lock.write_text(whole.replace('"1.0.0"', '"0.9.0"'))
    refused(source, "in sync", "install flexgs again")


def test_without_a_registry_or_node(source, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://someone:secret@127.0.0.1:9/")
    with pytest.raises(UserError) as error:
        node.kept(source, "a test")
    assert (node.UNREACHED in str(error.value) and "ECONNREFUSED" in str(error.value)
            and "secret" not in str(error.value))
    monkeypatch.setattr(node, "FETCH", 0.05)
    refused(source, "npm did not end in 0 s")
    monkeypatch.setenv("PATH", str(source))
    refused(source, "found no npm", "install Node.js")
