"""The daemon's calls to guests: HTTP/1.1 over the control socket in a sandbox's run directory.

One connection per call, none kept: a guest may be frozen or gone at any time, and calls are rare. A guest is not
trusted: what it answers is bounded in size and time, and parsed strictly.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.core.deadlines import DeadlinePassed, within
from penstock.feed.frames import address
from penstock.model.errors import Unavailable
from penstock.node.ports import Notice
from penstock.wire import http1

CONTROL_SOCKET: Final = "control.sock"
ANSWER_BYTES_MAX: Final = 64 * 1024  # head and body
_READ_BYTES: Final = 16 * 1024

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Synced(msgspec.Struct, frozen=True):
    synced_at: float


class _Refusal(msgspec.Struct, frozen=True):
    message: str = ""


async def connect_unix(path: str) -> Streams:
    """Raises OSError."""
    with address(Path(path)) as short:
        return await asyncio.open_unix_connection(short)


class SocketGuests:
    """Stateless; any number of calls at once. `connect` is given the path of a control socket."""

    def __init__(self, connect: Callable[[str], Awaitable[Streams]] = connect_unix) -> None:
        self._connect = connect

    async def notify(self, run_dir: str, notice: Notice, *, within_s: float) -> None:
        await self._call(run_dir, "notice", notice, within_s)

    async def quiesce(self, run_dir: str, *, within_s: float) -> float:
        body = await self._call(run_dir, "quiesce", {"within_s": within_s}, within_s)
        try:
            return msgspec.json.decode(body, type=_Synced).synced_at
        except msgspec.DecodeError as error:
            raise _unavailable(run_dir, "quiesce", str(error)) from error

    async def health(self, run_dir: str, *, within_s: float) -> bool:
        try:
            await self._call(run_dir, "health", None, within_s)
        except (Unavailable, DeadlinePassed):
            return False
        return True

    async def _call(self, run_dir: str, verb: str, wish: Any, within_s: float) -> bytes:
        """The body of a 2xx answer. POST with `wish` as JSON, GET without."""
        what = f"{verb} of the guest of {_sandbox(run_dir)}"
        try:
            async with within(within_s, what):
                status, body = await self._exchange(f"{run_dir}/{CONTROL_SOCKET}", _request(verb, wish))
        except DeadlinePassed:
            raise
        except (OSError, EOFError) as error:
            raise _unavailable(run_dir, verb, str(error) or type(error).__name__) from error
        except http1.BadRequest as error:
            raise _unavailable(run_dir, verb, error.why) from error
        if status == 504:
            raise DeadlinePassed(what, within_s=within_s)
        if not 200 <= status < 300:
            raise _unavailable(run_dir, verb, f"{status} {_message(body)}".rstrip())
        return body

    async def _exchange(self, path: str, request: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError, EOFError when it ends early, BadRequest."""
        reader, writer = await self._connect(path)
        try:
            writer.write(request)
            return await _read_answer(reader)
        finally:
            writer.transport.abort()


def _request(verb: str, wish: Any) -> bytes:
    body = b"" if wish is None else msgspec.json.encode(wish)
    fields = [(b"host", b"guest"), (b"connection", b"close")]
    if wish is None:
        return http1.encode_head(b"GET /%b HTTP/1.1" % verb.encode(), fields)
    fields += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return http1.encode_head(b"POST /%b HTTP/1.1" % verb.encode(), fields) + body


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    arrived = bytearray()
    while (head := http1.parse_response_head(arrived)) is None:
        await _read_more(reader, arrived)
    del arrived[: head.size]
    if head.framing not in (http1.Framing.NONE, http1.Framing.LENGTH) or head.content_length > ANSWER_BYTES_MAX:
        raise http1.BadRequest(502, "an answer of unknown or too great length")
    while len(arrived) < head.content_length:
        await _read_more(reader, arrived)
    return head.status, bytes(arrived[: head.content_length])


async def _read_more(reader: asyncio.StreamReader, arrived: bytearray) -> None:
    data = await reader.read(_READ_BYTES)
    if not data:
        raise EOFError("the connection ended early")
    arrived += data


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _unavailable(run_dir: str, verb: str, why: str) -> Unavailable:
    return Unavailable(f"the guest does not answer: {verb}", which=_sandbox(run_dir), why=why)


def _sandbox(run_dir: str) -> str:
    return os.path.basename(run_dir)
