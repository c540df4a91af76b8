"""How a sandbox stands, as its caller sees it: from its spec, its status and what it was paused as. Pure.

The three say it together, and none alone: one that is frozen has a spec and a status, one that was paused to disk has
neither, only its snapshot, and one that is being resumed from there has a spec and the snapshot still.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.model.sandbox import (
    TERMINAL,
    KillReason,
    Phase,
    SandboxSpec,
    SandboxStatus,
    wants_frozen,
    wants_parked,
)
from penstock.model.snapshot import Snapshot

_BEGINNING = frozenset({Phase.PENDING, Phase.BOUND, Phase.CREATING, Phase.STARTING})
_ENDING = frozenset({Phase.STOPPING, Phase.UNWINDING, Phase.QUARANTINED})


class State(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"  # into memory: ordered, and not yet so
    PAUSED = "paused"  # frozen on its node
    PARKING = "parking"  # to disk: its end as a process, which nothing takes back
    PARKED = "parked"  # its snapshot is all there is
    RESUMING = "resuming"  # from either


CHANGING = frozenset({State.STARTING, State.PAUSING, State.PARKING, State.RESUMING})


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox at one moment. `spec` is that of its snapshot when it has no other."""

    state: State
    spec: SandboxSpec
    status: SandboxStatus | None = None
    snapshot: Snapshot | None = None  # the newest it was paused as

    @property
    def paused(self) -> bool:
        """Whether a caller is told `paused`; one that is being resumed counts as paused until it serves."""
        return self.state not in (State.STARTING, State.RUNNING)

    @property
    def started_at(self) -> float:
        """Wall seconds, rounded to the microsecond that callers see, so that `startedAfter` may name it exactly."""
        if self.status is not None and self.status.started_at:
            return round(self.status.started_at, 6)
        kept = self.snapshot.started_at if self.snapshot is not None else 0.0
        return round(kept or self.spec.created_at, 6)

    @property
    def end_at(self) -> float:
        """Of one that is paused to disk: when it was paused (e2b 2.3)."""
        return self.snapshot.created_at if self.state is State.PARKED and self.snapshot else self.spec.end_at


def judge(
    spec: SandboxSpec | None, status: SandboxStatus | None, snapshot: Snapshot | None, now: float
) -> Standing | None:
    """None: there is no such sandbox any more, or its end is ordered. `snapshot`: its newest of kind PAUSED."""
    if spec is None:
        return Standing(state=State.PARKED, spec=snapshot.spec, snapshot=snapshot) if snapshot is not None else None
    if spec.stop is not None:
        return None
    if status is not None and status.phase in TERMINAL:
        # Control removes its records in a moment. A resume that failed leaves it paused, as it was.
        return Standing(state=State.PARKED, spec=snapshot.spec, snapshot=snapshot) if snapshot is not None else None
    state = _state(spec, status, now, resumes=snapshot is not None and snapshot.id == spec.snapshot)
    return Standing(state=state, spec=spec, status=status, snapshot=snapshot) if state is not None else None


def _state(spec: SandboxSpec, status: SandboxStatus | None, now: float, *, resumes: bool) -> State | None:
    if status is None or status.phase in _BEGINNING:
        return State.RESUMING if resumes else State.STARTING
    if status.phase in _ENDING:
        if spec.park is not None or status.kill_reason is KillReason.PAUSED:
            return State.PARKING
        return State.RESUMING if resumes else None  # a failed start: what it began with is still there
    if wants_parked(spec, now) is not None:
        return State.PARKING
    frozen = wants_frozen(spec, now)
    if status.phase is Phase.PAUSED:
        return State.PAUSED if frozen else State.RESUMING
    return State.PAUSING if frozen else State.RUNNING
