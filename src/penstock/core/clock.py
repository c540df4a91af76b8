"""Two clocks, two types of question.

*Monotonic* time answers "how long": the loop's own clock, which a simulation advances by hand. *Wall* time answers
"when" for people and for what outlives the process; it may jump both ways. Code that only waits needs neither: it
sleeps, and the seam is under the loop. Only rooms that persist times take a `Clock`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Where times come from. Real: `SystemClock`; in a simulated world: `sim.loop.SimClock`."""

    def wall(self) -> float:
        """Seconds since the epoch, UTC. May jump."""

    def monotonic(self) -> float:
        """Seconds of the running loop's clock: what `call_at` and every deadline of this package count in."""


class SystemClock:
    """The machine's clocks."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            # No loop runs in this thread (start-up, a synchronous command): the clock that the loop will use.
            return time.monotonic()
