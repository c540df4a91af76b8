"""An operator in a simulated world: drains the node, moves deadlines, forces, undoes. And what must hold of drains.

The daemon may die in the middle of any of it; the order stands in the store, and the next one goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.control.drains import foresee
from penstock.model import keys
from penstock.model.drain import DrainOrder, DrainPlan, DrainReport, DrainStage, Fate, Outcome
from penstock.model.node import NodeSpec, NodeStatus, NodeWord, drain, override, undrain
from penstock.model.records import Batch
from penstock.model.sandbox import Phase, SandboxStatus
from penstock.store.errors import RevisionConflict

if TYPE_CHECKING:
    from penstock.sim.world import World

SEEN_S: Final = 0.1  # the promise: from the acknowledgement to a node that says it drains
END_S: Final = 2.0  # the promise: from the hard deadline to the end
LOG_S: Final = 0.1  # what the slowest log of a world may take for the report and what is before it
PLAN_S: Final = 60.0

_encode = msgspec.json.Encoder().encode
_node_spec = msgspec.json.Decoder(NodeSpec).decode
_node_status = msgspec.json.Decoder(NodeStatus).decode
_outcome = msgspec.json.Decoder(Outcome).decode


class Drains:
    """What the store says of the node and its drains; each invariant of a drain is checked at each revision."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.spec: NodeSpec | None = None
        self.revision = 0
        self.report: DrainReport | None = None
        self.outcomes: dict[int, dict[str, Outcome]] = {}
        self.ended: dict[int, DrainReport] = {}
        self.plans: dict[int, DrainPlan] = {}
        self.foreseen = self.came_true = 0
        self._failed: set[str] = set()  # whose start failed
        self._meddled: dict[int, set[str]] = {}  # whose spec changed during a drain, by epoch
        self._known_at = 0.0  # loop seconds: when the present order was kept
        self._due = float("inf")  # loop seconds: when the hard deadline of the present order passes

    def anchor(self) -> None:
        """The node reads its order (anew): from here its deadline runs on the monotonic clock."""
        order = self.spec.drain if self.spec is not None else None
        clock = self._world.clock
        hard_at = None if order is None else order.hard_at
        self._due = float("inf") if hard_at is None else clock.monotonic() + max(0.0, hard_at - clock.wall())

    def check(self, now: float) -> None:
        """A node says at once that it drains, and the drain ends by its deadline and what verifying a release takes."""
        world, spec = self._world, self.spec
        if spec is None or spec.drain is None or spec.epoch in self.ended:
            return
        rates = world.rates
        seen = self.report is not None and self.report.epoch == spec.epoch
        if not seen and now - max(self._known_at, world.checkers.quiet_since) > SEEN_S + LOG_S:
            world.blame(f"the node does not say that it drains, in epoch {spec.epoch}: {self.report}")
        slow_s = 25.0 if rates.slow or rates.failure or rates.busy or rates.disk_full else 0.5
        late_s = now - max(self._due, world.checkers.quiet_since)
        if late_s > END_S + slow_s:
            world.blame(f"drain {spec.epoch} is {late_s:.1f} s past its hard deadline: {self.report}")

    def on_revision(self, batch: Batch) -> None:
        for change in batch.changes:
            key, value = change.record.key, change.record.value
            if change.kind == "delete":
                continue
            if key.startswith(keys.NODE_SPEC):
                self.spec, self.revision = _node_spec(value), batch.revision
                self._known_at = self._world.clock.monotonic()
                self.anchor()
            elif key.startswith(keys.NODE_STATUS):
                self._on_report(_node_status(value).drain)
            elif key.startswith(keys.DRAIN) and key.count("/") == 3:
                self._on_outcome(int(key.split("/")[2]), _outcome(value))
            elif key.startswith(keys.SANDBOX_SPEC) and self.spec is not None and change.record.version > 1:
                self._meddled.setdefault(self.spec.epoch, set()).add(key.removeprefix(keys.SANDBOX_SPEC))
            elif key.startswith(keys.SANDBOX_STATUS):
                self._on_status(msgspec.json.decode(value, type=SandboxStatus))

    def _on_report(self, report: DrainReport | None) -> None:
        if report is None or report == self.report:
            return
        self.report = report
        self._world.trace.say("drain", epoch=report.epoch, stage=report.stage.value, live=report.live)
        if report.stage is DrainStage.ENDED:
            if report.starts or report.builds or report.live:
                self._world.blame(f"drain {report.epoch} ended with {report}")
            if report.succeeded is not (report.quarantined == 0):
                self._world.blame(f"drain {report.epoch} calls itself {report.succeeded}: {report}")
            self.ended[report.epoch] = report

    def plan(self, spec: NodeSpec) -> None:
        """What is foreseen for the drain that `spec` begins, from what an operator can see."""
        order, facts = spec.drain, self._world.facts
        assert order is not None
        before = msgspec.structs.replace(spec, epoch=spec.epoch - 1, drain=None)
        sandboxes = [(one, facts.statuses.get(name)) for name, one in sorted(facts.specs.items())]
        self.plans[spec.epoch] = foresee(before, order, sandboxes, self._world.clock.wall())

    def forget_plan(self, epoch: int) -> None:
        """The operator changed his mind: what was foreseen is not what was ordered any more."""
        self.plans.pop(epoch, None)

    def compare(self) -> None:
        """What was foreseen and what came, of drains that went as ordered. Call once, in the end.

        A plan speaks of the world as it stood: whose spec somebody changed afterwards is left out, and whose start
        failed, as is everything when the machine was started anew.
        """
        for epoch, plan in self.plans.items():
            self._compare(plan, self.outcomes.get(epoch, {}))

    def _compare(self, plan: DrainPlan, outcomes: dict[str, Outcome]) -> None:
        for each in plan.foreseen:
            outcome = outcomes.get(each.sandbox)
            left_out = self._failed | self._meddled.get(plan.epoch + 1, set())
            if outcome is not None and each.sandbox not in left_out:
                self.foreseen += 1
                self.came_true += outcome.fate is each.fate
                if outcome.fate is not each.fate:
                    self._world.trace.say(
                        "not as planned", sandbox=each.sandbox, plan=each.fate.value, fate=outcome.fate.value
                    )

    def _on_outcome(self, epoch: int, outcome: Outcome) -> None:
        self._world.trace.say("fate", sandbox=outcome.sandbox, fate=outcome.fate.value)
        known = self.outcomes.setdefault(epoch, {})
        before = known.get(outcome.sandbox)
        if before is not None and before.fate is not outcome.fate and before.fate is not Fate.QUARANTINE:
            self._world.blame(f"{outcome.sandbox} had fate {before.fate.value}, now {outcome.fate.value}")
        known[outcome.sandbox] = outcome

    def _on_status(self, status: SandboxStatus) -> None:
        """Once the node said that it drains, it accepts nothing until that is undone."""
        spec, report = self.spec, self.report
        if status.phase is Phase.FAILED:
            self._failed.add(status.id)
        if status.phase is not Phase.CREATING or spec is None or spec.drain is None or report is None:
            return
        if report.epoch == spec.epoch and report.stage is not DrainStage.UNDONE and report.starts == 0:
            self._world.blame(f"{status.id} was admitted in epoch {spec.epoch}, which drains: {report}")


