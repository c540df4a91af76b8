"""One sandbox's owner on its node: its state machine, its ledger, its gate, its record and its reports.

One task lives through the sandbox's life (`run`); everybody else only pokes it (`update`, `kill`, `evict`), and pokes
are synchronous, so they never wait for each other. Phases change by `machine.fire` only.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from penstock.core.breaker import BreakerFull
from penstock.core.deadlines import backoff_s, within
from penstock.core.gate import Gate, GateClosed, Hold
from penstock.core.ledger import Ledger
from penstock.core.machine import Machine
from penstock.model.ids import SandboxId
from penstock.model.sandbox import (
    TERMINAL,
    TRANSITIONS,
    EgressRules,
    Event,
    KillReason,
    Phase,
    SandboxSpec,
    SandboxStatus,
)
from penstock.node.create import Steps, create
from penstock.node.evict import LABELS, Undo, cgroup_name
from penstock.node.means import Means
from penstock.node.ports import Process
from penstock.node.record import Due, LedgerBook, Moved, Remembered, SandboxRecord
from penstock.node.verdict import Verdict, look

_SERVING: Final = frozenset({Phase.READY, Phase.PAUSED, Phase.DRAINING})
_STARTING: Final = frozenset({Phase.BOUND, Phase.CREATING, Phase.STARTING})
RETRY_BASE_S: Final = 0.25
RETRY_CAP_S: Final = 30.0
HASTEN_EVERY_S: Final = 0.2
UNDO_MARGIN_S: Final = 0.5  # so that the port's own deadline, which names its step, passes first


class Order(msgspec.Struct, frozen=True):
    """Why a sandbox must end."""

    reason: KillReason
    because: str


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for `penstock why`, the page and tests."""

    id: SandboxId
    phase: Phase
    because: str
    holds: tuple[str, ...]  # ledger labels, oldest first
    end_at: float
    release_attempts: int
    released_ms: float  # from the order to end until everything was verified gone; 0 while it lives


