"""The one HTTP client, against a server on loopback that says what it likes."""

import asyncio
import contextlib
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from flexgs import http
from flexgs.http import HTTPError, Remote, request

TEN = b"Content-Length: 10\r\n\r\n0123456789"
NONE = b"Content-Length: 0\r\n\r\n"
PART = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/1000\r\n"


@dataclass
class Server:
    url: str
    reply: Callable[[bytes, socket.socket], None] = lambda asked, line: None
    """(request, connection): what it does."""
    asked: int = 0
    peek: bool = False
    """Leave the request in the connection, which the reply reads itself."""


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            said.asked += 1
            with contextlib.suppress(OSError):  # the client has gone, as it should
                said.reply(self.request.recv(65536, socket.MSG_PEEK if said.peek else 0), self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        tcp.daemon_threads = True
        said = Server(f"http://127.0.0.1:{tcp.server_address[1]}/m.fgs")
        thread = threading.Thread(target=tcp.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield said
        tcp.shutdown()
        thread.join()


def says(answer: bytes) -> Callable[[bytes, socket.socket], None]:
    return lambda asked, line: line.sendall(answer)


def drips(start: bytes, drop: bytes) -> Callable[[bytes, socket.socket], None]:
    def reply(asked: bytes, line: socket.socket) -> None:
        line.sendall(start)
        while True:
            time.sleep(0.02)
            line.sendall(drop)
    return reply


@pytest.mark.parametrize(("answer", "found"), [
    (b"garbage\r\n\r\n", "found an answer that is not HTTP"),
    (b"HTTP/1.1 206 OK\r\n" + b"a: b\r\n" * 5000 + b"\r\n", "found an answer that is not HTTP"),
    (b"HTTP/1.1 206 OK\r\nContent-Length: x\r\n\r\n", "found an answer that is not HTTP"),
    (b"", "the connection broke"),
    (b"HTTP/1.1 200 OK\r\nSet-Cookie: key=hunter2\r\n", "the connection broke"),
    (PART + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
     "found an answer that is not HTTP|the connection broke"),
    (PART + b"Content-Length: 10\r\n\r\nshort", "the connection broke"),
    (PART + b"Connection: close\r\n\r\nshort", "the connection broke"),
    (PART + b"Transfer-Encoding: chunked\r\n\r\nb\r\n0123456789a\r\n0\r\n\r\n",
     "found more than 10 bytes, expected no more"),
    (PART + b"Content-Encoding: gzip\r\n" + TEN, "found Content-Encoding gzip"),
    (b"HTTP/1.1 206 OK\r\n" + TEN, "without a valid Content-Range"),
    (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 9-0/10\r\n" + TEN, "without a valid Content-Range"),
    (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 5-14/100\r\n" + TEN, "found bytes 5 to 14 of 100"),
    (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\n",
     "found bytes 0 to 99 of 100"),
    (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/*\r\n" + TEN, "does not say how large the file is"),
    (b"HTTP/1.1 200 OK\r\n" + TEN, "the server sends whole files only"),
    (b"HTTP/1.1 204 No\r\n\r\n", "the server says 204 No Content"),
    (b"HTTP/1.1 404 \x1b[31m\r\nContent-Length: 0\r\n\r\n", "the server says 404 Not Found|not HTTP"),
    (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
     "found file, expected http or https behind a redirect to file:///etc/passwd"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/x\r\nContent-Length: 0\r\n\r\n",
     "an address, here or in a redirect"),
    (b"HTTP/1.1 302 Found\r\nLocation: /m.fgs\r\nContent-Length: 0\r\n\r\n",
     "found more than 5 redirects after each other"),
    (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "found more than 5 redirects after each other"),
])
def test_answers_that_are_none_are_one_line(server, answer, found):
    server.reply = says(answer)
    with pytest.raises(HTTPError, match=rf"^{server.url}: .*({found})") as error:
        Remote(server.url).read(0, 10)
    assert str(error.value).isprintable() and server.asked <= 6


@pytest.mark.parametrize("reply", [
    drips(b"HTTP/1.1 206 OK\r\n", b"a"),
    drips(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    drips(PART + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    drips(PART + b"Content-Length: 10\r\n\r\n", b""),
    lambda asked, line: time.sleep(1)], ids=["head", "continue", "chunk", "silent", "no answer"])
def test_an_answer_that_never_ends_is_given_up(server, reply, monkeypatch):
    monkeypatch.setattr(http, "QUIET", 0.3)
    server.reply = reply
    with pytest.raises(HTTPError,
                       match=r"takes too long|no answer for 0\.3 s|not HTTP|the connection broke") as error:
        Remote(server.url).read(0, 10)
    assert error.value.transient


def test_an_endless_body_takes_neither_memory_nor_time(server, monkeypatch):
    def endless(asked: bytes, line: socket.socket) -> None:
        line.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            line.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    server.reply, sizes = endless, []
    with pytest.raises(HTTPError, match="found more than 5,000,000 bytes"), request(server.url) as answer:
        sizes.extend(map(len, answer.chunks(5_000_000)))
    assert sum(sizes) <= 5_000_000 and max(sizes) <= 1 << 21
    with pytest.raises(HTTPError,
                       match="the answer takes too long"), request(server.url, seconds=0.2) as answer:
        for _ in answer.chunks(1 << 60):
            pass


def test_a_slow_drip_of_a_body_has_an_end(server, monkeypatch):
    monkeypatch.setattr(http, "QUIET", 0.3)
    server.reply = drips(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\n",
                         b"x")
    with pytest.raises(HTTPError, match="the answer takes too long"):
        Remote(server.url).read(0, 100)


def test_a_redirect_is_followed_with_the_range_and_without_the_password(server):
    asked = []

    def reply(request: bytes, line: socket.socket) -> None:
        asked.append(request)
        port = server.url.split(":")[2].split("/")[0]
        line.sendall(PART + TEN if b"/other" in request else
                     f"HTTP/1.1 307 Moved\r\nLocation: http://localhost:{port}/other file\r\n".encode()
                     + NONE)

    server.reply = reply
    assert Remote(server.url.replace("//", "//me:pass@")).read(0, 10) == b"0123456789"
    assert (b"Authorization: Basic" in asked[0] and b"GET /other%20file" in asked[1]
            and b"Authorization" not in asked[1])
    assert all(b"Range: bytes=0-9\r\n" in one for one in asked)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_a_redirect_never_leads_from_https_to_http(server, tmp_path):
    """In a process of its own, which trusts the certificate."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                    "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=IP:127.0.0.1"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + server.url.encode() + b"\r\n" + NONE
    moved_safely = moved.replace(b"http:", b"https:")

    def reply(start: bytes, line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as safe:
            asked = safe.recv(65536)
            safe.sendall(moved if b"/down" in asked else moved_safely if b"/up" in asked else PART + TEN)

    server.reply, server.peek = reply, True
    script = ("import sys; from flexgs.errors import UserError; from flexgs.http import Remote\n"
              "for url in sys.argv[1:]:\n    try: print(Remote(url).read(0, 10))\n    except "
              "UserError as e: print(e)")
    urls = [server.url.replace("http", "https").replace("m.fgs", name) for name in ("down", "up")]
    said = subprocess.run([sys.executable, "-c", script, *urls],
                          env={**os.environ, "SSL_CERT_FILE": str(cert)},
                          capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{urls[0]}: found a redirect from https to {server.url}, expected one to https",
                    "b'0123456789'"]
    with pytest.raises(HTTPError, match=r"no connection \(.*certificate") as error:  # here it is not trusted
        Remote(urls[1]).read(0, 10)
    assert not error.value.transient


def test_a_file_that_changes_between_two_ranges_is_noticed(server):
    totals = iter((b"1000", b"1001"))
    server.reply = lambda asked, line: line.sendall(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/"
                                                    + next(totals)
                                                    + b"\r\n" + TEN)
    remote = Remote(server.url)
    assert remote.read(0, 10) == b"0123456789" and remote.size == 1000 and remote.read(1000, 5) == b""
    with pytest.raises(HTTPError, match="found bytes 0 to 9 of 1001, expected 0 to 9 of 1000: "
                                        "the file has changed"):
        remote.read(0, 10)


@pytest.mark.parametrize(("url", "shown"), [
    ("ftp://127.0.0.1/x", "ftp://127.0.0.1/x: found ftp, expected http or https"),
    ("file:///etc/passwd", "file:///etc/passwd: found file, expected http or https"),
    ("http://127.0.0.1:abc/x", "that makes no sense, expected http"),
    ("http://[::1/x", "that makes no sense, expected http"),
    ("http://", "that makes no sense"), ("http://127.0.0.1:99999/x", "that makes no sense"),
    ("http://me:hunter2@127.0.0.1:9/x?token=hunter2",
     r"http://127.0.0.1:9/x\?token=\*\*\*: no connection \(Connection ref"),
    ("http://no.such.host.invalid/x", "no connection"),
])
def test_addresses_that_lead_nowhere_are_one_line_without_secrets(url, shown):
    with pytest.raises(HTTPError, match=shown) as error:
        Remote(url).read(0, 10)
    assert "hunter2" not in str(error.value) and str(error.value).isprintable()


def test_a_proxy_of_the_environment_is_asked(server, monkeypatch):
    seen = []
    server.reply = lambda asked, line: (seen.append(asked), line.sendall(b"HTTP/1.1 407 Who\r\n" + NONE))
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(HTTPError, match=r"https://example\.invalid/x: the proxy says 407"):
        Remote("https://example.invalid/x").read(0, 10)
    assert seen[0].startswith(b"CONNECT example.invalid:443 ")


def test_it_reads_where_a_loop_runs_already(server):
    """As in a notebook."""
    server.reply = says(PART + TEN)

    async def cell() -> bytes:
        return Remote(server.url).read(0, 10)

    assert asyncio.run(cell()) == b"0123456789"


def test_what_fails_in_the_block_is_not_the_servers_fault(server):
    server.reply = says(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    with pytest.raises(OSError, match="disk"), request(server.url) as answer:
        assert list(answer.chunks(3)) == [b"abc"]
        raise OSError("disk")
    assert "flexgs http" not in [thread.name for thread in threading.enumerate()]
