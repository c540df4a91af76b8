"""What to do about one sandbox, from what is seen of it. Pure, total, and a fixpoint on its own results.

A sandbox without a node gets one; refused, it gets another (or the same one later); ended, its two records are removed
after a while (the log keeps its history). Everything else is the node's business: a bound sandbox is never moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.control.placement import NodeSeen, choose
from penstock.model.ids import NodeId, SandboxId, SnapshotId
from penstock.model.sandbox import TERMINAL, KillReason, Phase, SandboxSpec, SandboxStatus

RETENTION_S: Final = 300.0  # how long an ended sandbox can still be looked up
RESUME_FAILED_S: Final = 2.0  # how long a failed resume is shown before the sandbox is paused again
REBIND_BASE_S: Final = 0.5  # after the second refusal; doubles
REBIND_CAP_S: Final = 10.0


class Bind(msgspec.Struct, frozen=True, tag=True):
    """Write `spec.node`. Conditional on the spec's revision as seen."""

    sandbox: SandboxId
    node: NodeId


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Delete its records from the store."""

    sandbox: SandboxId


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Delete the record of a snapshot; its node then removes the image."""

    snapshot: SnapshotId


Action = Bind | Remove | Drop


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox and the nodes. `refusals` counts refusals in a row, the last one seen at `refused_at` (wall seconds).

    Revisions are the store's, of the last write of each record; 0 when absent. A refusal stands until the spec is
    written again: that asks the node once more.
    """

    id: SandboxId
    spec: SandboxSpec | None
    status: SandboxStatus | None
    nodes: Sequence[NodeSeen]
    spec_revision: int = 0
    status_revision: int = 0
    refusals: int = 0
    refused_at: float = 0.0
    paused: tuple[SnapshotId, ...] = ()  # its snapshots of kind PAUSED, oldest first


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now, when to look again at the latest (wall seconds; None: only when something changes), and why."""

    actions: tuple[Action, ...] = ()
    wake_at: float | None = None
    because: tuple[str, ...] = ()


def plan(seen: Seen, now: float, *, retention_s: float = RETENTION_S) -> Plan:
    spec, status = seen.spec, seen.status
    if spec is None:
        return _orphan(seen.id, status)
    if status is not None and status.phase in TERMINAL:
        return _ended(seen, spec, status, now, retention_s)
    if status is not None and status.phase is Phase.READY and spec.snapshot in seen.paused:
        # It serves, so what it was resumed from is nobody's any more, nor what was before. Not what came after: that is
        # the pause that goes on right now, and whose status is still on its way.
        old = seen.paused[: seen.paused.index(spec.snapshot) + 1]
        return Plan(actions=tuple(Drop(each) for each in old), because=("it was resumed",))
    refused = _refused(seen)
    if spec.node is not None and not refused:
        return _bound(seen, spec, now)
    if spec.stop is not None or spec.end_at <= now:
        return _cancelled(spec, refused=refused)
    return _place(seen, spec, now, refused=refused)


def _refused(seen: Seen) -> bool:
    """Its node said no, and nobody asked again since."""
    spec, status = seen.spec, seen.status
    if spec is None or status is None or status.phase is not Phase.PENDING or status.node != spec.node:
        return False
    return seen.status_revision > seen.spec_revision


def _orphan(sandbox: SandboxId, status: SandboxStatus | None) -> Plan:
    """A status without a spec. Living ones are ended by their node, which watches specs too."""
    if status is None:
        return Plan(because=("nothing is known of it",))
    if status.phase in TERMINAL or status.phase is Phase.PENDING:
        return Plan(actions=(Remove(sandbox),), because=("its spec is gone and it has ended",))
    return Plan(because=(f"its spec is gone; node {status.node} has to end it first",))


def _ended(seen: Seen, spec: SandboxSpec, status: SandboxStatus, now: float, retention_s: float) -> Plan:
    """Its records stay a while, so that it can be looked up. One that was paused to disk lives on as its snapshot."""
    # Drops come first: after the removal nothing would say that they are still to be done.
    if seen.paused and spec.stop is not None:
        drops = tuple(Drop(each) for each in seen.paused)
        return Plan(actions=(*drops, Remove(spec.id)), because=("it was killed, and so is what it was paused as",))
    if seen.paused and status.kill_reason is KillReason.PAUSED:
        drops = tuple(Drop(each) for each in seen.paused[:-1])
        return Plan(actions=(*drops, Remove(spec.id)), because=(f"it is paused as {seen.paused[-1]}",))
    due = status.stopped_at + (min(retention_s, RESUME_FAILED_S) if seen.paused else retention_s)
    if now >= due:
        return Plan(actions=(Remove(spec.id),), because=(f"it ended {now - status.stopped_at:.0f} s ago",))
    return Plan(wake_at=due, because=(f"{status.phase.value}: {status.because}" if status.because else "it has ended",))


def _bound(seen: Seen, spec: SandboxSpec, now: float) -> Plan:
    """It has a node. Only a node that never said anything and no longer exists gives it back."""
    known = any(node.id == spec.node for node in seen.nodes)
    if seen.status is None and not known:
        chosen = choose(seen.nodes, spec.limits)
        if chosen.node is not None and spec.stop is None and spec.end_at > now:
            return Plan(
                actions=(Bind(spec.id, chosen.node),),
                because=(f"node {spec.node} is gone and never accepted it", *chosen.because),
            )
    return Plan(because=(f"node {spec.node} has it",))


def _cancelled(spec: SandboxSpec, *, refused: bool) -> Plan:
    """It ends before it ran. Only a node writes a status, so one that refused it is asked once more, and says so."""
    why = f"stopped by {spec.stop.by}" if spec.stop is not None else "its time was over"
    if refused and spec.node is not None:
        return Plan(actions=(Bind(spec.id, spec.node),), because=(f"{why} before it ran; node {spec.node} says so",))
    return Plan(actions=(Remove(spec.id),), because=(f"{why} before a node was chosen",))


def _place(seen: Seen, spec: SandboxSpec, now: float, *, refused: bool) -> Plan:
    if refused and seen.refusals > 1:
        due = seen.refused_at + min(REBIND_CAP_S, REBIND_BASE_S * 2.0 ** (min(seen.refusals, 10) - 2))
        if now < due:
            return Plan(wake_at=min(due, spec.end_at), because=(f"refused {seen.refusals} times; next try soon",))
    elsewhere = frozenset({spec.node}) if refused and spec.node is not None else frozenset[NodeId]()
    chosen = choose(seen.nodes, spec.limits, avoid=elsewhere)
    if chosen.node is None and refused:
        if seen.refusals <= 1 and now < seen.refused_at + REBIND_BASE_S:
            return Plan(wake_at=min(seen.refused_at + REBIND_BASE_S, spec.end_at), because=chosen.because)
        chosen = choose(seen.nodes, spec.limits)
    if chosen.node is None:
        return Plan(wake_at=spec.end_at, because=("no node can take it", *chosen.because))
    return Plan(actions=(Bind(spec.id, chosen.node),), because=chosen.because)
