"""Bounded running and bounded waiting, in order.

So many at once, so many more may wait, the rest is told to come back later. Starts beyond a node's concurrency queue
here; requests for an app that has no endpoint yet wait here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from penstock.core.deadlines import within
from penstock.core.errors import Kind, PenstockError

RETRY_AFTER_MIN_S: Final = 1.0
RETRY_AFTER_MAX_S: Final = 60.0
MEMORY: Final = 0.2  # weight of the newest run in the average from which retry_after_s is guessed


class BreakerFull(PenstockError):
    """Raised by `enter`: as many wait as may. Nothing was queued; come back after `retry_after_s`."""

    kind = Kind.EXHAUSTED
    code = "breaker_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatistics:
    name: str
    running: int
    running_max: int
    waiting: int
    waiting_max: int
    entered_total: int
    refused_total: int
    run_s: float  # moving average


class Breaker:
    """At most `running_max` bodies at once and `waiting_max` waiting, first come first served. One loop."""

    def __init__(self, running_max: int, waiting_max: int, name: str) -> None:
        assert running_max >= 1, running_max
        assert waiting_max >= 0, waiting_max
        self.name = name
        self._running_max, self._waiting_max = running_max, waiting_max
        self._running = 0
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order of arrival
        self._entered = self._refused = 0
        self._run_s = 0.0

    @asynccontextmanager
    async def enter(self, label: str, within_s: float | None) -> AsyncIterator[None]:
        """Run the body when it is its turn. Raises BreakerFull at once, or DeadlinePassed after `within_s` of waiting.

        The deadline bounds the wait, not the body. A turn that comes together with the deadline is taken; one that
        comes together with a cancellation is passed on.
        """
        await self._admit(label, within_s)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            took_s = loop.time() - began
            self._run_s = took_s if not self._run_s else (1 - MEMORY) * self._run_s + MEMORY * took_s
            self._leave()

    def resize(self, running_max: int) -> None:
        """Change how many run at once. Fewer: nobody is stopped, the next ones wait."""
        assert running_max >= 1, running_max
        self._running_max = running_max
        self._grant()

    def statistics(self) -> BreakerStatistics:
        return BreakerStatistics(
            name=self.name,
            running=self._running,
            running_max=self._running_max,
            waiting=len(self._waiters),
            waiting_max=self._waiting_max,
            entered_total=self._entered,
            refused_total=self._refused,
            run_s=self._run_s,
        )

    async def _admit(self, label: str, within_s: float | None) -> None:
        if self._running < self._running_max:  # then nobody waits: a place given back goes to the first waiter
            self._running += 1
            self._entered += 1
            return
        if len(self._waiters) >= self._waiting_max:
            self._refused += 1
            raise self._full(label)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[turn] = None
        try:
            async with within(within_s, f"the turn of {label} in {self.name}"):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._leave()  # the turn came, and nobody takes it
            else:
                self._waiters.pop(turn, None)
            raise

    def _leave(self) -> None:
        self._running -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiters and self._running < self._running_max:
            turn = next(iter(self._waiters))
            del self._waiters[turn]
            if turn.done():
                continue  # cancelled, and its task has not run yet
            self._running += 1
            self._entered += 1
            turn.set_result(None)

    def _full(self, label: str) -> BreakerFull:
        turns = (len(self._waiters) + 1) / self._running_max
        guess_s = min(max(turns * self._run_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
        return BreakerFull(
            "too many at once",
            which=f"{label} in {self.name}",
            why=f"{self._running} run and {len(self._waiters)} wait",
            retry_after_s=guess_s,
        )
