"""An HTTP server for a folder: byte ranges, ETags, files that are compressed already (NAME.gz), and CORS."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from flexgs.deploy.progressive import write
from flexgs.errors import UserError
from flexgs.files import newest
from flexgs.model.elastic import ElasticModel
from flexgs.view.visitors import Visitors, url

PREFLIGHT = {"Access-Control-Allow-Methods": "GET, HEAD", "Access-Control-Allow-Headers": "Range, If-Range",
             "Access-Control-Max-Age": "86400"}
"""What a browser is told that asks whether a page of another server may ask."""


def application(folder: Path, visitors: Visitors) -> web.Application:
    """Make a web application that serves a folder: files and listings, but no link that leads out of it.

    A folder that has an index.html is shown by it.

    Of a run folder only its model and cuts are served: model.fgs, which is packed first if it is missing or
    was made from another model (their modification times differ), and cuts/. The settings and checkpoints of
    a run name paths of this machine.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folder = folder.resolve()
    model, packed, cuts = newest(folder, "model"), folder / "model.fgs", newest(folder, "cuts")
    weights = model / "model.safetensors"
    whole = not weights.is_file()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        origins = request.headers.getall("Origin", [])
        if why := visitors.refusal(request.headers.getall("Host", []), origins):
            return web.Response(status=403, text=why)
        response: web.StreamResponse
        try:
            if request.method == "OPTIONS" and origins:
                response = web.Response(status=204, headers=PREFLIGHT)
            else:
                file = folder / request.path.strip("/")
                if whole and request.path.endswith("/") and (file / "index.html").is_file():
                    file /= "index.html"
                    response = web.FileResponse(file) if _is_inside(file, folder) else web.HTTPNotFound()
                else:
                    response = await handler(request)
                if isinstance(response, web.FileResponse) and _is_inside(file, folder):
                    response = _whole_if_changed(request, file) or response
        except web.HTTPException as e:
            response = e
        except (ValueError, OSError) as e:  # an impossible path: too long, or with a null character
            if isinstance(e, ConnectionError):
                raise
            response = web.Response(status=404, text="no such file\n")
        response.headers["Cache-Control"] = "no-cache"  # which asks whether the ETag is still the same
        if origins and visitors.welcome(origins[0]):
            response.headers.update({"Access-Control-Allow-Origin": origins[0],
                                     "Access-Control-Expose-Headers": "Content-Range, ETag"})
        if isinstance(response, web.HTTPException):
            raise response
        return response

    async def vary(request: web.Request, response: web.StreamResponse) -> None:
        if visitors.origins:  # said of every answer, beside the Accept-Encoding that aiohttp puts there
            response.headers["Vary"] = ", ".join(filter(None, (response.headers.get("Vary"), "Origin")))

    app = web.Application(middlewares=[guard])
    app.on_response_prepare.append(vary)
    if whole:
        app.add_routes([web.static("/", folder, show_index=True)])
        return app
    for part in (model.parent, model, *model.iterdir()):
        if not _is_inside(part, folder):
            raise UserError(f"{part}: leads out of {folder}, which is all that is served; put "
                            "the file itself there")
    made = weights.stat().st_mtime_ns
    if not _is_inside(packed, folder) or not packed.exists() or packed.stat().st_mtime_ns != made:
        # a link at this place is replaced, and its target left alone
        write(ElasticModel.load(model), packed)
        # equal times mark the pair: "newer" would fail where clocks are set back or files copied
        os.utime(packed, ns=(made, made))

    async def send(request: web.Request) -> web.StreamResponse:
        if not _is_inside(packed, folder):
            raise web.HTTPNotFound
        return web.FileResponse(packed)

    async def index(request: web.Request) -> web.StreamResponse:
        return web.Response(text='<a href="model.fgs">model.fgs</a> <a href="cuts/">cuts</a>',
                            content_type="text/html")

    app.add_routes([web.get("/", index), web.get("/model.fgs", send)])
    if cuts.is_dir() and _is_inside(cuts, folder):
        app.add_routes([web.static("/cuts", cuts, show_index=True)])
    return app


def _whole_if_changed(request: web.Request, path: Path) -> web.Response | None:
    """Return all of a file if the request is for a part of another version of it, by the ETag in If-Range.

    aiohttp compares If-Range only where it is a date.
    """
    if not (asked := request.headers.get("If-Range", "")).endswith('"'):
        return None
    file = path.open("rb")
    about = os.fstat(file.fileno())
    tag = f'"{about.st_mtime_ns:x}-{about.st_size:x}"'  # as aiohttp makes it
    if asked == tag:
        file.close()
        return None
    return web.Response(body=file, headers={"ETag": tag, "Accept-Ranges": "bytes"})


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether path, with all links followed, lies in folder, whose own path has no links."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # a circle of links
        return False


def serve(folder: Path, host: str, port: int, names: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
    """Serve the folder until Ctrl-C (names, origins: see Visitors); UserError if host or port is not free."""
    app = application(folder, Visitors(host, names, origins))
    try:
        asyncio.run(_run(app, host, port))
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--host {host} --port {port}: {reason}; choose another") from None


def _is_request(record: logging.LogRecord) -> bool:
    """Whether a log record of aiohttp is about HTTP; other bytes would log a stack trace each."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def _run(app: web.Application, host: str, port: int) -> None:
    logging.getLogger("aiohttp.server").addFilter(_is_request)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        print(f"{url(host, runner.addresses[0][1])} (Ctrl-C ends it)", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
