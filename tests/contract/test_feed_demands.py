"""The one way upward of the feed: a reader demands that a sandbox run, and is told what became of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed import server as servers
from penstock.feed.local import LocalSource
from penstock.feed.remote import RemoteSource
from penstock.feed.server import FeedServer
from penstock.model.errors import LimitReached, NotFound
from penstock.store.memory import MemoryLog
from penstock.store.store import Store

Meet = Callable[[str], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, meet: Meet | None) -> AsyncIterator[None]:
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    async with Crew("feed") as crew:
        await FeedServer(LocalSource(store), path, prefixes=("sandbox/",), meet=meet).serve(crew)
        yield
    await store.close()


async def test_it_is_met_or_refused_with_a_code(tmp_path: Path) -> None:
    met: list[str] = []

    async def meet(sandbox: str) -> None:
        if sandbox == "i-none":
            raise NotFound("no such sandbox")
        if sandbox == "i-full":
            raise LimitReached("full", retry_after_s=1)
        met.append(sandbox)

    remote = RemoteSource(tmp_path / "feed.sock", rng=random.Random(1))
    async with serving(tmp_path / "feed.sock", meet):
        assert await remote.demand("i1") == ""
        assert await remote.demand("i-none") == "not_found"
        assert await remote.demand("i-full") == "limit_reached"
        assert met == ["i1"]


async def test_nobody_upstairs_takes_up_demands(tmp_path: Path) -> None:
    async with serving(tmp_path / "feed.sock", None):
        assert await RemoteSource(tmp_path / "feed.sock", rng=random.Random(1)).demand("i1") == "forbidden"


async def test_one_made_while_the_other_side_is_away_is_met_when_it_comes_back(tmp_path: Path) -> None:
    """Also when it goes away in the middle: the demand is made again."""
    asked: list[str] = []
    hang = asyncio.Event()

    async def never(sandbox: str) -> None:
        asked.append(sandbox)
        await hang.wait()

    async def at_once(sandbox: str) -> None:
        asked.append(sandbox)

    path = tmp_path / "feed.sock"
    demand = asyncio.ensure_future(RemoteSource(path, rng=random.Random(1)).demand("i1"))
    await asyncio.sleep(0.05)
    async with serving(path, never):
        async with asyncio.timeout(5):
            while not asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert not demand.done()
    async with serving(path, at_once):
        assert await asyncio.wait_for(demand, 5) == ""
    assert asked == ["i1", "i1"]


async def test_one_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "DEMAND_S", 0.05)

    async def never(sandbox: str) -> None:
        await asyncio.get_running_loop().create_future()

    async with serving(tmp_path / "feed.sock", never):
        assert await RemoteSource(tmp_path / "feed.sock", rng=random.Random(1)).demand("i1") == "unavailable"
