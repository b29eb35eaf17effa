"""Reading what is behind an address: whatever a server does, it ends, takes bounded memory, and a failure is
one line.

Only http and https are asked. Redirects are few, lead to no other scheme, and from https never to http. An
answer has a minute to begin, may not be silent for longer, and its body has to arrive at SLOWEST at least.
Proxies are those of the environment (HTTPS_PROXY, NO_PROXY), passwords those of the URL or of ~/.netrc.
Errors show addresses without the secrets in them.
"""

import asyncio
import http
import math
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urljoin, urlsplit

import aiohttp

from flexgs.errors import UserError
from flexgs.urls import first_line, public

QUIET = 60.0
"""Seconds until an answer begins, and without a byte of it."""
SLOWEST = 16_384
"""Bytes a second, on the average."""
REDIRECTS = 5
PIECE, PIECES = 1 << 16, 16
"""Bytes that are read at a time, and how many times ahead."""
TRANSIENT = (408, 425, 429)
"""Of the 4xx those that another attempt may mend; of the 5xx all."""


class HTTPError(UserError):
    """A request that failed: f"{address without secrets}: {reason}"."""

    def __init__(self, url: str, reason: str, transient: bool = False, status: int | None = None):
        super().__init__(f"{public(url)}: {reason}")
        self.reason, self.status = reason, status
        self.transient = transient
        """Whether another attempt may mend it."""


class Span(NamedTuple):
    """Which bytes of a file an answer has, as its Content-Range says."""

    first: int
    last: int
    total: int | None
    """Of the whole file, if the server knows."""


@dataclass(frozen=True)
class Answer:
    """One with status 200, or 206 to a request with a Range."""

    header: Callable[[str], str]
    """What a header says, of several alike their values with commas between; empty if there is none."""
    span: Span | None
    """None: it is the whole file, also where a range was asked for."""
    length: int | None
    """Bytes of the body, if the server says."""
    chunks: Callable[[int], Iterator[bytes]]
    """The body, once: HTTPError if it ends early, or has more bytes than this."""


class Remote:
    """A file behind a URL, of which ranges are read."""

    def __init__(self, url: str):
        self.url = url
        self.size: int | None = None
        """Bytes of the whole, once any have been read."""

    def read(self, offset: int, length: int) -> bytes:
        """That many bytes, or fewer where the file ends. HTTPError, also for a server that sends other bytes
        than those."""
        if self.size is not None:
            length = min(length, self.size - offset)
        if length <= 0:
            return b""
        last = offset + length - 1
        try:
            with request(self.url, {"Range": f"bytes={offset}-{last}"}) as answer:
                if answer.span is None:
                    raise HTTPError(self.url, "the server sends whole files only, expected "
                                              "one that answers ranges")
                first, end, size = answer.span
                if size is None:
                    raise HTTPError(self.url, "the server does not say how large the file is, "
                                              "expected it in Content-Range")
                if first != offset or end != min(last, size - 1) or self.size not in (None, size):
                    raise HTTPError(self.url, f"found bytes {first} to {end} of {size}, expected "
                                              f"{offset} to {last} of {self.size or 'them'}: the file has "
                                    "changed, or the server is at fault")
                self.size = size
                return b"".join(answer.chunks(length))
        except HTTPError as e:
            if e.status == 416 and self.size is None:  # an empty file has no range
                return b""
            raise


@contextmanager
def request(url: str, headers: Mapping[str, str] | None = None,
            seconds: float = math.inf) -> Iterator[Answer]:
    """What a GET of the URL answers, open while the block runs; seconds: for all of it, if less than what the
    body is given.

    HTTPError for every other status, for an address, redirect or encoding that is not taken, and if the line
    or the server fails, also while the body is read.
    """
    headers = headers or {}
    latest = time.monotonic() + seconds
    with _loop(url) as wait:
        session = wait(_session(), math.inf)
        try:
            response, body = wait(_asked(session, url, headers), min(latest, time.monotonic() + QUIET))
            span, length = _checked(response, url, "Range" in headers)

            def chunks(most: int) -> Iterator[bytes]:
                left = most if length is None else min(length, most)
                end, done = min(latest, time.monotonic() + QUIET + left / SLOWEST), 0
                while data := wait(body.next(), end):
                    done += len(data)
                    if done > left:
                        raise HTTPError(url, f"found more than {left:,} bytes, expected no more: "
                                             "the server is at fault")
                    yield data
                if length not in (None, done):
                    raise HTTPError(url, "the connection broke", transient=True)

            yield Answer(lambda name: ", ".join(response.headers.getall(name, ())), span, length, chunks)
        finally:
            wait(_closed(session), math.inf)


