"""The Node: one machine. Health, schedulability and drain epoch are separate axes.

What an operator wants of a node is its spec; the words of E2B's node API (`healthy`, `standby`, `draining`,
`unhealthy`) are one view of it, and `OVERRIDES` is the one table of what may follow what.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from penstock.model.drain import Disposition, DrainOrder, DrainReport
from penstock.model.errors import Conflict
from penstock.model.ids import NodeId


class NodeWord(StrEnum):
    """A node in E2B's words."""

    HEALTHY = "healthy"
    STANDBY = "standby"  # cordoned: well, but nothing new is placed on it
    DRAINING = "draining"  # sticky: only `undrain`, a verb of its own, ends it
    UNHEALTHY = "unhealthy"  # an operator's word; nothing new is placed on it


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What operators want. Written by `api`, always with the revision it was read at.

    `epoch` counts drains begun and undone; whoever acts on an order names its epoch, so that an answer to an older one
    changes nothing. `drain` stays set after the drain has ended, until `undrain`.
    """

    id: NodeId
    cordoned: bool = False
    cordon_reason: str = ""
    unhealthy: bool = False
    epoch: int = 0
    drain: DrainOrder | None = None
    disposition: Disposition | None = None  # what a drain of this node does, unless its call says otherwise
    changed_at: float = 0.0  # wall seconds of the last real change of word

    @property
    def word(self) -> NodeWord:
        if self.unhealthy:
            return NodeWord.UNHEALTHY
        if self.drain is not None:
            return NodeWord.DRAINING
        return NodeWord.STANDBY if self.cordoned else NodeWord.HEALTHY

    @property
    def schedulable(self) -> bool:
        return self.word is NodeWord.HEALTHY

    @property
    def why_not(self) -> str:
        """Why nothing is placed on it, as a clause; empty when something may be."""
        if self.drain is not None:
            return f"drains ({self.drain.reason})" if self.drain.reason else "drains"
        if self.unhealthy:
            return "is marked unhealthy"
        if self.cordoned:
            return f"is cordoned ({self.cordon_reason})" if self.cordon_reason else "is cordoned"
        return ""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is. Written by the node."""

    id: NodeId
    boot_id: str
    started_at: float
    installation: str
    sandboxes: int = 0  # every sandbox it owns, starting and dying ones included
    sandboxes_max: int = 0
    starting: int = 0
    cpu_count: int = 0
    memory_bytes: int = 0
    isolation: tuple[str, ...] = ()  # tiers whose probe passed on this machine
    drain: DrainReport | None = None  # of the newest epoch in which it drained


_W = NodeWord
OVERRIDES: Final[dict[tuple[NodeWord, NodeWord], NodeWord]] = {
    (_W.HEALTHY, _W.HEALTHY): _W.HEALTHY,
    (_W.HEALTHY, _W.STANDBY): _W.STANDBY,
    (_W.HEALTHY, _W.DRAINING): _W.DRAINING,
    (_W.HEALTHY, _W.UNHEALTHY): _W.UNHEALTHY,
    (_W.STANDBY, _W.HEALTHY): _W.HEALTHY,
    (_W.STANDBY, _W.STANDBY): _W.STANDBY,
    (_W.STANDBY, _W.DRAINING): _W.DRAINING,
    (_W.STANDBY, _W.UNHEALTHY): _W.UNHEALTHY,
    (_W.UNHEALTHY, _W.HEALTHY): _W.HEALTHY,
    (_W.UNHEALTHY, _W.STANDBY): _W.STANDBY,
    (_W.UNHEALTHY, _W.DRAINING): _W.DRAINING,
    (_W.UNHEALTHY, _W.UNHEALTHY): _W.UNHEALTHY,
    (_W.DRAINING, _W.DRAINING): _W.DRAINING,
    (_W.DRAINING, _W.UNHEALTHY): _W.UNHEALTHY,  # keeps its drain: see `override`
    # DRAINING to HEALTHY or STANDBY is absent: a drain is sticky.
}


def override(spec: NodeSpec, wanted: NodeWord, *, now: float) -> NodeSpec:
    """The spec after an operator said `wanted`; a drain's order is for the caller to add. Equal when nothing changes.

    Raises Conflict for a reversal of a drain, also by way of `unhealthy`.
    """
    before = spec.word
    sticky = spec.drain is not None and wanted in (NodeWord.HEALTHY, NodeWord.STANDBY)
    if sticky or (before, wanted) not in OVERRIDES:
        raise Conflict(
            "a drain is not taken back by a status",
            which=spec.id,
            why=f"{spec.why_not} since epoch {spec.epoch}",
            now=f"undrain it: penstock node undrain {spec.id}",
        )
    changed = msgspec.structs.replace(
        spec,
        cordoned=wanted is NodeWord.STANDBY or (spec.cordoned and wanted in (NodeWord.DRAINING, NodeWord.UNHEALTHY)),
        unhealthy=wanted is NodeWord.UNHEALTHY,
    )
    if changed.cordoned is False:
        changed = msgspec.structs.replace(changed, cordon_reason="")
    return spec if changed == spec else msgspec.structs.replace(changed, changed_at=now)


def drain(spec: NodeSpec, order: DrainOrder, *, now: float) -> NodeSpec:
    """The spec with a drain begun, or the one under way tightened: force is added, never taken away.

    A drain under way keeps its epoch and its beginning; its deadlines move as `order` says. Raises Conflict.
    """
    spec = override(spec, NodeWord.DRAINING, now=now)
    under_way = spec.drain
    if under_way is None:
        epoch = spec.epoch + 1
        return msgspec.structs.replace(
            spec, epoch=epoch, drain=msgspec.structs.replace(order, epoch=epoch), changed_at=now
        )
    merged = msgspec.structs.replace(
        order,
        epoch=under_way.epoch,
        at=under_way.at,
        reason=order.reason or under_way.reason,
        force_number=max(order.force_number, under_way.force_number),
    )
    return spec if merged == under_way else msgspec.structs.replace(spec, drain=merged)


def undrain(spec: NodeSpec, *, now: float) -> NodeSpec:
    """The spec with its drain undone, in a new epoch. Raises Conflict when it does not drain."""
    if spec.drain is None:
        raise Conflict("node does not drain", which=spec.id, why=f"it is {spec.word.value}")
    return msgspec.structs.replace(spec, epoch=spec.epoch + 1, drain=None, changed_at=now)
