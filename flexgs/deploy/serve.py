"""A folder over HTTP, with ranges."""

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


def application(folder: Path, visitors: Visitors) -> web.Application:
    """The files below folder and lists of them; nothing above it, and no links out of it.

    Of a run only what it is cut from and its cuts: model.fgs, which is packed if it is not there or has
    another time than the model, and cuts/. Its settings and checkpoints name paths of this machine.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folder = folder.resolve()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if why := visitors.refusal(request.headers.getall("Host", []), request.headers.getall("Origin", [])):
            return web.Response(status=403, text=why)
        try:
            return await handler(request)
        except (ValueError, OSError) as e:  # of paths that cannot be: too long, with a null character
            if isinstance(e, ConnectionError):
                raise
            return web.Response(status=404, text="no such file\n")

    app = web.Application(middlewares=[guard])
    model, packed, cuts = newest(folder, "model"), folder / "model.fgs", newest(folder, "cuts")
    weights = model / "model.safetensors"
    if not weights.is_file():
        app.add_routes([web.static("/", folder, show_index=True)])
        return app
    for part in (model.parent, model, *model.iterdir()):
        if not _is_inside(part, folder):
            raise UserError(f"{part}: leads out of {folder}, which is all that is served; put "
                            "the file itself there")
    made = weights.stat().st_mtime_ns
    if not _is_inside(packed, folder) or not packed.exists() or packed.stat().st_mtime_ns != made:
        # takes the place of a link, and leaves what it leads to alone
        write(ElasticModel.load(model), packed)
        # the time of the model that it was made of, as clocks are set back and files copied
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


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether path, with all links followed, is a part of folder, which has none."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # links in a circle
        return False


def serve(folder: Path, host: str, port: int, names: Sequence[str] = ()) -> None:
    """Until Ctrl-C; UserError if there is no such host or port, or it is taken. names: see Visitors."""
    app = application(folder, Visitors(host, names))
    try:
        asyncio.run(_run(app, host, port))
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}; choose another") from None


def _is_request(record: logging.LogRecord) -> bool:
    """Whether what aiohttp logs is about more than bytes that are no request, each of which would be a stack
    trace."""
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
