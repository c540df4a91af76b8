"""What a node counted since it opened. Written by supervisors and sync, read by `Node.statistics`."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from penstock.core.errors import PenstockError
from penstock.model.sandbox import KillReason

SAMPLES_MAX: Final = 512  # kept per series: enough for a p99 of what is recent
BUGS_MAX: Final = 100


class Tally:
    """Counters only grow; series keep the last SAMPLES_MAX. Durations in milliseconds."""

    def __init__(self) -> None:
        self.ready_total = self.failed_total = self.phase_changes_total = 0
        self.release_retries_total = 0
        self.refused_total: Counter[str] = Counter()  # by the error's code
        self.ended_total: Counter[str] = Counter()  # by kill reason
        self.steps_ms: dict[str, deque[float]] = {}  # of creates that became ready, by step
        self.released_ms: deque[float] = deque(maxlen=SAMPLES_MAX)  # order to end → verified gone
        self.bugs: deque[str] = deque(maxlen=BUGS_MAX)

    def ready(self, steps_ms: dict[str, float]) -> None:
        self.ready_total += 1
        for step, took_ms in steps_ms.items():
            self.steps_ms.setdefault(step, deque(maxlen=SAMPLES_MAX)).append(took_ms)

    def refused(self, why: Exception) -> None:
        self.refused_total[why.code if isinstance(why, PenstockError) else "internal"] += 1

    def ended(self, reason: KillReason | None, *, failed: bool, released_ms: float) -> None:
        self.failed_total += failed
        self.ended_total[reason.value if reason is not None else "none"] += 1
        self.released_ms.append(released_ms)

    def bug(self, name: str, error: BaseException) -> None:
        notes = "; ".join(getattr(error, "__notes__", ()))
        self.bugs.append(f"{name}: {type(error).__name__}: {error}" + (f" ({notes})" if notes else ""))
