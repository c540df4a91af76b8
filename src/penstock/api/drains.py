"""Changing what is wanted of a node: cordon, drain, extend, force, undrain.

Every change is one commit: the spec under compare-and-swap and the line of the event log that explains it. What the
transitions mean is `model.node`'s; who carries them out is the node's. Here is who may ask for what, and the wait for
the node's word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from penstock.api import chronicle
from penstock.api.front import Caller, Front
from penstock.api.node_shapes import DrainApplied, DrainAsked, Extension
from penstock.core.deadlines import DeadlinePassed
from penstock.model import keys, node
from penstock.model.drain import DrainOrder, DrainPlan, DrainReport, DrainStage
from penstock.model.errors import Conflict, Invalid, NotFound, Unavailable
from penstock.model.event import LoggedEvent, drain_subject
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec, NodeStatus, NodeWord
from penstock.model.sandbox import SandboxSpec, SandboxStatus
from penstock.store.errors import RevisionConflict
from penstock.store.store import Put

RACES_MAX: Final = 8  # lost in a row; each means that somebody else made progress

Edit = Callable[[NodeSpec, float], NodeSpec]
Facts = Mapping[str, str]


class PlanMoved(Conflict):
    """The plan an order was bound to no longer holds. `plan` is that of now; nothing was changed."""

    code = "plan_moved"

    def __init__(self, node: NodeId, plan: DrainPlan) -> None:
        self.plan = plan
        super().__init__(
            "the world has moved since the plan was made", which=node, now="look at the plan anew, and apply that"
        )


# -- looking --


def known(front: Front, id: str) -> NodeStatus:
    """The node's word of itself. Raises NotFound: it never said any."""
    status = front.nodes.get(id)
    if status is None:
        raise NotFound(f"node {id!r} not found")
    return status


def read(front: Front, id: NodeId) -> tuple[NodeSpec, int]:
    """What is wanted of it, and the revision that says so; a node nobody ever said a word of is wanted as it is."""
    record = front.store.get(keys.NODE_SPEC + id)
    if record is None:
        return NodeSpec(id=id), 0
    return _decode(record.value), record.mod_revision


def sandboxes(front: Front, id: NodeId) -> list[tuple[SandboxSpec, SandboxStatus | None]]:
    """Those bound to the node, by id."""
    roster = front.roster
    found = ((one, roster.statuses.get(sandbox)) for sandbox, one in roster.specs.items() if one.node == id)
    return sorted(found, key=lambda pair: pair[0].id)


def foresee(front: Front, caller: Caller, spec: NodeSpec, asked: DrainAsked) -> DrainPlan:
    """The plan of this moment, remembered by its digest."""
    now = front.clock.wall()
    force = isinstance(asked, DrainApplied) and asked.force
    plan = front.planner(spec, _order(spec, caller, asked, now, force=force), sandboxes(front, spec.id), now)
    front.plans.remember(plan)
    return plan


def told(front: Front, spec: NodeSpec) -> DrainReport | None:
    """What the node last said of the drain that is ordered."""
    status = front.nodes.get(spec.id)
    if status is None or status.drain is None or status.drain.epoch != spec.epoch:
        return None
    return status.drain


# -- changing --


async def set_word(front: Front, caller: Caller, id: NodeId, word: NodeWord, *, reason: str = "") -> NodeSpec:
    """Healthy, standby or unhealthy. Repeating changes nothing. Raises Conflict for the reversal of a drain."""

    def edit(spec: NodeSpec, now: float) -> NodeSpec:
        changed = node.override(spec, word, now=now)
        if word is NodeWord.STANDBY and reason:
            changed = msgspec.structs.replace(changed, cordon_reason=reason)
        return changed

    kinds = {NodeWord.STANDBY: "node.cordoned", NodeWord.HEALTHY: "node.healthy", NodeWord.UNHEALTHY: "node.unhealthy"}
    _, after = await _change(front, caller, id, edit, kind=kinds[word], because=reason)
    return after


async def begin(front: Front, caller: Caller, id: NodeId) -> NodeSpec:
    """E2B's `draining`: notice, and no deadline. One that drains already keeps its order and its deadlines."""

    def edit(spec: NodeSpec, now: float) -> NodeSpec:
        return node.drain(spec, spec.drain or DrainOrder(at=now, by=caller.name), now=now)

    _, after = await _change(front, caller, id, edit, kind="drain.ordered")
    await acknowledged(front, after)
    return after


