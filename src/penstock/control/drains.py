"""What a drain would do to each sandbox of a node, before it is ordered. Pure, total, and indifferent to the clock.

The stages are `model.drain.ladder`'s, the same that the node climbs; what is added here is what each of them means for
one sandbox as it is now: whose word on the disposition holds, whether its own end comes first, what is lost by it, and
what can keep the drain from ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from penstock.model.drain import Disposition, DrainOrder, DrainPlan, Fate, Foreseen, Rung, Step, digest, ladder
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec
from penstock.model.sandbox import PAUSE_TO_DISK, TERMINAL, KillReason, OnTimeout, Phase, SandboxSpec, SandboxStatus

Sandboxes = Sequence[tuple[SandboxSpec, SandboxStatus | None]]
MayPark = Callable[[SandboxSpec, SandboxStatus], bool]

_QUEUED: Final = frozenset({Phase.PENDING, Phase.BOUND})
_STARTING: Final = frozenset({Phase.CREATING, Phase.STARTING})
_ENDING: Final = frozenset({Phase.STOPPING, Phase.UNWINDING})
_DOUBTFUL: Final = frozenset({Phase.UNKNOWN, Phase.LOST})

_MEMORY: Final = "memory and processes"
_FROZEN: Final = "the memory it is frozen with, and its processes"
_FILES: Final = ", and files not fetched"


def parks(spec: SandboxSpec, status: SandboxStatus) -> bool:
    """As the node has it: whatever serves can be paused to disk, unless its tier names what it can do instead."""
    return not status.capabilities or PAUSE_TO_DISK in status.capabilities


def foresee(
    spec: NodeSpec, order: DrainOrder, sandboxes: Sandboxes, now: float, *, may_park: MayPark = parks
) -> DrainPlan:
    """The fate of each of the node's sandboxes under `order`, and what blocks. Sandboxes elsewhere are left out.

    `order.at` is now; a drain under way keeps its beginning, as `model.node.drain` has it. An order whose
    `force_number` is above that of the drain under way kills at once. `may_park` says of a sandbox whether a drain can
    pause it to disk.
    """
    seen = _Seen(spec, order, now, may_park)
    here = sorted(
        ((one, status) for one, status in sandboxes if _is_here(spec.id, one, status)), key=lambda pair: pair[0].id
    )
    foreseen = tuple(_foresee_one(seen, one, status) for one, status in here)
    return DrainPlan(
        node=spec.id,
        epoch=spec.epoch,
        foreseen=foreseen,
        blocks=tuple(_blocks(seen, here)),
        digest=digest(spec.id, spec.epoch, order, foreseen),
    )


class _Seen:
    """The order as the node will climb it."""

    def __init__(self, spec: NodeSpec, order: DrainOrder, now: float, may_park: MayPark) -> None:
        self.spec, self.now, self.may_park = spec, now, may_park
        self.before = spec.drain
        forced_before = self.before.force_number if self.before is not None else 0
        self.forced = order.force_number > forced_before
        self.order = order if self.before is None else msgspec.structs.replace(order, at=self.before.at)

    def disposition(self, one: SandboxSpec, order: DrainOrder) -> Disposition:
        """The call's word, then the sandbox's own, then its node's."""
        return order.disposition or one.on_drain or self.spec.disposition or Disposition.STOP

    def rungs(self, one: SandboxSpec, status: SandboxStatus) -> tuple[Rung, ...]:
        """What is done to it beyond the notice, in order."""
        if self.forced:
            return (Rung(Step.KILL, self.now),)
        disposition = self.disposition(one, self.order)
        rungs = ladder(self.order, disposition, may_park=self.may_park(one, status))
        if status.phase in _DOUBTFUL:
            return tuple(rung for rung in rungs if rung.step is Step.KILL)  # nobody can be asked
        return tuple(rung for rung in rungs if rung.step is not Step.NOTICE)

    def was_asked(self, one: SandboxSpec, status: SandboxStatus) -> bool:
        """Whether the drain under way has sent it SIGTERM already, which no later order takes back."""
        if self.before is None or status.phase is not Phase.DRAINING:
            return False
        rungs = ladder(self.before, self.disposition(one, self.before), may_park=self.may_park(one, status))
        return any(rung.step is Step.TERM and rung.at <= self.now for rung in rungs)


def _is_here(node: NodeId, one: SandboxSpec, status: SandboxStatus | None) -> bool:
    if status is None or status.phase in _QUEUED:
        return one.node == node
    return status.node == node and status.phase not in TERMINAL


