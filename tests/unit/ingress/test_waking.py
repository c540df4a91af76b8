"""Requests for a paused sandbox: held, bounded, and let through once it runs; or answered as if it were gone."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest

from penstock.ingress import hub as hubs
from penstock.ingress import waking
from penstock.wire import tokens
from tests.unit.ingress.conftest import SANDBOX, SEED, Fixture, echo, head, read_response, running


class Upstairs:
    """Who resumes. `code` is what is answered; while `hangs` nothing is."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.code = ""
        self.go = asyncio.Event()
        self.go.set()
        self.resume: Callable[[], None] = lambda: None

    async def ask(self, sandbox: str) -> str:
        self.asked.append(sandbox)
        await self.go.wait()
        if not self.code:
            self.resume()
        return self.code


@pytest.fixture
def upstairs() -> Upstairs:
    return Upstairs()


@asynccontextmanager
async def asleep(folder: Path, upstairs: Upstairs, **facts: object) -> AsyncIterator[Fixture]:
    """A paused sandbox with a guest and a server on port 8000, as they will answer once it runs."""
    async with running(folder, ask=upstairs.ask) as fixture:
        await fixture.guest(echo)
        await fixture.port(8000, echo)
        pause(fixture, **{"auto_resume": True, **facts})
        upstairs.resume = lambda: wake(fixture)
        yield fixture


def pause(fixture: Fixture, **facts: object) -> None:
    route = fixture.hub.table.routes[SANDBOX]
    fixture.hub.table.put(SANDBOX, msgspec.structs.replace(route, serving=False, **facts))


def wake(fixture: Fixture) -> None:
    route = fixture.hub.table.routes[SANDBOX]
    fixture.hub.table.put(SANDBOX, msgspec.structs.replace(route, serving=True))


async def ask(fixture: Fixture, request: bytes) -> tuple[int, bytes]:
    reader, writer = await fixture.open()
    writer.write(request)
    got, body = await read_response(reader)
    writer.close()
    return int(got.split(b" ")[1]), body


async def test_the_first_request_wakes_it_and_is_answered(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs) as fixture:
        status, body = await ask(fixture, head("/hello", port=8000))
        assert status == 200
        assert body.startswith(b"GET /hello ")
        assert upstairs.asked == [SANDBOX]
        assert fixture.hub.waker.held == 0


async def test_many_at_once_are_held_by_one_question(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs) as fixture:
        upstairs.go.clear()
        replies = [asyncio.ensure_future(ask(fixture, head(f"/{n}", port=8000))) for n in range(30)]
        await until(lambda: fixture.hub.waker.held == 30)
        upstairs.go.set()
        assert {status for status, _ in await asyncio.gather(*replies)} == {200}
        assert upstairs.asked == [SANDBOX]


async def test_a_body_that_came_with_it_arrives_whole(tmp_path: Path, upstairs: Upstairs):
    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(300_000)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n%06d" % body.count(b"x"))

    async with asleep(tmp_path, upstairs) as fixture:
        await fixture.port(8001, whole)
        upstairs.go.clear()
        request = head("/", method="POST", port=8001, extra="Content-Length: 300000\r\n") + b"x" * 300_000
        reply = asyncio.ensure_future(ask(fixture, request))
        await until(lambda: fixture.hub.waker.held == 1)
        upstairs.go.set()
        assert await reply == (200, b"300000")


async def test_without_the_policy_it_is_as_if_gone(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs, auto_resume=False) as fixture:
        status, body = await ask(fixture, head("/", port=8000))
        assert status == 502
        assert json.loads(body) == {"sandboxId": SANDBOX, "message": "The sandbox was not found", "code": 502}
        assert upstairs.asked == []


async def test_a_wrong_traffic_token_wakes_nobody(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs, private=True) as fixture:
        for extra in ("", "E2b-Traffic-Access-Token: wrong\r\n"):
            assert (await ask(fixture, head("/", port=8000, extra=extra)))[0] == 403
        assert upstairs.asked == []
        right = f"E2b-Traffic-Access-Token: {tokens.traffic_token(SEED, SANDBOX)}\r\n"
        assert (await ask(fixture, head("/", port=8000, extra=right)))[0] == 200


async def test_what_is_for_the_guest_needs_what_the_guest_asks_for(tmp_path: Path, upstairs: Upstairs):
    token = tokens.access_token(SEED, SANDBOX)
    async with asleep(tmp_path, upstairs) as fixture:
        for extra in ("", "X-Access-Token: wrong\r\n"):
            status, body = await ask(fixture, head("/envs", extra=extra))
            assert (status, json.loads(body)["sandboxId"]) == (403, SANDBOX)
        forged = "/files?path=a&signature=v1_nothing"
        assert (await ask(fixture, head(forged)))[0] == 403
        status, _ = await ask(fixture, head("/health", extra=f"X-Access-Token: {token}\r\n"))
        assert status == 502, "asking whether it runs is no use of it"
        assert upstairs.asked == []
        late = tokens.sign("a", "read", "", token, 1000)
        expired = f"/files?path=a&signature={quote(late, safe='')}&signature_expiration=1000"
        fixture.hub.wall = lambda: 1001.0
        assert (await ask(fixture, head(expired)))[0] == 403
        assert upstairs.asked == []
        signed = f"/files?path=a&signature={quote(tokens.sign('a', 'read', '', token), safe='')}"
        assert (await ask(fixture, head(signed)))[0] == 200
        pause(fixture)
        assert (await ask(fixture, head("/envs", extra=f"X-Access-Token: {token}\r\n")))[0] == 200
        pause(fixture, secure=False)
        assert (await ask(fixture, head("/envs")))[0] == 200
        assert len(upstairs.asked) == 3


