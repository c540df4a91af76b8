"""Assignments ↔ supervisors: the specs that control bound to this node, each with exactly one owner here.

Edges are not trusted: every spec seen is compared with what is supervised, so a missed or a repeated notification
changes nothing. What an earlier daemon had accepted and has no record any more is over, and is reported so; it is
never started a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.deadlines import backoff_s
from penstock.core.machine import Machine
from penstock.model.ids import SandboxId
from penstock.model.sandbox import TERMINAL, TRANSITIONS, Event, KillReason, Phase, SandboxSpec, SandboxStatus
from penstock.node.adopt import Adopted
from penstock.node.means import Means
from penstock.node.record import RecordUnreadable, read_sandbox
from penstock.node.supervisor import Supervisor
from penstock.node.verdict import look

RESTART_BASE_S: Final = 0.5
RESTART_CAP_S: Final = 30.0

# The events that lead from each phase to its end, for a sandbox of which nothing is left.
_TO_THE_END: Final[dict[Phase, tuple[Event, ...]]] = {
    Phase.PENDING: (Event.CANCEL,),
    Phase.BOUND: (Event.CANCEL,),
    Phase.CREATING: (Event.FAULT, Event.CLEAN),
    Phase.STARTING: (Event.FAULT, Event.CLEAN),
    Phase.READY: (Event.DIED, Event.GONE),
    Phase.PAUSED: (Event.DIED, Event.GONE),
    Phase.DRAINING: (Event.DIED, Event.GONE),
    Phase.STOPPING: (Event.GONE,),
    Phase.UNWINDING: (Event.CLEAN,),
    Phase.QUARANTINED: (Event.REAPED,),
    Phase.UNKNOWN: (Event.FOUND_GONE, Event.GONE),
    Phase.LOST: (Event.FOUND_GONE, Event.GONE),
}


class Sync:
    """Who is supervised on this node.

    `seen_at()` is the revision of the spec view; `before` are the statuses this node had reported in an earlier life;
    `on_bug(sandbox, error)` hears of a supervisor that raised: it is started again from its record.
    """

    def __init__(
        self,
        *,
        means: Means,
        seen_at: Callable[[], int],
        before: dict[str, SandboxStatus],
        on_bug: Callable[[str, Exception], None],
    ) -> None:
        self.supervisors: dict[str, Supervisor] = {}
        self.pinned: dict[str, str] = {}
        self._means, self._seen_at, self._before, self._on_bug = means, seen_at, before, on_bug
        self._ended: set[str] = set()  # until their spec is removed
        self._specs: dict[str, SandboxSpec] = {}  # of what is supervised, for a restart from the record
        self._closed = False

    def take_up(self, adopted: Adopted) -> None:
        """Supervise what an earlier daemon left."""
        self.pinned.update(adopted.pinned)
        for supervisor in adopted.supervisors:
            before = self._before.pop(supervisor.id, None)
            if before is not None:
                _remember_answers(supervisor, before)
            self._supervise(supervisor)

    def on_spec(self, sandbox: str, spec: SandboxSpec | None) -> None:
        """The spec of `sandbox` as it now stands; None: it was removed."""
        if spec is None:
            self._removed(sandbox)
        elif spec.node == self._means.settings.id:
            self._assigned(spec, self._seen_at())

    def spec(self, sandbox: str) -> SandboxSpec | None:
        """The newest spec seen of a supervised sandbox."""
        return self._specs.get(sandbox)

    def close(self) -> None:
        """Take no further assignments: they stay bound, and the next daemon finds them."""
        self._closed = True

    def on_due(self, sandbox: str) -> None:
        """Its end has come."""
        supervisor = self.supervisors.get(sandbox)
        if supervisor is not None:
            supervisor.due()

    def bury(self, specs: set[str]) -> None:
        """Report as ended what an earlier daemon ran, of which neither a record nor a spec is left."""
        for sandbox in [gone for gone in self._before if gone not in specs]:
            status = self._before.pop(sandbox)
            if status.phase not in TERMINAL:
                self._finish(msgspec.structs.replace(status, because="it is gone, and so is its spec"))

    def _removed(self, sandbox: str) -> None:
        self._ended.discard(sandbox)
        supervisor = self.supervisors.get(sandbox)
        if supervisor is not None:
            supervisor.kill(KillReason.ADMIN, "its spec was removed")

    def _assigned(self, spec: SandboxSpec, revision: int) -> None:
        supervisor = self.supervisors.get(spec.id)
        if supervisor is not None:
            self._specs[spec.id] = spec  # kept for a restart from the record
            supervisor.update(spec, revision)
        elif self._closed or spec.id in self._ended:
            return
        elif spec.id in self.pinned:
            self._say(spec, Phase.UNKNOWN, self.pinned[spec.id])
        elif spec.id in self._before:
            self._over(self._before.pop(spec.id), spec)
        elif spec.stop is not None or spec.end_at <= self._means.clock.wall():
            self._over(self._status(spec, Phase.BOUND), spec)
        else:
            self._specs[spec.id] = spec
            self._supervise(Supervisor.of_spec(spec, revision, self._means))

    def _supervise(self, supervisor: Supervisor) -> None:
        assert supervisor.id not in self.supervisors
        self.supervisors[supervisor.id] = supervisor
        self._means.crew.spawn(self._care(supervisor), name=f"{supervisor.id} life")

    async def _care(self, supervisor: Supervisor) -> None:
        """Run it; after a bug in it, run its successor, made from the record as after the daemon's death."""
        attempt = 0
        while True:
            try:
                await supervisor.run()
                break
            except Exception as error:
                error.add_note(f"while supervising {supervisor.id} in phase {supervisor.phase.value}")
                self._on_bug(supervisor.id, error)
                attempt += 1
                await asyncio.sleep(backoff_s(attempt, base_s=RESTART_BASE_S, cap_s=RESTART_CAP_S, rng=self._means.rng))
                successor = self._successor(supervisor)
                if successor is None:
                    break
                supervisor = self.supervisors[supervisor.id] = successor
        del self.supervisors[supervisor.id]
        self._specs.pop(supervisor.id, None)
        if supervisor.phase in TERMINAL or supervisor.id in self.pinned:
            self._ended.add(supervisor.id)

    def _successor(self, supervisor: Supervisor) -> Supervisor | None:
        means, sandbox = self._means, supervisor.id
        if supervisor.phase in TERMINAL:
            return None
        try:
            remembered = read_sandbox(means.ports.files, sandbox)
        except RecordUnreadable as error:
            self.pinned[sandbox] = str(error)
            means.reporter.say(msgspec.structs.replace(supervisor.status, phase=Phase.UNKNOWN, because=str(error)))
            return None
        if remembered is None:
            self._finish(supervisor.status)
            return None
        successor = Supervisor.of_record(remembered, look(remembered, means.ports, means.boot_id), means)
        _remember_answers(successor, supervisor.status)
        spec = self._specs.get(sandbox)
        if spec is not None:
            successor.update(spec, self._seen_at())
        return successor

    def _over(self, status: SandboxStatus, spec: SandboxSpec) -> None:
        """Nothing is left of it: say how it ended, unless that was said before."""
        self._ended.add(spec.id)
        if status.phase in TERMINAL:
            return
        why = f"stopped by {spec.stop.by}" if spec.stop is not None else status.because or "it is gone"
        reason = status.kill_reason or (spec.stop.reason if spec.stop is not None else None)
        if reason is None and spec.end_at <= self._means.clock.wall():
            why, reason = "its time was over", KillReason.TIMEOUT
        self._finish(msgspec.structs.replace(status, because=why, kill_reason=reason or KillReason.CRASHED))

    def _finish(self, status: SandboxStatus) -> None:
        machine: Machine[Phase, Event] = Machine(TRANSITIONS, status.phase, name=f"sandbox {status.id}")
        for event in _TO_THE_END[status.phase]:
            machine.fire(event)
        self._means.reporter.say(
            msgspec.structs.replace(status, phase=machine.state, stopped_at=self._means.clock.wall())
        )

    def _say(self, spec: SandboxSpec, phase: Phase, because: str) -> None:
        self._means.reporter.say(msgspec.structs.replace(self._status(spec, phase), because=because))

    def _status(self, spec: SandboxSpec, phase: Phase) -> SandboxStatus:
        return SandboxStatus(id=SandboxId(spec.id), phase=phase, node=self._means.settings.id, team=spec.team)


def _remember_answers(supervisor: Supervisor, before: SandboxStatus) -> None:
    """What was answered once is not on record, and must not be done again: a checkpoint has one moment."""
    if before.checkpoint_done is not None:
        supervisor.report(
            checkpoint_done=before.checkpoint_done,
            checkpoint_failed=before.checkpoint_failed,
            durable_up_to=before.durable_up_to,
        )
