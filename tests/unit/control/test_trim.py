"""The event log stays bounded, oldest first, whatever else is in the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock.control.trim import CUT_AT_ONCE, LOOK_S, Trimmer
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.model import keys
from penstock.model.event import EventWriter, LoggedEvent, decode
from penstock.sim.loop import SimClock
from penstock.store.memory import MemoryLog
from penstock.store.store import Store
from tests.unit.core.virtual import virtual


class House:
    def __init__(self, store: Store, clock: SimClock, trimmer: Trimmer) -> None:
        self.store, self.clock, self.trimmer = store, clock, trimmer
        self.writer = EventWriter("api", "b")

    async def tell(self, count: int) -> None:
        for _ in range(count):
            event = LoggedEvent(at=self.clock.wall(), kind="x", subject="ia", actor="api")
            record = self.writer.record(event)
            await self.store.put(record.key, record.value, labels=record.labels, by="api")

    def kept(self) -> list[float]:
        return [decode(record.value).at for record in self.store.list(keys.EVENT).records]


@asynccontextmanager
async def house(*, before: int = 0, events_max: int = 50, keep_s: float = 3600.0) -> AsyncIterator[House]:
    clock = SimClock(asyncio.get_running_loop())
    store = Store(MemoryLog(), clock)
    await store.open()
    trimmer = Trimmer(store=store, source=LocalSource(store), clock=clock, events_max=events_max, keep_s=keep_s)
    made = House(store, clock, trimmer)
    await made.tell(before)
    async with Crew("test") as crew:
        trimmer.start(crew)
        yield made
        crew.cancel_all()


@virtual
async def test_the_oldest_go_when_there_are_too_many_those_of_before_included() -> None:
    async with house(before=2 * CUT_AT_ONCE) as one:
        await asyncio.sleep(1)
        await one.tell(30)
        newest = one.kept()[-50:]
        await asyncio.sleep(LOOK_S + 1)
        assert one.kept() == newest
        assert one.trimmer.cut_total == 2 * CUT_AT_ONCE - 20


@virtual
async def test_what_is_too_old_goes_though_nothing_new_comes() -> None:
    async with house(keep_s=100.0) as one:
        await one.tell(10)
        await asyncio.sleep(60)
        await one.tell(10)
        await asyncio.sleep(41 + LOOK_S)
        assert len(one.kept()) == 10
        await asyncio.sleep(60)
        assert one.kept() == []


@virtual
async def test_a_store_that_refuses_loses_nothing_of_what_is_to_go() -> None:
    async with house(events_max=5) as one:
        await one.tell(20)
        commit, one.store.commit = one.store.commit, _refuse  # type: ignore[method-assign]
        await asyncio.sleep(LOOK_S * 3)
        assert len(one.kept()) == 20
        one.store.commit = commit  # type: ignore[method-assign]
        await asyncio.sleep(LOOK_S * 2)
        assert len(one.kept()) == 5


async def _refuse(*_: object, **__: object) -> int:
    from penstock.store.errors import StoreFull

    raise StoreFull("no room", retry_after_s=1.0)
