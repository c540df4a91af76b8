from __future__ import annotations

import asyncio

import pytest

from penstock.core.breaker import Breaker, BreakerFull
from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed

from .virtual import virtual


class Runs:
    def __init__(self, breaker: Breaker) -> None:
        self.breaker, self.order, self.at_once, self.most = breaker, [], 0, 0  # type: ignore[var-annotated]

    async def run(self, label: str, seconds: float = 1, within_s: float | None = None) -> None:
        async with self.breaker.enter(label, within_s):
            self.order.append(label)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.at_once -= 1


@virtual
async def test_so_many_run_so_many_wait_in_order_and_the_rest_is_refused() -> None:
    runs = Runs(Breaker(2, 3, "starts"))
    async with Crew("c") as crew:
        for label in "abcde":
            crew.spawn(runs.run(label), name=label)
        await asyncio.sleep(0.5)
        with pytest.raises(BreakerFull, match=r"f in starts.*2 run and 3 wait") as caught:
            await runs.run("f")
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1
        await crew.join()
    assert runs.order == list("abcde")
    assert runs.most == 2
    assert asyncio.get_running_loop().time() == 3
    statistics = runs.breaker.statistics()
    assert (statistics.running, statistics.waiting, statistics.entered_total, statistics.refused_total) == (0, 0, 5, 1)


@virtual
async def test_a_newcomer_never_overtakes_who_waits() -> None:
    runs = Runs(Breaker(1, 10, "b"))
    async with Crew("c") as crew:
        crew.spawn(runs.run("a"), name="a")
        crew.spawn(runs.run("b"), name="b")
        asyncio.get_running_loop().call_later(1, lambda: crew.spawn(runs.run("c"), name="c"))
        await asyncio.sleep(0.5)
        await crew.join()
        await asyncio.sleep(1)
        await crew.join()
    assert runs.order == list("abc")


@virtual
async def test_a_wait_is_bounded_by_name_and_gives_its_place_back() -> None:
    runs = Runs(Breaker(1, 1, "b"))
    async with Crew("c") as crew:
        crew.spawn(runs.run("a", seconds=10), name="a")
        await asyncio.sleep(0)
        with pytest.raises(DeadlinePassed, match="the turn of x in b"):
            await runs.run("x", within_s=3)
        assert runs.breaker.statistics().waiting == 0
        await runs.run("y", within_s=60)
    assert runs.order == ["a", "y"]


@virtual
async def test_a_turn_that_comes_with_the_deadline_is_taken() -> None:
    for _ in range(1_000):
        runs = Runs(Breaker(1, 1, "b"))
        async with Crew("c") as crew:
            crew.spawn(runs.run("a", seconds=3), name="a")
            await asyncio.sleep(0)
            await runs.run("x", within_s=3)
        assert runs.order == ["a", "x"]


@virtual
async def test_a_turn_that_comes_with_a_cancellation_is_passed_on() -> None:
    runs = Runs(Breaker(1, 5, "b"))
    async with Crew("c") as crew:
        async with runs.breaker.enter("a", 1):
            loser = crew.spawn(runs.run("loser"), name="loser")
            winner = crew.spawn(runs.run("winner"), name="winner")
            await asyncio.sleep(3)
        loser.cancel()  # its turn has come, and it has not run yet
        await winner
        assert loser.cancelled()
    assert runs.order == ["winner"]
    assert runs.breaker.statistics().running == 0


@virtual
async def test_an_error_in_the_body_frees_the_place() -> None:
    breaker = Breaker(1, 0, "b")
    for _ in range(3):
        with pytest.raises(ValueError, match="mine"):
            async with breaker.enter("x", 1):
                raise ValueError("mine")
    assert breaker.statistics().running == 0


@virtual
async def test_resizing_lets_waiters_in_and_stops_nobody() -> None:
    runs = Runs(Breaker(1, 10, "b"))
    async with Crew("c") as crew:
        for label in "abcd":
            crew.spawn(runs.run(label, seconds=10), name=label)
        await asyncio.sleep(1)
        runs.breaker.resize(3)
        await asyncio.sleep(1)
        assert runs.at_once == 3
        runs.breaker.resize(1)
        assert runs.at_once == 3
        await crew.join()
    assert runs.order == list("abcd")
