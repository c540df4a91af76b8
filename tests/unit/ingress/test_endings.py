"""Sandboxes and servers that die, kept connections that died unseen, and the ingress's own end."""

from __future__ import annotations

import asyncio

import pytest

from penstock.ingress import pool as pool_module
from penstock.ingress.table import Route
from tests.unit.ingress.conftest import SANDBOX, Fixture, echo, head, read_head, read_response


async def stream_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n")
    await reader.read()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_a_stream_is_reset_when_its_sandbox_ends(ingress: Fixture):
    await ingress.guest(stream_for_ever)
    reader, writer = await ingress.open()
    writer.write(head())
    await read_head(reader)
    await reader.readuntil(b".\r\n")
    began = asyncio.get_running_loop().time()
    ingress.hub.table.put(SANDBOX, None)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 2)
    assert asyncio.get_running_loop().time() - began < 0.1
    assert ingress.hub.tally.resets == 1
    assert not ingress.hub.upstreams or await settled(ingress)
    writer.close()


async def settled(ingress: Fixture) -> bool:
    for _ in range(50):
        if not ingress.hub.upstreams:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_who_was_not_answered_yet_is_told_that_the_sandbox_ended(ingress: Fixture):
    await ingress.guest(silent)
    reader, writer = await ingress.open()
    writer.write(head())
    await asyncio.sleep(0.05)
    ingress.hub.table.put(SANDBOX, None)
    got, body = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 502 ") and b"was not found" in body
    assert await settled(ingress)
    writer.close()


async def test_another_incarnation_of_a_sandbox_ends_the_old_streams(ingress: Fixture):
    route = await ingress.guest(stream_for_ever)
    reader, writer = await ingress.open()
    writer.write(head())
    await reader.readuntil(b".\r\n")
    ingress.hub.table.put(SANDBOX, Route(sandbox=SANDBOX, guest_socket=route.guest_socket, pid=2000, start_ticks=6))
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 2)
    writer.close()


