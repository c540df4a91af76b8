"""What a person runs inside a sandbox of a simulated world: a small HTTP server on a user port, not always polite.

Every answer begins with the sandbox's name, so that an answer from the wrong one is recognised, and repeats the
request's body, so that a lost or doubled byte is.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from penstock.wire import http1
from penstock.wire.chunked import LAST_CHUNK, ChunkedDecoder, chunk
from penstock.wire.http1 import Framing, RequestHead

PORT: Final = 8000  # keeps its promises
RUDE_PORT: Final = 8001  # hangs up, says nonsense, answers too early
PORTS: Final = (PORT, RUDE_PORT)
TURNS_MAX: Final = 5  # requests per connection
IDLE_S: Final = 5.0  # as uvicorn and Node


def signature(sandbox: str) -> bytes:
    """How every body from inside `sandbox` begins."""
    return f"sandbox {sandbox}\n".encode()


class Echo(asyncio.Protocol):
    """One connection."""

    def __init__(self, sandbox: str, port: int, rng: random.Random) -> None:
        self._signature, self._rude, self._rng = signature(sandbox), port == RUDE_PORT, rng
        self._transport: asyncio.Transport | None = None
        self._inbox = bytearray()
        self._head: RequestHead | None = None
        self._body = bytearray()
        self._decoder: ChunkedDecoder | None = None
        self._left = 0
        self._turns = 0
        self._tunnel = False
        self._busy = False  # an answer is being made up
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stir()

    def eof_received(self) -> bool:
        return self._busy  # finish what was asked, then close

    def data_received(self, data: bytes) -> None:
        self._stir()
        if self._tunnel:
            assert self._transport is not None
            self._transport.write(data)
            return
        self._inbox += data
        self._go_on()

    # ---- private parts

    def _rest(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._close)

    def _stir(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _go_on(self) -> None:
        if self._busy or self._transport is None:
            return
        if self._head is None:
            head = http1.parse_request_head(self._inbox)
            if head is None:
                return
            del self._inbox[: head.size]
            self._head, self._left = head, head.content_length
            self._decoder = ChunkedDecoder() if head.framing is Framing.CHUNKED else None
            self._body.clear()
        if self._take_body():
            self._busy = True
            delay_s = self._rng.choice((0.0, 0.001, 0.05, 0.5))
            asyncio.get_running_loop().call_later(delay_s, self._answer)

    def _take_body(self) -> bool:
        """Whether the body is complete."""
        data = bytes(self._inbox)
        if self._decoder is not None:
            if not self._decoder.done and data:
                self._body += b"".join(self._decoder.feed(data))
                self._inbox[:] = self._decoder.rest
            return self._decoder.done
        part = data[: self._left]
        self._body += part
        self._left -= len(part)
        del self._inbox[: len(part)]
        return self._left == 0

    def _answer(self) -> None:
        transport, head = self._transport, self._head
        self._busy, self._head = False, None
        if transport is None or head is None:
            return
        self._turns += 1
        if head.upgrade is not None:
            self._tunnel = True
            transport.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
            transport.write(self._signature)
            return
        if self._rude and self._misbehave(transport):
            return
        body = self._signature + bytes(self._body)
        last = self._turns >= TURNS_MAX or not head.keep_alive
        shape = self._rng.choice(("length", "length", "chunked", "until close"))
        if head.method == b"HEAD":
            shape = "length"
        if shape == "length":
            transport.write(_head(last, b"content-length: %d" % len(body)))
            transport.write(b"" if head.method == b"HEAD" else body)
        elif shape == "chunked":
            transport.write(_head(last, b"transfer-encoding: chunked"))
            half = len(body) // 2
            transport.write(chunk(body[:half]) + chunk(body[half:]) + LAST_CHUNK)
        else:
            last = True
            transport.write(_head(True, b"x-shape: until-close") + body)
        if last:
            transport.close()
        else:
            self._rest()
            self._go_on()

    def _misbehave(self, transport: asyncio.Transport) -> bool:
        match self._rng.randrange(6):
            case 0:
                transport.abort()
            case 1:
                transport.close()
            case 2:
                transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n")
            case 3:
                transport.write(_head(False, b"content-length: 100000") + self._signature)
                transport.close()
            case 4:
                transport.write(_head(False, b"transfer-encoding: chunked") + b"zz\r\n")
            case _:
                return False
        return True


def _head(last: bool, field: bytes) -> bytes:
    close = b"connection: close\r\n" if last else b""
    return b"HTTP/1.1 200 OK\r\n" + close + field + b"\r\n\r\n"
