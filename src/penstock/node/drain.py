"""The drain of one node, level-triggered: what is ordered, who is left, what to do now.

Orders come in the node's spec, and from a stopping daemon. Whatever happens (an order, a changed deadline, a sandbox
that ended, a daemon that came back in the middle), `_look` compares the order with what is and does what is missing:
cordon the gate, turn queued starts away, hand each sandbox its ladder, force at the hard deadline or when told, and say
how far it got. Starts are waited for first, then builds, then sandboxes; a sandbox in quarantine is waited for by
nobody, and keeps the drain from counting as a success.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.gate import DrainPolicy, GateClosed, StillHeld
from penstock.model.drain import (
    WAITING_SHOWN_MAX,
    Disposition,
    DrainOrder,
    DrainReport,
    DrainStage,
    Fate,
    Outcome,
    Waiting,
    ladder,
)
from penstock.model.node import NodeSpec
from penstock.model.sandbox import KillReason, Phase
from penstock.node.climb import Eviction
from penstock.node.means import Means
from penstock.node.supervisor import Supervisor

LOOK_S: Final = 0.02  # the least time between two looks: a hundred sandboxes end in one
FORCE_MARGIN_S: Final = 3.0  # beyond the bound of a release, so that its own error comes first
FORCE_AGAIN_S: Final = 5.0  # from a failed attempt at the hard deadline to the next
STOP: Final = "the node stops"


class Drain:
    """Make one per node; `run` it in the node's crew after adoption.

    `supervised` gives the sandboxes by id; `tell(report)` hears of each change of the report, `tell_outcome` of each
    fate, both only of drains that were ordered in the store.
    """

    def __init__(
        self,
        means: Means,
        *,
        supervised: Callable[[], dict[str, Supervisor]],
        tell: Callable[[DrainReport], None],
        tell_outcome: Callable[[int, Outcome], None],
    ) -> None:
        self._means, self._supervised = means, supervised
        self._tell, self._tell_outcome = tell, tell_outcome
        self._spec: NodeSpec | None = None
        self._stop: DrainOrder | None = None
        self._order: DrainOrder | None = None  # as it was last looked at
        self._anchor_s = 0.0
        self._told: dict[str, tuple[Supervisor, Eviction]] = {}  # whose fate is not known yet
        self._stuck: set[str] = set()  # told to be in quarantine
        self._evictions: dict[tuple[Disposition, bool], Eviction] = {}  # of the present order
        self._had_builds = False
        self._builds_told_at: float | None = None  # monotonic: those who poll a build's status have read its result
        self._attempt: asyncio.Task[None] | None = None
        self._forced_number = 0
        self._force_errors: tuple[str, ...] = ()
        self._force_again_at = 0.0
        self._seen = -1  # what `_changes` was at the last look
        self._asked = 0
        self.report: DrainReport | None = None
        self.outcomes: list[Outcome] = []  # of the drain under way, in order
        means.gate.on_release(self._wake)

    # -- orders: synchronous, from anywhere on the loop --

    def on_spec(self, spec: NodeSpec | None) -> None:
        """What operators want of this node. In force when this returns: nothing is admitted afterwards."""
        self._spec = spec
        self._look()
        self._wake()

    def stop(self, order: DrainOrder) -> None:
        """The daemon stops. Ends with it; force is added to an earlier stop, never taken away."""
        before = self._stop
        if before is not None:
            order = msgspec.structs.replace(order, force_number=max(order.force_number, before.force_number))
        self._stop = order
        self._look()
        self._wake()

    def remember(self, outcomes: list[Outcome]) -> None:
        """What an earlier daemon wrote of the drain under way. Call after the first `on_spec`."""
        known = {each.sandbox for each in self.outcomes}
        self.outcomes = [each for each in outcomes if each.sandbox not in known] + self.outcomes

    def force(self) -> None:
        """Turn a stop under way into force. A no-op otherwise."""
        if self._stop is not None:
            self.stop(msgspec.structs.replace(self._stop, force_number=self._forced_number + 1))

    @property
    def epoch(self) -> int:
        """Of the node, as last seen."""
        return self._spec.epoch if self._spec is not None else 0

    # -- waiting --

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            wake_at = self._look()
            await self._means.changed.wait_for(lambda: self._seen != self._changes(), until=wake_at)
            await asyncio.sleep(LOOK_S)

    async def ended(self) -> DrainReport:
        """The report once nothing is left but quarantine, and force asked for was answered. Unbounded: it forces."""

        def done() -> bool:
            report, order = self.report, self._order
            return (
                report is not None
                and report.stage is DrainStage.ENDED
                and (order is None or self._forced_number >= order.force_number)
            )

        await self._means.changed.wait_for(done, until=None)
        assert self.report is not None
        return self.report

    # -- looking --

    def _changes(self) -> int:
        return self._means.tally.phase_changes_total + self._asked

    def _wake(self) -> None:
        self._asked += 1
        self._means.changed.fire()

    @property
    def _is_ordered(self) -> bool:
        """By the node's spec, and so to be told of there; also when a stop goes on beside it, or was forced by it."""
        return self._stop is None or (self._spec is not None and self._spec.drain is not None)

    def _wanted(self) -> DrainOrder | None:
        """The order in force: a stop's, but no later than the node's own drain would end."""
        ordered = self._spec.drain if self._spec is not None else None
        stop = self._stop
        if stop is None or ordered is None:
            return stop or ordered
        return msgspec.structs.replace(
            stop,
            epoch=ordered.epoch,
            hard_at=min((at for at in (stop.hard_at, ordered.hard_at) if at is not None), default=None),
            disposition=stop.disposition or ordered.disposition,
            force_number=max(stop.force_number, ordered.force_number),
        )

    def _look(self) -> float | None:
        """Do what is missing. Returns when to look again at the latest (monotonic); None: when something changes."""
        self._seen = self._changes()
        order = self._wanted()
        if order is None:
            return self._undo() if self._order is not None else None
        if self._order is None or self._order.epoch != order.epoch:
            self._begin(order)
        if self._order != order:
            self._order = order
            self._evictions.clear()
            self._anchor_s = self._means.clock.monotonic() - self._means.clock.wall()
        self._evict(order)
        self._settle_fates()
        stage, wake_at = self._stage(order)
        wake_at = self._maybe_force(order, stage, wake_at)
        self._say(self._report(order, stage))
        return wake_at

    def _begin(self, order: DrainOrder) -> None:
        self._told.clear()
        self._stuck.clear()
        self.outcomes = []
        self._had_builds, self._builds_told_at = False, None
        self._forced_number, self._force_errors = 0, ()
        self.report = None
        self._means.gate.cordon(f"the node drains: {order.reason}" if order.reason else "the node drains")

    def _evict(self, order: DrainOrder) -> None:
        """Queued starts go elsewhere; each living sandbox gets its ladder."""
        for sandbox, one in self._supervised().items():
            if one.phase is Phase.BOUND:
                if self._stop is None:
                    one.turn_away(GateClosed(self._means.gate.cordoned or "", gate=self._means.gate.name))
                else:
                    one.kill(KillReason.NODE_SHUTDOWN, STOP)
            elif one.phase is not Phase.QUARANTINED or sandbox not in self._told:
                eviction = self._eviction(one, order)
                self._told[sandbox] = (one, eviction)
                one.evict(eviction)

    def _eviction(self, one: Supervisor, order: DrainOrder) -> Eviction:
        """The same object as long as nothing it is made of has changed: looks are many."""
        node = self._spec.disposition if self._spec is not None else None
        disposition = order.disposition or one.on_drain or node or Disposition.STOP
        known = self._evictions.get((disposition, one.may_park))
        if known is None:
            known = self._evictions[disposition, one.may_park] = self._make_eviction(order, disposition, one.may_park)
        return known

    def _make_eviction(self, order: DrainOrder, disposition: Disposition, may_park: bool) -> Eviction:
        return Eviction(
            epoch=order.epoch,
            reason=order.reason or "the node drains",
            rungs=ladder(order, disposition, may_park=may_park),
            anchor_s=self._anchor_s,
            soft_at=order.soft_at,
            hard_at=order.hard_at,
        )

    def _settle_fates(self) -> None:
        """The fate of each that is gone, or in quarantine, is decided once."""
        supervised = self._supervised()
        for sandbox, (one, _) in list(self._told.items()):
            because = one.status.because
            if supervised.get(sandbox) is not one:
                del self._told[sandbox]
                self._decide(Outcome(sandbox=one.id, fate=one.fate, at=self._now(), because=because))
            elif one.phase is Phase.QUARANTINED and one.id not in self._stuck:
                self._stuck.add(one.id)  # told now; when it is freed after all, its real fate takes the place
                self._decide(
                    Outcome(sandbox=one.id, fate=Fate.QUARANTINE, at=self._now(), because=because, error=because)
                )

    def _decide(self, outcome: Outcome) -> None:
        self.outcomes = [each for each in self.outcomes if each.sandbox != outcome.sandbox] + [outcome]
        if self._order is not None and self._is_ordered:
            self._tell_outcome(self._order.epoch, outcome)

    def _stage(self, order: DrainOrder) -> tuple[DrainStage, float | None]:
        gate, now = self._means.gate, self._means.clock.monotonic()
        until = None if order.hard_at is None else order.hard_at + self._anchor_s
        if self._attempt is not None:
            return DrainStage.FORCING, None
        if gate.held("start"):
            return DrainStage.STARTS, until
        if gate.held("build"):
            self._had_builds, self._builds_told_at = True, None
            return DrainStage.BUILDS, until
        if self._had_builds:
            if self._builds_told_at is None:
                self._builds_told_at = now + self._means.settings.build_grace_s
            if now < self._builds_told_at:
                return DrainStage.BUILDS, min(
                    self._builds_told_at, until if until is not None else self._builds_told_at
                )
        if not gate.empty:
            return DrainStage.LIVE, until
        return DrainStage.ENDED, None

    # -- force --

    def _maybe_force(self, order: DrainOrder, stage: DrainStage, wake_at: float | None) -> float | None:
        """Begin an attempt when one is asked for, or the hard deadline is over and somebody is left."""
        if self._attempt is not None:
            return None
        now = self._means.clock.monotonic()
        asked = order.force_number > self._forced_number
        over = order.hard_at is not None and now >= order.hard_at + self._anchor_s
        if not asked and not (over and stage is not DrainStage.ENDED):
            return wake_at
        if not asked and now < self._force_again_at:
            return self._force_again_at
        number = max(order.force_number, self._forced_number)
        self._attempt = self._means.crew.spawn(self._force(number), name="force of the drain")
        return None

    async def _force(self, number: int) -> None:
        """One attempt: success is an empty gate and nothing in quarantine. Whoever asks again gets another one."""
        means = self._means
        errors: list[str] = []
        stuck = {one.id: one.attempts for one in self._quarantined()}
        try:
            for one in self._quarantined():
                one.retry()
            force_s = means.settings.unwind_within_s + FORCE_MARGIN_S
            try:
                await means.gate.drain(DrainPolicy(grace_s=0.0, force_s=force_s, reason="the node drains"))
            except StillHeld as held:
                errors += [f"{label}: not ended {force_s:g} s after it was killed" for label in held.labels]
            except ExceptionGroup as group:
                errors += [str(error) for error in group.exceptions]
            await means.changed.wait_for(
                lambda: all(one.attempts > stuck.get(one.id, -1) for one in self._quarantined()),
                until=means.clock.monotonic() + means.settings.unwind_within_s,
            )
        finally:
            self._attempt = None
            self._force_again_at = means.clock.monotonic() + FORCE_AGAIN_S
        errors += [f"{one.id}: {one.status.because}" for one in self._quarantined()]
        self._forced_number, self._force_errors = number, tuple(dict.fromkeys(errors))
        self._look()
        self._wake()

    def _quarantined(self) -> list[Supervisor]:
        return [one for one in self._supervised().values() if one.phase is Phase.QUARANTINED]

    # -- the end, and the undoing --

    def _undo(self) -> float | None:
        """The order was taken back: admit again, spare whom nothing was done to, and close the report."""
        if self._attempt is not None:
            return None  # force cannot be taken back half-way; its end looks again
        self._means.gate.uncordon()
        for one, _ in self._told.values():
            if one.spare() and one.serving:
                because = "the drain was undone"
                self._decide(Outcome(sandbox=one.id, fate=Fate.SPARED, at=self._now(), because=because))
        order, self._order = self._order, None
        self._told.clear()
        if self.report is not None and order is not None:
            ended_at = self.report.ended_at or self._now()
            fates = Counter(each.fate.value for each in self.outcomes)
            self._say(
                msgspec.structs.replace(
                    self.report, stage=DrainStage.UNDONE, ended_at=ended_at, fates=dict(fates), waiting=(), live=0
                )
            )
        return None

    def _report(self, order: DrainOrder, stage: DrainStage) -> DrainReport:
        gate, before = self._means.gate, self.report
        quarantined = len(self._quarantined())
        ended = stage is DrainStage.ENDED
        return DrainReport(
            node=self._means.settings.id,
            epoch=order.epoch,
            stage=stage,
            began_at=order.at,
            reason=order.reason,
            ended_at=((before.ended_at if before is not None else 0.0) or self._now()) if ended else 0.0,
            succeeded=quarantined == 0 if ended else None,
            starts=len(gate.held("start")),
            builds=len(gate.held("build")),
            live=len(gate.held("sandbox")),
            quarantined=quarantined,
            waiting=self.left(),
            fates=dict(Counter(each.fate.value for each in self.outcomes)),
            forced_number=self._forced_number,
            force_errors=self._force_errors,
        )

    def left(self) -> tuple[Waiting, ...]:
        """Who is waited for now, at most WAITING_SHOWN_MAX of them."""
        left = sorted((name, told) for name, told in self._told.items() if name not in self._stuck)[:WAITING_SHOWN_MAX]
        return tuple(one.climb.waiting(one.id, f"{one.phase.value}: {one.status.because}") for _, (one, _) in left)

    def _say(self, report: DrainReport) -> None:
        if report == self.report:
            return
        self.report = report
        if self._is_ordered:
            self._tell(report)
        self._means.changed.fire()

    def _now(self) -> float:
        return self._means.clock.wall()
