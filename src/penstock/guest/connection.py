"""One HTTP/1.1 connection: requests one after the other, bounded memory, back-pressure in both directions.

Refused designs: `asyncio.StreamReader` (a task and two buffers per connection, 64 KiB reads); one receive buffer per
connection (a thousand idle clients would hold 256 MiB; the process is single-threaded, so one shared buffer is
enough); reading on while a handler is slow (memory would follow the client's speed).

Bounds per connection: BODY_BYTES_HELD + one receive for a body nobody has asked for yet, PIPELINE_BYTES_MAX + one
receive of following requests, WRITE_BYTES_HIGH + one write of an answer the client has not taken: under 1 MiB.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final

from penstock.guest.exchange import REASONS, Disconnected, Exchange, HttpError, Peer, decode_path, error_answer
from penstock.wire import chunked, http1
from penstock.wire.http1 import BadRequest, Field, Framing, RequestHead

if TYPE_CHECKING:
    from penstock.guest.server import Server

RECEIVE_BYTES: Final = 256 * 1024  # of the buffer all connections share
BODY_BYTES_HELD: Final = 256 * 1024  # above: the client is not read
PIPELINE_BYTES_MAX: Final = 64 * 1024  # of requests that follow the one being served
WRITE_BYTES_HIGH: Final = 256 * 1024  # above: writers wait
WRITE_BYTES_LOW: Final = 64 * 1024
DISCARD_BYTES_MAX: Final = 64 * 1024  # an unread rest of a body up to this is swallowed to keep the connection
HEAD_S: Final = 10.0  # from the first byte of a head to its last
IDLE_S: Final = 640.0  # between requests; above the ingress's own, so that it never meets a closing connection
LINGER_S: Final = 2.0  # an answer given before the body was read: how long we swallow the rest

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_CORS: Final = ((b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*"))
_CLOSE: Final = ((b"connection", b"close"),)
_KEEP: Final = ((b"connection", b"keep-alive"),)


class Phase(Enum):
    HEAD = "head"  # between requests, or inside a head
    SERVING = "serving"  # a handler runs
    DISCARDING = "discarding"  # answered; the small rest of the body is being swallowed
    LINGERING = "lingering"  # answered, our half closed; what still comes is dropped
    CLOSED = "closed"


class Connection(asyncio.BufferedProtocol):
    """By the server only. Handlers see an `Exchange`."""

    def __init__(self, server: Server, peer: Peer) -> None:
        self._server, self._peer = server, peer
        self._transport: asyncio.Transport | None = None
        self._phase = Phase.HEAD
        self._inbox = bytearray()
        self._exchange: Exchange | None = None
        self._head: RequestHead | None = None
        self._head_started = False  # a part of the next head has come
        self._closing = False  # close after the current answer
        self._eof = False
        self._reading = True
        self.has_room = True
        self._room_waiters: list[Callable[[], None]] = []
        self.deadline = float("inf")  # loop time at which the server closes us
        # the body being received
        self._left = 0
        self._decoder: chunked.ChunkedDecoder | None = None
        self._body_done = True
        self._body_broken = ""
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._piece_waiter: asyncio.Future[None] | None = None
        self._continue_due = False

    # ---- the transport's side ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH, low=WRITE_BYTES_LOW)
        refusal = self._server.admit(self)
        if refusal is not None:
            self._phase = Phase.CLOSED
            transport.write(refusal)
            transport.close()
            return
        self._set_deadline(IDLE_S)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._server.receive_buffer[:nbytes])
        if self._phase is Phase.CLOSED or self._phase is Phase.LINGERING:
            return
        if self._body_done:
            self._inbox += data
        else:
            self._feed_body(data)
        if self._phase is Phase.HEAD:
            self._next_request()
        self._hold_back()

    def eof_received(self) -> bool:
        self._eof = True
        self._wake_reader()
        if self._phase is not Phase.SERVING:
            return False
        assert self._exchange is not None
        self._exchange.note_disconnect()
        return True  # the answer may still be wanted: `printf ... | nc`

    def connection_lost(self, exc: Exception | None) -> None:
        serving = self._phase is Phase.SERVING
        self._phase = Phase.CLOSED
        self._eof = True
        self._server.forget(self)
        self._inbox.clear()
        self._pieces.clear()
        self._wake_reader()
        self._call_room_waiters()
        if serving and self._exchange is not None:
            self._exchange.note_disconnect()

    def pause_writing(self) -> None:
        self.has_room = False

    def resume_writing(self) -> None:
        self.has_room = True
        self._call_room_waiters()

    # ---- the server's side -------------------------------------------------------------------------------

    def expire(self) -> None:
        """Its deadline passed: a head that did not end is answered, an idle connection just closed."""
        self.deadline = float("inf")
        if self._phase is Phase.HEAD and self._inbox:
            self._refuse(408, f"request head did not end within {HEAD_S:.0f} s")
        self.close()

    def stop_when_idle(self) -> None:
        """Close now when between requests, else after the current answer."""
        self._closing = True
        if self._phase is Phase.HEAD:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def done(self, exchange: Exchange) -> None:
        """The handler of `exchange` has returned."""
        if self._phase is Phase.CLOSED:
            self._exchange = None
            return
        stream = exchange.stream
        self._exchange = None
        if stream is None or not stream.finished:
            self._abort()  # the client must not take a torn answer for a whole one
            return
        if self._body_done and not self._body_broken:
            self._end_request()
        elif self._closing or self._body_broken:
            self._linger()
        else:
            self._phase = Phase.DISCARDING
            self._pieces.clear()
            self._held = 0
            self._set_deadline(HEAD_S)
            self._hold_back()

    # ---- the exchange's side -----------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """The client has closed, or at least sends nothing more."""
        return self._eof

    @property
    def chunks(self) -> bool:
        """Whether the client understands chunked answers."""
        return self._head is not None and self._head.minor == 1

    def close_after_response(self) -> None:
        self._closing = True

    def encode_head(self, status: int, fields: Iterable[Field]) -> bytes:
        """The answer's head, with what every answer of this connection carries. Decides whether we close after it."""
        if not self._body_done and (self._decoder is not None or self._left > DISCARD_BYTES_MAX or self._continue_due):
            self._closing = True
        extra: tuple[Field, ...] = ()
        head = self._head
        if head is not None and self._peer is Peer.PUBLIC and head.header(b"origin"):
            extra = _CORS
        if self._closing:
            extra += _CLOSE
        elif head is not None and head.minor == 0:
            extra += _KEEP
        return http1.encode_head(b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b"Unknown")), (*fields, *extra))

    def send(self, data: bytes) -> None:
        if self._phase is Phase.CLOSED or self._transport is None or self._transport.is_closing():
            raise Disconnected
        self._continue_due = False
        self._transport.write(data)

    async def writable(self) -> None:
        """Return when the client has taken most of what was sent. Raises Disconnected."""
        while not self.has_room and self._phase is not Phase.CLOSED:
            room = asyncio.get_running_loop().create_future()
            self._room_waiters.append(lambda room=room: room.done() or room.set_result(None))  # type: ignore[misc]
            await room
        if self._phase is Phase.CLOSED:
            raise Disconnected

    def on_writable(self, callback: Callable[[], None]) -> None:
        if self.has_room or self._phase is Phase.CLOSED:
            callback()
        else:
            self._room_waiters.append(callback)

    async def read_piece(self) -> bytes:
        """The next piece of the body; empty at its end."""
        while not self._pieces:
            if self._body_broken:
                raise HttpError(400, self._body_broken)
            if self._body_done:
                return b""
            if self._eof:
                raise Disconnected
            if self._continue_due:
                self.send(_CONTINUE)
            self._hold_back()
            self._piece_waiter = asyncio.get_running_loop().create_future()
            await self._piece_waiter
        piece = self._pieces.popleft()
        self._held -= len(piece)
        self._hold_back()
        return piece

    # ---- private parts -----------------------------------------------------------------------------------

    def _next_request(self) -> None:
        if not self._inbox:
            self._wait_for_more(IDLE_S)
            return
        try:
            head = http1.parse_request_head(self._inbox)
        except BadRequest as bad:
            self._refuse(bad.status, bad.why)
            return
        if head is None:
            if not self._head_started:
                self._head_started = True
                self._wait_for_more(HEAD_S)
            return
        self._head_started = False
        del self._inbox[: head.size]
        self._serve(head)

    def _wait_for_more(self, within_s: float) -> None:
        if self._eof:
            self.close()
        else:
            self._set_deadline(within_s)

    def _serve(self, head: RequestHead) -> None:
        self.deadline = float("inf")
        self._phase = Phase.SERVING
        self._head = head
        self._closing = self._closing or not head.keep_alive
        self._continue_due = head.expects_continue
        self._body_broken = ""
        self._pieces.clear()
        self._held = 0
        self._left = head.content_length
        self._decoder = chunked.ChunkedDecoder() if head.framing is Framing.CHUNKED else None
        self._body_done = head.framing is Framing.NONE
        if not self._body_done and self._inbox:
            self._continue_due = False
            data = bytes(self._inbox)
            self._inbox.clear()
            self._feed_body(data)
        exchange = self._exchange = Exchange(self, head, decode_path(head.path), self._peer)
        self._server.serve(exchange, self)

    def _feed_body(self, data: bytes) -> None:
        rest = b""
        self._continue_due = False
        if self._decoder is None:
            if len(data) > self._left:
                data, rest = data[: self._left], data[self._left :]
            self._left -= len(data)
            self._body_done = self._left == 0
            pieces = [data]
        else:
            try:
                pieces = self._decoder.feed(data)
            except BadRequest as bad:
                self._body_broken, self._closing = bad.why, True
                pieces = []
            self._body_done = self._decoder.done
            rest = self._decoder.rest
        if self._phase is Phase.SERVING:
            for piece in pieces:
                self._pieces.append(piece)
                self._held += len(piece)
        if rest:
            self._inbox += rest
        self._wake_reader()
        if self._phase is Phase.DISCARDING and self._body_done:
            self._end_request()

    def _end_request(self) -> None:
        if self._closing:
            self._phase = Phase.HEAD
            self.close()
            return
        self._phase = Phase.HEAD
        self._head = None
        self._next_request()
        self._hold_back()

    def _refuse(self, status: int, why: str) -> None:
        """Answer something that is no request, then close: nobody knows where the next one would start."""
        self._closing = True
        status, fields, body = error_answer(HttpError(status, why))
        try:
            self.send(self.encode_head(status, (*fields, (b"content-length", b"%d" % len(body)))) + body)
        except Disconnected:
            return
        self._inbox.clear()
        self._linger()

    def _linger(self) -> None:
        """Close our half and swallow what the client still sends, so that a reset does not eat the answer."""
        if self._transport is None or self._eof:
            self.close()
            return
        self._phase = Phase.LINGERING
        self._pieces.clear()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._set_deadline(LINGER_S)
        self._hold_back()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _hold_back(self) -> None:
        """Read the client exactly while there is room for what it sends."""
        if self._transport is None or self._eof or self._transport.is_closing():
            return
        full = self._held >= BODY_BYTES_HELD or len(self._inbox) >= PIPELINE_BYTES_MAX
        want = not full or self._phase in (Phase.HEAD, Phase.LINGERING)
        if want and not self._reading:
            self._reading = True
            self._transport.resume_reading()
        elif self._reading and not want:
            self._reading = False
            self._transport.pause_reading()

    def _set_deadline(self, within_s: float) -> None:
        self.deadline = asyncio.get_running_loop().time() + within_s
        self._server.note_deadline(self.deadline)

    def _wake_reader(self) -> None:
        waiter = self._piece_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _call_room_waiters(self) -> None:
        waiters, self._room_waiters = self._room_waiters, []
        for waiter in waiters:
            waiter()
