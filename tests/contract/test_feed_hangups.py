"""Readers of the feed that hang up at any moment, on the loop the daemon runs on: the server outlives them all."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path

import uvloop

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.frames import List, Watch, frame
from penstock.feed.local import LocalSource
from penstock.feed.server import FeedServer
from penstock.store.memory import MemoryLog
from penstock.store.ops import Put
from penstock.store.store import Store


async def _hang_up_often(path: Path, times: int) -> None:
    store, rng = Store(MemoryLog(), SystemClock()), random.Random(5)
    await store.open()

    async def write() -> None:
        for number in range(1_000_000):
            await store.commit([Put(f"sandbox/status/{number % 50}", b"x" * 200)], by="node")
            await asyncio.sleep(0)

    async with Crew("daemon") as crew:
        await FeedServer(LocalSource(store), path, prefixes=("sandbox/",)).serve(crew)
        crew.spawn(write(), name="writer")
        for number in range(times):
            with socket.socket(socket.AF_UNIX) as reader:
                reader.connect(str(path))
                request = Watch("sandbox/status/", 0) if number % 4 else List("sandbox/")
                reader.send(frame(request)[: None if number % 5 else 3])
                await asyncio.sleep(rng.random() * 0.003)
        crew.cancel_all()
    await store.close()


def test_the_server_outlives_readers_that_hang_up(tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_hang_up_often(tmp_path / "s", 400))
