"""One sandbox's owner on its node: its state machine, its ledger, its gate, its record and its reports.

One task lives through the sandbox's life (`run`); everybody else only pokes it (`update`, `kill`, `evict`), and pokes
are synchronous, so they never wait for each other. Phases change by `machine.fire` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from penstock.core.breaker import BreakerFull
from penstock.core.deadlines import backoff_s, within
from penstock.core.errors import Kind, PenstockError
from penstock.core.gate import GateClosed
from penstock.core.hold import Hold
from penstock.core.ledger import Ledger
from penstock.core.machine import Machine
from penstock.model.drain import Disposition, Fate
from penstock.model.sandbox import (
    TERMINAL,
    TRANSITIONS,
    EgressRules,
    Event,
    KillReason,
    OnTimeout,
    Phase,
    SandboxSpec,
    SandboxStatus,
)
from penstock.node.chronicle import autopsy
from penstock.node.climb import Climb, Eviction
from penstock.node.create import Steps, create
from penstock.node.evict import LABELS, Undo, cgroup_name
from penstock.node.life import Explained, Order, Stuck, status_of_record, status_of_spec
from penstock.node.means import Means
from penstock.node.ports import Process
from penstock.node.record import Due, LedgerBook, Remembered, SandboxRecord
from penstock.node.release import release
from penstock.node.serve import SERVING, serve
from penstock.node.verdict import Verdict, look

_STARTING: Final = frozenset({Phase.BOUND, Phase.CREATING, Phase.STARTING})
RETRY_BASE_S: Final = 0.25
RETRY_CAP_S: Final = 30.0
HASTEN_EVERY_S: Final = 0.2
UNDO_MARGIN_S: Final = 0.5  # so that the port's own deadline, which names its step, passes first


class Supervisor:
    """Owner of one sandbox. Make one with `of_spec` or `of_record`, then spawn `run`.

    `run` returns after the last status was handed to the reporter.
    """

    def __init__(self, status: SandboxStatus, *, end_at: float, means: Means, remembered: Remembered | None) -> None:
        self.id = status.id
        self.end_at = end_at
        self.machine: Machine[Phase, Event] = Machine(TRANSITIONS, status.phase, name=f"sandbox {status.id}")
        self.climb = Climb(was_asked=remembered is not None and remembered.was_asked)
        self.steps_ms: dict[str, float] = {}
        self.released_ms, self.stuck = 0.0, Stuck()
        self.means = means
        self._status = status
        self._remembered = remembered
        self.record = SandboxRecord(means.ports.files, status.id)
        self.undo = Undo(status.id, means)
        self.ledger = Ledger(status.id, LedgerBook(self.record), undo_s=means.settings.step_within_s + UNDO_MARGIN_S)
        self.spec: SandboxSpec | None = None
        self.seen_revision = status.spec_revision  # of `spec`; the status has the one whose rules are in force
        self.rules: EgressRules | None = None  # in force; None: not known, so apply the wanted ones
        self.process: Process | None = None
        self.autopsy = ""  # how its first process ended
        self.noticed_epoch = 0  # of the last notice its programs were given
        self.stands_still = False  # frozen by this daemon, not only on record
        self.may_be_frozen = remembered is not None  # although it runs on record
        self.order: Order | None = None
        self.ordered_at = 0.0  # monotonic
        self.died = False
        self.poked = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._fault: Exception | None = None
        self._refusal: Exception | None = None
        self.attempts = 0

    @classmethod
    def of_spec(cls, spec: SandboxSpec, revision: int, means: Means) -> Supervisor:
        """For a sandbox that control bound to this node, of which nothing exists yet."""
        self = cls(status_of_spec(spec, revision, means), end_at=spec.end_at, means=means, remembered=None)
        self.spec = spec
        means.expiry.watch(spec.id, spec.end_at)
        return self

    @classmethod
    def of_record(cls, remembered: Remembered, verdict: Verdict, means: Means) -> Supervisor:
        """For a sandbox that an earlier daemon began. Its ledger's labels come from the record."""
        born, pid, end_at = remembered.born, remembered.pid, remembered.end_at
        self = cls(status_of_record(remembered, means), end_at=end_at, means=means, remembered=remembered)
        if pid is not None and born.boot_id == means.boot_id:
            self.undo.identity = (pid.pid, pid.start_ticks)
        self.ledger.adopt(
            (owned.entry for owned in remembered.owned), {label: self._way_back(label) for label in LABELS}
        )
        self.undo.keep = remembered.parking
        self._judge(verdict)
        if self.phase is not Phase.PAUSED:
            means.expiry.watch(born.id, end_at)
        means.chronicle.adopted(self.status)
        self.poked.set()
        return self

    @property
    def phase(self) -> Phase:
        return self.machine.state

    @property
    def status(self) -> SandboxStatus:
        return self._status

    @property
    def serving(self) -> bool:
        return self.phase in SERVING

    @property
    def on_timeout(self) -> OnTimeout:
        """What its end means; of one whose spec was not seen yet, as its record says."""
        if self.spec is not None:
            return self.spec.on_timeout
        return self._remembered.born.on_timeout if self._remembered is not None else OnTimeout.KILL

    @property
    def on_drain(self) -> Disposition | None:
        """What its creator or its template says of drains; of one whose spec was not seen yet, as its record says."""
        if self.spec is not None:
            return self.spec.on_drain
        return self._remembered.born.on_drain if self._remembered is not None else None

    @property
    def may_park(self) -> bool:
        """Whether a drain may pause it to disk: this tier can, also once a start under way is done."""
        return True

    @property
    def run_dir(self) -> str:
        return self._status.guest_socket.rpartition("/")[0]

    @property
    def forced(self) -> bool:
        """Killed by a drain or a stop of its node."""
        if self.order is not None:
            return self.order.reason is KillReason.NODE_SHUTDOWN
        return self._remembered is not None and self._remembered.forced

    @property
    def fate(self) -> Fate:
        """What became of it, as a drain sees it. Meaningful once it has ended or is in quarantine."""
        return self.climb.fate(
            forced=self.forced,
            parked=self.undo.keep is not None,
            quarantined=self.phase is Phase.QUARANTINED,
        )

    @property
    def settled(self) -> bool:
        """Nothing is under way: a stopping daemon may leave it as it is."""
        return self.phase in SERVING or self.phase in (Phase.UNKNOWN, Phase.QUARANTINED, *TERMINAL)

    # -- pokes: synchronous, from anywhere on the loop --

    def update(self, spec: SandboxSpec, revision: int) -> None:
        """The spec as it now stands in the store, and the revision at which it was seen."""
        self.spec = spec
        if spec.end_at != self.end_at:
            self.end_at = spec.end_at
            if self.phase is not Phase.BOUND:  # its record begins when it is accepted
                self.record.note(Due(end_at=spec.end_at))
            if self.phase is not Phase.PAUSED:
                self.means.expiry.watch(self.id, spec.end_at)
        self.seen_revision = revision
        if spec.stop is not None:
            self.kill(spec.stop.reason, f"stopped by {spec.stop.by}")
        self.poked.set()

    def due(self) -> None:
        """Its end has come: it is killed, or paused if that is what its end means or somebody asked for just now."""
        asked = self.spec is not None and (self.spec.frozen or self.spec.park is not None)
        if not self.serving or (self.on_timeout is OnTimeout.KILL and not asked):
            self.kill(KillReason.TIMEOUT, "its time was over")
        else:
            self.poked.set()

    def poke_later(self) -> None:
        """What could not be done now is tried again, each time later."""
        self.attempts += 1
        self.means.crew.spawn(self._poke_later(), name=f"{self.id} tries again")

    async def _poke_later(self) -> None:
        await asyncio.sleep(self.pause_s())
        self.poked.set()

    def kill(self, reason: KillReason, because: str) -> None:
        """End it, from any state. The first reason stays."""
        if self.order is not None or self.phase in TERMINAL:
            return
        self.order = Order(reason, because)
        self.ordered_at = self.means.clock.monotonic()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            if self.phase is Phase.STARTING:
                self.means.crew.spawn(self._hasten(), name=f"{self.id} hasten")
        self.poked.set()

    def evict(self, eviction: Eviction) -> None:
        """Climb the ladder of a drain. Whoever drains the node forces what is left at the hard deadline."""
        if self.climb.begin(eviction):
            self.poked.set()

    def spare(self) -> bool:
        """The drain was undone. False when it was asked to end already, and will."""
        spared = self.climb.end()
        self.poked.set()
        return spared

    def turn_away(self, why: Exception) -> None:
        """A start that still waits for its turn is refused, so that it is placed elsewhere. Otherwise a no-op."""
        if self.phase is Phase.BOUND and self._refusal is None and self.order is None:
            self._refusal = why
            if self._starting is not None:
                self._starting.cancel()

    def retry(self) -> None:
        """Try the release of a quarantined sandbox now, whatever its back-off says."""
        self.poked.set()

    def explain(self) -> Explained:
        return Explained(
            id=self.id,
            phase=self.phase,
            because=self._status.because,
            holds=self.ledger.labels(),
            end_at=self.end_at,
            release_attempts=self.attempts,
            released_ms=self.released_ms,
        )

    # -- the life --

    async def run(self) -> None:
        """Until it has ended, or was refused. If cancelled (the daemon stops), everything stays as recorded.

        A start holds the node's gate, and the life that follows takes its own hold before the start gives its back:
        a drain never sees a moment with neither.
        """
        gate = self.means.gate
        if self.phase is not Phase.BOUND:
            hold = gate.readmit("sandbox", self.id)
        else:
            try:
                start = gate.hold("start", self.id)
            except GateClosed as closed:
                self._refuse(closed)
                return
            with start:
                start.on_force(self._force)
                if not await self._start():
                    return
                hold = gate.readmit("sandbox", self.id)
        with hold:
            hold.on_force(self._force)
            await self._live(hold)

    def _force(self) -> None:
        self.kill(KillReason.NODE_SHUTDOWN, self.means.gate.cordoned or "the node stops")

    async def _live(self, hold: Hold) -> None:
        while self.phase is Phase.UNKNOWN:
            await self._doubt()
        if self.phase in SERVING:
            await serve(self)
        await release(self, hold)

    async def _start(self) -> bool:
        """From BOUND to READY or UNWINDING. False when it ended without having taken anything."""
        self._starting = self.means.crew.spawn(self._create(), name=f"{self.id} start")
        try:
            await self._starting
        except asyncio.CancelledError:
            if self.order is None and self._refusal is None:
                raise
        if self._refusal is not None:
            self._refuse(self._refusal)
            return False
        if self.phase is Phase.BOUND and self.order is not None:
            self.fire(Event.CANCEL, self.order.because, self.order.reason)
            return False
        if self.phase is Phase.BOUND and self._fault is None:
            return False
        if self.phase is not Phase.READY:
            why = self.order.because if self.order is not None else str(self._fault)
            reason = self.order.reason if self.order is not None else _reason_of(self._fault)
            self.fire(Event.FAULT, why, reason)
        return True

    async def _create(self) -> None:
        """Wait for a turn, accept, create. Failures are kept for `_start` to judge; only cancellation goes out."""
        means, spec = self.means, self.spec
        assert spec is not None
        try:
            async with means.starts.enter(self.id, within_s=means.settings.start_queue_s):
                if means.gate.cordoned is not None:
                    return  # nothing was taken or said: it stays bound, and the next daemon starts it
                self.record.begin(spec, boot_id=means.boot_id, now=means.clock.wall())
                if self.end_at != spec.end_at:
                    self.record.note(Due(end_at=self.end_at))
                self.fire(Event.ACCEPT)
                steps = Steps(means)
                self.steps_ms = steps.ms
                self.rules = spec.egress
                created = await create(
                    spec,
                    means=means,
                    ledger=self.ledger,
                    record=self.record,
                    undo=self.undo,
                    steps=steps,
                    on_launch=lambda: self.fire(Event.STARTED),
                )
        except BreakerFull as full:
            self._refusal = full
        except Exception as error:
            self._fault = error
        else:
            self._take_over(created.process)
            self._status = msgspec.structs.replace(
                self._status,
                pid=created.process.pid,
                start_ticks=created.process.start_ticks,
                slot=created.slot,
                address=created.address,
                guest_socket=f"{created.run_dir}/guest.sock",
                started_at=created.started_at,
                steps_ms=dict(created.steps_ms),
            )
            self.fire(Event.GUEST_HELLO)
            means.tally.ready(created.steps_ms)

    async def _doubt(self) -> None:
        """Look again, each time later. Doubt itself never kills; an order to end does."""
        self.attempts += 1
        try:
            async with within(self.pause_s(), f"news of {self.id}"):
                await self.poked.wait()
        except TimeoutError:
            pass
        self.poked.clear()
        if self.order is not None:
            self.fire(Event.KILL, self.order.because, self.order.reason)
        elif self._remembered is not None:
            self._judge(look(self._remembered, self.means.ports, self.means.boot_id))

    # -- small things --

    def _judge(self, verdict: Verdict) -> None:
        """What was found of a remembered sandbox becomes its phase."""
        phase = self.phase
        if phase in (Phase.STOPPING, Phase.UNWINDING, Phase.QUARANTINED):
            self._hold(verdict.process)
            self.report()
        elif phase in _STARTING:
            self.fire(Event.FAULT, "the daemon ended during its start", verdict.reason or KillReason.START_FAILED)
        elif verdict.process is not None and verdict.slot is not None:
            if phase is Phase.UNKNOWN:
                self.fire(Event.FOUND_READY, "found again")
            else:
                self.report()
            self._take_over(verdict.process)
        elif verdict.gone:
            event = Event.FOUND_GONE if phase is Phase.UNKNOWN else Event.DIED
            self.fire(event, verdict.because, verdict.reason or KillReason.CRASHED)
        else:
            self._hold(verdict.process)
            if phase is not Phase.UNKNOWN:
                self.fire(Event.DOUBT, verdict.because)

    def _hold(self, process: Process | None) -> None:
        """Keep a handle for the release, and only one: each is a descriptor."""
        if self.undo.process is not None and self.undo.process is not process:
            self.undo.process.close()
        self.undo.process = process

    def _take_over(self, process: Process) -> None:
        self._hold(process)
        self.process = process
        self.means.crew.spawn(self._watch(process), name=f"{self.id} pid 1")

    async def _watch(self, process: Process) -> None:
        self.autopsy = autopsy(await process.wait(), self._oom_kills())
        self.died = True
        self.poked.set()

    def _oom_kills(self) -> int:
        try:
            return self.means.ports.cgroups.usage(cgroup_name(self.id)).oom_kills
        except OSError:
            return 0  # Safe: it only says why something died, and the cgroup may be gone already.

    async def _hasten(self) -> None:
        """A killed start must not wait for a deaf guest: kill what the launch made, until the launch gives up."""
        while self.phase is Phase.STARTING and self._starting is not None and not self._starting.done():
            try:
                await self.means.ports.cgroups.kill(cgroup_name(self.id), within_s=self.means.settings.step_within_s)
            except Exception:  # noqa: S110
                pass  # Safe: the release that follows kills again and verifies.
            await asyncio.sleep(HASTEN_EVERY_S)

    def _refuse(self, why: Exception) -> None:
        if self.phase is Phase.BOUND:
            self.means.expiry.forget(self.id)
            self.means.tally.refused(why)
            self.fire(Event.REFUSE, f"refused: {why}")

    def _way_back(self, label: str) -> Callable[[Mapping[str, str]], Awaitable[None]]:
        return lambda _: self.undo.of(label)

    def pause_s(self) -> float:
        return backoff_s(max(1, self.attempts), base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self.means.rng)

    def fire(self, event: Event, because: str = "", reason: KillReason | None = None) -> None:
        before = self.phase
        self.machine.fire(event)
        changes: dict[str, object] = {}
        if because:
            changes["because"] = because
        if reason is not None:
            changes["kill_reason"] = reason
        if self.phase in TERMINAL:
            changes["stopped_at"] = self.means.clock.wall()
        self.report(**changes)
        self.means.chronicle.phase(before, event, self._status)
        self.means.tally.phase_changes_total += 1
        self.means.changed.fire()

    def report(self, **changes: object) -> None:
        self._status = msgspec.structs.replace(self._status, phase=self.phase, **changes)
        self.means.reporter.say(self._status)


def _reason_of(fault: Exception | None) -> KillReason:
    """Whether it is of use to try again is told by the error's kind."""
    passing = isinstance(fault, PenstockError) and fault.kind is Kind.UNAVAILABLE
    return KillReason.START_REFUSED if passing else KillReason.START_FAILED
