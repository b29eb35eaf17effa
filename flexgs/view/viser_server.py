"""A viser server that answers only the requests that Visitors allows.

viser has no setting for this. It calls websockets' serve() once, with a function that looks at every request
before it is answered; ours is put in front of that function. If another version of viser starts its server
differently, tests/test_security.py fails, and start() refuses to go on.
"""

import contextlib
import http
import io
import logging
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import viser
import websockets.asyncio.server
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from flexgs.errors import UserError
from flexgs.view.visitors import Visitors

Check = Callable[[ServerConnection, Request], Response | None]


class Server(viser.ViserServer):
    """viser's server without the public tunnel that any connected browser could request from it."""

    def request_share_url(self, verbose: bool = True) -> None:
        """Refuse the tunnel."""
        return None

    def stop(self) -> None:
        """Stop without a word."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().stop()


def check_free(host: str, port: int) -> None:
    """Raise UserError if host and port cannot be listened at."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}; choose "
                        "another") from None


def start(host: str, port: int, visitors: Visitors) -> Server:
    """Start a server; UserError if host and port cannot be listened at."""
    # bytes that are not HTTP would log a stack trace each
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)
    serve, checked = websockets.asyncio.server.serve, []

    def serve_visitors(*args: Any, process_request: Check, **options: Any) -> Any:
        def check(connection: ServerConnection, request: Request) -> Response | None:
            if why := visitors.refusal(request.headers.get_all("Host"), request.headers.get_all("Origin")):
                return connection.respond(http.HTTPStatus.FORBIDDEN, why)
            try:
                return process_request(connection, request)
            except (OSError, ValueError):  # an impossible path: too long, or with a null character
                return connection.respond(http.HTTPStatus.NOT_FOUND, "no such file\n")

        checked.append(check)
        return serve(*args, process_request=check, **options)

    check_free(host, port)  # viser hangs where it cannot listen
    try:
        with (mock.patch.object(websockets.asyncio.server, "serve", serve_visitors),
              contextlib.redirect_stdout(io.StringIO())):  # viser's own box of addresses
            server = Server(host, port, label="flexgs", verbose=False)
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {host} --port {port}: {e}; choose another") from None
    if not checked:
        server.stop()
        raise RuntimeError(f"viser {viser.__version__} starts its server in another way: who may "
                           "look cannot be checked")
    server.gui.configure_theme(show_share_button=False)
    return server
