"""The pool of single-use resources: what is made ahead, what comes back, and what a number may be used for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed, within
from penstock.core.ledger import Entry, Ledger
from penstock.model.errors import NoFreeSlot, PoolClosed
from penstock.node.record import read_pooled
from penstock.node.slots import REFILL_QUIET_S, Pool
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Nursery
from penstock.sim.kernel import Kernel, Life, SimFiles
from penstock.sim.trace import Trace


class World:
    """What exists, by number; and what to do to makers and destroyers."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.kernel = Kernel(faults=Faults(rng, Rates()), nursery=Nursery(rng, odd=0), trace=Trace(lambda: 0.0))
        self.files = SimFiles(self.kernel, Life(1))
        self.exists: set[int] = set()
        self.made: list[int] = []
        self.make_error: Exception | None = None
        self.destroy_error: Exception | None = None
        self.destroy_gate = asyncio.Event()
        self.destroy_gate.set()
        self.make_gate = asyncio.Event()
        self.make_gate.set()

    async def make(self, number: int) -> str:
        assert f"slot{number}" in self.kernel.records, "made before it was recorded"
        assert number not in self.exists, f"{number} used twice"
        await self.make_gate.wait()
        await asyncio.sleep(0)
        if self.make_error is not None:
            raise self.make_error
        self.exists.add(number)
        self.made.append(number)
        return f"value {number}"

    async def destroy(self, number: int) -> None:
        await self.destroy_gate.wait()
        if self.destroy_error is not None:
            raise self.destroy_error
        self.exists.discard(number)


class Bench:
    def __init__(self, crew: Crew) -> None:
        self.world, self.crew = World(), crew

    def pool(self, *, count: int = 8, ready: int = 2, first: int = 0) -> Pool[str]:
        pool: Pool[str] = Pool(
            kind="slot",
            numbers=range(first, first + count),
            make=self.world.make,
            destroy=self.world.destroy,
            files=self.world.files,
            crew=self.crew,
            rng=random.Random(1),
            ready_target=ready,
        )
        return pool


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with Crew("test") as crew:
        yield Bench(crew)


async def until(condition: object) -> None:
    async with within(5.0, "the condition of the test"):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - a pool tells nobody of its fullness
            await asyncio.sleep(0.001)


async def test_it_is_filled_before_anybody_asks_and_refilled_after(bench: Bench) -> None:
    pool = bench.pool(ready=3)
    pool.open()
    await until(lambda: pool.statistics().ready == 3)
    assert bench.world.exists == {0, 1, 2}
    number, value = await pool.take("a", within_s=1)
    assert value == f"value {number}"
    assert read_pooled(bench.world.files, f"slot{number}")[1] == "a"  # type: ignore[index]
    await until(lambda: pool.statistics().ready == 3)


async def test_nothing_is_made_ahead_of_need_while_takes_go_on(bench: Bench) -> None:
    pool = bench.pool(count=40, ready=16)
    pool.open()
    await until(lambda: pool.statistics().ready == 16)
    for number in range(16):
        await pool.take(f"owner{number}", within_s=1)
        await asyncio.sleep(REFILL_QUIET_S / 10)
    assert len(bench.world.made) == 16, "a sandbox that starts comes before a slot for the next one"
    await pool.take("one more", within_s=1)  # made at once: somebody waits
    assert len(bench.world.made) == 17
    await until(lambda: pool.statistics().ready == 16)


async def test_ahead_of_need_one_is_made_after_the_other(bench: Bench) -> None:
    bench.world.make_gate.clear()
    pool = bench.pool(count=8, ready=6)
    pool.open()
    await asyncio.sleep(0.01)
    assert pool.statistics().making == 1
    takers = [bench.crew.spawn(pool.take(owner, within_s=5), name=owner) for owner in "abc"]
    await asyncio.sleep(0.01)
    assert pool.statistics().making == 3, "for takers they are made side by side"
    bench.world.make_gate.set()
    for taker in takers:
        await taker


async def test_closing_destroys_what_lies_ready_side_by_side(bench: Bench) -> None:
    pool = bench.pool(count=8, ready=8)
    pool.open()
    await until(lambda: pool.statistics().ready == 8)
    bench.world.destroy_gate.clear()
    closing = bench.crew.spawn(pool.close(within_s=5), name="close")
    await asyncio.sleep(0.01)
    assert pool.statistics().returning == 8
    bench.world.destroy_gate.set()
    await closing
    assert bench.world.exists == set()
    assert bench.world.kernel.records == {}