async def test_a_signed_address_that_names_nobody_wakes_its_sandbox(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs) as fixture:
        signature = quote(tokens.sign("a", "read", "", tokens.access_token(SEED, SANDBOX)), safe="")
        request = f"GET /files?path=a&signature={signature} HTTP/1.1\r\nHost: 127.0.0.1:3002\r\n\r\n".encode()
        assert (await ask(fixture, request))[0] == 200
        assert upstairs.asked == [SANDBOX]
        pause(fixture, auto_resume=False)
        assert (await ask(fixture, request))[0] == 401


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("not_found", 502, "was not found"),
        ("forbidden", 403, "may not resume"),
        ("limit_reached", 429, "limit"),
        ("still_changing", 409, "sandbox is still transitioning"),
        ("unavailable", 503, "could not be resumed"),
        ("", 409, "sandbox is still transitioning"),  # resumed, and paused again before we could look
    ],
)
async def test_why_it_was_not_resumed_is_told_by_the_status(
    tmp_path: Path, upstairs: Upstairs, code: str, status: int, words: str
):
    async with asleep(tmp_path, upstairs) as fixture:
        upstairs.code, upstairs.resume = code, lambda: None
        got, body = await ask(fixture, head("/", port=8000))
        assert (got, words in json.loads(body)["message"]) == (status, True)


async def test_nobody_is_held_longer_than_the_bound(
    tmp_path: Path, upstairs: Upstairs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(waking, "WITHIN_S", 0.1)
    async with asleep(tmp_path, upstairs) as fixture:
        upstairs.go.clear()
        assert (await ask(fixture, head("/", port=8000)))[0] == 503
        await until(lambda: not fixture.hub.waker._answers)
        upstairs.go.set()
        assert (await ask(fixture, head("/", port=8000)))[0] == 200


async def test_no_more_are_held_than_the_bound(tmp_path: Path, upstairs: Upstairs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waking, "HELD_EACH_MAX", 3)
    async with asleep(tmp_path, upstairs) as fixture:
        upstairs.go.clear()
        held = [asyncio.ensure_future(ask(fixture, head(f"/{n}", port=8000))) for n in range(3)]
        await until(lambda: fixture.hub.waker.held == 3)
        assert (await ask(fixture, head("/", port=8000)))[0] == 429
        upstairs.go.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}


async def test_one_who_hangs_up_while_held_takes_nobody_with_him(tmp_path: Path, upstairs: Upstairs):
    async with asleep(tmp_path, upstairs) as fixture:
        upstairs.go.clear()
        _, writer = await fixture.open()
        writer.write(head("/", port=8000))
        stays = asyncio.ensure_future(ask(fixture, head("/", port=8000)))
        await until(lambda: fixture.hub.waker.held == 2)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end of sending
        writer.transport.abort()
        await until(lambda: fixture.hub.waker.held == 1)
        upstairs.go.set()
        assert (await stays)[0] == 200
        assert fixture.hub.exchanges(SANDBOX) == 0


# ---- the race of a request with a pause


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that stands still."""
    await reader.readuntil(b"\r\n\r\n")
    await reader.read()


@pytest.mark.parametrize(("recent_s", "taken_back"), [(60.0, True), (-1.0, False)])
async def test_a_request_that_went_in_right_before_the_pause_is_taken_back(
    tmp_path: Path, upstairs: Upstairs, monkeypatch: pytest.MonkeyPatch, recent_s: float, taken_back: bool
):
    monkeypatch.setattr(hubs, "RECENT_S", recent_s)
    async with asleep(tmp_path, upstairs, auto_resume=False) as fixture:
        await fixture.port(8002, silence)
        wake(fixture)
        reply = asyncio.ensure_future(ask(fixture, head("/", port=8002)))
        await until(lambda: len(fixture.hub.upstreams) == 1)
        pause(fixture)
        await asyncio.sleep(0.05)
        assert reply.done() is taken_back
        if taken_back:
            assert (await reply)[0] == 502
        reply.cancel()


async def test_one_that_resumes_by_traffic_is_woken_by_it(tmp_path: Path, upstairs: Upstairs):
    answer = asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with asleep(tmp_path, upstairs) as fixture:
        await fixture.port(8003, late)
        wake(fixture)
        reply = asyncio.ensure_future(ask(fixture, head("/", method="POST", port=8003)))
        await until(lambda: len(fixture.hub.upstreams) == 1)
        pause(fixture)
        await until(lambda: upstairs.asked == [SANDBOX])
        answer.set()
        assert await reply == (200, b"ok")


async def until(check: Callable[[], bool | Awaitable[bool]]) -> None:
    for _ in range(500):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not happen")
