"""The bytes of the remote feed: a length of four bytes, big-endian, then one MessagePack message.

reader → server    List | Watch | Demand, once and first; after a Watch any number of Wants
server → reader    Page* End        answers a List
                   Started Event*   answers a Watch
                   Granted          answers a Demand, once it is done
                   Refusal          instead of any of these, and then the connection ends
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from penstock.core.deadlines import within
from penstock.core.errors import PenstockError
from penstock.model.records import Batch, Record

FRAME_BYTES_MAX: Final = 16 * 1024 * 1024  # four times the largest commit
PAGE_BYTES: Final = 256 * 1024  # of values in one Page, give or take a record
READ_BYTES: Final = 256 * 1024
UNIX_PATH_BYTES_MAX: Final = 107  # sun_path, without its NUL

M = TypeVar("M")


class List(msgspec.Struct, frozen=True, tag=True, array_like=True):
    prefix: str


class Watch(msgspec.Struct, frozen=True, tag=True, array_like=True):
    prefix: str
    after_revision: int


class Want(msgspec.Struct, frozen=True, tag=True, array_like=True):
    revision: int


class Demand(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The one thing a reader may want of the world: that this sandbox runs, because a request for it has come."""

    sandbox: str


class Granted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Page(msgspec.Struct, frozen=True, tag=True, array_like=True):
    records: tuple[Record, ...]


class End(msgspec.Struct, frozen=True, tag=True, array_like=True):
    revision: int


class Started(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Event(msgspec.Struct, frozen=True, tag=True, array_like=True):
    batch: Batch


class Refusal(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`code` is the error's; the numbers are those of Compacted."""

    code: str
    why: str
    asked: int = 0
    compacted: int = 0
    revision: int = 0


FromReader = List | Watch | Want | Demand
FromServer = Page | End | Started | Event | Granted | Refusal

_encode = msgspec.msgpack.Encoder().encode


class BrokenFrame(PenstockError, ConnectionError):
    """What arrived is not this protocol. The connection is dropped."""

    code = "broken_frame"


def frame(message: FromReader | FromServer) -> bytes:
    body = _encode(message)
    assert len(body) <= FRAME_BYTES_MAX, f"a frame of {len(body)} bytes"
    return len(body).to_bytes(4, "big") + body


class Link:
    """One connection. `receive` may be cancelled: what had arrived stays."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._arrived = bytearray()
        self._over = False

    async def receive(self, decoder: msgspec.msgpack.Decoder[M]) -> M | None:
        """The next message, None when the other side has closed. Raises BrokenFrame, OSError."""
        while True:
            body = self._next_body()
            if body is not None:
                try:
                    return decoder.decode(body)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec lets the second one through
                    raise BrokenFrame("feed sent what it may not", why=str(error)) from error
            data = await self._reader.read(READ_BYTES)
            if not data:
                return None
            self._arrived += data

    def put(self, message: FromReader | FromServer) -> None:
        """Queue a message; `flush` bounds what is queued. Raises ConnectionResetError once the connection has ended."""
        if self._writer.transport.is_closing():  # uvloop's answer to a write then is a RuntimeError
            raise ConnectionResetError("the other side has gone")
        self._writer.write(frame(message))

    async def flush(self) -> None:
        """Wait until the other side has taken most of what was put. Raises OSError. Bound it."""
        await self._writer.drain()

    async def close(self, *, within_s: float) -> None:
        """Let what was put go out, for at most `within_s`, then close."""
        self._writer.close()
        try:
            async with within(within_s, "the last bytes of a feed connection"):
                await self._writer.wait_closed()
        except TimeoutError:
            self.abort()
        except OSError:
            pass  # the other side was faster
        self._over = True

    def abort(self) -> None:
        """Close at once; what was put and not taken is lost. Idempotent."""
        if not self._over:  # asyncio's transport fails on an abort after it has closed by itself (3.11)
            self._writer.transport.abort()
        self._over = True

    def _next_body(self) -> bytes | None:
        if len(self._arrived) < 4:
            return None
        size_bytes = int.from_bytes(self._arrived[:4], "big")
        if size_bytes > FRAME_BYTES_MAX:
            raise BrokenFrame("frame is too large", why=f"{size_bytes} bytes, allowed are {FRAME_BYTES_MAX}")
        if len(self._arrived) < 4 + size_bytes:
            return None
        body = bytes(self._arrived[4 : 4 + size_bytes])
        del self._arrived[: 4 + size_bytes]
        return body


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """A name of the socket that fits into sun_path: one through a descriptor of its folder when its own is too long."""
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
