"""A folder over HTTP, with ranges."""

import asyncio
from pathlib import Path

from aiohttp import web

from flexgs.deploy.progressive import write
from flexgs.errors import UserError
from flexgs.model.elastic import ElasticModel


def application(folder: Path) -> web.Application:
    """The files below folder and lists of them; nothing above it, no links out of it.

    Of a run only what it is cut from and its cuts: model.fgs, which is packed if it is not there or older than the model, and
    cuts/. Its settings and checkpoints name paths of this machine.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    app, model = web.Application(), folder / "model" / "model.safetensors"
    if not model.is_file():
        app.add_routes([web.static("/", folder, show_index=True)])
        return app
    packed = folder / "model.fgs"
    if not packed.exists() or packed.stat().st_mtime < model.stat().st_mtime:
        write(ElasticModel.load(folder), packed)

    async def send(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(packed)

    async def index(request: web.Request) -> web.StreamResponse:
        return web.Response(text='<a href="model.fgs">model.fgs</a> <a href="cuts/">cuts</a>', content_type="text/html")

    app.add_routes([web.get("/", index), web.get("/model.fgs", send)])
    if (folder / "cuts").is_dir():
        app.add_routes([web.static("/cuts", folder / "cuts", show_index=True)])
    return app


def serve(folder: Path, host: str, port: int) -> None:
    """Until Ctrl-C; UserError if there is no such host or port, or it is taken."""
    try:
        asyncio.run(_run(application(folder), host, port))
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}; choose another") from None


async def _run(app: web.Application, host: str, port: int) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        print(f"http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