class Operator:
    """One drain after another, each seen to its end or undone. The node is open again when `live` returns."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._drains = world.drains

    async def live(self) -> None:
        for _ in range(self._rng.choice((0, 1, 2, 3))):
            await self._world.sleep(self._rng.uniform(1.0, 12.0))
            await self._drain_once()
        await self._write(lambda spec: undrain(spec, now=self._now()) if spec.drain is not None else spec)
        await self._write(lambda spec: override(spec, NodeWord.HEALTHY, now=self._now()))

    async def _drain_once(self) -> None:
        rng = self._rng
        soft_s, hard_s = rng.choice(((0.0, 12.0), (2.0, 20.0), (None, 15.0), (30.0, 8.0), (5.0, None)))
        await self._write(lambda spec: self._order(spec, soft_s, hard_s))
        spec = self._drains.spec
        assert spec is not None
        self._drains.plan(spec)
        epoch, how = spec.epoch, rng.choice(("wait", "wait", "wait", "wait", "extend", "force", "undo", "unhealthy"))
        self._world.trace.say("operator", how=how, epoch=epoch)
        await self._world.sleep(rng.uniform(0.0, 6.0))
        if how != "wait" or hard_s is None:
            self._drains.forget_plan(epoch)
        if how == "undo":
            await self._write(lambda spec: undrain(spec, now=self._now()) if spec.drain is not None else spec)
            return
        if how == "extend":
            await self._write(lambda spec: self._order(spec, soft_s, (hard_s or 20.0) + 10.0))
        elif how == "unhealthy":
            await self._write(lambda spec: override(spec, NodeWord.UNHEALTHY, now=self._now()))
        elif how == "force" or hard_s is None:
            await self._write(lambda spec: self._order(spec, soft_s, hard_s, force=1))
        await self._world.until(
            lambda: epoch in self._drains.ended or self._world.faults.is_calm, PLAN_S * 5, f"the end of drain {epoch}"
        )

    def _order(self, spec: NodeSpec, soft_s: float | None, hard_s: float | None, *, force: int = 0) -> NodeSpec:
        now = self._now()
        order = DrainOrder(
            at=now,
            reason="an operator said so",
            soft_at=None if soft_s is None else now + soft_s,
            hard_at=None if hard_s is None else now + hard_s,
            force_number=force,
        )
        return drain(spec, order, now=now)

    async def _write(self, edit: Callable[[NodeSpec], NodeSpec]) -> None:
        from penstock.sim.world import NODE

        def changed() -> list[tuple[str, bytes, int | None]]:
            seen = self._drains.spec or NodeSpec(id=NODE)
            new = edit(seen)
            return [] if new == seen else [(keys.NODE_SPEC + NODE, _encode(new), self._drains.revision)]

        for _ in range(20):
            try:
                await self._world.write(changed)
            except RevisionConflict:
                await self._world.sleep(0.05)
                continue
            return

    def _now(self) -> float:
        return self._world.clock.wall()
