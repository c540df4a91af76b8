"""Which node gets a sandbox: filter, then best fit. Pure.

Best fit (the fullest node that still has room) rather than spreading: it keeps whole machines free, so that a drained
or cordoned machine empties and a large sandbox finds a place. Memory is a limit of the sandbox, not a reservation:
idle sandboxes hold about 3 MiB, so counting limits against the machine would refuse 300 for every one it could run.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.model.ids import NodeId
from penstock.model.sandbox import Limits


class NodeSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the planner sees it. `placed` counts the live sandboxes bound to it, by this controller's own book."""

    id: NodeId
    why_not: str  # why nothing is placed on it, as a clause; empty when something may be
    placed: int
    sandboxes_max: int  # 0: it does not say
    memory_bytes: int  # of the machine; 0: it does not say


class Choice(msgspec.Struct, frozen=True):
    """The node chosen, or None; and why, one clause per node passed over."""

    node: NodeId | None
    because: tuple[str, ...]


def choose(nodes: Sequence[NodeSeen], limits: Limits, *, avoid: frozenset[NodeId] = frozenset()) -> Choice:
    """The node with the least room left that can take it; ties go to the smaller id, so that replays agree."""
    passed_over: list[str] = []
    best: NodeSeen | None = None
    for node in nodes:
        why_not = "refused it just now" if node.id in avoid else _why_not(node, limits)
        if why_not:
            passed_over.append(f"{node.id} {why_not}")
        elif best is None or (_room(node), node.id) < (_room(best), best.id):
            best = node
    if best is None:
        return Choice(None, tuple(passed_over) or ("no node has joined",))
    return Choice(best.id, (f"{best.id} is the fullest with room ({best.placed} placed)", *passed_over))


def _why_not(node: NodeSeen, limits: Limits) -> str:
    if node.why_not:
        return node.why_not
    if node.sandboxes_max and node.placed >= node.sandboxes_max:
        return f"is full ({node.placed} of {node.sandboxes_max})"
    if node.memory_bytes and limits.memory_bytes_max > node.memory_bytes:
        return f"has {node.memory_bytes} bytes of memory, the sandbox may use {limits.memory_bytes_max}"
    return ""


def _room(node: NodeSeen) -> float:
    return node.sandboxes_max - node.placed if node.sandboxes_max else float("inf")
