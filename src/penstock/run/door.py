"""The daemon's back door: a unix socket in the data folder by which `penstock down` speaks to it.

One JSON line asks, JSON lines answer: any number of `{"note": …}` while it works, then one `{"done": …}` or
`{"error": …}`. Only root reaches the folder (mode 0700), so the door asks for no key.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from penstock.core.deadlines import within
from penstock.core.errors import Kind, PenstockError
from penstock.feed.frames import address

Answer = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]
LINE_BYTES_MAX: Final = 64 * 1024
QUESTION_S: Final = 5.0


class DoorClosed(PenstockError):
    """Nobody listens behind the door: the daemon is dead or not yet up."""

    kind = Kind.UNAVAILABLE
    code = "door_closed"


async def serve(path: Path, answer: Answer) -> asyncio.Server:
    """Listen on `path` until the returned server is closed. `answer` yields the lines of each reply."""

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with within(QUESTION_S, "a question at the door"):
                asked = json.loads(await reader.readline())
            async for line in answer(asked):
                writer.write(json.dumps(line).encode() + b"\n")
                await writer.drain()
        except (ValueError, TimeoutError, ConnectionError):
            pass  # Safe: a visitor that says nothing sensible gets nothing.
        except PenstockError as error:
            writer.write(json.dumps({"error": str(error)}).encode() + b"\n")
        finally:
            writer.close()

    path.unlink(missing_ok=True)  # noqa: ASYNC240 - one unlink
    with address(path) as name:
        return await asyncio.start_unix_server(visit, name, limit=LINE_BYTES_MAX)


def ask(path: Path, question: dict[str, Any], *, within_s: float) -> Iterator[dict[str, Any]]:
    """Send one question and yield the lines of the reply. Blocking. Raises DoorClosed; TimeoutError per line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        wire.settimeout(within_s)
        try:
            with address(path) as name:
                wire.connect(name)
        except OSError as error:
            raise DoorClosed("the daemon does not answer", which=str(path), why=str(error)) from error
        wire.sendall(json.dumps(question).encode() + b"\n")
        with wire.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
