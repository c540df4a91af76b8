"""The daemon may run on uvloop or on asyncio's own loop: the writer thread and the feed's socket work on both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.remote import RemoteSource
from penstock.feed.server import FeedServer
from penstock.feed.view import View
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Put, Store


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_writes_reach_a_remote_view(new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    async def world() -> None:
        store = Store(SqliteLog(tmp_path / "store.db"), SystemClock(), writers={"": frozenset({"t"})})
        await store.open()
        async with Crew("world") as crew:
            await FeedServer(LocalSource(store), tmp_path / "feed.sock", prefixes=["a/"]).serve(crew)
            view = View(RemoteSource(tmp_path / "feed.sock", rng=random.Random(1)), "a/", bytes)
            await view.start(crew)
            async with Crew("writers") as writers:
                for n in range(8):
                    writers.spawn(store.commit([Put(f"a/{n}", b"%d" % n)], by="t", durable=n == 5), name=f"{n}")
                await view.wait_for("7", lambda value: value == b"7", within_s=5)
            await view.wait_revision(store.revision, within_s=5)
            assert view.items() == [(f"{n}", b"%d" % n) for n in range(8)]
        await store.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(world())