async def apply(front: Front, caller: Caller, id: NodeId, asked: DrainApplied) -> tuple[NodeSpec, DrainPlan]:
    """Order the drain that was planned. Returns once the node has it: nothing is admitted there from then on.

    Raises PlanMoved when the fates are no longer those of `planDigest`, Unavailable when the node does not answer.
    """
    if not asked.yes and not asked.planDigest:
        raise Invalid("planDigest", "is missing", now="plan the drain first, or say yes to whatever the plan is")
    applied: list[DrainPlan] = []

    def edit(spec: NodeSpec, now: float) -> NodeSpec:
        plan = foresee(front, caller, spec, asked)
        if not asked.yes and plan.digest != asked.planDigest:
            raise PlanMoved(id, plan)
        applied[:] = [plan]
        order = _order(spec, caller, asked, now, force=asked.force)
        return node.drain(spec, msgspec.structs.replace(order, plan=plan.digest), now=now)

    _, after = await _change(front, caller, id, edit, kind="drain.ordered", because=asked.reason)
    await acknowledged(front, after)
    return after, applied[0]


async def extend(front: Front, caller: Caller, id: NodeId, asked: Extension) -> NodeSpec:
    """Move deadlines away. Raises Conflict when it would bring one nearer, or the drain has ended."""
    if asked.softS is None and asked.hardS is None:
        raise Invalid("hardS", "is missing, and so is softS")

    def edit(spec: NodeSpec, now: float) -> NodeSpec:
        order = _require_drain(spec)
        report = told(front, spec)
        if report is not None and report.stage is DrainStage.ENDED:
            raise Conflict("the drain has ended", which=id, now=f"undrain it: penstock node undrain {id}")
        soft_at = _later("softS", order.soft_at, asked.softS, now)
        hard_at = _later("hardS", order.hard_at, asked.hardS, now)
        if soft_at is not None and hard_at is not None and soft_at > hard_at:
            raise Invalid("softS", "comes after the hard deadline")
        return node.drain(spec, msgspec.structs.replace(order, soft_at=soft_at, hard_at=hard_at), now=now)

    _, after = await _change(front, caller, id, edit, kind="drain.extended")
    return after


async def undrain(front: Front, caller: Caller, id: NodeId) -> tuple[NodeSpec, DrainReport | None, DrainReport | None]:
    """Take the drain back, in a new epoch. Returns the spec, the node's report just before, and its last one.

    The last one is None when the node has not said within `answer_s` that it is undone: it ends what it had begun.
    """
    before, after = await _change(
        front, caller, id, lambda spec, now: node.undrain(spec, now=now), kind="node.undrained"
    )
    was = told(front, before)

    def undone(status: NodeStatus | None) -> bool:
        report = status.drain if status is not None else None
        return report is not None and report.epoch >= before.epoch and report.stage is DrainStage.UNDONE

    try:
        status = await front.nodes.wait_for(id, undone, within_s=front.answer_s)
    except DeadlinePassed:
        return after, was, None
    return after, was, status.drain if status is not None else None


async def force(front: Front, caller: Caller, id: NodeId) -> DrainReport | None:
    """Kill what is left. Joins an attempt under way; after a failed one, makes another; after success, a no-op.

    Returns the report that answers it, or None when `forced_s` were not enough: it goes on. Raises Conflict when the
    node does not drain (any more), Unavailable when it does not answer at all.
    """

    def edit(spec: NodeSpec, now: float) -> NodeSpec:
        order, report = _require_drain(spec), told(front, spec)
        if report is not None and report.succeeded:
            return spec
        if order.force_number > (report.forced_number if report is not None else 0):
            return spec  # an attempt is under way: its outcome is ours
        return node.drain(spec, msgspec.structs.replace(order, force_number=order.force_number + 1), now=now)

    _, after = await _change(front, caller, id, edit, kind="drain.forced")
    number = _require_drain(after).force_number

    def answered(status: NodeStatus | None) -> bool:
        report = status.drain if status is not None else None
        return report is not None and _answers(report, after.epoch, number)

    await acknowledged(front, after)
    try:
        status = await front.nodes.wait_for(id, answered, within_s=front.forced_s)
    except DeadlinePassed:
        return None
    report = status.drain if status is not None else None
    if report is not None and (report.epoch > after.epoch or report.stage is DrainStage.UNDONE):
        raise Conflict("the drain was undone before it was forced", which=id)
    return report


