"""A folder over HTTP, with ranges."""

import asyncio
from pathlib import Path

from aiohttp import web

from flexgs.errors import UserError


def application(folder: Path) -> web.Application:
    """The files below folder and lists of them; nothing above it, no links out of it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    app = web.Application()
    app.add_routes([web.static("/", folder, show_index=True)])
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
