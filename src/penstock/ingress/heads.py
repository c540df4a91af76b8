"""Heads: parsed, judged and written anew for the other side, once per distinct head.

What goes out is always serialised from the parsed form, never copied from the wire, so that the server in the sandbox
can only read what we read. A client that asks the same again sends the same bytes, and everything here depends on those
bytes alone; so the result is kept by them.

Dropped are the fields that speak of one hop (RFC 9110 7.6.1) and what `Connection` names, except fields the far side
needs to tell who asks: a client must not be able to have us remove those.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from penstock.ingress.decide import Aim, read
from penstock.wire.http1 import (
    BadRequest,
    Field,
    Framing,
    RequestHead,
    ResponseHead,
    encode_head,
    parse_request_head,
    parse_response_head,
)
from penstock.wire.routing import GUEST_PORT, Target

KEPT_MAX: Final = 512  # distinct heads remembered per kind; then all are forgotten at once, which needs no bookkeeping
KEPT_BYTES_MAX: Final = 2048  # of one head; a longer one is parsed each time

_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
    | {b"http2-settings", b"proxy-authenticate", b"proxy-authorization", b"content-length"}
)
_NEVER_NAMED: Final = frozenset(
    {b"host", b"authorization", b"cookie", b"x-access-token", b"e2b-traffic-access-token", b"e2b-sandbox-id"}
    | {b"e2b-sandbox-port", b"content-type", b"expect", b"x-forwarded-host"}
)
# Safe to send twice (RFC 9110 9.2.2) when a kept connection turns out to have been closed by the server.
_REPLAYABLE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})


class Asked:
    """A request head with all that follows from it alone."""

    __slots__ = ("aim", "bodiless", "forward", "head", "keep_alive", "minor", "replayable", "to_head", "upgrade")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.aim: Aim = read(head)
        guest = type(self.aim) is Target and self.aim.port == GUEST_PORT
        # The guest speaks no other protocol; offering it one could only open a way around the reserved paths.
        self.upgrade = None if guest else head.upgrade
        self.bodiless = head.framing is Framing.NONE
        self.keep_alive = head.keep_alive and self.upgrade is None
        self.minor = head.minor
        self.replayable = self.bodiless and head.method in _REPLAYABLE and self.upgrade is None
        self.to_head = head.method == b"HEAD"
        self.forward = request_bytes(head, upgrade=self.upgrade is not None)


class Answered:
    """A response head with what is sent for it: `keep` on a connection that goes on, `close` on its last."""

    __slots__ = ("close", "head", "keep", "result")

    def __init__(self, head: ResponseHead) -> None:
        self.head = head
        self.result = f"{head.status // 100}xx"
        self.keep = response_bytes(head, connection=b"")
        self.close = response_bytes(head, connection=b"close")


V = TypeVar("V")


class _Memory(Generic[V]):
    """At most KEPT_MAX values by the bytes of their head."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[bytes, V] = {}

    def get(self, raw: bytes) -> V | None:
        return self._kept.get(raw)

    def put(self, raw: bytes, value: V) -> V:
        if len(raw) <= KEPT_BYTES_MAX:
            if len(self._kept) >= KEPT_MAX:
                self._kept.clear()
            self._kept[raw] = value
        return value


class Heads:
    """Both directions. `raw` is one whole head, its empty line included."""

    def __init__(self) -> None:
        self._asked: _Memory[Asked] = _Memory()
        self._answered: _Memory[Answered] = _Memory()
        self._answered_head: _Memory[Answered] = _Memory()  # to HEAD requests: same bytes, no body

    def asked(self, raw: bytes) -> Asked:
        """Raises BadRequest."""
        kept = self._asked.get(raw)
        if kept is not None:
            return kept
        head = parse_request_head(raw)
        assert head is not None, "called with a whole head"
        return self._asked.put(raw, Asked(head))

    def answered(self, raw: bytes, *, to_head: bool = False) -> Answered:
        """Raises BadRequest with status 502."""
        memory = self._answered_head if to_head else self._answered
        kept = memory.get(raw)
        if kept is not None:
            return kept
        head = parse_response_head(raw, method=b"HEAD" if to_head else b"GET")
        assert head is not None, "called with a whole head"
        return memory.put(raw, Answered(head))


def request_bytes(
    head: RequestHead, *, upgrade: bool, host: bytes | None = None, forwarded_host: bytes | None = None
) -> bytes:
    """The request as the sandbox will read it: always HTTP/1.1 and origin form; `host` replaces the Host field."""
    fields = _end_to_end(head.fields)
    if host is not None:
        fields = [(name, value) for name, value in fields if name not in (b"host", b"x-forwarded-host")]
        fields[:0] = [(b"host", host), (b"x-forwarded-host", forwarded_host or b"")]
    elif head.minor == 0 and not head.header(b"host"):
        fields.insert(0, (b"host", b""))  # HTTP/1.1 wants one, also an empty one
    if head.framing is Framing.CHUNKED:
        fields.append((b"transfer-encoding", b"chunked"))
    elif head.framing is Framing.LENGTH or head.header(b"content-length"):
        fields.append((b"content-length", b"%d" % head.content_length))
    if upgrade and head.upgrade is not None:
        fields += [(b"connection", b"upgrade"), (b"upgrade", head.header(b"upgrade"))]
    return encode_head(b"%b %b HTTP/1.1" % (head.method, _origin(head)), fields)


def response_bytes(head: ResponseHead, *, connection: bytes, chunked: bool = True) -> bytes:
    """The response as the client will read it. `chunked=False` for a client of HTTP/1.0, which knows no chunks."""
    fields = _end_to_end(head.fields)
    if head.framing is Framing.CHUNKED:
        if chunked:
            fields.append((b"transfer-encoding", b"chunked"))
    elif head.framing is not Framing.UNTIL_CLOSE and head.status >= 200:
        length = head.header(b"content-length")  # of a reply to HEAD: what GET would have carried
        if length and head.status != 204:
            fields.append((b"content-length", length))
    if head.status == 101:
        fields += [(b"connection", b"upgrade"), (b"upgrade", head.header(b"upgrade"))]
    elif connection:
        fields.append((b"connection", connection))
    return encode_head(b"HTTP/1.1 %d %b" % (head.status, head.reason), fields)


def mask(pattern: str, port: int) -> bytes:
    """The Host shown to a user port. Raises BadRequest when the pattern would not be a Host."""
    host = pattern.replace("${PORT}", str(port)).encode("latin-1", "replace")
    if not host or any(byte <= 0x20 or byte >= 0x7F for byte in host):
        raise BadRequest(502, "the sandbox's maskRequestHost is not a host name")
    return host


def _end_to_end(fields: list[Field]) -> list[Field]:
    named = _HOP
    for name, value in fields:
        if name == b"connection":
            options = {option.strip(b" \t").lower() for option in value.split(b",")}
            if not options <= _COMMON_OPTIONS:
                named = named | (options - _NEVER_NAMED)
    return [field for field in fields if field[0] not in named]


_COMMON_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"upgrade"})


def _origin(head: RequestHead) -> bytes:
    if head.target.startswith((b"/", b"*")):
        return head.target
    return head.path + (b"?" + head.query if b"?" in head.target else b"")
