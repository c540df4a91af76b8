"""Leases in virtual time: days pass in milliseconds, and the same seed gives the same revisions."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.clock import SystemClock
from penstock.sim.loop import run
from penstock.store.errors import LeaseNotFound
from penstock.store.memory import MemoryLog
from penstock.store.store import Put, Store

DAY_S = 86_400.0


async def opened(log: MemoryLog) -> Store:
    store = Store(log, SystemClock(), writers={"": frozenset({"t"})})
    await store.open()
    return store


async def held(store: Store, key: str, ttl_s: float) -> int:
    lease = await store.grant(ttl_s)
    await store.commit([Put(key, b"", lease=lease)], by="t")
    return lease


def test_a_lease_ends_when_its_time_is_over_and_not_before() -> None:
    async def world() -> None:
        store = await opened(MemoryLog())
        await held(store, "a/1", DAY_S)
        await asyncio.sleep(DAY_S - 1)
        assert store.get("a/1") is not None
        await asyncio.sleep(1.5)
        assert store.get("a/1") is None
        await store.close()

    run(world(), seed=1)


def test_a_renewal_moves_the_end_and_is_looked_at_when_the_old_one_is_due() -> None:
    async def world() -> None:
        store = await opened(MemoryLog())
        lease = await held(store, "a/1", 10)
        for _ in range(1_000):
            await asyncio.sleep(9)
            await store.renew(lease)
        revision = store.revision
        await asyncio.sleep(9.9)
        assert (store.get("a/1") is not None, store.revision) == (True, revision), "a renewal writes nothing"
        await asyncio.sleep(0.2)
        assert store.get("a/1") is None
        with pytest.raises(LeaseNotFound):
            await store.renew(lease)
        await store.close()

    run(world(), seed=1)


def test_a_lease_that_is_over_cannot_be_renewed_while_its_end_is_still_on_its_way() -> None:
    async def world() -> None:
        store = await opened(MemoryLog(delay_s=5))
        lease = await held(store, "a/1", 11)
        await asyncio.sleep(2)  # logged at 5 and 10, over at 11, its end logged at 16
        assert store.get("a/1") is not None
        with pytest.raises(LeaseNotFound):
            await store.renew(lease)
        await store.close()

    run(world(), seed=1)


def test_a_shorter_lease_granted_later_ends_first() -> None:
    async def world() -> None:
        store = await opened(MemoryLog())
        await held(store, "a/long", 100)
        await held(store, "a/short", 10)
        await asyncio.sleep(11)
        assert [record.key for record in store.list("a/").records] == ["a/long"]
        await asyncio.sleep(90)
        assert store.statistics().leases == store.statistics().records == 0
        await store.close()

    run(world(), seed=1)


def test_a_crash_loses_what_was_not_acknowledged_and_replays_alike() -> None:
    async def world() -> list[tuple[int, str]]:
        log = MemoryLog(delay_s=0.01)
        store = await opened(log)
        await held(store, "a/1", 30)
        lost = asyncio.ensure_future(store.commit([Put("a/2", b"")], by="t"))
        await asyncio.sleep(0.005)
        store = await opened(log)  # the one before is abandoned in the middle of its write
        lost.cancel()
        assert store.get("a/2") is None
        seen = []
        watch = store.watch("", 0)
        for n in range(20):
            await store.commit([Put(f"a/{n % 3}", b"%d" % n)], by="t")
            await asyncio.sleep(3)
        while watch.revision < store.revision:
            batch = await anext(watch)
            seen.extend((batch.revision, f"{change.kind} {change.record.key}") for change in batch.changes)
        await store.close()
        return seen

    first = run(world(), seed=1)
    assert any(what == "delete lease/1" for _, what in first)
    assert run(world(), seed=1) == first