async def test_what_comes_back_is_destroyed_and_its_number_waits_for_that(bench: Bench) -> None:
    world = bench.world
    pool = bench.pool(count=1, ready=1)
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    world.destroy_gate.clear()
    back = bench.crew.spawn(pool.give_back(number), name="back")
    next_one = bench.crew.spawn(pool.take("b", within_s=5), name="next")
    await asyncio.sleep(0.01)
    assert not back.done(), "an undo waits for the slot's return"
    assert not next_one.done()
    assert world.made == [0], "a number is not used again before its absence was verified"
    world.destroy_gate.set()
    await back
    assert (await next_one)[0] == 0
    assert world.made == [0, 0]


async def test_two_give_backs_of_one_number_share_the_outcome(bench: Bench) -> None:
    pool = bench.pool()
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    bench.world.destroy_gate.clear()
    first = bench.crew.spawn(pool.give_back(number), name="first")
    second = bench.crew.spawn(pool.give_back(number), name="second")
    await asyncio.sleep(0.01)
    assert not first.done()
    assert not second.done()
    bench.world.destroy_gate.set()
    await first
    await second
    await pool.give_back(number)  # absent is success


async def test_a_failed_destruction_keeps_the_number_taken_and_is_retryable(bench: Bench) -> None:
    pool = bench.pool(count=1, ready=1)
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    bench.world.destroy_error = OSError(16, "busy")
    with pytest.raises(OSError, match="busy"):
        await pool.give_back(number)
    assert pool.owned_by("a") == [number]
    assert "slot0" in bench.world.kernel.records
    with pytest.raises(NoFreeSlot):
        await pool.take("b", within_s=1)
    bench.world.destroy_error = None
    await pool.give_back(number)
    assert pool.owned_by("a") == []


async def test_all_in_use_is_said_at_once(bench: Bench) -> None:
    pool = bench.pool(count=2)
    pool.open()
    await pool.take("a", within_s=1)
    await pool.take("b", within_s=1)
    with pytest.raises(NoFreeSlot, match="all 2 are in use") as caught:
        await pool.take("c", within_s=60)
    assert caught.value.retry_after_s
    assert pool.statistics().refused_total == 1


async def test_giving_back_to_a_closed_pool_destroys_and_says_so(bench: Bench) -> None:
    pool = bench.pool()
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    await pool.close(within_s=1, leave_taken=True)
    with pytest.raises(PoolClosed):
        await pool.give_back(number)
    assert bench.world.exists == set()
    assert bench.world.kernel.records == {}


async def test_giving_back_to_a_closed_pool_joins_the_error(bench: Bench) -> None:
    pool = bench.pool()
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    await pool.close(within_s=1, leave_taken=True)
    bench.world.destroy_error = OSError(16, "busy")
    with pytest.raises(ExceptionGroup) as caught:
        await pool.give_back(number)
    assert caught.group_contains(PoolClosed)
    assert caught.group_contains(OSError, match="busy")
    assert f"slot{number}" in bench.world.kernel.records, "it exists, so its record stays"


async def test_closing_waits_for_what_is_out_and_is_idempotent(bench: Bench) -> None:
    pool = bench.pool(ready=3)
    pool.open()
    number, _ = await pool.take("a", within_s=1)
    closing = bench.crew.spawn(pool.close(within_s=5), name="close")
    again = bench.crew.spawn(pool.close(within_s=5), name="close again")
    await asyncio.sleep(0.01)
    assert not closing.done()
    with pytest.raises(PoolClosed):
        await pool.take("b", within_s=1)
    with pytest.raises(PoolClosed):
        await pool.give_back(number)
    await closing
    await again
    await pool.close(within_s=1)
    assert bench.world.exists == set()
    assert bench.world.kernel.records == {}


async def test_closing_names_what_does_not_come_back(bench: Bench) -> None:
    pool = bench.pool()
    pool.open()
    await pool.take("a", within_s=1)
    with pytest.raises(DeadlinePassed, match="the return of every slot"):
        await pool.close(within_s=0.05)


