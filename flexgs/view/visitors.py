"""Which requests a local server answers, so that other web pages cannot read from it.

A browser lets any page of the web send requests to this machine. Such a page could read the answers if its
own host name resolves to this machine (DNS rebinding), and could always read WebSockets. Both are recognised
by the headers Host and Origin, which the browser sets.
"""

import ipaddress
import re
from collections.abc import Sequence

from flexgs.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Visitors:
    """The rule by which a server that listens at `host` answers or refuses a request."""

    def __init__(self, host: str, names: Sequence[str] = (), origins: Sequence[str] = ()):
        """Accept requests to `host` and to further names of the server, such as that of a proxy.

        Pages of other servers may ask too if their origin, such as https://shop.example, is in origins, or if
        "*" is. UserError for an empty host, which systems take for all addresses of the machine, and for an
        origin that is none.
        """
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^\s/@?#]+", origin):
                raise UserError(f"--cors {origin}: expected the origin of a page, such as "
                                "https://shop.example, without a path; or * for any page")
        self.origins = {origin.lower() for origin in origins}
        if not host.strip():
            raise UserError("--host: found nothing, expected a name or address of this machine, or "
                            "0.0.0.0 for all that it has")
        address = _address(host)
        self.names = {host.lower(), *(name.lower() for name in names)}
        # bound to all addresses, the server answers to any IP address: unlike a name, it cannot be rebound
        self.any_address = address is not None and address.is_unspecified
        if self.any_address or (address and address.is_loopback) or host.lower() == "localhost":
            self.names.update(LOOPBACK)

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> str | None:
        """Return why a request with these Host and Origin headers is refused, in a line; None if allowed.

        Programs such as curl send no Origin, which is allowed.
        """
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self.names or (self.any_address and _address(name))):
            return f"this server is not called {name or 'so'}: --allow-host NAME lets it answer to a name\n"
        own = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
        if any(origin.lower() not in own and not self.welcome(origin) for origin in origins):
            return "a page of another server may not ask this one: --cors ORIGIN lets it\n"
        return None

    def welcome(self, origin: str) -> bool:
        """Whether pages of an origin may ask although they are of another server."""
        return "*" in self.origins or origin.lower() in self.origins


def url(host: str, port: int) -> str:
    """Return the URL that a person opens."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _name(host: str) -> str | None:
    """Return the name in a Host header in lower case, without the port; None if the header is malformed."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]@:,/?#]+))(?::\d{1,5})?", host)
    return (found[1] or found[2]).lower() if found else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