async def test_a_pause_keeps_streams_and_refuses_requests(ingress: Fixture):
    route = await ingress.guest(stream_for_ever)
    reader, writer = await ingress.open()
    writer.write(head())
    await reader.readuntil(b".\r\n")
    paused = Route(sandbox=SANDBOX, guest_socket=route.guest_socket, pid=1000, start_ticks=5, serving=False)
    ingress.hub.table.put(SANDBOX, paused)
    assert b"was not found" in await ingress.exchange(head(extra="Connection: close\r\n"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    writer.close()


@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_a_server_that_dies_in_the_middle_is_no_end_of_the_body(ingress: Fixture, framing: bytes):
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n3\r\none\r\n")

    await ingress.guest(die)
    reader, writer = await ingress.open()
    writer.write(head())
    with pytest.raises(ConnectionResetError):
        while await asyncio.wait_for(reader.read(1000), 2):
            pass
        pytest.fail("it looked like the end")
    writer.close()


async def test_a_guest_that_dies_before_it_answers_is_a_sandbox_that_is_gone(ingress: Fixture):
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    await ingress.guest(die)
    got = await ingress.exchange(head(method="POST", extra="Connection: close\r\nContent-Length: 0\r\n"))
    assert got.startswith(b"HTTP/1.1 502 ") and b"The sandbox was not found" in got


async def test_a_guest_that_does_not_listen_is_a_sandbox_that_is_gone(ingress: Fixture, tmp_path):
    for path in (tmp_path / "absent.sock", tmp_path / "plain"):
        ingress.hub.table.put(SANDBOX, Route(sandbox=SANDBOX, guest_socket=str(path)))
        assert b"was not found" in await ingress.exchange(head(extra="Connection: close\r\n"))


async def test_a_long_socket_path_works(ingress: Fixture, tmp_path):
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    await ingress.guest(echo)
    (folder / "guest.sock").symlink_to(ingress.hub.table.routes[SANDBOX].guest_socket)
    ingress.hub.table.put(
        SANDBOX, Route(sandbox=SANDBOX, guest_socket=str(folder / "guest.sock"), pid=1000, start_ticks=5)
    )
    assert (await ingress.exchange(head(extra="Connection: close\r\n"))).startswith(b"HTTP/1.1 200 ")


async def test_a_closed_port_is_named(ingress: Fixture):
    ingress.hub.table.put(SANDBOX, Route(sandbox=SANDBOX))
    got = await ingress.exchange(head(port=3000, extra="Connection: close\r\n"))
    assert got.endswith(
        b'{"sandboxId":"%s","message":"The sandbox is running but port is not open","port":3000,"code":502}'
        % SANDBOX.encode()
    )


@pytest.mark.parametrize("garbage", [b"NOT HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\n\r\n\r\n", b"x" * 70_000])
async def test_a_server_that_speaks_no_http_is_a_bad_gateway(ingress: Fixture, garbage: bytes):
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(garbage)
        await reader.read()

    await ingress.port(8000, speak)
    got = await ingress.exchange(head(port=8000, extra="Connection: close\r\n"))
    assert got.startswith(b"HTTP/1.1 502 ") and b"port is not open" not in got and b"was not found" not in got


async def test_a_kept_connection_that_died_costs_a_safe_request_nothing(ingress: Fixture):
    served = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request, then hangs up when the next one arrives."""
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read(1)

    await ingress.port(8000, once)
    reader, writer = await ingress.open()
    for _ in range(3):
        writer.write(head(port=8000))
        assert (await read_response(reader))[1] == b"ok"
    assert served == 3
    assert ingress.hub.tally.retries == 2
    writer.close()


async def test_a_request_that_may_not_be_repeated_is_not(ingress: Fixture):
    seen = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        for answer in (True, False):
            await reader.readuntil(b"\r\n\r\n")
            seen += 1
            if answer:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    await ingress.port(8000, once)
    reader, writer = await ingress.open()
    writer.write(head(port=8000, method="POST", extra="Content-Length: 0\r\n"))
    assert (await read_response(reader))[1] == b"ok"
    writer.write(head(port=8000, method="POST", extra="Content-Length: 0\r\n"))
    assert (await read_response(reader))[0].startswith(b"HTTP/1.1 502 ")
    assert seen == 2
    writer.close()


async def test_such_a_request_takes_only_a_connection_used_just_now(ingress: Fixture, monkeypatch):
    monkeypatch.setattr(pool_module, "FRESH_S", 0.05)
    await ingress.port(8000, echo)
    reader, writer = await ingress.open()
    for wait_s, dials in ((0.0, 1), (0.0, 1), (0.15, 2)):
        await asyncio.sleep(wait_s)
        writer.write(head(port=8000, method="POST", extra="Content-Length: 0\r\n"))
        await read_response(reader)
        assert ingress.dialler.dials == dials
    writer.close()


async def test_what_a_server_says_unasked_is_never_an_answer(ingress: Fixture):
    async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await reader.read()

    await ingress.port(8000, chatty)
    reader, writer = await ingress.open()
    for _ in range(3):
        writer.write(head(port=8000))
        assert (await read_response(reader))[1] == b"ok"
        await asyncio.sleep(0.06)
    assert len(ingress.hub.pool) == 0
    writer.close()


async def test_idle_upstreams_of_an_ended_sandbox_are_closed(ingress: Fixture):
    await ingress.guest(echo)
    reader, writer = await ingress.open()
    writer.write(head())
    await read_response(reader)
    assert len(ingress.hub.pool) == 1
    ingress.hub.table.put(SANDBOX, None)
    assert len(ingress.hub.pool) == 0
    assert await settled(ingress)
    writer.write(head())
    assert b"was not found" in (await read_response(reader))[1]
    writer.close()


async def test_stopping_lets_responses_end_and_closes_the_idle(ingress: Fixture):
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()

    await ingress.guest(slow)
    idle_reader, idle_writer = await ingress.open()
    reader, writer = await ingress.open()
    writer.write(head())
    await asyncio.sleep(0.05)
    stopping = asyncio.create_task(ingress.hub.stop(grace_s=5.0))
    assert await asyncio.wait_for(idle_reader.read(), 1) == b""
    go.set()
    got, body = await read_response(reader)
    assert b"connection: close" in got and body == b"ok"
    assert await asyncio.wait_for(reader.read(), 1) == b""
    assert await asyncio.wait_for(stopping, 1) == 0
    writer.close()
    idle_writer.close()


async def test_stopping_cuts_what_does_not_end(ingress: Fixture):
    await ingress.guest(stream_for_ever)
    reader, writer = await ingress.open()
    writer.write(head())
    await reader.readuntil(b".\r\n")
    assert await ingress.hub.stop(grace_s=0.05) == 1
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 1)
    writer.close()


@pytest.mark.parametrize("body", [b"", b"x" * 2000])
async def test_a_server_that_refuses_before_it_is_asked_is_heard(ingress: Fixture, body: bytes):
    """A guest with too many connections says so at once and hangs up: before our request, when it is the faster one."""

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfull")
        writer.close()

    await ingress.guest(refuses)
    ingress.dialler.late_s = 0.1
    reader, writer = await ingress.open()
    writer.write(head(method="POST", extra=f"Content-Length: {len(body)}\r\n") + body)
    got, said = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 503 ") and said == b"full"
    assert await settled(ingress)
    writer.close()


async def test_a_server_that_hangs_up_before_it_is_asked_leaves_no_request_without_an_answer(ingress: Fixture):
    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    await ingress.guest(hangs_up)
    ingress.dialler.late_s = 0.1
    reader, writer = await ingress.open()
    writer.write(head())
    got, _ = await read_response(reader)
    assert got.startswith(b"HTTP/1.1 502 ")
    assert await settled(ingress)
    writer.close()


async def test_a_bug_on_the_way_to_a_server_cuts_the_connection(ingress: Fixture, monkeypatch: pytest.MonkeyPatch):
    heard: list[BaseException] = []
    monkeypatch.setattr(ingress.hub._crew, "_on_error", lambda name, error: heard.append(error))

    async def bug(route: Route, port: int, make: object) -> None:
        raise RuntimeError("a bug")

    await ingress.guest(echo)
    ingress.dialler.dial = bug  # type: ignore[method-assign]
    reader, writer = await ingress.open()
    writer.write(head())
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 2)
    assert [str(error) for error in heard] == ["a bug"]
    writer.close()
