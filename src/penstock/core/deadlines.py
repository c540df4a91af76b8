"""Every wait has a deadline and a name.

Deadlines are absolute, in seconds of the loop's clock; durations appear only at the door. The one promise that shapes
this file: **when the result and the deadline are both there, the answer is the result.**

`asyncio.timeout` does not keep it. Its timer cancels the task even if what the task awaits is already done; a task
in that state cannot be un-cancelled, so the result is dropped (3.11: 1,000 losses in 1,000 ties). `within` looks
before it strikes: a task whose awaited future is done is about to run, and is given that run. Nothing polls and
nobody yields in a loop: the look is one callback, after the callbacks that were due at the same instant.

Refused: `asyncio.wait_for` (one more task per wait, and in 3.11 it can swallow a cancellation); waiting in a helper
task and comparing afterwards (the body would run in another task, with another context).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Final, Generic, Protocol, TypeVar

from penstock.core.errors import Kind, PenstockError

SPARED_MAX: Final = 100  # a body that never really waits is cut after so many passes of the loop past its deadline
HEAP_SLACK: Final = 64  # dead entries a DeadlineHeap may carry beyond its living ones before it is rebuilt

K = TypeVar("K", bound=Hashable)


class DeadlinePassed(PenstockError, TimeoutError):
    """Raised by every bounded wait of ours. `which` names what was awaited; the catcher decides whether to ask again.

    It is also a `TimeoutError`, hence an `OSError`: an `except OSError` that means errno must look at the errno.
    """

    kind = Kind.DEADLINE
    code = "deadline_passed"

    def __init__(self, waited_for: str, within_s: float, *, why: str = "", retry_after_s: float | None = None) -> None:
        self.within_s = within_s
        super().__init__(
            "deadline passed", which=waited_for, why=why or f"waited {within_s:g} s", retry_after_s=retry_after_s
        )


class Within:
    """`async with within(seconds, what)`: the body ends by then or is cancelled and DeadlinePassed raised in its place.

    A cancellation from outside stays a cancellation, also when the deadline passes at the same time. Not re-usable.
    """

    def __init__(self, seconds: float | None, what: str) -> None:
        self._seconds, self._what = seconds, what
        self._task: asyncio.Task[object] | None = None
        self._handle: asyncio.Handle | None = None
        self._baseline = 0
        self._spared = 0
        self._struck = False
        self.deadline: float | None = None  # loop seconds; None: unbounded

    @property
    def passed(self) -> bool:
        """Whether the body was cancelled because of this deadline."""
        return self._struck

    @property
    def left_s(self) -> float | None:
        """Seconds left, never negative; None when unbounded."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    async def __aenter__(self) -> Within:
        assert self._task is None, f"within({self._what!r}) was entered twice"
        task = asyncio.current_task()
        assert task is not None, "within() needs a task to cancel"
        self._task, self._baseline = task, task.cancelling()
        if self._seconds is not None:
            loop = asyncio.get_running_loop()
            self.deadline = loop.time() + self._seconds
            self._handle = loop.call_at(self.deadline, self._due)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if not self._struck:
            return
        assert self._task is not None
        assert self._seconds is not None
        alone = self._task.uncancel() <= self._baseline
        if kind is asyncio.CancelledError:
            if alone:
                raise DeadlinePassed(self._what, within_s=self._seconds) from error
            return
        # The body ended otherwise, so our cancellation may still be pending; it must not hit whoever waits next.
        await absorb_cancellation(self._task, self._baseline)

    def _due(self) -> None:
        # One pass later: what came due at the same instant has run by then, in whichever order the timers stood.
        self._handle = asyncio.get_running_loop().call_soon(self._strike)

    def _strike(self) -> None:
        assert self._task is not None
        if is_about_to_run(self._task) and self._spared < SPARED_MAX:
            self._spared += 1
            self._handle = asyncio.get_running_loop().call_soon(self._strike)
            return
        self._struck = True
        self._task.cancel(f"deadline passed: {self._what}")


def within(seconds: float | None, what: str) -> Within:
    """Bound the body of an `async with` to `seconds` (None: unbounded). `what` completes "waiting for …"."""
    return Within(seconds, what)


