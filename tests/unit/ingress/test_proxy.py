"""Bytes through the ingress: both ways, unbuffered, as they are."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import websockets
from websockets.asyncio.server import serve as serve_websocket

from penstock.ingress.pipe import READ_BYTES_MAX, WRITE_HIGH_BYTES
from tests.unit.ingress.conftest import SANDBOX, Fixture, echo, head, read_head, read_response

MIB = 1024 * 1024


async def test_requests_share_connections_on_both_sides(ingress: Fixture):
    await ingress.guest(echo)
    reader, writer = await ingress.open()
    for number in range(5):
        writer.write(head(f"/{number}"))
        got, body = await read_response(reader)
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert body.startswith(b"GET /%d HTTP/1.1\r\n" % number)
    assert ingress.dialler.dials == 1
    writer.close()


async def test_a_hundred_requests_at_once_find_their_connections_kept(ingress: Fixture):
    """Beyond what is kept each request would dial, and a proxy at half of its capacity falls behind for good."""
    arrived, everyone = 0, asyncio.Event()

    async def wait_for_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        while True:
            await reader.readuntil(b"\r\n\r\n")
            arrived += 1
            if arrived % 100 == 0:
                everyone.set()
            await everyone.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    await ingress.guest(wait_for_all)
    clients = [await ingress.open() for _ in range(100)]
    for _ in range(3):
        everyone.clear()
        for _, writer in clients:
            writer.write(head("/"))
        for reader, _ in clients:
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert ingress.dialler.dials == 100
    for _, writer in clients:
        writer.close()


async def test_the_host_form_reaches_a_user_port(ingress: Fixture):
    await ingress.port(8000, echo)
    got = await ingress.exchange(
        b"GET /x HTTP/1.1\r\nHost: 8000-%s-00000000.sbx.localhost\r\nConnection: close\r\n\r\n" % SANDBOX.encode()
    )
    assert b"host: 8000-" + SANDBOX.encode() in got


async def test_a_mask_changes_what_a_user_port_sees(ingress: Fixture):
    await ingress.port(8000, echo, mask_host="localhost:${PORT}")
    got = await ingress.exchange(
        b"GET /x HTTP/1.1\r\nHost: 8000-%s.sbx.localhost\r\nConnection: close\r\n\r\n" % SANDBOX.encode()
    )
    assert b"host: localhost:8000\r\nx-forwarded-host: 8000-" in got


async def test_pipelined_requests_are_answered_in_order(ingress: Fixture):
    await ingress.guest(echo)
    reader, writer = await ingress.open()
    many = [head(f"/{number}") if number % 3 else head(f"/{number}", sandbox="igone") for number in range(30)]
    writer.write(b"".join(many))
    for number in range(30):
        got, body = await read_response(reader)
        if number % 3:
            assert body.startswith(b"GET /%d " % number)
        else:
            assert got.startswith(b"HTTP/1.1 502 ")
    writer.close()


async def test_a_response_arrives_piece_by_piece(ingress: Fixture):
    go = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await go.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await reader.read()

    await ingress.guest(stream)
    reader, writer = await ingress.open()
    writer.write(head())
    await read_head(reader)
    assert await asyncio.wait_for(reader.readuntil(b"one\r\n"), 2) == b"3\r\none\r\n"
    go.set()
    assert await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 2) == b"3\r\ntwo\r\n0\r\n\r\n"
    writer.close()


async def test_a_request_body_arrives_piece_by_piece(ingress: Fixture):
    seen: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for size in (8, 8, 5):
            seen.put_nowait(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()

    await ingress.guest(take)
    reader, writer = await ingress.open()
    writer.write(head(method="POST", extra="Transfer-Encoding: chunked\r\n") + b"3\r\none\r")
    await asyncio.sleep(0.02)
    writer.write(b"\n")
    assert await asyncio.wait_for(seen.get(), 2) == b"3\r\none\r\n"
    writer.write(b"3;ext=1\r\ntwo\r\n0\r\nTrailer: x\r\n\r\n")
    assert await asyncio.wait_for(seen.get(), 2) == b"3\r\ntwo\r\n"
    assert await asyncio.wait_for(seen.get(), 2) == b"0\r\n\r\n"
    assert (await read_response(reader))[1] == b"ok"
    writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_response_waits_for_a_slow_client(ingress: Fixture, chunked: bool):
    """The server is held back, and the ingress holds no more than its bound."""
    size = 24 * MIB
    sent = 0

    async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        piece = b"x" * 65536
        for _ in range(size // len(piece)):
            writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            await writer.drain()
            sent += len(piece)
        writer.write(b"0\r\n\r\n" if chunked else b"")
        await writer.drain()

    await ingress.guest(large)
    reader, writer = await ingress.open()
    writer.write(head(extra="Connection: close\r\n"))
    await read_head(reader)
    await asyncio.sleep(0.3)
    client = next(iter(ingress.hub.clients))
    assert sent < size - 8 * MIB, "the server was not held back"
    assert client.transport.get_write_buffer_size() <= READ_BYTES_MAX + WRITE_HIGH_BYTES + 64
    got = await asyncio.wait_for(reader.read(-1), 20)
    assert len(got) >= size
    writer.close()


async def test_a_large_upload_waits_for_a_slow_server(ingress: Fixture):
    size, taken = 24 * MIB, asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await taken.wait()
        left = size
        while left:
            left -= len(await reader.read(min(left, 1 << 20)))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    await ingress.guest(slow)
    reader, writer = await ingress.open()
    writer.write(head(method="POST", extra=f"Content-Length: {size}\r\n"))

    async def feed() -> None:
        for _ in range(size // 65536):
            writer.write(b"y" * 65536)
            await writer.drain()

    feeding = asyncio.create_task(feed())
    await asyncio.sleep(0.3)
    assert not feeding.done(), "the client was not held back"
    upstream = next(iter(ingress.hub.upstreams))
    assert upstream.transport.get_write_buffer_size() <= READ_BYTES_MAX + WRITE_HIGH_BYTES + 64
    taken.set()
    await asyncio.wait_for(feeding, 20)
    assert (await read_response(reader))[1] == b"ok"
    writer.close()


async def test_expect_100_continue_is_the_servers_to_answer(ingress: Fixture):
    async def careful(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = await reader.readuntil(b"\r\n\r\n")
        assert b"expect: 100-continue" in got
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(4)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)
        await reader.read()

    await ingress.guest(careful)
    reader, writer = await ingress.open()
    writer.write(head(method="POST", extra="Expect: 100-continue\r\nContent-Length: 4\r\n"))
    assert await read_head(reader) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"body")
    assert (await read_head(reader)).startswith(b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n")
    assert (await read_response(reader))[1] == b"body"
    writer.close()


async def test_replies_without_a_body_keep_the_connection(ingress: Fixture):
    async def bodiless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            got = await reader.readuntil(b"\r\n\r\n")
            if got.startswith(b"HEAD"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    await ingress.guest(bodiless)
    reader, writer = await ingress.open()
    for _ in range(2):
        writer.write(head(method="HEAD"))
        assert b"content-length: 1000" in await read_head(reader)
        writer.write(head(method="DELETE"))
        assert b"content-length" not in await read_head(reader)
    assert ingress.dialler.dials == 1
    writer.close()


async def test_a_response_that_ends_with_its_connection(ingress: Fixture):
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nServer: BaseHTTP\r\n\r\nall of it")

    await ingress.port(8000, old)
    got = await ingress.exchange(head(port=8000))
    assert got == b"HTTP/1.1 200 OK\r\nserver: BaseHTTP\r\nconnection: close\r\n\r\nall of it"


async def test_a_client_of_http_1_0_gets_no_chunks(ingress: Fixture):
    async def chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET / HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        await reader.read()

    await ingress.guest(chunks)
    got = await ingress.exchange(
        head().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    )
    assert got == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nonetwo"


async def test_keep_alive_of_http_1_0_is_said(ingress: Fixture):
    await ingress.guest(echo)
    reader, writer = await ingress.open()
    for _ in range(2):
        writer.write(head(extra="Connection: keep-alive\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b"connection: keep-alive\r\n" in (await read_response(reader))[0]
    writer.close()


async def test_an_answer_before_the_end_of_the_request_arrives(ingress: Fixture):
    """The server refuses an upload early and hangs up; the client, still sending, sees why."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        await writer.drain()

    await ingress.guest(refuse)
    reader, writer = await ingress.open()
    writer.write(head(method="POST", extra=f"Content-Length: {64 * MIB}\r\n") + b"z" * 100_000)
    got, body = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 413 ") and b"connection: close" in got and body == b"big"
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            writer.write(b"z" * 100_000)
            await writer.drain()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_our_own_refusal_of_an_upload_arrives_too(ingress: Fixture):
    reader, writer = await ingress.open()
    writer.write(head(method="POST", sandbox="igone", extra=f"Content-Length: {64 * MIB}\r\n") + b"z" * 500_000)
    got, body = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 502 ") and b"Connection: close" in got and b"was not found" in body
    writer.close()


