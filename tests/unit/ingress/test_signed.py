"""Signed URLs find their sandbox by their signature alone."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

from penstock.ingress import signed as signed_module
from penstock.ingress.decide import Signed
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.signed import SignedRoutes
from penstock.ingress.table import Route, Table
from penstock.wire.tokens import access_token, sign
from tests.unit.ingress.conftest import SANDBOX, SEED, Fixture, echo

PATH = "/home/user/größe & more.txt"


def url(sandbox: str, *, operation: str = "read", username: str = "user", expires: int | None = None) -> bytes:
    signature = sign(PATH, operation, username, access_token(SEED, sandbox), expires)
    query = f"path={quote(PATH)}&username={username}&signature={quote(signature)}"
    query += f"&signature_expiration={expires}" if expires is not None else ""
    method = "GET" if operation == "read" else "POST"
    return f"{method} /files?{query} HTTP/1.1\r\nHost: 127.0.0.1:3002\r\nConnection: close\r\n\r\n".encode()


async def test_a_signed_url_reaches_its_sandbox(ingress: Fixture):
    for name in ("iother", SANDBOX):
        await ingress.guest(echo, sandbox=name)
    for request in (url(SANDBOX), url(SANDBOX, operation="write"), url(SANDBOX, expires=1), url(SANDBOX, username="")):
        got = await ingress.exchange(request)
        assert got.startswith(b"HTTP/1.1 200 "), got
        assert b"/files?path=" in got
    assert {upstream.key[0] for upstream in ingress.hub.upstreams} == {SANDBOX}


async def test_a_signature_of_nobody_is_401(ingress: Fixture):
    await ingress.guest(echo)
    for request in (url("inobody"), url(SANDBOX).replace(b"path=", b"path=x"), url(SANDBOX).replace(b"GET", b"POST")):
        got = await ingress.exchange(request)
        assert got.startswith(b"HTTP/1.1 401 ") and b"invalid signature" in got


async def test_a_sandbox_without_a_token_owns_no_signature(ingress: Fixture):
    await ingress.guest(echo, secure=False)
    assert (await ingress.exchange(url(SANDBOX))).startswith(b"HTTP/1.1 401 ")


async def test_an_ended_sandbox_is_not_found_again(ingress: Fixture):
    await ingress.guest(echo)
    assert (await ingress.exchange(url(SANDBOX))).startswith(b"HTTP/1.1 200 ")
    ingress.hub.table.put(SANDBOX, None)
    assert (await ingress.exchange(url(SANDBOX))).startswith(b"HTTP/1.1 401 ")


async def test_searching_many_sandboxes_lets_others_work(monkeypatch):
    monkeypatch.setattr(signed_module, "PAUSE_S", 0.0)
    table, tokens = Table(), Tokens(SEED)
    for number in range(2000):
        table.put(f"i{number}", Route(sandbox=f"i{number}"))
    routes = SignedRoutes(table, tokens)
    wanted = Signed("p", "read", "", sign("p", "read", "", access_token(SEED, "i1999")), None)
    others = 0

    async def work() -> None:
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(work())
    found = await routes.find(wanted)
    working.cancel()
    assert found is not None and found.sandbox == "i1999"
    assert others > 10


async def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(signed_module, "FOUND_MAX", 10)
    table = Table()
    table.put("i1", Route(sandbox="i1"))
    routes = SignedRoutes(table, Tokens(SEED))
    token = access_token(SEED, "i1")
    for number in range(50):
        assert await routes.find(Signed(str(number), "read", "", sign(str(number), "read", "", token), None))
    assert len(routes._found) <= 10
