"""One request and its answer, as a handler sees them; and the errors a handler may raise.

A handler is `async def handler(exchange: Exchange) -> None`. It reads the body if it wants it, answers once with
`respond` or `start_stream`, and returns. Raising is answering: HttpError and PenstockError become the JSON body
`{"code", "message"}`, Disconnected ends quietly, anything else is a 500 and one line in the log.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote

from penstock.core.errors import Kind
from penstock.wire import chunked
from penstock.wire.http1 import Field, RequestHead

if TYPE_CHECKING:
    from penstock.guest.connection import Connection

QUERY_FIELDS_MAX: Final = 64

REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
STATUS_OF_KIND: Final = {
    Kind.INVALID: 400,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.EXHAUSTED: 429,
    Kind.UNAVAILABLE: 503,
    Kind.UNSUPPORTED: 501,
    Kind.DEADLINE: 504,
    Kind.INTERNAL: 500,
}


class Peer(Enum):
    """Who is at the other end: anybody the ingress let through, or this machine's own daemon."""

    PUBLIC = "public"
    CONTROL = "control"


class HttpError(Exception):
    """Answer `status` with `{"code": status, "message": message}`."""

    def __init__(self, status: int, message: str, fields: Iterable[Field] = ()) -> None:
        self.status, self.message, self.fields = status, message, tuple(fields)
        super().__init__(message)


class Disconnected(Exception):
    """The client went away; raised by every read and write of its exchange. Nothing can be answered any more."""


