"""A body that is too large, over a real connection: its sender reads the answer, however it sends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from penstock.api import bounds
from penstock.api.bounds import BodyLimit
from penstock.core.crew import Crew
from penstock.run.front_server import FrontServer

SIZE = 20_000_000


async def reads_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with Crew("server") as crew:
        server = FrontServer("127.0.0.1", 0)
        server.start(BodyLimit(reads_all), crew)
        yield server.port
        await server.stop()


def talk(port: int, head: bytes, body: bytes, *, first_look: bool = False) -> bytes:
    """Send all, only then read. `first_look`: wait for the answer to the head before any body."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(b"POST / HTTP/1.1\r\nHost: door\r\n" + head + b"\r\n")
        if not first_look:
            wire.sendall(body)
        answer = b""
        while part := wire.recv(65536):
            answer += part
        return answer


DECLARED = b"Content-Length: %d\r\n" % SIZE
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ONE_CHUNK = b"%x\r\n" % SIZE + b"x" * SIZE + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(("head", "body"), [(DECLARED, b"x" * SIZE), (CHUNKED, ONE_CHUNK)], ids=["length", "chunked"])
async def test_who_sends_everything_first_reads_the_refusal(port: int, head: bytes, body: bytes):
    for _ in range(3):
        answer = await asyncio.to_thread(talk, port, head, body)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"larger than 16 MiB" in answer


async def test_who_asks_first_is_told_at_once(port: int):
    began = asyncio.get_running_loop().time()
    answer = await asyncio.to_thread(talk, port, DECLARED + b"Expect: 100-continue\r\n", b"", first_look=True)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert asyncio.get_running_loop().time() - began < 1


async def test_who_promises_much_and_sends_nothing_is_not_waited_for(port: int, monkeypatch: Any):
    monkeypatch.setattr(bounds, "DISCARD_S", 0.2)
    answer = await asyncio.to_thread(talk, port, DECLARED, b"", first_look=True)
    assert answer.startswith(b"HTTP/1.1 413 ")