async def test_closing_during_a_make_destroys_what_it_makes(bench: Bench) -> None:
    bench.world.make_gate.clear()
    pool = bench.pool(ready=2)
    pool.open()
    await asyncio.sleep(0.01)
    closing = bench.crew.spawn(pool.close(within_s=5), name="close")
    await asyncio.sleep(0.01)
    bench.world.make_gate.set()
    await closing
    assert bench.world.exists == set()


async def test_a_failed_make_reaches_the_taker_and_leaves_nothing(bench: Bench) -> None:
    bench.world.make_error = OSError(12, "no memory")
    pool = bench.pool(ready=0)
    pool.open()
    with pytest.raises(OSError, match="no memory"):
        await pool.take("a", within_s=1)
    await until(lambda: not bench.world.kernel.records)
    bench.world.make_error = None
    assert (await pool.take("a", within_s=1))[1].startswith("value")


async def test_failing_makes_are_retried_with_pauses_until_they_work(bench: Bench) -> None:
    bench.world.make_error = OSError(12, "no memory")
    pool = bench.pool(ready=2)
    pool.open()
    await asyncio.sleep(0.05)
    assert pool.statistics().make_failures_total < 10
    bench.world.make_error = None
    await until(lambda: pool.statistics().ready == 2)


async def test_a_cancelled_taker_leaves_nothing_taken(bench: Bench) -> None:
    bench.world.make_gate.clear()
    pool = bench.pool(ready=0, count=1)
    pool.open()
    taker = bench.crew.spawn(pool.take("a", within_s=60), name="taker")
    await asyncio.sleep(0.01)
    bench.world.make_gate.set()
    await asyncio.sleep(0)
    taker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taker
    assert pool.owned_by("a") == []
    assert (await pool.take("b", within_s=1))[0] == 0


async def test_takers_are_served_in_order(bench: Bench) -> None:
    bench.world.make_gate.clear()
    pool = bench.pool(ready=0, count=4)
    pool.open()
    got: list[str] = []

    async def take(owner: str) -> None:
        await pool.take(owner, within_s=5)
        got.append(owner)

    takers = [bench.crew.spawn(take(owner), name=owner) for owner in "abcd"]
    await asyncio.sleep(0.01)
    bench.world.make_gate.set()
    for taker in takers:
        await taker
    assert got == ["a", "b", "c", "d"]


async def test_what_an_earlier_daemon_left_ready_is_destroyed_before_its_number_is_used(bench: Bench) -> None:
    bench.world.exists.add(0)
    bench.world.files.append_record("slot0", b'{"k":"pooled","v":1,"kind":"slot","number":0}')
    bench.world.destroy_error = OSError(16, "busy")
    pool = bench.pool(count=1, ready=1)
    pool.condemn(0)
    pool.open()
    await asyncio.sleep(0.02)
    assert bench.world.made == []
    bench.world.destroy_error = None
    await until(lambda: pool.statistics().ready == 1)
    assert bench.world.made == [0]


async def test_a_number_that_nobody_understands_is_never_used(bench: Bench) -> None:
    pool = bench.pool(count=2, ready=2)
    pool.hold_back(0)
    pool.open()
    await until(lambda: pool.statistics().ready == 1)
    await asyncio.sleep(0.02)
    assert bench.world.made == [1]
    await pool.close(within_s=1)


async def test_a_number_outside_the_block_is_given_back_but_never_handed_out(bench: Bench) -> None:
    pool = bench.pool(count=1, ready=1, first=10)
    bench.world.exists.add(3)
    pool.reclaim(3, "value 3", owner="old")
    pool.open()
    await pool.give_back(3)
    await until(lambda: pool.statistics().ready == 1)
    assert bench.world.exists == {10}
    assert pool.statistics().free == 0


async def test_in_a_ledger_the_undo_waits_for_the_return(bench: Bench) -> None:
    class Book:
        def __init__(self) -> None:
            self.lines: list[Entry] = []

        def append(self, entry: Entry) -> None:
            self.lines.append(entry)

    pool = bench.pool()
    pool.open()
    ledger = Ledger("a", Book(), undo_s=5)

    async def undo() -> None:
        for number in pool.owned_by("a"):
            await pool.give_back(number)

    await ledger.take("slot", lambda: pool.take("a", within_s=1), undo)
    bench.world.destroy_gate.clear()
    unwinding = bench.crew.spawn(ledger.unwind(5), name="unwind")
    await asyncio.sleep(0.01)
    assert not unwinding.done()
    bench.world.destroy_gate.set()
    await unwinding
    assert ledger.labels() == ()
