"""Keys to look at: fair, stingy, and never two workers on one key.

The queue carries names, not events, so that work is level-triggered: a key added ten times while it waits is one look,
and a key added while it is being worked is looked at once more afterwards. Promises, each a property test:

- never twice at once: between `get` and its `done` or `retry`, no other `get` returns the key;
- never lost: every `add` is followed by a `get` of that key that began after it;
- fair: keys come out in the order they became ready.

Bounded by the number of distinct keys.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from penstock.core.deadlines import DeadlineHeap, Pulse, Rng, backoff_s

BASE_S: Final = 0.1
CAP_S: Final = 30.0

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyQueueStatistics:
    ready: int
    working: int
    delayed: int
    failing: int  # keys whose last look ended in `retry`


class KeyQueue(Generic[K]):
    """One queue, any number of workers on one loop. `rng` spreads retries."""

    def __init__(self, *, rng: Rng, base_s: float = BASE_S, cap_s: float = CAP_S) -> None:
        self._rng, self._base_s, self._cap_s = rng, base_s, cap_s
        self._ready: deque[K] = deque()
        self._dirty: set[K] = set()  # wanted: in _ready, or waiting for its worker to finish
        self._working: set[K] = set()
        self._delayed: DeadlineHeap[K] = DeadlineHeap()
        self._failures: dict[K, int] = {}
        self._changed = Pulse()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Keys wanted now."""
        return len(self._dirty)

    def add(self, key: K) -> None:
        """Look at `key` soon."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._working:
            self._ready.append(key)
            self._changed.fire()

    def add_after(self, key: K, delay_s: float) -> None:
        """Look at `key` in `delay_s`. Of several such wishes the earliest counts; an `add` meanwhile cancels none."""
        if delay_s <= 0:
            self.add(key)
            return
        at = asyncio.get_running_loop().time() + delay_s
        known = self._delayed.at(key)
        if known is None or at < known:
            self._delayed.push(key, at)
            self._set_timer()

    async def get(self) -> K:
        """The next key, now this caller's until `done` or `retry`. Cancelling it loses nothing. Unbounded wait."""
        await self._changed.wait_for(lambda: bool(self._ready), until=None)
        key = self._ready.popleft()
        self._dirty.discard(key)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """The look succeeded: forget earlier failures."""
        self._failures.pop(key, None)
        self._finish(key)

    def retry(self, key: K) -> None:
        """The look failed: give the key back and look again after a growing delay. Instead of `done`."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        self.add_after(key, backoff_s(failures, base_s=self._base_s, cap_s=self._cap_s, rng=self._rng))
        self._finish(key)

    def failures(self, key: K) -> int:
        """Looks in a row that ended in `retry`."""
        return self._failures.get(key, 0)

    def statistics(self) -> KeyQueueStatistics:
        return KeyQueueStatistics(
            ready=len(self._ready), working=len(self._working), delayed=len(self._delayed), failing=len(self._failures)
        )

    def close(self) -> None:
        """Stop the timer. What waits in the queue stays; delayed keys no longer become ready."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self, key: K) -> None:
        assert key in self._working, f"{key!r} is not being worked"
        self._working.discard(key)
        if key in self._dirty:
            self._ready.append(key)
            self._changed.fire()

    def _set_timer(self) -> None:
        at = self._delayed.next_at()
        if self._timer is not None:
            if at == self._timer.when():
                return
            self._timer.cancel()
        self._timer = None if at is None else asyncio.get_running_loop().call_at(at, self._due)

    def _due(self) -> None:
        self._timer = None
        for key in self._delayed.pop_due(asyncio.get_running_loop().time()):
            self.add(key)
        self._set_timer()