class _Body:
    """The body of an answer. It is read as it comes and for a few pieces ahead, since aiohttp drops what it
    holds when the line
    breaks: a download could not go on from there."""

    def __init__(self, content: aiohttp.StreamReader):
        self._content = content
        self._ahead: asyncio.Queue[bytes | Exception] = asyncio.Queue(PIECES)
        if start := content.read_nowait(-1):
            self._ahead.put_nowait(start)
        self._task = asyncio.create_task(self._pump())

    async def _pump(self) -> None:
        try:
            while data := await self._content.read(PIECE):
                await self._ahead.put(data)
            await self._ahead.put(b"")
        except Exception as e:
            await self._ahead.put(e)

    async def next(self) -> bytes:
        """A piece, or nothing at its end."""
        item = await self._ahead.get()
        if isinstance(item, Exception):
            raise item
        return item


@contextmanager
def _loop(url: str) -> Iterator[Callable[[Coroutine[Any, Any, Any], float], Any]]:
    """wait(work, end) of an event loop of its own, in a thread, since the caller's may run already (in a
    notebook): the result of work, or HTTPError, by the time.monotonic() of end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="flexgs http", daemon=True)
    thread.start()

    def wait(work: Coroutine[Any, Any, Any], end: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result(None if end == math.inf else max(0.0, end - time.monotonic()))
        except Exception as e:
            _explain(e, url)
        finally:
            future.cancel()

    try:
        yield wait
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"User-Agent": "flexgs", "Accept-Encoding": "identity"},
                                 auto_decompress=False,
                                 timeout=aiohttp.ClientTimeout(total=None, sock_connect=QUIET,
                                                               sock_read=QUIET),
                                 cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=PIECE, trust_env=True)


async def _closed(session: aiohttp.ClientSession) -> None:
    """Close it, and end what still reads from it."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await session.close()


async def _asked(session: aiohttp.ClientSession, url: str,
                 headers: Mapping[str, str]) -> tuple[aiohttp.ClientResponse, _Body]:
    response = await _follow(session, url, headers)
    return response, _Body(response.content)


async def _follow(session: aiohttp.ClientSession, url: str,
                  headers: Mapping[str, str]) -> aiohttp.ClientResponse:
    """The first answer that is no redirect."""
    place = url
    for _ in range(REDIRECTS + 1):
        if (scheme := urlsplit(place).scheme) not in ("http", "https"):
            raise HTTPError(url, f"found {scheme[:20] or 'no scheme'}, expected http or https"
                                 + (f" behind a redirect to {public(place)[:100]}" if place != url else ""))
        response = await session.get(place, headers=headers, allow_redirects=False)
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        place = urljoin(place, response.headers.get("Location", ""))
        if scheme == "https" and urlsplit(place).scheme == "http":
            raise HTTPError(url, f"found a redirect from https to {public(place)[:100]}, "
                                 "expected one to https")
    raise HTTPError(url, f"found more than {REDIRECTS} redirects after each other, expected fewer: "
                         "the server is at fault")


def _checked(response: aiohttp.ClientResponse, url: str, ranged: bool) -> tuple[Span | None, int | None]:
    """Span and length of the body; HTTPError unless the answer is one to such a request."""
    status = response.status
    if status != 200 and not (status == 206 and ranged):
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        raise HTTPError(url, f"the server says {status} {phrase}".rstrip(),
                        status >= 500 or status in TRANSIENT, status)
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise HTTPError(url, f"found Content-Encoding {first_line(ValueError(encoding))[:40]}, "
                             "expected the file as it is")
    if status == 200:
        return None, response.content_length
    said = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)",
                        response.headers.get("Content-Range", ""))
    span = Span(int(said[1]), int(said[2]), None if said[3] == "*" else int(said[3])) if said else None
    if not span or not span.first <= span.last < (math.inf if span.total is None else span.total):
        raise HTTPError(url, "found a part of the file without a valid Content-Range, expected one: "
                             "the server is at fault")
    return span, span.last - span.first + 1


def _explain(error: Exception, url: str) -> NoReturn:
    """Raise an error of a request as HTTPError."""
    transient = True
    match error:
        case HTTPError():
            raise error
        case aiohttp.ServerTimeoutError():
            reason = f"no answer for {QUIET:g} s"
        case TimeoutError():
            reason = "the answer takes too long"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            reason = "the connection broke"
        case aiohttp.ClientHttpProxyError():
            reason, transient = f"the proxy says {error.status}", error.status >= 500
        case aiohttp.ClientResponseError():
            # behind it are bytes of the answer
            what = first_line(ValueError(error.message)).partition(":")[0]
            reason = f"found an answer that is not HTTP ({what})"
        case aiohttp.ClientSSLError():
            reason, transient = f"no connection ({first_line(error)})", False
        case OSError():
            number = error.errno or 0
            reason = ("no connection "
                      f"({os.strerror(number) if number > 0 else error.strerror or first_line(error)})")
        case aiohttp.ClientError() | ValueError():
            reason = ("found an address, here or in a redirect, that makes no sense, "
                      "expected http(s)://HOST/PATH")
            transient = False
        case _:
            raise error
    raise HTTPError(url, reason, transient) from None