async def acknowledged(front: Front, spec: NodeSpec) -> None:
    """Return once the node says that it drains in this epoch. Raises Unavailable; the order stands all the same."""

    def said(status: NodeStatus | None) -> bool:
        return status is not None and status.drain is not None and status.drain.epoch >= spec.epoch

    try:
        await front.nodes.wait_for(spec.id, said, within_s=front.answer_s)
    except DeadlinePassed:
        raise Unavailable(
            "the node does not answer",
            which=spec.id,
            why=f"nothing was heard of its drain for {front.answer_s:g} s",
            now="the order stands, and is followed when the node is back",
            retry_after_s=5,
        ) from None


async def _change(
    front: Front, caller: Caller, id: NodeId, edit: Edit, *, kind: str, because: str = ""
) -> tuple[NodeSpec, NodeSpec]:
    """Apply `edit(spec, now)` under compare-and-swap, with its line in the log. Returns the spec before and after.

    One at a time per node; bounded against others. No change, no commit and no line.
    """
    async with front.turns.of(keys.NODE_SPEC + id):
        for _ in range(RACES_MAX):
            before, revision = read(front, id)
            now = front.clock.wall()
            after = edit(before, now)
            if after == before:
                return before, after
            event = _event(before, after, now=now, kind=kind, actor=caller.name, because=because)
            ops = [Put(keys.NODE_SPEC + id, _encode(after), expect=revision), chronicle.line(front, event)]
            try:
                await front.store.commit(ops, by="api", durable=True)
            except RevisionConflict:
                continue
            return before, after
    raise Conflict("the node is being changed by others", which=id, now="try again")


def _event(before: NodeSpec, after: NodeSpec, *, now: float, kind: str, actor: str, because: str) -> LoggedEvent:
    facts: dict[str, str] = {"word": after.word.value, "was": before.word.value, "epoch": str(after.epoch)}
    order = after.drain
    if order is not None:
        facts |= {"force": str(order.force_number)} if order.force_number else {}
        facts |= {"soft": f"{order.soft_at - now:.0f} s"} if order.soft_at is not None else {}
        facts |= {"hard": f"{order.hard_at - now:.0f} s"} if order.hard_at is not None else {}
        facts |= {"plan": order.plan} if order.plan else {}
        facts |= {"disposition": order.disposition.value} if order.disposition is not None else {}
    drained = after.epoch if order is not None else before.epoch
    return LoggedEvent(
        at=now,
        kind=kind,
        subject=after.id,
        actor=actor,
        because=because,
        deadline=order.hard_at if order is not None else None,
        related=(drain_subject(after.id, drained),) if order is not None or before.drain is not None else (),
        facts=facts,
    )


def _order(spec: NodeSpec, caller: Caller, asked: DrainAsked, now: float, *, force: bool) -> DrainOrder:
    """Durations at the door become moments; to the millisecond, so that a plan's digest survives the addition."""
    soft_s, hard_s = asked.softS, asked.hardS
    if soft_s is not None and hard_s is not None and soft_s > hard_s:
        raise Invalid("softS", f"{soft_s:g} s comes after the hard deadline, {hard_s:g} s")
    before = spec.drain.force_number if spec.drain is not None else 0
    return DrainOrder(
        at=now,
        reason=asked.reason,
        by=caller.name,
        soft_at=None if soft_s is None else now + round(soft_s, 3),
        hard_at=None if hard_s is None else now + round(hard_s, 3),
        propagation_s=asked.propagationS,
        disposition=asked.disposition,
        force_number=before + force,
    )


def _later(field: str, before: float | None, seconds: float | None, now: float) -> float | None:
    if seconds is None:
        return before
    if before is None or now + seconds < before:
        left = "none" if before is None else f"{max(0.0, before - now):.0f} s away"
        raise Conflict(f"{field} would come sooner than before", why=f"it is {left}", now="to tighten it, drain again")
    return now + seconds


def _require_drain(spec: NodeSpec) -> DrainOrder:
    if spec.drain is None:
        raise Conflict("node does not drain", which=spec.id, why=f"it is {spec.word.value}")
    return spec.drain


def _answers(report: DrainReport, epoch: int, number: int) -> bool:
    """Whether this attempt is over, or will never be made: the drain was undone."""
    if report.epoch != epoch or report.stage is DrainStage.UNDONE:
        return report.epoch >= epoch
    return report.forced_number >= number


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(NodeSpec).decode
