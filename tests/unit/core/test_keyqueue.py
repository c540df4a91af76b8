from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.crew import Crew
from penstock.core.keyqueue import KeyQueue
from penstock.sim.loop import run

from .virtual import virtual


def queue_of(*keys: str) -> KeyQueue[str]:
    queue: KeyQueue[str] = KeyQueue(rng=random.Random(1), base_s=1, cap_s=60)
    for key in keys:
        queue.add(key)
    return queue


@virtual
async def test_a_key_added_many_times_while_it_waits_is_one_look_in_order_of_first_adding() -> None:
    queue = queue_of("a", "b", "a", "a", "c", "b")
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]
    assert queue.statistics().ready == 0


@virtual
async def test_a_key_added_while_it_is_worked_is_looked_at_again_but_not_at_once() -> None:
    queue = queue_of("a", "b")
    assert await queue.get() == "a"
    queue.add("a")
    assert await queue.get() == "b"
    assert queue.statistics().ready == 0
    queue.done("a")
    assert await queue.get() == "a"


@virtual
async def test_delayed_keys_come_in_time_and_the_earliest_wish_counts() -> None:
    queue = queue_of()
    queue.add_after("late", 10)
    queue.add_after("soon", 5)
    queue.add_after("late", 3)
    queue.add_after("late", 30)
    queue.add_after("now", 0)
    came = []
    for _ in range(3):
        key = await queue.get()
        came.append((key, asyncio.get_running_loop().time()))
        queue.done(key)
    assert came == [("now", 0), ("late", 3), ("soon", 5)]
    assert queue.statistics().delayed == 0


@virtual
async def test_retries_back_off_and_success_forgets_them() -> None:
    queue = queue_of("a")
    waits = []
    for _ in range(9):
        began = asyncio.get_running_loop().time()
        key = await queue.get()
        waits.append(asyncio.get_running_loop().time() - began)
        queue.retry(key)
    assert queue.failures("a") == 9
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits[1:7]))
    assert all(30 <= wait <= 60 for wait in waits[7:])
    queue.done(await queue.get())
    assert queue.failures("a") == 0


@virtual
async def test_a_cancelled_get_loses_no_key() -> None:
    queue = queue_of()
    async with Crew("c") as crew:
        getters = [crew.spawn(queue.get(), name=name) for name in "ab"]
        await asyncio.sleep(1)
        queue.add("x")
        getters[0].cancel()  # in the same instant as the key comes
        assert await getters[1] == "x"


@virtual
async def test_finishing_what_is_not_worked_is_a_programming_error() -> None:
    queue = queue_of("a")
    with pytest.raises(AssertionError):
        queue.done("a")


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 5), keys=st.integers(1, 6))
def test_never_twice_at_once_never_lost(seed: int, workers: int, keys: int) -> None:
    """Producers add at random, workers take random time and fail at random, getters are cancelled at random.

    The model: `wanted[key]` counts adds, and each look answers all adds that came before it began.
    """
    rng = random.Random(seed)
    added: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    working: set[int] = set()

    async def produce(queue: KeyQueue[int]) -> None:
        for _ in range(60):
            await asyncio.sleep(rng.choice((0, 0, 0.1, 1)))
            key = rng.randrange(keys)
            added[key] += 1
            if rng.random() < 0.3:
                queue.add_after(key, rng.choice((0.1, 1, 5)))
            else:
                queue.add(key)

    async def work(queue: KeyQueue[int]) -> None:
        while True:
            key = await queue.get()
            assert key not in working, "worked twice at once"
            working.add(key)
            answers = added[key]
            await asyncio.sleep(rng.choice((0, 0.05, 0.5, 2)))
            working.discard(key)
            if rng.random() < 0.2:
                queue.retry(key)
            else:
                answered[key] = answers
                queue.done(key)

    async def impatient(queue: KeyQueue[int], crew: Crew) -> None:
        for _ in range(20):
            task = crew.spawn(queue.get(), name="impatient")
            await asyncio.sleep(rng.choice((0, 0.1)))
            task.cancel()
            try:
                queue.retry(await task)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        queue: KeyQueue[int] = KeyQueue(rng=rng)
        async with Crew("c") as crew:
            for number in range(workers):
                crew.spawn(work(queue), name=f"worker {number}")
            both = [crew.spawn(produce(queue), name="producer"), crew.spawn(impatient(queue, crew), name="impatient")]
            for task in both:
                await task
            await asyncio.sleep(1_000)
            statistics = queue.statistics()
            assert (statistics.ready, statistics.working, statistics.delayed) == (0, 0, 0)
            assert answered == added

    run(main(), seed)
