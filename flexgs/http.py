"""HTTP GET for files of any size from servers that may misbehave: bounded time, bounded memory.

Only http and https are allowed. At most REDIRECTS redirects are followed, to no other scheme, and never from
https to http. An answer has QUIET seconds to begin and may not pause for longer; its body must arrive at
SLOWEST or faster on average. Proxies come from the environment (HTTPS_PROXY, NO_PROXY), passwords from the
URL or ~/.netrc. Every failure is one line, with the secrets removed from the address.
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
"""The most seconds until an answer begins, and between two pieces of its body."""
SLOWEST = 16_384
"""The least average speed of a body, in bytes per second."""
REDIRECTS = 5
PIECE, PIECES = 1 << 16, 16
"""Bytes read at a time, and the number of pieces read ahead."""
TRANSIENT = (408, 425, 429)
"""The 4xx status codes that are worth another attempt; all 5xx codes are."""


class HTTPError(UserError):
    """A failed request; the message is "ADDRESS WITHOUT SECRETS: REASON"."""

    def __init__(self, url: str, reason: str, transient: bool = False, status: int | None = None):
        super().__init__(f"{public(url)}: {reason}")
        self.reason, self.status = reason, status
        self.transient = transient
        """Whether another attempt may succeed."""


class Span(NamedTuple):
    """The range of bytes in an answer, as its Content-Range says; both ends are included."""

    first: int
    last: int
    total: int | None
    """Size of the whole file in bytes; None if the server does not know it."""


@dataclass(frozen=True)
class Answer:
    """A successful answer: status 200, or 206 to a request with a Range."""

    header: Callable[[str], str]
    """Return the value of a header; several of one name are joined by commas, a missing one is empty."""
    span: Span | None
    """The range that the body covers; None: it is the whole file, even if a range was asked for."""
    length: int | None
    """Size of the body in bytes; None if the server does not say."""
    chunks: Callable[[int], Iterator[bytes]]
    """Yield the body, once. The argument is the most bytes to accept; HTTPError if there are more, or if the
    body ends early."""


class Remote:
    """A file behind a URL, read by byte ranges."""

    def __init__(self, url: str):
        self.url = url
        self.size: int | None = None
        """Size of the whole file in bytes; None before the first read."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer where the file ends; HTTPError if that fails."""
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
                    raise HTTPError(self.url, f"found bytes {first} to {end} of {size}, expected {offset} to "
                                              f"{last} of {self.size or 'them'}: the file has changed, or "
                                              "the server is at fault")
                self.size = size
                return b"".join(answer.chunks(length))
        except HTTPError as e:
            if e.status == 416 and self.size is None:  # an empty file has no range
                return b""
            raise


@contextmanager
def request(url: str, headers: Mapping[str, str] | None = None,
            seconds: float = math.inf) -> Iterator[Answer]:
    """Send a GET request, and yield the answer, which stays open while the block runs.

    Args:
        url: the address, http or https.
        headers: further headers, such as Range.
        seconds: the most for the whole request; it only ever shortens the limits of this module.

    Raises:
        HTTPError: the status is neither 200 nor 206 to a Range; the address, a redirect or the encoding is
            refused; or the connection or the server fails, also while the body is read.
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
    """The body of an answer, read a few pieces ahead of its use.

    aiohttp drops the data it holds when the connection breaks; what was read ahead is kept, and a download
    can go on from there.
    """

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
        """Return the next piece; empty at the end of the body."""
        item = await self._ahead.get()
        if isinstance(item, Exception):
            raise item
        return item


@contextmanager
def _loop(url: str) -> Iterator[Callable[[Coroutine[Any, Any, Any], float], Any]]:
    """Run an event loop in a thread, since the caller's thread may run one already (in a notebook).

    Yields wait(work, end): run a coroutine and return its result, or raise HTTPError, by the time.monotonic()
    of `end`.
    """
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
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=QUIET, sock_read=QUIET)
    return aiohttp.ClientSession(headers={"User-Agent": "flexgs", "Accept-Encoding": "identity"},
                                 auto_decompress=False, timeout=timeout,
                                 cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=PIECE, trust_env=True)


async def _closed(session: aiohttp.ClientSession) -> None:
    """Close the session, and cancel the tasks that still read from it."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await session.close()


async def _asked(session: aiohttp.ClientSession, url: str,
                 headers: Mapping[str, str]) -> tuple[aiohttp.ClientResponse, _Body]:
    response = await _follow(session, url, headers)
    return response, _Body(response.content)


async def _follow(session: aiohttp.ClientSession, url: str,
                  headers: Mapping[str, str]) -> aiohttp.ClientResponse:
    """Return the first answer that is not a redirect."""
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
    """Return the span and the length of the body; HTTPError if the answer does not suit the request."""
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
    """Raise an exception of a request as HTTPError; one of another kind as it is."""
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
            # aiohttp's message goes on with bytes of the answer, which are not quoted
            what = first_line(ValueError(error.message)).partition(":")[0]
            reason = f"found an answer that is not HTTP ({what})"
        case aiohttp.ClientSSLError():
            reason, transient = f"no connection ({first_line(error)})", False
        case OSError():
            number = error.errno or 0
            what = os.strerror(number) if number > 0 else error.strerror or first_line(error)
            reason = f"no connection ({what})"
        case aiohttp.ClientError() | ValueError():
            reason = ("found an address, here or in a redirect, that makes no sense, "
                      "expected http(s)://HOST/PATH")
            transient = False
        case _:
            raise error
    raise HTTPError(url, reason, transient) from None
