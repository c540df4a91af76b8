"""What of a sandbox's life is worth a line in the event log, and how the line reads.

Called by whoever acts, at the moment it acts; nothing here decides. The steps of a start are facts of the line that
ends it (`sandbox.ready` or `sandbox.start_failed`), not lines of their own: a start has eight steps and lasts 30 ms.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Final, Protocol

from penstock.core.clock import Clock
from penstock.model.drain import DrainReport, DrainStage, Outcome, Step
from penstock.model.event import LoggedEvent, drain_subject
from penstock.model.ids import NodeId
from penstock.model.sandbox import Event, KillReason, Phase, SandboxStatus

# What each transition is called in the log; the others say nothing (see the docstring, and `step` for EVICT).
KINDS: Final[dict[Event, str]] = {
    Event.REFUSE: "sandbox.refused",
    Event.CANCEL: "sandbox.cancelled",
    Event.FAULT: "sandbox.start_failed",
    Event.GUEST_HELLO: "sandbox.ready",
    Event.PAUSE: "sandbox.paused",
    Event.RESUME: "sandbox.resumed",
    Event.SPARE: "sandbox.spared",
    Event.EMPTY: "sandbox.emptied",
    Event.DEADLINE: "sandbox.killed",
    Event.KILL: "sandbox.killed",
    Event.DIED: "sandbox.died",
    Event.CLEAN: "sandbox.ended",
    Event.GONE: "sandbox.ended",
    Event.PINNED: "sandbox.quarantined",
    Event.REAPED: "sandbox.reaped",
    Event.DOUBT: "sandbox.doubted",
    Event.FOUND_READY: "sandbox.found",
    Event.FOUND_GONE: "sandbox.found_gone",
    Event.NODE_LOST: "sandbox.lost",
}
_STEPS: Final[dict[Step, str]] = {
    Step.NOTICE: "sandbox.notice",
    Step.PARK: "sandbox.park",
    Step.TERM: "sandbox.term",
    Step.KILL: "sandbox.kill",
    Step.QUARANTINE: "sandbox.quarantine",
}
_ENDERS: Final[dict[KillReason, str]] = {  # who ends a sandbox by this reason, where nobody more exact is named
    KillReason.TIMEOUT: "expiry",
    KillReason.ADMIN: "operator",
}
_STOPPED_BY: Final = "stopped by "  # how an order from its spec names who gave it


class Teller(Protocol):
    def tell(self, event: LoggedEvent) -> None:
        """Take it; never wait, never fail."""


class Chronicle:
    """One per node. `told_total` counts lines by kind, for metrics."""

    def __init__(self, reporter: Teller, clock: Clock, node_id: NodeId) -> None:
        self._reporter, self._clock, self._node = reporter, clock, node_id
        self.told_total: Counter[str] = Counter()
        self._drain: tuple[int, DrainStage, int] | None = None  # epoch, stage and force attempts as last told

    def phase(self, before: Phase, event: Event, status: SandboxStatus, **facts: str) -> None:
        """A transition that was just made: `before` its phase until now, `status` what is said of it from now on."""
        kind = KINDS.get(event)
        if kind is None:
            return
        found = {"from": before.value, "to": status.phase.value} | facts
        if status.kill_reason is not None:
            found["reason"] = status.kill_reason.value
        if event in (Event.GUEST_HELLO, Event.FAULT) and status.steps_ms:
            steps = [
                (step, took_ms) for step, took_ms in status.steps_ms.items() if "." not in step
            ]  # not those inside
            found["steps_ms"] = " ".join(f"{step}={took_ms:.1f}" for step, took_ms in steps)
        self._tell(kind, status, status.because, actor=self._actor(event, status), facts=found)

    def adopted(self, status: SandboxStatus) -> None:
        """A daemon that came back took up what an earlier one began."""
        facts = {"phase": status.phase.value}
        if status.pid:
            facts |= {"pid": str(status.pid), "boot_id": status.boot_id}
        self._tell("sandbox.adopted", status, status.because or "found in its record by a new daemon", facts=facts)

    def step(
        self,
        step: Step,
        status: SandboxStatus,
        because: str,
        *,
        epoch: int = 0,
        deadline: float | None = None,
        failed: str = "",
    ) -> None:
        """A rung of the ladder that was just climbed, or could not be (`failed`: why). `deadline`: what comes next.

        `epoch` names the drain in whose chain it stands; 0: a stop of the daemon, which is no drain of the node's.
        """
        facts = {"epoch": str(epoch)} | ({"failed": failed} if failed else {})
        drain = (drain_subject(self._node, epoch),) if epoch else ()
        kind = _STEPS[step] + ("_failed" if failed else "")
        self._tell(kind, status, because, facts=facts, deadline=deadline, related=drain)

    def snapshot(self, status: SandboxStatus, kind: str, snapshot: str, *, disk_bytes: int) -> None:
        """An image of it was kept: `kind` is "parked" or "checkpointed"."""
        facts = {"snapshot": snapshot, "disk_bytes": str(disk_bytes)}
        self._tell(f"sandbox.{kind}", status, status.because, facts=facts, related=(snapshot,))

    def drain(self, report: DrainReport) -> None:
        """Progress of a drain that was ordered: a line when its stage changes, and one per answered force attempt."""
        before, now = self._drain, (report.epoch, report.stage, report.forced_number)
        if before == now:
            return
        self._drain = now
        forced = before is not None and before[0] == report.epoch and report.forced_number > before[2]
        if forced:
            errors = "; ".join(report.force_errors)
            self._tell_drain("drain.force_failed" if errors else "drain.forced", report, errors or "nobody is left")
        if before is None or before[:2] != now[:2]:
            self._tell_drain(f"drain.{report.stage.value}", report, report.reason)

    def outcome(self, epoch: int, outcome: Outcome, *, team: str = "") -> None:
        """What a drain made of one sandbox; stands in the chain of both."""
        facts = {"fate": outcome.fate.value} | ({"error": outcome.error} if outcome.error else {})
        self._put(
            LoggedEvent(
                at=outcome.at,
                kind="sandbox.fate",
                subject=outcome.sandbox,
                actor=f"node {self._node}",
                because=outcome.because,
                related=(drain_subject(self._node, epoch),),
                facts={"node": self._node, "epoch": str(epoch)} | facts,
                team=team,
            )
        )

    def node(self, kind: str, because: str = "", *, actor: str = "", **facts: str) -> None:
        """Something about the node itself: `kind` is `node.…`."""
        self._put(
            LoggedEvent(
                at=self._clock.wall(),
                kind=kind,
                subject=self._node,
                actor=actor or f"node {self._node}",
                because=because,
                facts=facts,
            )
        )

    def _tell_drain(self, kind: str, report: DrainReport, because: str) -> None:
        counts = {"starts": report.starts, "builds": report.builds, "live": report.live, "stuck": report.quarantined}
        facts = {name: str(count) for name, count in (counts | report.fates).items() if count}
        if report.succeeded is not None:
            facts["succeeded"] = str(report.succeeded).lower()
        self._put(
            LoggedEvent(
                at=self._clock.wall(),
                kind=kind,
                subject=drain_subject(report.node, report.epoch),
                actor=f"node {self._node}",
                because=because,
                related=(report.node,),
                facts=facts,
            )
        )

    def _actor(self, event: Event, status: SandboxStatus) -> str:
        """Who made it happen: for an order from the spec whoever wrote it, else who acts by that reason."""
        if event in (Event.KILL, Event.CANCEL):
            if status.because.startswith(_STOPPED_BY):
                return status.because.removeprefix(_STOPPED_BY)
            if status.kill_reason in _ENDERS:
                return _ENDERS[status.kill_reason]
        return f"node {self._node}"

    def _tell(
        self,
        kind: str,
        status: SandboxStatus,
        because: str,
        *,
        facts: dict[str, str],
        actor: str = "",
        deadline: float | None = None,
        related: tuple[str, ...] = (),
    ) -> None:
        self._put(
            LoggedEvent(
                at=self._clock.wall(),
                kind=kind,
                subject=status.id,
                actor=actor or f"node {self._node}",
                because=because,
                deadline=deadline,
                related=related,
                facts={"node": self._node} | facts,
                team=status.team,
            )
        )

    def _put(self, event: LoggedEvent) -> None:
        self.told_total[event.kind] += 1
        self._reporter.tell(event)


def autopsy(wait_status: int | None, oom_kills: int = 0) -> str:
    """How a first process ended, as a clause. `wait_status` as `Process.wait` returns it.

    A process that the kernel killed for memory shows as signal 9; only the cgroup's count tells the two apart.
    """
    if wait_status is None:
        how = "how is not known: it was not our child"
    elif os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        how = f"killed by {name}"
    else:
        how = f"exit code {os.waitstatus_to_exitcode(wait_status)}"
    if oom_kills:
        times = "once" if oom_kills == 1 else f"{oom_kills} times"
        how += f"; the kernel killed in it for lack of memory {times}"
    return how