class Supervisor:
    """Owner of one sandbox. Make one with `of_spec` or `of_record`, then spawn `run`.

    `run` returns after the last status was handed to the reporter.
    """

    def __init__(self, status: SandboxStatus, *, end_at: float, means: Means, remembered: Remembered | None) -> None:
        self.id = status.id
        self.end_at = end_at
        self.machine: Machine[Phase, Event] = Machine(TRANSITIONS, status.phase, name=f"sandbox {status.id}")
        self.gate = Gate(f"sandbox {status.id}")  # of its execs and streams, as far as this process relays any
        self.steps_ms: dict[str, float] = {}
        self.released_ms = 0.0
        self._means = means
        self._status = status
        self._remembered = remembered
        self._record = SandboxRecord(means.ports.files, status.id)
        self._undo = Undo(status.id, means)
        self._ledger = Ledger(status.id, LedgerBook(self._record), undo_s=means.settings.step_within_s + UNDO_MARGIN_S)
        self._spec: SandboxSpec | None = None
        self._seen_revision = status.spec_revision  # of `_spec`; the status has the one whose rules are in force
        self._rules: EgressRules | None = None  # in force; None: not known, so apply the wanted ones
        self._process: Process | None = None
        self._order: Order | None = None
        self._ordered_at = 0.0  # monotonic
        self._evicting = False
        self._died = False
        self._poked = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._fault: Exception | None = None
        self._refusal: Exception | None = None
        self._attempts = 0

    @classmethod
    def of_spec(cls, spec: SandboxSpec, revision: int, means: Means) -> Supervisor:
        """For a sandbox that control bound to this node, of which nothing exists yet."""
        status = SandboxStatus(
            id=spec.id,
            phase=Phase.BOUND,
            node=means.settings.id,
            team=spec.team,
            boot_id=means.boot_id,
            spec_revision=revision,
        )
        self = cls(status, end_at=spec.end_at, means=means, remembered=None)
        self._spec = spec
        means.expiry.watch(spec.id, spec.end_at)
        return self

    @classmethod
    def of_record(cls, remembered: Remembered, verdict: Verdict, means: Means) -> Supervisor:
        """For a sandbox that an earlier daemon began. Its ledger's labels come from the record."""
        born, pid = remembered.born, remembered.pid
        status = SandboxStatus(
            id=born.id,
            phase=remembered.phase,
            node=means.settings.id,
            team=born.team,
            because=remembered.because,
            kill_reason=remembered.kill_reason,
            boot_id=born.boot_id,
        )
        if pid is not None:
            status = msgspec.structs.replace(
                status,
                pid=pid.pid,
                start_ticks=pid.start_ticks,
                slot=pid.slot,
                address=pid.address,
                guest_socket=f"{pid.run_dir}/guest.sock",
                started_at=pid.started_at,
                steps_ms=pid.steps_ms,
            )
        self = cls(status, end_at=remembered.end_at, means=means, remembered=remembered)
        if pid is not None and born.boot_id == means.boot_id:
            self._undo.identity = (pid.pid, pid.start_ticks)
        self._ledger.adopt(
            (owned.entry for owned in remembered.owned), {label: self._way_back(label) for label in LABELS}
        )
        self._judge(verdict)
        means.expiry.watch(born.id, remembered.end_at)
        return self

    @property
    def phase(self) -> Phase:
        return self.machine.state

    @property
    def status(self) -> SandboxStatus:
        return self._status

    @property
    def serving(self) -> bool:
        return self.phase in _SERVING

    @property
    def settled(self) -> bool:
        """Nothing is under way: a stopping daemon may leave it as it is."""
        return self.phase in _SERVING or self.phase in (Phase.UNKNOWN, Phase.QUARANTINED, *TERMINAL)

    # -- pokes: synchronous, from anywhere on the loop --

    def update(self, spec: SandboxSpec, revision: int) -> None:
        """The spec as it now stands in the store, and the revision at which it was seen."""
        self._spec = spec
        if spec.end_at != self.end_at:
            self.end_at = spec.end_at
            if self.phase is not Phase.BOUND:  # its record begins when it is accepted
                self._record.note(Due(end_at=spec.end_at))
            self._means.expiry.watch(self.id, spec.end_at)
        self._seen_revision = revision
        if spec.stop is not None:
            self.kill(spec.stop.reason, f"stopped by {spec.stop.by}")
        self._poked.set()

    def kill(self, reason: KillReason, because: str) -> None:
        """End it, from any state. The first reason stays."""
        if self._order is not None or self.phase in TERMINAL:
            return
        self._order = Order(reason, because)
        self._ordered_at = self._means.clock.monotonic()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            if self.phase is Phase.STARTING:
                self._means.crew.spawn(self._hasten(), name=f"{self.id} hasten")
        self._poked.set()

    def evict(self) -> None:
        """Notice: pid 1 gets SIGTERM and may end by itself. Whoever drains the node's gate forces what is left."""
        self._evicting = True
        self._poked.set()

    def explain(self) -> Explained:
        return Explained(
            id=self.id,
            phase=self.phase,
            because=self._status.because,
            holds=tuple(self._ledger.labels()),
            end_at=self.end_at,
            release_attempts=self._attempts,
            released_ms=self.released_ms,
        )

    # -- the life --

    async def run(self) -> None:
        """Until it has ended, or was refused. If cancelled (the daemon stops), everything stays as recorded."""
        try:
            with self._means.gate.hold("sandbox", self.id) as hold:
                hold.on_force(lambda: self.kill(KillReason.NODE_SHUTDOWN, "the node stops"))
                await self._live(hold)
        except GateClosed as closed:
            self._refuse(closed)

    async def _live(self, hold: Hold) -> None:
        if self.phase is Phase.BOUND and not await self._start():
            return
        while self.phase is Phase.UNKNOWN:
            await self._doubt()
        if self.phase in _SERVING:
            await self._serve()
        await self._finish()

    async def _start(self) -> bool:
        """From BOUND to READY or UNWINDING. False when it ended without having taken anything."""
        self._starting = self._means.crew.spawn(self._create(), name=f"{self.id} start")
        try:
            await self._starting
        except asyncio.CancelledError:
            if self._order is None:
                raise
        if self._refusal is not None:
            self._refuse(self._refusal)
            return False
        if self.phase is Phase.BOUND and self._order is not None:
            self._fire(Event.CANCEL, self._order.because, self._order.reason)
            return False
        if self.phase is Phase.BOUND and self._fault is None:
            return False
        if self.phase is not Phase.READY:
            why = self._order.because if self._order is not None else str(self._fault)
            reason = self._order.reason if self._order is not None else KillReason.START_FAILED
            self._fire(Event.FAULT, why, reason)
        return True

    async def _create(self) -> None:
        """Wait for a turn, accept, create. Failures are kept for `_start` to judge; only cancellation goes out."""
        means, spec = self._means, self._spec
        assert spec is not None
        try:
            async with means.starts.enter(self.id, within_s=means.settings.start_queue_s):
                if means.gate.cordoned is not None:
                    return  # nothing was taken or said: it stays bound, and the next daemon starts it
                self._record.begin(spec, boot_id=means.boot_id, now=means.clock.wall())
                if self.end_at != spec.end_at:
                    self._record.note(Due(end_at=self.end_at))
                self._fire(Event.ACCEPT)
                steps = Steps(means)
                self.steps_ms = steps.ms
                self._rules = spec.egress
                created = await create(
                    spec,
                    means=means,
                    ledger=self._ledger,
                    record=self._record,
                    undo=self._undo,
                    steps=steps,
                    on_launch=lambda: self._fire(Event.STARTED),
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
            self._fire(Event.GUEST_HELLO)
            means.tally.ready(created.steps_ms)

    async def _serve(self) -> None:
        """From READY until something ends it. Control, the API and the store may all be away meanwhile."""
        while self.phase in _SERVING:
            await self._poked.wait()
            self._poked.clear()
            if self._died and self._order is None:
                self._fire(Event.DIED, "its first process ended", KillReason.CRASHED)
            elif self._order is not None:
                self._fire(Event.KILL, self._order.because, self._order.reason)
            elif self._evicting and self.phase is not Phase.DRAINING:
                self._fire(Event.EVICT, "the node drains")
                if self._process is not None:
                    self._process.signal(signal.SIGTERM)
            else:
                await self._conform()

    async def _conform(self) -> None:
        """Put the spec's egress rules in force, then say which spec revision is."""
        spec = self._spec
        if spec is None:
            return
        revision = self._seen_revision  # of `spec`, read together: both may move on while the rules are applied
        if spec.egress != self._rules and self._status.slot >= 0:
            try:
                async with within(self._means.settings.step_within_s, f"egress rules of {self.id}"):
                    await self._means.ports.network.apply(self._status.slot, spec.egress)
            except Exception:
                # Safe: `spec_revision` is not reported, so nobody believes the rules are in force; we come again.
                self._rules = None
                self._means.crew.spawn(self._poke_later(), name=f"{self.id} egress retry")
                return
            self._rules = spec.egress
            self._attempts = 0
        self._report(spec_revision=revision)

    async def _poke_later(self) -> None:
        self._attempts += 1
        await asyncio.sleep(self._pause_s())
        self._poked.set()

    async def _doubt(self) -> None:
        """Look again, each time later. Doubt itself never kills; an order to end does."""
        self._attempts += 1
        try:
            async with within(self._pause_s(), f"news of {self.id}"):
                await self._poked.wait()
        except TimeoutError:
            pass
        self._poked.clear()
        if self._order is not None:
            self._fire(Event.KILL, self._order.because, self._order.reason)
        elif self._remembered is not None:
            self._judge(look(self._remembered, self._means.ports, self._means.boot_id))

    async def _finish(self) -> None:
        """Release everything, verified, however long it takes; then unlink the record and say so."""
        self._means.expiry.forget(self.id)
        self._record.note(Moved(phase=self.phase, because=self._status.because, kill_reason=self._status.kill_reason))
        begun = self._ordered_at or self._means.clock.monotonic()
        self._attempts = 0
        while not await self._release():  # noqa: ASYNC110 - the kernel tells nobody that EBUSY is over
            await asyncio.sleep(self._pause_s())
        self.released_ms = (self._means.clock.monotonic() - begun) * 1000
        done = {Phase.UNWINDING: Event.CLEAN, Phase.STOPPING: Event.GONE, Phase.QUARANTINED: Event.REAPED}
        failed = self.phase is Phase.UNWINDING
        self._fire(done[self.phase])
        self._means.tally.ended(self._status.kill_reason, failed=failed, released_ms=self.released_ms)

    async def _release(self) -> bool:
        """One way down the ladder. False: something could not be verified gone, and pins what lies beneath it."""
        try:
            await self._ledger.unwind(self._means.settings.unwind_within_s)
            self._record.remove()
        except Exception as error:
            self._attempts += 1
            if self.phase is not Phase.QUARANTINED:
                self._fire(Event.PINNED, f"release failed: {_innermost(error)}")
            return False
        return True

    # -- small things --

    def _judge(self, verdict: Verdict) -> None:
        """What was found of a remembered sandbox becomes its phase."""
        phase = self.phase
        if phase in (Phase.STOPPING, Phase.UNWINDING, Phase.QUARANTINED):
            self._hold(verdict.process)
            self._report()
        elif phase in _STARTING:
            self._fire(Event.FAULT, "the daemon ended during its start", verdict.reason or KillReason.START_FAILED)
        elif verdict.process is not None and verdict.slot is not None:
            if phase is Phase.UNKNOWN:
                self._fire(Event.FOUND_READY, "found again")
            else:
                self._report()
            self._take_over(verdict.process)
        elif verdict.gone:
            event = Event.FOUND_GONE if phase is Phase.UNKNOWN else Event.DIED
            self._fire(event, verdict.because, verdict.reason or KillReason.CRASHED)
        else:
            self._hold(verdict.process)
            if phase is not Phase.UNKNOWN:
                self._fire(Event.DOUBT, verdict.because)

    def _hold(self, process: Process | None) -> None:
        """Keep a handle for the release, and only one: each is a descriptor."""
        if self._undo.process is not None and self._undo.process is not process:
            self._undo.process.close()
        self._undo.process = process

    def _take_over(self, process: Process) -> None:
        self._hold(process)
        self._process = process
        self._means.crew.spawn(self._watch(process), name=f"{self.id} pid 1")

    async def _watch(self, process: Process) -> None:
        await process.wait()
        self._died = True
        self._poked.set()

    async def _hasten(self) -> None:
        """A killed start must not wait for a deaf guest: kill what the launch made, until the launch gives up."""
        while self.phase is Phase.STARTING and self._starting is not None and not self._starting.done():
            try:
                await self._means.ports.cgroups.kill(cgroup_name(self.id), within_s=self._means.settings.step_within_s)
            except Exception:  # noqa: S110
                pass  # Safe: the release that follows kills again and verifies.
            await asyncio.sleep(HASTEN_EVERY_S)

    def _refuse(self, why: Exception) -> None:
        if self.phase is Phase.BOUND:
            self._means.expiry.forget(self.id)
            self._means.tally.refused(why)
            self._fire(Event.REFUSE, f"refused: {why}")

    def _way_back(self, label: str) -> Callable[[Mapping[str, str]], Awaitable[None]]:
        return lambda _: self._undo.of(label)

    def _pause_s(self) -> float:
        return backoff_s(max(1, self._attempts), base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._means.rng)

    def _fire(self, event: Event, because: str = "", reason: KillReason | None = None) -> None:
        self.machine.fire(event)
        changes: dict[str, object] = {}
        if because:
            changes["because"] = because
        if reason is not None:
            changes["kill_reason"] = reason
        if self.phase in TERMINAL:
            changes["stopped_at"] = self._means.clock.wall()
        self._report(**changes)
        self._means.changed.fire()

    def _report(self, **changes: object) -> None:
        self._status = msgspec.structs.replace(self._status, phase=self.phase, **changes)
        self._means.reporter.say(self._status)


def _innermost(error: BaseException) -> str:
    """The first leaf of nested groups: what a person wants to read."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
