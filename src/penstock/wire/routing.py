"""Which sandbox and which port a request means. Source: E2B's edge; spec of hosts and headers.

Two ways: the host name `<port>-<sandbox>[-<anything>].<domain>`, or the headers E2b-Sandbox-Id and E2b-Sandbox-Port,
which count only where the host name cannot say it: `localhost`, an IP address, `sandbox.<domain>`.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

GUEST_PORT: Final = 49983
ID_HEADER: Final = b"e2b-sandbox-id"
PORT_HEADER: Final = b"e2b-sandbox-port"
TRAFFIC_TOKEN_HEADER: Final = b"e2b-traffic-access-token"
ACCESS_TOKEN_HEADER: Final = b"x-access-token"

_SANDBOX: Final = re.compile(r"[a-z0-9]{1,63}")
_IPV4: Final = re.compile(r"(?:\d{1,3}\.){3}\d{1,3}")
_IPV6: Final = re.compile(r"\[[0-9a-f:.]+\]")
_HOST_PORT: Final = re.compile(r":\d{0,5}$")


class Target(NamedTuple):
    """Where a request goes."""

    sandbox: str
    port: int


class RoutingError(Exception):
    """The request names no target. Answer `status` with `message`."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)


def route(host: bytes, sandbox_header: bytes | None, port_header: bytes | None) -> Target:
    """The target of a request with this Host value; an absent header is None or empty. Raises RoutingError."""
    name = host_name(host)
    if (sandbox_header or port_header) and headers_count_for(name):
        if not sandbox_header or not port_header:
            raise RoutingError(400, "missing header")
        return Target(_sandbox(sandbox_header.decode("latin-1")), _port(port_header.decode("latin-1")))
    return parse_host(name)


def parse_host(name: str) -> Target:
    """`8000-iabc.example.org` → (iabc, 8000). `name` has no port of its own (`host_name`). Raises RoutingError."""
    label, dot, _ = name.partition(".")
    if not dot:
        raise RoutingError(400, "Invalid host")
    parts = label.split("-")
    if len(parts) < 2:
        raise RoutingError(400, "Invalid host")
    return Target(_sandbox(parts[1]), _port(parts[0]))


def host_name(host: bytes) -> str:
    """A Host value, lower case, without its port."""
    return _HOST_PORT.sub("", host.decode("latin-1").strip().lower())


def headers_count_for(name: str) -> bool:
    """Whether the routing headers are honoured under this host name."""
    if name == "localhost" or _IPV4.fullmatch(name) or _IPV6.fullmatch(name):
        return True
    return name.startswith("sandbox.") and len(name) > len("sandbox.")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or not 0 < int(text) < 65536:
        raise RoutingError(400, "Invalid sandbox port")
    return int(text)


def _sandbox(text: str) -> str:
    if _SANDBOX.fullmatch(text) is None:
        raise RoutingError(400, "Invalid sandbox ID")
    return text
