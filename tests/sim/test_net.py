"""The simulated network keeps what asyncio and the kernel promise: order, back-pressure, half-closing, resets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from penstock.sim import loop as virtual
from penstock.sim.net import DELAY_S_MAX, HIGH_BYTES, KERNEL_BYTES, Net

SEEDS = range(20)


class Taker(asyncio.Protocol):
    """Takes everything down; with `paused` it does not read until told."""

    def __init__(self, *, paused: bool = False, stay: bool = False) -> None:
        self.got = bytearray()
        self.pieces = 0
        self.ended = False
        self.lost: list[Exception | None] = []
        self._paused, self._stay = paused, stay
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._paused:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.got += data
        self.pieces += 1

    def eof_received(self) -> bool:
        self.ended = True
        return self._stay

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


def play(coro: Coroutine[Any, Any, None]) -> None:
    virtual.run(coro, 1)


def pair(seed: int, server: Taker, address: str = "there") -> tuple[Net, Any]:
    net = Net(random.Random(seed))
    net.listen(address, lambda: server)
    return net, net.open_streams(address)


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_arrive_in_order_and_whole_however_they_are_cut(seed: int) -> None:
    async def body() -> None:
        server, sent = Taker(), random.Random(seed).randbytes(300_000)
        _, opening = pair(seed, server)
        _, writer = await opening
        for at in range(0, len(sent), 70_001):
            writer.write(sent[at : at + 70_001])
            await writer.drain()
        writer.close()
        await asyncio.sleep(10.0)
        assert server.got == sent and server.ended and server.lost == [None]
        assert server.pieces > 5

    play(body())


def test_a_reader_that_does_not_read_stops_the_writer() -> None:
    async def body() -> None:
        server = Taker(paused=True)
        _, opening = pair(1, server)
        _, writer = await opening
        writer.write(bytes(HIGH_BYTES + KERNEL_BYTES + 1))
        await asyncio.sleep(5.0)
        assert not server.got
        waiting = asyncio.get_running_loop().create_task(writer.drain())
        await asyncio.sleep(5.0)
        assert not waiting.done()
        server.transport.resume_reading()
        await waiting
        await asyncio.sleep(5.0)
        assert len(server.got) == HIGH_BYTES + KERNEL_BYTES + 1

    play(body())


def test_half_closing_leaves_the_other_direction_open() -> None:
    async def body() -> None:
        server = Taker(stay=True)
        _, opening = pair(2, server)
        reader, writer = await opening
        writer.write(b"question")
        writer.write_eof()
        await asyncio.sleep(1.0)
        assert server.ended and not server.lost
        server.transport.write(b"answer")
        server.transport.close()
        assert await reader.read() == b"answer"

    play(body())


def test_writing_to_somebody_who_has_closed_is_answered_by_a_reset() -> None:
    async def body() -> None:
        server = Taker()
        _, opening = pair(3, server)
        reader, writer = await opening
        await asyncio.sleep(1.0)
        server.transport.close()
        await asyncio.sleep(1.0)
        assert await reader.read() == b""
        writer.write(b"too late")
        await asyncio.sleep(1.0)
        with pytest.raises(ConnectionResetError):
            await writer.drain()

    play(body())


def test_an_aborted_connection_is_reset_and_nothing_of_it_is_delivered() -> None:
    async def body() -> None:
        server = Taker()
        _, opening = pair(4, server)
        _, writer = await opening
        await asyncio.sleep(1.0)
        writer.write(b"lost")
        writer.transport.abort()
        await asyncio.sleep(1.0)
        assert not server.got and isinstance(server.lost[0], ConnectionResetError)

    play(body())


def test_a_killed_process_says_nothing_and_its_peers_see_the_end() -> None:
    async def body() -> None:
        net = Net(random.Random(5))
        server = Taker()

        async def live() -> None:
            net.listen("there", lambda: server)
            await asyncio.get_running_loop().create_future()

        process = virtual.start_process("victim", live())
        await asyncio.sleep(0.1)
        reader, _ = await net.open_streams("there")
        await asyncio.sleep(1.0)
        server.transport.write(b"last words")
        net.kill("victim")
        process.cancel()
        assert await reader.read() == b"last words"
        assert server.lost == []
        with pytest.raises(ConnectionRefusedError):
            await net.open_streams("there")

    play(body())


def test_nobody_listening_is_a_refusal_after_a_moment() -> None:
    async def body() -> None:
        with pytest.raises(ConnectionRefusedError):
            await Net(random.Random(6)).open_streams("nowhere")
        assert 0.0 < asyncio.get_running_loop().time() <= DELAY_S_MAX

    play(body())