async def test_websockets_pass(ingress: Fixture):
    async def handler(socket: websockets.ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with serve_websocket(handler, "127.0.0.1", 0, max_size=None) as server:
        await ingress.port(8000, echo)
        ingress.dialler.ports[SANDBOX, 8000] = server.sockets[0].getsockname()[1]
        url = f"ws://{ingress.address[0]}:{ingress.address[1]}/"
        headers = {"E2b-Sandbox-Id": SANDBOX, "E2b-Sandbox-Port": "8000"}
        async with websockets.connect(url, additional_headers=headers, max_size=None) as client:
            for message in ("hello", b"\x00" * 100, b"x" * (2 * MIB), "end"):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), 5) == message
    assert ingress.hub.tally.requests["upgraded"] == 1


async def test_a_tunnel_carries_each_sides_end(ingress: Fixture):
    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\nfirst")
        got = await reader.read()  # until the client's end
        writer.write(b"got " + got)
        writer.write_eof()

    await ingress.port(8000, switch)
    reader, writer = await ingress.open()
    writer.write(head(port=8000, extra="Connection: Upgrade\r\nUpgrade: raw\r\n") + b"early ")
    assert b"upgrade: raw" in await read_head(reader)
    writer.write(b"late")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b"firstgot early late"
    writer.close()


