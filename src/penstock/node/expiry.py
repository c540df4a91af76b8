"""Each sandbox's end, watched by the node itself: the API, control and the store may all be away.

Ends are wall-clock times, because callers set them so and a restarted daemon must find them again. The wall clock may
be stepped while we sleep on the monotonic one, so no sleep is longer than `LOOK_S`: after a step the right sandboxes
end within that time. Two wake-ups a second while anything is watched, none otherwise. (A timerfd with CANCEL_ON_SET
would spare them, and would be one more port to keep two adapters of.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from penstock.core.clock import Clock
from penstock.core.deadlines import DeadlineHeap

LOOK_S: Final = 0.5  # promise: a sandbox is told within 1 s of its end
SHORTEST_S: Final = 0.001  # wall seconds have 0.2 µs of float resolution: never spin on the last one


class Expiry:
    """Calls `on_due(sandbox)` once when its end has passed. `on_due` is synchronous and must not raise."""

    def __init__(self, clock: Clock, on_due: Callable[[str], None]) -> None:
        self._clock, self._on_due = clock, on_due
        self._heap: DeadlineHeap[str] = DeadlineHeap()
        self._nearer = asyncio.Event()

    def watch(self, sandbox: str, end_at: float) -> None:
        """Set or move the end of `sandbox` (wall seconds)."""
        self._heap.push(sandbox, end_at)
        self._nearer.set()

    def forget(self, sandbox: str) -> None:
        self._heap.remove(sandbox)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._nearer.clear()
            now = self._clock.wall()
            for sandbox in self._heap.pop_due(now):
                self._on_due(sandbox)
            next_at = self._heap.next_at()
            if next_at is None:
                await self._nearer.wait()
                continue
            await asyncio.sleep(min(LOOK_S, max(SHORTEST_S, next_at - self._clock.wall())))
