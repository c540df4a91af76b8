"""What goes wrong in a world: drawn from its seed, switched off before the final check.

Everything is asked for by the kernel in memory at the moment of an operation, so a fault needs no hook in production
code. The daemon's death is the exception that proves it: it strikes inside a record's append, which is the same as
between any two ledger entries.
"""

from __future__ import annotations

import errno
import random

import msgspec


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities per operation, 0 to 1, and the crash points as counts of appends from the daemon's birth."""

    failure: float = 0.0  # the operation raises, having done nothing
    slow: float = 0.0  # it takes up to 3 s
    busy: float = 0.0  # a release meets EBUSY until its deadline
    disk_full: float = 0.0  # an append raises ENOSPC
    odd_guests: float = 0.0
    crash_after: tuple[int, ...] = ()  # one per life of the daemon
    clock_jumps: int = 0
    reboot: bool = False  # one of the crashes takes the kernel with it
    stops: tuple[str, ...] = ()  # planned ends of a daemon's life, in order: keep, drain or force


def draw_rates(rng: random.Random) -> Rates:
    """A world is calm in some respects and bad in others: uniform badness hides what only shows alone."""
    return Rates(
        failure=rng.choice((0.0, 0.0, 0.02, 0.1)),
        slow=rng.choice((0.0, 0.02, 0.1)),
        busy=rng.choice((0.0, 0.0, 0.02, 0.1)),
        disk_full=rng.choice((0.0, 0.0, 0.01)),
        odd_guests=rng.choice((0.0, 0.1, 0.4)),
        crash_after=tuple(rng.randint(1, 160) for _ in range(rng.choice((0, 1, 1, 2, 3)))),
        clock_jumps=rng.choice((0, 0, 1, 2)),
        reboot=rng.random() < 0.15,
        stops=tuple(rng.choice(("keep", "keep", "drain", "force")) for _ in range(rng.choice((0, 0, 1, 2)))),
    )


class Faults:
    """The dice of one world. `calm()` ends the bad times."""

    def __init__(self, rng: random.Random, rates: Rates) -> None:
        self._rng, self.rates = rng, rates
        self._calm = False

    def calm(self) -> None:
        self._calm = True

    @property
    def is_calm(self) -> bool:
        return self._calm

    def delay_s(self, usual_s: float) -> float:
        if not self._calm and self._rng.random() < self.rates.slow:
            return self._rng.uniform(0.1, 3.0)
        return usual_s * self._rng.uniform(0.7, 1.6)

    def fails(self) -> bool:
        return not self._calm and self._rng.random() < self.rates.failure

    def busy(self) -> bool:
        return not self._calm and self._rng.random() < self.rates.busy

    def refuse_append(self) -> None:
        """Raise ENOSPC, sometimes."""
        if not self._calm and self._rng.random() < self.rates.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device (simulated)")
