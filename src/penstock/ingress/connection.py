"""A client's connection by itself: heads, their order, the waits, and closing so that the last answer arrives.

Stages: HEAD (waiting for a request) → BODY (its body goes on to the sandbox) → ANSWER (the request is complete) →
HEAD …; TUNNEL after an upgrade; LINGER when we answered before the request was complete; CLOSED. What a client sends
early (pipelined requests, a body while we dial) is held, and beyond HELD_BYTES_MAX not read.

What is done with a request is `client.py`'s: it continues this class.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final

from penstock.ingress import pages
from penstock.ingress.framing import Body
from penstock.ingress.heads import Asked
from penstock.ingress.pages import Refusal
from penstock.ingress.pipe import Pipe
from penstock.wire.http1 import HEAD_BYTES_MAX, BadRequest, parse_request_head

if TYPE_CHECKING:
    from penstock.ingress.hub import Hub

HELD_BYTES_MAX: Final = 64 * 1024  # received ahead of its turn; above it the client is not read
FIRST_S: Final = 60.0  # a fresh connection says something
HEAD_S: Final = 10.0  # from the first byte of a head to its last
IDLE_S: Final = 620.0  # between requests, of an unfinished body, of a client that does not take what we send
LINGER_S: Final = 3.0  # after an early answer, for a client still sending to see it


class Stage(Enum):
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    TUNNEL = "tunnel"
    LINGER = "linger"
    CLOSED = "closed"


_HEAD, _BODY, _ANSWER = Stage.HEAD, Stage.BODY, Stage.ANSWER
_TUNNEL, _LINGER, _CLOSED = Stage.TUNNEL, Stage.LINGER, Stage.CLOSED


class Connection(Pipe):
    """Lives from `connection_made` to `connection_lost`."""

    __slots__ = ("_advancing", "_body", "_finished", "_heard", "_held", "_keep", "_timer", "asked", "hub", "stage")

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub
        self.stage = _HEAD
        self.asked: Asked | None = None
        self._body: Body | None = None  # what is still to come of the request
        self._held = bytearray()
        self._heard = 0.0  # loop seconds of the last byte, or of the last response's end
        self._keep = False  # the connection goes on after this response
        self._finished = False  # the client will send no more
        self._advancing = False
        self._timer: asyncio.TimerHandle | None = None

    # ---- what is done with a request

    def _start(self, asked: Asked, rest: bytes) -> None:
        """A whole head has come, and `rest` behind it."""
        raise NotImplementedError

    def _take(self, data: bytes) -> None:
        """More of a request under way, or of a tunnel."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Whatever is under way for this client ends now."""
        raise NotImplementedError

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connected(transport)
        self._heard = self.hub.loop.time()
        if self.hub.admit(self):
            self._timer = self.hub.loop.call_later(FIRST_S, self._check)
        else:
            self._answer_self(pages.render(pages.full(), None, close=True), cause="full", close=True)
            if not self.hub.may_linger(self):
                self.transport.abort()

    def data_received(self, data: bytes) -> None:
        hub, stage = self.hub, self.stage
        self._heard = hub.loop.time()
        hub.tally.bytes_from_clients += len(data)
        if stage is _HEAD:
            if self._held:
                self._grow_head(data)
            else:
                self._read_head(data)
        elif stage is not _LINGER and stage is not _CLOSED:
            self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stage = _CLOSED
        if self._timer is not None:
            self._timer.cancel()
        self._let_go()
        self._held.clear()
        self.hub.leave(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        self._heard = self.hub.loop.time()
        if self.stage is not _LINGER and self.stage is not _HEAD:  # those have a timer of their own, and a shorter one
            self._rearm(IDLE_S)

    def resume_writing(self) -> None:
        self.write_paused = False
        self._heard = self.hub.loop.time()
        if self.stage is _HEAD and self._held:
            self._advance()

    # ---- what others ask

    def send(self, data: bytes) -> None:
        self.hub.tally.bytes_to_clients += len(data)
        self.transport.write(data)

    def may_keep(self) -> bool:
        """Whether this connection may serve another request after this one."""
        asked = self.asked
        return asked is not None and asked.keep_alive and self._body is None and not self.hub.stopping

    @property
    def request_complete(self) -> bool:
        return self._body is None

    @property
    def finished(self) -> bool:
        """It has ended its sending, and so have we, towards the server."""
        return self._finished

    def close_if_idle(self) -> None:
        """No request is under way: close. Otherwise the connection closes with its response."""
        if self.stage is _HEAD and not self._held:
            self.stage = _CLOSED
            self.transport.close()

    # ---- heads

    def _read_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        try:
            if end < 0:
                parse_request_head(data)  # raises for what can become no head
                self._held += data
                self._rearm(HEAD_S)
                return
            end += 4
            raw, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
            asked = self.hub.heads.asked(raw)
        except BadRequest as bad:
            self.asked = None
            self._refuse(pages.bad_request(bad.status, bad.why), close=True)
            return
        self._start(asked, rest)

    def _grow_head(self, data: bytes) -> None:
        """More of an unfinished head: its timer runs on, and what was searched is not searched again."""
        held = self._held
        start = max(0, len(held) - 3)
        held += data
        if held.find(b"\r\n\r\n", start) >= 0:
            self._advance()
        elif len(held) >= HEAD_BYTES_MAX:
            self._refuse(pages.bad_request(431, f"head longer than {HEAD_BYTES_MAX} bytes"), close=True)

    def _advance(self) -> None:
        """Take up what was held, one request after the other: by a loop, since refusals complete at once."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self.stage is _HEAD and self._held and not self.write_paused:
                data = bytes(self._held)
                self._held.clear()
                self._read_head(data)
                if self.stage is _HEAD and len(self._held) == len(data):
                    return  # an unfinished head
        finally:
            self._advancing = False
        if self.stage is _HEAD and self._finished:
            self.stage = _CLOSED
            self.transport.close()

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > HELD_BYTES_MAX:
            self.pause_reading()

    # ---- answers of our own

    def _refuse(self, refusal: Refusal, *, close: bool = False) -> None:
        """Answer by ourselves. The exchange, if one was under way, is over."""
        self._let_go()
        if self._body is not None and self._held:
            self._skip_body()
        close = close or not self._may_keep_own()
        head = self.asked.head if self.asked is not None else None
        self._answer_self(pages.render(refusal, head, close=close), cause=refusal.cause, close=close)

    def _answer_self(self, reply: bytes, *, cause: str, close: bool) -> None:
        self.hub.tally.requests[cause] += 1
        self.send(reply)
        self._next(close=close)

    def _may_keep_own(self) -> bool:
        """After an answer of ours; a client of HTTP/1.0 would have to be told, and is not worth it."""
        return self.may_keep() and self.asked is not None and self.asked.minor == 1

    def _skip_body(self) -> None:
        """The rest of the request is perhaps here already; then the connection can go on."""
        assert self._body is not None
        try:
            _, rest = self._body.feed(bytes(self._held))
        except BadRequest:
            rest = None
        self._held.clear()
        if rest is not None:
            self._body = None
            self._held += rest

    # ---- endings

    def _next(self, *, close: bool) -> None:
        """One exchange is over: read the next, or end the connection so that the client sees all of the answer."""
        if self.stage is _CLOSED:
            return
        if close:
            self._close_gently()
            return
        self.stage, self.asked, self._keep = _HEAD, None, True
        if self._held:
            self._advance()
        elif self._finished:
            self.stage = _CLOSED
            self.transport.close()
            return
        if self.stage is _HEAD and not self._held:
            self.hub.idle[self] = None
            if self.hub.stopping:
                self.close_if_idle()
        if len(self._held) <= HELD_BYTES_MAX:
            self.resume_reading()

    def _close_gently(self) -> None:
        """Close so that the answer arrives.

        Closing with unread input sends a reset, which can overtake the answer: stop sending, and read on for a while.
        """
        unread = self._body is not None or bool(self._held) or self.asked is None
        self._held.clear()
        if not unread or self._finished:
            self.stage = _CLOSED
            self.transport.close()
            return
        self.stage = _LINGER
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.resume_reading()
        self._rearm(LINGER_S)

    # ---- time

    def _rearm(self, after_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.hub.loop.call_later(after_s, self._check)

    def _check(self) -> None:
        """One timer per connection, armed for the earliest moment it could matter, and here compared with the facts."""
        stage, quiet_s = self.stage, self.hub.loop.time() - self._heard
        if stage is _CLOSED:
            return
        allowed_s = IDLE_S
        if stage is _LINGER:
            allowed_s = 0.0
        elif stage is _HEAD and self._held:
            self._refuse(pages.bad_request(408, "the request's head did not come in time"), close=True)
            return
        elif stage is _HEAD and self.asked is None and not self._keep:
            allowed_s = FIRST_S
        elif not self.write_paused and (stage is _ANSWER or stage is _TUNNEL or self.read_paused):
            quiet_s = 0.0  # it is the server's turn; there is no limit on how long that takes
        if quiet_s >= allowed_s - 0.001:
            if self.write_paused or stage is _LINGER:
                self.transport.abort()
            else:
                self.stage = _CLOSED
                self._let_go()
                self.transport.close()
            return
        self._timer = self.hub.loop.call_later(max(allowed_s - quiet_s, 0.05), self._check)