class Exchange:
    """A request being served. Lives until its handler returns."""

    __slots__ = ("_body_taken", "_connection", "_gone", "_gone_callbacks", "_query", "_stream", "head", "path", "peer")

    def __init__(self, connection: Connection, head: RequestHead, path: str, peer: Peer) -> None:
        self.head = head
        self.path = path  # percent-decoded
        self.peer = peer
        self._connection = connection
        self._stream: Stream | None = None
        self._query: dict[str, str] | None = None
        self._body_taken = False
        self._gone: asyncio.Event | None = None
        self._gone_callbacks: list[Callable[[], None]] = []

    @property
    def method(self) -> str:
        return self.head.method.decode("ascii")

    @property
    def query(self) -> dict[str, str]:
        """Decoded query; of a repeated name the first value counts. Bytes that are not UTF-8 become surrogates.

        Raises HttpError(400) beyond QUERY_FIELDS_MAX names.
        """
        if self._query is None:
            self._query = _parse_query(self.head.query)
        return self._query

    def header(self, name: bytes, default: bytes = b"") -> bytes:
        return self.head.header(name, default)

    def header_text(self, name: bytes) -> str:
        """The header decoded as latin-1; empty when absent."""
        return self.head.header(name).decode("latin-1")

    # ---- the request body --------------------------------------------------------------------------------

    async def read_body(self, max_bytes: int) -> bytes:
        """The whole body. Raises HttpError(413) as soon as it must exceed `max_bytes`, or Disconnected."""
        if self.head.content_length > max_bytes:
            raise HttpError(413, f"body of {self.head.content_length} bytes exceeds {max_bytes}")
        pieces: list[bytes] = []
        size = 0
        async for piece in self.iter_body():
            size += len(piece)
            if size > max_bytes:
                raise HttpError(413, f"body exceeds {max_bytes} bytes")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def iter_body(self) -> AsyncIterator[bytes]:
        """The body in pieces as they arrive. The client is held back while you do not ask.

        Raises Disconnected when it ends early, HttpError(400) when its framing breaks. Once only.
        """
        assert not self._body_taken, "the body was read before"
        self._body_taken = True
        while True:
            piece = await self._connection.read_piece()
            if not piece:
                return
            yield piece

    # ---- the answer --------------------------------------------------------------------------------------

    @property
    def answered(self) -> bool:
        """Whether the response head was sent."""
        return self._stream is not None

    async def respond(self, status: int, fields: Iterable[Field] = (), body: bytes = b"") -> None:
        """The whole answer at once. Returns when the client has room for more. Raises Disconnected."""
        self.answer(status, fields, body)
        await self._connection.writable()

    def answer(self, status: int, fields: Iterable[Field] = (), body: bytes = b"") -> None:
        """`respond` without the wait: for bodies that are small and already in memory."""
        assert self._stream is None, "answered twice"
        stream = self._stream = Stream(self._connection, self._silent(status), length=len(body))
        if status >= 200 and status not in (204, 304):
            fields = (*fields, (b"content-length", b"%d" % len(body)))
        stream.begin(status, fields, body)
        stream.close()

    async def respond_json(self, status: int, value: object, fields: Iterable[Field] = ()) -> None:
        body = json.dumps(value).encode()
        await self.respond(status, (*fields, (b"content-type", b"application/json")), body)

    async def start_stream(
        self, status: int, fields: Iterable[Field] = (), *, length: int | None = None, first: bytes = b""
    ) -> Stream:
        """Send the head and return the writer of the body. With `length` the body must have exactly so many bytes;
        without, it is chunked (until close for HTTP/1.0). `first` leaves in the same packet as the head."""
        assert self._stream is None, "answered twice"
        stream = self._stream = Stream(self._connection, self._silent(status), length=length)
        if length is not None:
            fields = (*fields, (b"content-length", b"%d" % length))
        elif self.head.minor:
            fields = (*fields, (b"transfer-encoding", b"chunked"))
        else:
            self._connection.close_after_response()
        stream.begin(status, fields, first)
        await self._connection.writable()
        return stream

    def _silent(self, status: int) -> bool:
        return self.head.method == b"HEAD" or status in (204, 304)

    # ---- the other end -----------------------------------------------------------------------------------

    @property
    def disconnected(self) -> asyncio.Event:
        """Set when the client closed the connection, or its sending half."""
        if self._gone is None:
            self._gone = asyncio.Event()
            if self._connection.gone:
                self._gone.set()
        return self._gone

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the client goes away (at once when it has)."""
        if self._connection.gone:
            callback()
        else:
            self._gone_callbacks.append(callback)

    def note_disconnect(self) -> None:
        """By the connection only."""
        if self._gone is not None:
            self._gone.set()
        callbacks, self._gone_callbacks = self._gone_callbacks, []
        for callback in callbacks:
            callback()

    @property
    def stream(self) -> Stream | None:
        return self._stream


class Stream:
    """The body of an answer, written in pieces."""

    __slots__ = ("_chunked", "_connection", "_left", "_silent", "finished")

    def __init__(self, connection: Connection, silent: bool, *, length: int | None) -> None:
        self._connection, self._silent, self._left = connection, silent, length
        self._chunked = length is None
        self.finished = False

    def begin(self, status: int, fields: Iterable[Field], first: bytes) -> None:
        """By the exchange only."""
        self._chunked = self._chunked and self._connection.chunks
        head = self._connection.encode_head(status, fields)
        self._connection.send(head + self._encode(first) if first else head)

    async def write(self, data: bytes) -> None:
        """Send `data`; returns when the client has room for more. Raises Disconnected."""
        self.push(data)
        await self._connection.writable()

    def push(self, data: bytes) -> bool:
        """Send `data` without waiting. False when the client is slow: stop until `on_writable` calls back.

        Pushing on regardless would grow the buffer without bound. Raises Disconnected.
        """
        assert not self.finished, "written after its end"
        if data:
            self._connection.send(self._encode(data))
        return self._connection.has_room

    def on_writable(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the client has room again or is gone."""
        self._connection.on_writable(callback)

    async def finish(self, last: bytes = b"") -> None:
        """End the body, `last` being its last piece. Raises Disconnected."""
        if last:
            last = self._encode(last)
        self._end(last)
        await self._connection.writable()

    def close(self) -> None:
        """End the body without waiting."""
        self._end(b"")

    def _end(self, last: bytes) -> None:
        assert not self.finished, "finished twice"
        assert not self._left or self._silent, f"{self._left} bytes of the announced length are missing"
        self.finished = True
        if self._chunked and not self._silent:
            last += chunked.LAST_CHUNK
        if last:
            self._connection.send(last)

    def _encode(self, data: bytes) -> bytes:
        if self._left is not None:
            assert len(data) <= self._left, "more bytes than announced"
            self._left -= len(data)
        if self._silent:
            return b""
        return chunked.chunk(data) if self._chunked else data


def error_answer(error: HttpError) -> tuple[int, tuple[Field, ...], bytes]:
    """Status, fields and body of an error."""
    body = json.dumps({"code": error.status, "message": error.message}).encode()
    return error.status, (*error.fields, (b"content-type", b"application/json; charset=utf-8")), body


def _parse_query(raw: bytes) -> dict[str, str]:
    if not raw:
        return {}
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, errors="surrogateescape", max_num_fields=QUERY_FIELDS_MAX
        )
    except ValueError:
        raise HttpError(400, f"query has more than {QUERY_FIELDS_MAX} fields") from None
    query: dict[str, str] = {}
    for name, value in pairs:
        query.setdefault(name, value)
    return query


def decode_path(raw: bytes) -> str:
    """Percent-decoded path; bytes that are not UTF-8 become surrogates."""
    text = raw.decode("ascii")
    return unquote(text, errors="surrogateescape") if "%" in text else text