def _foresee_one(seen: _Seen, one: SandboxSpec, status: SandboxStatus | None) -> Foreseen:
    if status is None or status.phase in _QUEUED:
        because = "it has not started: it is refused here and placed elsewhere"
        return Foreseen(sandbox=one.id, fate=Fate.SPARED, by=seen.now, because=because)
    if status.phase is Phase.QUARANTINED:
        because = f"in quarantine: {status.because}"
        return Foreseen(sandbox=one.id, fate=Fate.QUARANTINE, by=None, because=because)
    if status.phase in _ENDING or one.stop is not None:
        because = f"it is ending: {status.because}" if status.because else "it is ending"
        if status.kill_reason is KillReason.PAUSED:
            return Foreseen(sandbox=one.id, fate=Fate.PARK, by=seen.order.hard_at, because=because)
        return Foreseen(sandbox=one.id, fate=Fate.FINISH, by=seen.order.hard_at, because=because)
    rungs = seen.rungs(one, status)
    asked = seen.was_asked(one, status)
    end_at = _own_end(one, status)
    if not asked and (not rungs or (end_at is not None and end_at <= rungs[0].at)):
        return _left_alone(one, status, end_at)
    return _evicted(seen, one, status, rungs, asked=asked)


def _own_end(one: SandboxSpec, status: SandboxStatus) -> float | None:
    """When it is gone by itself; None: never, because it lies frozen or will. One to be parked is gone by then."""
    if one.park is not None:
        return 0.0
    if one.on_timeout is OnTimeout.PAUSE or one.frozen or status.phase is Phase.PAUSED:
        return None
    return one.end_at


def _left_alone(one: SandboxSpec, status: SandboxStatus, end_at: float | None) -> Foreseen:
    """Nothing is done to it before its own end."""
    if one.park is not None or (one.on_timeout is OnTimeout.PARK and end_at is not None):
        by = one.end_at if one.park is None else None
        loses = _memory(status)
        return Foreseen(sandbox=one.id, fate=Fate.PARK, by=by, loses=loses, because="paused to disk by its own order")
    because = "it ends by its own time" if end_at is not None else "nothing is done to it, and it has no end of its own"
    return Foreseen(sandbox=one.id, fate=Fate.FINISH, by=end_at, because=because)


def _evicted(seen: _Seen, one: SandboxSpec, status: SandboxStatus, rungs: tuple[Rung, ...], *, asked: bool) -> Foreseen:
    """Something will be done to it before its own end."""
    memory = _memory(status)
    kill_at = next((rung.at for rung in rungs if rung.step is Step.KILL), None)
    by = min((at for at in (kill_at, _own_end(one, status)) if at is not None), default=None)
    first = rungs[0] if rungs else Rung(Step.TERM, seen.now)
    if first.step is Step.KILL or (kill_at is not None and kill_at <= first.at):
        because = "its node cannot tell how it is: nobody can ask it to end" if status.phase in _DOUBTFUL else ""
        because = because or ("killed at once" if seen.forced else "no time between SIGTERM and the hard deadline")
        return Foreseen(sandbox=one.id, fate=Fate.FORCE, by=by, loses=memory + _FILES, because=because)
    if first.step is Step.PARK and not asked:
        return Foreseen(sandbox=one.id, fate=Fate.PARK, by=first.at, loses=memory, because="paused to disk")
    because = f"asked to end already, at epoch {seen.spec.epoch}" if asked else f"SIGTERM at {_moment(first.at)}"
    if not asked and seen.disposition(one, seen.order) is Disposition.PARK:
        because += "; it cannot be parked"
    return Foreseen(sandbox=one.id, fate=Fate.STOP, by=by, loses=memory + _FILES, because=because)


def _memory(status: SandboxStatus) -> str:
    return _FROZEN if status.phase is Phase.PAUSED else _MEMORY


def _blocks(seen: _Seen, here: Iterable[tuple[SandboxSpec, SandboxStatus | None]]) -> list[str]:
    """What can keep the drain from ending, or from ending as a success; a line each."""
    lines: list[str] = []
    starts, patient = 0, list[float | None]()
    for one, status in here:
        if status is None or status.phase in _QUEUED:
            continue
        if status.phase is Phase.QUARANTINED:
            lines.append(f"{one.id} is in quarantine ({status.because}): the drain ends, but not as a success")
        elif status.phase in _DOUBTFUL:
            lines.append(f"{one.id} is {status.phase.value} ({status.because}): only force or its own end ends it")
        starts += status.phase in _STARTING
        if status.phase not in _ENDING | {Phase.QUARANTINED} and one.stop is None:
            patient.append(_own_end(one, status))
    if starts:
        lines.append(f"starts under way are waited for: {starts}")
    if patient and seen.order.hard_at is None and not seen.forced:
        ends = [at for at in patient if at is not None]
        last = f"to {_moment(max(ends))}" if len(ends) == len(patient) else "and some have none"
        lines.append(f"no hard deadline: sandboxes may run to their own end: {len(patient)}, {last}")
    return lines


def _moment(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
