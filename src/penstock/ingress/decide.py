"""Where a request goes, decided without any I/O.

In steps, because they change at different rates. `named(fields)` depends on the fields alone and `read(head)` on the
head alone, so their answers are kept for the same bytes coming again (`heads.py`). `choose(target, fields, table, …)`
asks the table, which changes at any moment, so it is asked for every request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from penstock.ingress import pages
from penstock.ingress.pages import Refusal
from penstock.ingress.table import Route, Table
from penstock.wire import routing
from penstock.wire.http1 import Fields, RequestHead
from penstock.wire.routing import GUEST_PORT, Target
from penstock.wire.tokens import same

# The guest's routes that only the node may call (spec/e2b.md 3.6). The guest refuses them on its public socket as well.
RESERVED: Final = frozenset(
    {b"/init", b"/freeze", b"/unfreeze", b"/fsfreeze", b"/fsthaw", b"/collapse", b"/upgrade"}
    | {b"/notice", b"/drain", b"/control", b"/adopt", b"/stop"}
)
_RESERVED_NAMES: Final = frozenset(route[1:] for route in RESERVED)
_SPELLED: Final = re.compile(rb"[%\\;\s]|//|/\.")  # what `is_reserved` undoes; in most paths there is none of it
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
ROUTES_KEPT: Final = 4096  # (host, id, port) triples whose meaning is remembered
QUERY_BYTES_MAX: Final = 16 * 1024  # of a signed URL; a path has at most 4 KiB, percent-encoded 12

_UNNAMED: Final = pages.bad_request(400, "the request names no sandbox: send E2b-Sandbox-Id and E2b-Sandbox-Port")


class Own(Enum):
    """What the ingress serves about itself, when no sandbox is named."""

    HEALTH = "/health"
    METRICS = "/metrics"


class Signed(msgspec.Struct, frozen=True):
    """A signed file URL that does not say of which sandbox: the signature itself will tell (`signed.py`)."""

    path: str
    operation: str
    username: str
    signature: str
    expires: int | None


Aim = Target | Own | Signed | Refusal
TrafficToken = Callable[[str], str]  # by sandbox id


class Named(NamedTuple):
    """What a head's fields say of the sandbox, whatever its method and target. None: no sandbox is named."""

    host: bytes
    target: Target | Refusal | None


def named(told: Fields) -> Named:
    """The first half of `read`, of the fields alone. Pure."""
    host = sandbox = port = b""
    for name, value in told.fields:
        if name == b"host":
            host = value
        elif name == routing.ID_HEADER:
            sandbox = sandbox or value
        elif name == routing.PORT_HEADER:
            port = port or value
    return Named(host, _route(host, sandbox, port))


def read(head: RequestHead, names: Named | None = None) -> Aim:
    """What the head asks for. `names` is `named(head)`, for who has it already. Pure."""
    host, target = names or named(head)
    if not head.target.startswith(b"/"):
        refusal = _refuse_target(head, host)
        if refusal is not None:
            return refusal
    if target is None:
        return _read_unnamed(head)
    if type(target) is Target and target.port == GUEST_PORT and is_reserved(head.path):
        return pages.reserved_path(head.path.decode("latin-1"))
    return target


@lru_cache(maxsize=ROUTES_KEPT)
def _route(host: bytes, sandbox: bytes, port: bytes) -> Target | Refusal | None:
    """None: no sandbox is named where the headers could have named one."""
    if not sandbox and not port and routing.headers_count_for(routing.host_name(host)):
        return None
    try:
        return routing.route(host, sandbox, port)
    except routing.RoutingError as error:
        return pages.bad_request(error.status, error.message)


def choose(target: Target, told: Fields, table: Table, traffic_token: TrafficToken) -> Route | Refusal:
    """The route of `target`, if this request may take it: one that serves, or sleeps and is woken by requests.

    Pure but for the table's present content.
    """
    route = table.routes.get(target.sandbox)
    if route is None or not route.reachable:
        return pages.sandbox_not_found(target.sandbox) if table.complete else pages.starting()
    if route.private and target.port != GUEST_PORT:
        given = told.header(routing.TRAFFIC_TOKEN_HEADER)
        if not given:
            return pages.token_missing(route.sandbox)
        if not same(given.decode("latin-1"), traffic_token(route.sandbox)):
            return pages.token_invalid(route.sandbox)
    return route


def is_reserved(path: bytes) -> bool:
    """Whether `path`, however it is spelled, is one of the node's own routes of the guest.

    Percent-encoding, repeated slashes, dot segments, matrix parameters and case are undone first: the guest matches
    exactly, so this errs on the side of 404.
    """
    if path.startswith(b"/") and _SPELLED.search(path) is None:
        return path.split(b"/", 2)[1].lower() in _RESERVED_NAMES
    parts: list[bytes] = []
    for part in unquote_to_bytes(path.replace(b"\\", b"/")).split(b"/"):
        name = part.partition(b";")[0].strip().lower()
        if name == b"..":
            del parts[-1:]
        elif name not in (b"", b"."):
            parts.append(name)
    return bool(parts) and parts[0] in _RESERVED_NAMES


def _refuse_target(head: RequestHead, host: bytes) -> Refusal | None:
    if head.method == b"CONNECT":
        return pages.bad_request(405, "CONNECT is not served")
    absolute = _ABSOLUTE.match(head.target)
    # An absolute target outranks Host (RFC 9112 3.2.2): were they to differ, we and the server in the sandbox could
    # read two different requests.
    if absolute is not None and absolute[1].lower() != host.lower():
        return pages.bad_request(400, "the target's host and the Host field differ")
    return None


def _read_unnamed(head: RequestHead) -> Aim:
    path = head.path
    if path == b"/files" and head.query:
        return read_signed(head)
    if head.method in (b"GET", b"HEAD"):
        for own in Own:
            if path == own.value.encode():
                return own
    return _UNNAMED


def read_signed(head: RequestHead) -> Aim:
    """A signed file URL's parts; a Refusal when it is none."""
    if len(head.query) > QUERY_BYTES_MAX:
        return pages.bad_request(414, "the query is too long")
    query: dict[str, str] = {}
    for name, value in parse_qsl(head.query.decode("latin-1"), keep_blank_values=True):
        query.setdefault(name, value)
    signature, expires = query.get("signature", ""), query.get("signature_expiration", "")
    if not signature or (expires and not (expires.isascii() and expires.isdigit() and len(expires) <= 15)):
        return _UNNAMED
    return Signed(
        path=query.get("path", ""),
        operation="write" if head.method == b"POST" else "read",
        username=query.get("username", ""),
        signature=signature,
        expires=int(expires) if expires else None,
    )
