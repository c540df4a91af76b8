"""What a node is told of its machine, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from penstock.model.sandbox import Phase
from penstock.node.means import Means
from penstock.node.reap import Leak
from penstock.node.slots import PoolStatistics
from penstock.node.supervisor import Supervisor


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of this machine, probed by `run`."""

    boot_id: str
    cpu_count: int = 0
    memory_bytes: int = 0
    isolation: tuple[str, ...] = ()


class NodeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; `run` publishes it as metrics. Durations in milliseconds, the newest last."""

    sandboxes: dict[str, int]  # by phase
    slots: PoolStatistics
    disks: PoolStatistics
    starts_running: int
    starts_waiting: int
    reports_waiting: int
    ready_total: int
    failed_total: int
    refused_total: dict[str, int]  # by the error's code
    ended_total: dict[str, int]  # by kill reason
    steps_ms: dict[str, tuple[float, ...]]  # of the last creates, by step
    released_ms: tuple[float, ...]  # of the last ends: order → everything verified gone
    quarantined: int
    quarantined_for_s: float  # the oldest; 0 when there is none
    release_retries_total: int
    swept_total: dict[str, int]  # by kind
    leaks: tuple[Leak, ...]  # what the last sweep could not remove
    bugs: tuple[str, ...]  # supervisors that raised, the newest last
    told_total: dict[str, int]  # lines of the event log, by kind


def statistics(
    means: Means,
    supervisors: Iterable[Supervisor],
    *,
    reports_waiting: int,
    swept_total: dict[str, int],
    leaks: tuple[Leak, ...],
) -> NodeStatistics:
    """A snapshot of the node whose `means` these are."""
    tally = means.tally
    phases: dict[str, int] = {}
    stuck_since = now = means.clock.wall()
    for supervisor in supervisors:
        if supervisor.phase is Phase.QUARANTINED:
            stuck_since = min(stuck_since, supervisor.stuck.since or now)
        phases[supervisor.phase.value] = phases.get(supervisor.phase.value, 0) + 1
    starts = means.starts.statistics()
    return NodeStatistics(
        sandboxes=phases,
        slots=means.slots.statistics(),
        disks=means.disks.statistics(),
        starts_running=starts.running,
        starts_waiting=starts.waiting,
        reports_waiting=reports_waiting,
        ready_total=tally.ready_total,
        failed_total=tally.failed_total,
        refused_total=dict(tally.refused_total),
        ended_total=dict(tally.ended_total),
        steps_ms={step: tuple(last) for step, last in tally.steps_ms.items()},
        released_ms=tuple(tally.released_ms),
        quarantined=phases.get(Phase.QUARANTINED.value, 0),
        quarantined_for_s=now - stuck_since,
        release_retries_total=tally.release_retries_total,
        swept_total=swept_total,
        leaks=leaks,
        bugs=tuple(tally.bugs),
        told_total=dict(means.chronicle.told_total),
    )