def is_about_to_run(task: asyncio.Task[object]) -> bool:
    """Whether `task` has what it waits for (or waits for nothing), so that the loop will run it without further cause.

    Reads `Task._fut_waiter`, the one private name of asyncio this package uses; `tests/unit/core` fails loudly should a
    Python release drop it.
    """
    waiter: asyncio.Future[object] | None = getattr(task, "_fut_waiter", None)
    while isinstance(waiter, asyncio.Task) and not waiter.done():
        waiter = getattr(waiter, "_fut_waiter", None)  # it awaits a task: what does that one await?
    return waiter is None or waiter.done()


async def absorb_cancellation(task: asyncio.Task[object], baseline: int) -> None:
    """Consume a cancellation requested but not yet delivered to the current `task`; re-request what was not ours.

    In 3.11 `uncancel()` lowers the count but leaves the delivery pending; only an await takes it.
    """
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        if task.cancelling() > baseline:
            task.uncancel()
            task.cancel()


class Pulse:
    """Wakes everybody who waits for a change of some state they can look at. Bounded by its waiters.

    Level-triggered: the state decides, the pulse only says "look again", so a lost or doubled pulse is harmless.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order of arrival

    def fire(self) -> None:
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            _wake(waiter)

    async def wait_for(self, done: Callable[[], bool], *, until: float | None) -> bool:
        """True as soon as `done()`, False at `until` (loop seconds; None: no bound). When both hold: True."""
        loop = asyncio.get_running_loop()
        while not done():
            if until is not None and loop.time() >= until:
                return False
            waiter = loop.create_future()
            self._waiters[waiter] = None
            timer = None if until is None else loop.call_at(until, _wake, waiter)
            try:
                await waiter
            finally:
                self._waiters.pop(waiter, None)
                if timer is not None:
                    timer.cancel()
        return True


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Rng(Protocol):
    """What this package asks of `random.Random`: the caller owns the seed."""

    def random(self) -> float: ...


def backoff_s(attempt: int, *, base_s: float, cap_s: float, rng: Rng) -> float:
    """Seconds to wait after failure number `attempt` (from 1): doubling from `base_s` to `cap_s`, less up to half.

    The jitter is downward, so `cap_s` is a promise.
    """
    assert attempt >= 1, attempt
    doubled = base_s * 2.0 ** min(attempt - 1, 63)
    return min(cap_s, doubled) * (1.0 - rng.random() / 2)


class DeadlineHeap(Generic[K]):
    """Keys by the time they are due. One deadline a key; pushing again moves it.

    With `coalesce_s`, `next_at` waits for the last deadline inside that window after the first, so that a thousand
    leases expiring together are one wake-up and one write; nothing is popped early and nothing later than the window.
    """

    def __init__(self, *, coalesce_s: float = 0.0) -> None:
        self._coalesce_s = coalesce_s
        self._heap: list[tuple[float, int, K]] = []
        self._live: dict[K, tuple[float, int]] = {}
        self._pushed = 0  # breaks ties by age and tells a moved entry from a live one

    def __len__(self) -> int:
        return len(self._live)

    def push(self, key: K, at: float) -> None:
        self._pushed += 1
        self._live[key] = (at, self._pushed)
        heapq.heappush(self._heap, (at, self._pushed, key))
        if len(self._heap) > 2 * len(self._live) + HEAP_SLACK:
            self._rebuild()

    def remove(self, key: K) -> None:
        """Absent is success."""
        self._live.pop(key, None)

    def at(self, key: K) -> float | None:
        entry = self._live.get(key)
        return None if entry is None else entry[0]

    def pop_due(self, now: float) -> list[K]:
        """Remove and return the keys due at or before `now`, earliest first, equals in order of pushing."""
        due: list[K] = []
        while self._heap and self._heap[0][0] <= now:
            at, number, key = heapq.heappop(self._heap)
            if self._live.get(key) == (at, number):
                del self._live[key]
                due.append(key)
        return due

    def next_at(self) -> float | None:
        """When to call `pop_due` next; None when empty. Costs O(1), or O(n) with a window."""
        while self._heap and self._live.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        first = self._heap[0][0]
        if not self._coalesce_s:
            return first
        return max(at for at, _ in self._live.values() if at <= first + self._coalesce_s)

    def _rebuild(self) -> None:
        self._heap = [(at, number, key) for key, (at, number) in self._live.items()]
        heapq.heapify(self._heap)