async def test_a_switch_nobody_asked_for_is_refused(ingress: Fixture):
    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
        )
        await reader.read()

    await ingress.port(8000, switch)
    reader, writer = await ingress.open()
    writer.write(head(port=8000))
    got, _ = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 502 ")
    writer.close()


async def test_a_client_that_leaves_is_felt_at_once(ingress: Fixture):
    left = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n")
        assert await reader.read() == b""
        left.set()

    await ingress.guest(wait)
    reader, writer = await ingress.open()
    writer.write(head())
    await read_head(reader)
    writer.close()
    await asyncio.wait_for(left.wait(), 1)


async def test_a_client_that_only_ends_its_sending_still_gets_its_answer(ingress: Fixture):
    await ingress.guest(echo)
    reader, writer = await ingress.open()
    writer.write(head("/a") + head("/b"))
    writer.write_eof()
    got = await asyncio.wait_for(reader.read(), 5)
    assert b"GET /a " in got and b"GET /b " in got
    writer.close()


async def test_a_request_that_was_cut_short_is_not_passed_off_as_whole(ingress: Fixture):
    seen: asyncio.Queue[object] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            seen.put_nowait(await reader.readexactly(100))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            seen.put_nowait(error)

    await ingress.guest(take)
    _, writer = await ingress.open()
    writer.write(head(method="POST", extra="Content-Length: 100\r\n") + b"half")
    await asyncio.sleep(0.05)
    writer.close()
    assert isinstance(await asyncio.wait_for(seen.get(), 2), Exception)


async def test_the_ingress_speaks_of_itself(ingress: Fixture):
    got = await ingress.exchange(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert got.endswith(b'{"status":"ok"}')
    got = await ingress.exchange(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    for name in (b"connections_total", b"requests_total", b"loop_lag_seconds", b"routes", b"dial_seconds_bucket"):
        assert b"penstock_ingress_" + name in got
    assert SANDBOX.encode() not in got
