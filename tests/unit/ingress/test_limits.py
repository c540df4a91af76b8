"""Every wait and every resource of the ingress has an end, and reaching it hurts nobody else."""

from __future__ import annotations

import asyncio
import resource

import pytest

from penstock.ingress import connection as connection_module
from penstock.ingress.hub import budget_of
from penstock.ingress.table import Route
from tests.unit.ingress.conftest import SANDBOX, Fixture, echo, head, read_head, read_response, running


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_beyond_the_budget_the_longest_idle_make_room(tmp_path):
    async with running(tmp_path, descriptors_max=20) as ingress:
        await ingress.guest(echo)
        idle = [await ingress.open() for _ in range(60)]
        reader, writer = await ingress.open()
        writer.write(head())
        assert (await read_response(reader))[0].startswith(b"HTTP/1.1 200 ")
        assert len(ingress.hub.clients) + len(ingress.hub.upstreams) <= 20
        assert await asyncio.wait_for(idle[0][0].read(), 1) == b""
        assert ingress.hub.tally.evicted >= 40
        for _, other in [*idle, (reader, writer)]:
            other.close()


async def test_when_nobody_is_idle_a_new_client_is_told_503(tmp_path):
    async with running(tmp_path, descriptors_max=8, per_sandbox_max=100) as ingress:
        await ingress.guest(never)
        busy = [await ingress.open() for _ in range(4)]
        for _, writer in busy:
            writer.write(head())
        await asyncio.sleep(0.1)
        assert len(ingress.hub.upstreams) == 4
        got = await ingress.exchange(b"")
        assert got.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in got and b"Connection: close" in got
        for _, writer in busy:
            writer.close()
        await asyncio.sleep(0.1)
        assert len(ingress.hub.clients) == 0
        assert (
            await ingress.exchange(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        ).startswith(b"HTTP/1.1 200 ")


async def test_one_sandbox_has_its_share_and_others_theirs(tmp_path):
    async with running(tmp_path, per_sandbox_max=3) as ingress:
        await ingress.guest(never)
        await ingress.guest(echo, sandbox="iother")
        busy = [await ingress.open() for _ in range(3)]
        for _, writer in busy:
            writer.write(head())
        await asyncio.sleep(0.05)
        got = await ingress.exchange(head(extra="Connection: close\r\n"))
        assert got.startswith(b"HTTP/1.1 429 ") and b'"connectionLimit":3' in got and b"Retry-After" in got
        assert (await ingress.exchange(head(sandbox="iother", extra="Connection: close\r\n"))).startswith(
            b"HTTP/1.1 200"
        )
        for _, writer in busy:
            writer.close()


async def test_no_descriptor_for_the_far_side_is_503(ingress: Fixture):
    await ingress.guest(echo)
    ingress.dialler.full = True
    got = await ingress.exchange(head(extra="Connection: close\r\n"))
    assert got.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in got


async def test_a_slow_head_is_cut_however_steadily_it_trickles(ingress: Fixture, monkeypatch):
    monkeypatch.setattr(connection_module, "HEAD_S", 0.3)
    reader, writer = await ingress.open()
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def trickle() -> None:
        for byte in head(extra="X: " + "y" * 500 + "\r\n"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    got = await asyncio.wait_for(read_head(reader), 2)
    assert got.startswith(b"HTTP/1.1 408 ") and 0.25 < loop.time() - began < 1.0
    trickling.cancel()
    writer.close()


async def test_idle_connections_end(ingress: Fixture, monkeypatch):
    monkeypatch.setattr(connection_module, "FIRST_S", 0.1)
    monkeypatch.setattr(connection_module, "IDLE_S", 0.4)
    await ingress.guest(echo)
    fresh_reader, fresh_writer = await ingress.open()
    reader, writer = await ingress.open()
    writer.write(head())
    await read_response(reader)
    assert await asyncio.wait_for(fresh_reader.read(), 1) == b""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(), 0.1)
    assert await asyncio.wait_for(reader.read(), 1) == b""
    fresh_writer.close()
    writer.close()


async def test_a_server_may_think_for_as_long_as_it_likes(ingress: Fixture, monkeypatch):
    monkeypatch.setattr(connection_module, "FIRST_S", 0.05)
    monkeypatch.setattr(connection_module, "IDLE_S", 0.1)

    async def think(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    await ingress.guest(think)
    reader, writer = await ingress.open()
    writer.write(head())
    assert (await read_response(reader))[1] == b"ok"
    writer.close()


async def test_a_client_that_takes_nothing_is_cut_in_the_end(ingress: Fixture, monkeypatch):
    monkeypatch.setattr(connection_module, "IDLE_S", 0.3)

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    await ingress.guest(flood)
    _, writer = await ingress.open()
    writer.write(head())
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not ingress.hub.clients:
            break
    assert not ingress.hub.clients and not ingress.hub.upstreams
    writer.close()


async def test_pipelining_without_reading_is_held_back(ingress: Fixture):
    """A client that asks and asks and takes no answer must not fill the ingress with answers."""
    big = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(big)
            await writer.drain()

    await ingress.guest(serve)
    _, writer = await ingress.open()
    writer.transport.pause_reading()
    writer.write(head() * 20_000)
    await asyncio.sleep(0.5)
    client = next(iter(ingress.hub.clients))
    assert len(client._held) < 600_000
    assert client.transport.get_write_buffer_size() < 600_000
    assert sum(ingress.hub.tally.requests.values()) < 1000
    writer.transport.abort()


async def test_many_idle_connections_do_not_slow_a_request(ingress: Fixture):
    ingress.hub.descriptors_max = 3000
    await ingress.guest(echo)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 6000 and hard < 6000:
        pytest.skip("too few descriptors for the clients of this test")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle = [await ingress.open() for _ in range(2000)]
    reader, writer = await ingress.open()
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(100):
        began = loop.time()
        writer.write(head())
        await read_response(reader)
        took.append(loop.time() - began)
    assert sorted(took)[50] < 0.05
    for _, other in [*idle, (reader, writer)]:
        other.transport.abort()


@pytest.mark.parametrize(("limit", "least"), [(256, 128), (1024, 512), (20_000, 18_000), (1_000_000, 990_000)])
def test_the_budget_leaves_room_for_the_rest_of_the_process(limit, least):
    assert least <= budget_of(limit) < limit


async def test_routes_of_ended_sandboxes_leave_nothing(ingress: Fixture):
    for number in range(20):
        await ingress.guest(echo, sandbox=f"i{number}")
        await ingress.exchange(head(sandbox=f"i{number}", extra="Connection: close\r\n"))
        ingress.hub.tokens.access(f"i{number}")
        ingress.hub.table.put(f"i{number}", None)
    hub = ingress.hub
    assert not hub.table.routes and not hub._exchanges and not hub.pool._kept
    assert not hub.tokens._access and not hub.tokens._traffic


async def test_a_route_is_replaced_without_disturbing_its_streams(ingress: Fixture):
    route = await ingress.guest(echo)
    reader, writer = await ingress.open()
    writer.write(head())
    await read_response(reader)
    changed = Route(sandbox=SANDBOX, guest_socket=route.guest_socket, pid=1000, start_ticks=5, private=True)
    ingress.hub.table.put(SANDBOX, changed)
    assert len(ingress.hub.pool) == 1
    writer.close()
