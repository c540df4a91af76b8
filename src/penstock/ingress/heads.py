"""Heads: parsed, judged and written anew for the other side, once per distinct head.

What goes out is always serialised from the parsed form, never copied from the wire, so that the server in the sandbox
can only read what we read. A client that asks the same again sends the same bytes, and everything here depends on those
bytes alone; so the result is kept by them.

Dropped are the fields that speak of one hop (RFC 9110 7.6.1) and what `Connection` names, except fields the far side
needs to tell who asks: a client must not be able to have us remove those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

from penstock.ingress.decide import Aim, named, read
from penstock.wire.http1 import (
    HEAD_BYTES_MAX,
    BadRequest,
    Field,
    Fields,
    Framing,
    RequestHead,
    ResponseHead,
    parse_request_fields,
    parse_response_head,
    split_request,
)
from penstock.wire.routing import GUEST_PORT, Target

KEPT_MAX: Final = 512  # distinct heads remembered per kind; then all are forgotten at once, which needs no bookkeeping
SEEN_MAX: Final = 4096  # hashes of heads seen once
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


class Told:
    """Request fields with all that follows from them alone, whatever the method and the target."""

    __slots__ = ("bodiless", "fields", "forward", "keep_alive", "names", "upgrade")

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.names = named(fields)
        target = self.names.target
        # The guest speaks no other protocol; offering it one could only open a way around the reserved paths.
        self.upgrade = fields.upgrade if type(target) is Target and target.port != GUEST_PORT else None
        self.bodiless = fields.framing is Framing.NONE
        self.keep_alive = fields.keep_alive and self.upgrade is None
        self.forward = _field_bytes(fields, upgrade=self.upgrade is not None)


class Asked:
    """A request head with all that follows from it alone."""

    __slots__ = ("aim", "bodiless", "forward", "head", "keep_alive", "minor", "replayable", "to_head", "upgrade")

    def __init__(self, method: bytes, target: bytes, told: Told, raw: bytes) -> None:
        self.head = head = RequestHead(method, target, told.fields, raw)
        self.aim: Aim = read(head, told.names)
        self.upgrade, self.bodiless, self.keep_alive = told.upgrade, told.bodiless, told.keep_alive
        self.minor = head.minor
        self.replayable = told.bodiless and method in _REPLAYABLE and told.upgrade is None
        self.to_head = method == b"HEAD"
        self.forward = b"%b %b HTTP/1.1\r\n%b" % (method, _origin(head), told.forward)


class Answered:
    """A response head with what is sent for it: `keep` on a connection that goes on, `close` on its last."""

    __slots__ = ("_close", "head", "keep", "result")

    def __init__(self, head: ResponseHead) -> None:
        self.head = head
        self.result = f"{head.status // 100}xx"
        self.keep = response_bytes(head, connection=b"")
        self._close: bytes | None = None

    @property
    def close(self) -> bytes:
        if self._close is None:
            self._close = response_bytes(self.head, connection=b"close")
        return self._close


class Heads:
    """Both directions. `raw` is one whole head, its empty line included."""

    def __init__(self) -> None:
        self._asked: _Memory[Asked] = _Memory(self._ask)
        # The fields of requests that differ in method and target only, as most of a client do.
        self._told: _Memory[Told] = _Memory(lambda rest: Told(parse_request_fields(rest)))
        self._answered: _Memory[Answered] = _Memory(lambda raw: Answered(_whole(parse_response_head(raw))))
        # Replies to HEAD: the same bytes, and no body.
        self._answered_head: _Memory[Answered] = _Memory(
            lambda raw: Answered(_whole(parse_response_head(raw, method=b"HEAD")))
        )

    def asked(self, raw: bytes) -> Asked:
        """Raises BadRequest."""
        return self._asked.kept.get(raw) or self._asked.make(raw)

    def answered(self, raw: bytes, *, to_head: bool = False) -> Answered:
        """Raises BadRequest with status 502."""
        memory = self._answered_head if to_head else self._answered
        return memory.kept.get(raw) or memory.make(raw)

    def _ask(self, raw: bytes) -> Asked:
        if len(raw) > HEAD_BYTES_MAX:
            raise BadRequest(431, f"head longer than {HEAD_BYTES_MAX} bytes")
        method, target, rest = split_request(raw)
        return Asked(method, target, self._told.kept.get(rest) or self._told.make(rest), raw)


V = TypeVar("V")


class _Memory(Generic[V]):
    """Keeps a value from the second time on that its head is seen: most heads of some clients are never seen again."""

    __slots__ = ("_make", "_seen", "kept")

    def __init__(self, make: Callable[[bytes], V]) -> None:
        self._make = make
        self.kept: dict[bytes, V] = {}
        self._seen: set[int] = set()

    def make(self, raw: bytes) -> V:
        value = self._make(raw)
        if len(raw) <= KEPT_BYTES_MAX:
            mark = hash(raw)  # keyed per process; a collision only keeps a head one time too early
            if mark in self._seen:
                if len(self.kept) >= KEPT_MAX:
                    self.kept.clear()
                self.kept[raw] = value
            else:
                if len(self._seen) >= SEEN_MAX:
                    self._seen.clear()
                self._seen.add(mark)
        return value


def _whole(head: ResponseHead | None) -> ResponseHead:
    assert head is not None, "called with a whole head"
    return head


def request_bytes(
    head: RequestHead, *, upgrade: bool, host: bytes | None = None, forwarded_host: bytes | None = None
) -> bytes:
    """The request as the sandbox will read it: always HTTP/1.1 and origin form; `host` replaces the Host field."""
    fields = _field_bytes(head, upgrade=upgrade, host=host, forwarded_host=forwarded_host)
    return b"%b %b HTTP/1.1\r\n%b" % (head.method, _origin(head), fields)


def _field_bytes(
    head: Fields, *, upgrade: bool, host: bytes | None = None, forwarded_host: bytes | None = None
) -> bytes:
    fields = _end_to_end(head.fields)
    if host is not None:
        fields = [field for field in fields if field[0] not in (b"host", b"x-forwarded-host")]
        fields[:0] = [(b"host", host), (b"x-forwarded-host", forwarded_host or b"")]
    elif head.minor == 0 and not head.header(b"host"):
        fields.insert(0, (b"host", b""))  # HTTP/1.1 wants one, also an empty one
    if head.framing is Framing.CHUNKED:
        fields.append((b"transfer-encoding", b"chunked"))
    elif head.framing is Framing.LENGTH or head.header(b"content-length"):
        fields.append((b"content-length", b"%d" % head.content_length))
    if upgrade and head.upgrade is not None:
        fields += [(b"connection", b"upgrade"), (b"upgrade", head.header(b"upgrade"))]
    return _join(b"", fields)


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
    return _join(b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason), fields)


def mask(pattern: str, port: int) -> bytes:
    """The Host shown to a user port. Raises BadRequest when the pattern would not be a Host."""
    host = pattern.replace("${PORT}", str(port)).encode("latin-1", "replace")
    if not host or any(byte <= 0x20 or byte >= 0x7F for byte in host):
        raise BadRequest(502, "the sandbox's maskRequestHost is not a host name")
    return host


def _join(first_line: bytes, fields: list[Field]) -> bytes:
    """A head of fields that the strict parser has passed, or that we made: none holds a byte that ends a line."""
    return b"%b%b\r\n" % (first_line, b"".join([b"%b: %b\r\n" % field for field in fields]))


def _end_to_end(fields: list[Field]) -> list[Field]:
    dropped = _HOP
    for options in [value for name, value in fields if name == b"connection"]:
        if options not in _COMMON_OPTIONS:
            named = {option.strip(b" \t").lower() for option in options.split(b",")}
            dropped = dropped | (named - _NEVER_NAMED)
    return [field for field in fields if field[0] not in dropped]


_COMMON_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"Keep-Alive", b"Upgrade", b"upgrade"})


def _origin(head: RequestHead) -> bytes:
    if head.target.startswith((b"/", b"*")):
        return head.target
    return head.path + (b"?" + head.query if b"?" in head.target else b"")
