"""An HTTP client in a simulated world: it says what it is told, byte by byte if need be, and judges every answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.core.deadlines import DeadlinePassed, within
from penstock.sim.net import Net, Streams
from penstock.wire import http1
from penstock.wire.chunked import LAST_CHUNK, ChunkedDecoder, chunk
from penstock.wire.http1 import BadRequest, Framing, ResponseHead

READ_BYTES: Final = 64 * 1024
ANSWER_S: Final = 60.0  # nothing a visitor asks takes longer, unless something hangs


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one request. `status` 0: nothing did, the connection was reset. `whole`: the body ended as it says
    it would; never true of status 0."""

    status: int
    body: bytes = b""
    whole: bool = False
    keep: bool = False

    def __str__(self) -> str:
        return f"{self.status or 'reset'}" + ("" if self.whole or not self.status else " torn")


RESET: Final = Answer(status=0)


class Hung(Exception):
    """No answer and no end within ANSWER_S."""


class Caller:
    """One connection to `address`. Requests go one after the other, or several at once with `send` and `receive`."""

    def __init__(self, net: Net, address: str, rng: random.Random) -> None:
        self._net, self._address, self._rng = net, address, rng
        self._streams: Streams | None = None
        self._held = bytearray()
        self._broken = False  # by a reset

    async def open(self) -> None:
        """Raises ConnectionRefusedError: nobody listens."""
        self._streams = await self._net.open_streams(self._address)
        self._held.clear()
        self._broken = False

    @property
    def writer(self) -> asyncio.StreamWriter:
        assert self._streams is not None
        return self._streams[1]

    async def send(self, data: bytes) -> None:
        """All of it, in pieces, some after a pause. Returns early when the other side has gone.

        As in `net`, the number of pieces does not depend on the length.
        """
        count = self._rng.choice((1, 1, 2, 5, 20))
        for number in range(count):
            if self.writer.is_closing():
                return
            self.writer.write(data[len(data) * number // count : len(data) * (number + 1) // count])
            try:
                async with within(ANSWER_S, "the other side to take a request"):
                    await self.writer.drain()
            except DeadlinePassed:
                raise Hung("a request is not taken") from None
            except OSError:
                return
            if self._rng.random() < 0.1:
                await asyncio.sleep(0.01)

    async def receive(self, method: bytes = b"GET", *, within_s: float = ANSWER_S) -> Answer:
        """The next final answer. Raises Hung."""
        try:
            async with within(within_s, "an answer"):
                while True:
                    head = await self._head(method)
                    if head is None:
                        return RESET
                    if head.status >= 200:
                        return await self._rest(head)
                    if head.status == 101:
                        return Answer(status=101, whole=True)
        except DeadlinePassed:
            raise Hung("no answer") from None

    async def read(self) -> bytes:
        """Whatever comes next, b"" at the end or a reset."""
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            return data
        assert self._streams is not None
        try:
            return await self._streams[0].read(READ_BYTES)
        except OSError:
            return b""

    async def ended(self) -> bool:
        """Send the end and read to the other side's: False when anything more was said, or no end came."""
        self.writer.write_eof() if not self.writer.is_closing() else None
        try:
            async with within(ANSWER_S, "the end of a connection"):
                return not await self.read()
        except DeadlinePassed:
            return False

    def hang_up(self) -> None:
        """At once, whatever is under way."""
        if self._streams is not None:
            self.writer.transport.abort()

    # ---- private parts

    async def _head(self, method: bytes) -> ResponseHead | None:
        while True:
            if self._held:
                head = http1.parse_response_head(self._held, method=method)
                if head is not None:
                    del self._held[: head.size]
                    return head
            if not await self._more():
                return None

    async def _more(self) -> bool:
        assert self._streams is not None
        try:
            data = await self._streams[0].read(READ_BYTES)
        except OSError:
            self._broken = True
            return False
        self._held += data
        return bool(data)

    async def _rest(self, head: ResponseHead) -> Answer:
        body, whole = await self._body(head)
        return Answer(status=head.status, body=body, whole=whole, keep=head.keep_alive and whole)

    async def _body(self, head: ResponseHead) -> tuple[bytes, bool]:
        """The body, and whether it is whole."""
        body = bytearray()
        decoder = ChunkedDecoder() if head.framing is Framing.CHUNKED else None
        while True:
            if head.framing is Framing.NONE:
                return b"", True
            data = bytes(self._held)
            self._held.clear()
            if decoder is not None:
                if data:
                    try:
                        body += b"".join(decoder.feed(data))
                    except BadRequest:
                        return bytes(body), False
                if decoder.done:
                    self._held += decoder.rest
                    return bytes(body), True
            elif head.framing is Framing.LENGTH:
                left = head.content_length - len(body)
                body += data[:left]
                self._held += data[left:]
                if len(body) == head.content_length:
                    return bytes(body), True
            else:
                body += data
            if not await self._more():
                return bytes(body), head.framing is Framing.UNTIL_CLOSE and not self._broken


def request(
    method: str, target: str, fields: Sequence[tuple[str, str]] = (), body: bytes = b"", *, chunks: Sequence[int] = ()
) -> bytes:
    """A whole request. With `chunks` (sizes; the rest is one more) the body is sent chunked."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    if chunks:
        pieces, at = [], 0
        for size in (*chunks, len(body)):
            if body[at : at + size]:
                pieces.append(chunk(body[at : at + size]))
            at += size
        lines.append("Transfer-Encoding: chunked")
        sent = b"".join(pieces) + LAST_CHUNK
    else:
        if body or method in ("POST", "PUT"):
            lines.append(f"Content-Length: {len(body)}")
        sent = body
    return "\r\n".join([*lines, "", ""]).encode() + sent
