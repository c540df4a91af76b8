"""The table follows the feed, and outlives it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.remote import RemoteSource
from penstock.feed.server import FeedServer
from penstock.ingress.follow import Follower
from penstock.ingress.table import Route, Table, route_of
from penstock.model import keys
from penstock.model.sandbox import Limits, Phase, SandboxSpec, SandboxStatus
from penstock.store.memory import MemoryLog
from penstock.store.store import Store

PREFIXES = (keys.SANDBOX_SPEC, keys.SANDBOX_STATUS)


def spec(sandbox: str, **facts: object) -> SandboxSpec:
    return SandboxSpec(
        id=sandbox, team="t", template="base", build="b", limits=Limits(), created_at=0.0, end_at=0.0, **facts
    )


def status(sandbox: str, phase: Phase = Phase.READY, *, pid: int = 100) -> SandboxStatus:
    return SandboxStatus(
        id=sandbox, phase=phase, node="n", team="t", pid=pid, start_ticks=7, guest_socket=f"/run/{sandbox}/guest.sock"
    )


async def put(store: Store, sandbox: str, phase: Phase = Phase.READY) -> None:
    await store.put(keys.SANDBOX_SPEC + sandbox, msgspec.json.encode(spec(sandbox)), by="api")
    await store.put(keys.SANDBOX_STATUS + sandbox, msgspec.json.encode(status(sandbox, phase)), by="node")


@asynccontextmanager
async def serving(store: Store, path: Path) -> AsyncIterator[None]:
    async with Crew("feed server") as crew:
        await FeedServer(LocalSource(store), path, prefixes=PREFIXES).serve(crew)
        yield


async def until(done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not happen")


async def test_the_table_survives_its_feed_and_catches_up(tmp_path: Path):
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    ended: list[Route] = []
    table = Table(ended.append)
    follower = Follower(RemoteSource(tmp_path / "feed.sock", rng=random.Random(1)), table, on_trouble=print)
    await put(store, "i1")
    await put(store, "i2")
    async with Crew("test") as crew:
        crew.spawn(follower.follow(), name="follower")
        assert not await follower.wait_complete(within_s=0.05)
        assert not table.complete
        async with serving(store, tmp_path / "feed.sock"):
            assert await follower.wait_complete(within_s=5)
            assert set(table.routes) == {"i1", "i2"}
            await until(lambda: follower.connected)
            await put(store, "i3")
            await until(lambda: "i3" in table.routes)
        await until(lambda: not follower.connected)
        assert set(table.routes) == {"i1", "i2", "i3"} and ended == []
        await put(store, "i1", Phase.STOPPING)
        await store.delete(keys.SANDBOX_STATUS + "i2", by="node")
        async with serving(store, tmp_path / "feed.sock"):
            await until(lambda: set(table.routes) == {"i3"})
        assert {route.sandbox for route in ended} == {"i1", "i2"}


async def test_a_record_that_cannot_be_read_does_not_stop_the_ingress(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("penstock.ingress.follow.AGAIN_S", 0.05)
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    troubles: list[BaseException] = []
    table = Table()
    follower = Follower(LocalSource(store), table, on_trouble=troubles.append)
    async with Crew("test") as crew:
        crew.spawn(follower.follow(), name="follower")
        await put(store, "i1")
        await until(lambda: "i1" in table.routes)
        await store.put(keys.SANDBOX_STATUS + "i2", b"not json", by="node")
        await until(lambda: bool(troubles))
        assert "i1" in table.routes
        await store.delete(keys.SANDBOX_STATUS + "i2", by="node")
        await put(store, "i3")
        await until(lambda: "i3" in table.routes)


def test_only_what_serves_is_routed():
    for phase in Phase:
        route = route_of(spec("i1"), status("i1", phase))
        if phase in (Phase.READY, Phase.DRAINING, Phase.UNKNOWN):
            assert route is not None and route.serving
        elif phase is Phase.PAUSED:
            assert route is not None and not route.serving
        else:
            assert route is None
    assert route_of(None, status("i1")) is None and route_of(spec("i1"), None) is None
