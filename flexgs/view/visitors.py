"""Whom a server of this machine answers: those who call it by a name that it has, and pages that it has
served itself.

A browser lets any page of the web send requests to this machine. Where the page's name leads here (DNS
rebinding) it may read the answers, and WebSockets it may always read. Both are told from what a browser says
about itself: Host and Origin.
"""

import ipaddress
import re
from collections.abc import Sequence

from flexgs.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Visitors:
    """Who may ask a server that listens at host; names are further ones that it is called by, such as a
    proxy's."""

    def __init__(self, host: str, names: Sequence[str] = ()):
        """UserError without a host, which systems take for all addresses that they have."""
        if not host.strip():
            raise UserError("--host: found nothing, expected a name or address of this machine, or "
                            "0.0.0.0 for all that it has")
        address = _address(host)
        self.names = {host.lower(), *(name.lower() for name in names)}
        # an address is no name that could lead elsewhere
        self.any_address = address is not None and address.is_unspecified
        if self.any_address or (address and address.is_loopback) or host.lower() == "localhost":
            self.names.update(LOOPBACK)

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> str | None:
        """Why a request with these headers gets no answer, in a line; None if it does. Programs such as curl
        send no Origin."""
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self.names or (self.any_address and _address(name))):
            return f"this server is not called {name or 'so'}: --allow-host NAME lets it answer to a name\n"
        if any(origin.lower() not in (f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}")
               for origin in origins):
            return "a page of another server may not ask this one\n"
        return None


def url(host: str, port: int) -> str:
    """What a person opens."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _name(host: str) -> str | None:
    """That of a Host header without its port, in lower case; None if it is none."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]@:,/?#]+))(?::\d{1,5})?", host)
    return (found[1] or found[2]).lower() if found else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
