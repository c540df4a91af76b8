"""The Node: one machine. Health, schedulability and drain are separate axes."""

from __future__ import annotations

import msgspec

from penstock.model.ids import NodeId


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Written by `api` (operators). Cordon is intent, not health."""

    id: NodeId
    cordoned: bool = False
    cordon_reason: str = ""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Written by the node."""

    id: NodeId
    boot_id: str
    started_at: float
    installation: str
    sandboxes: int = 0
    sandboxes_max: int = 0
    cpu_count: int = 0
    memory_bytes: int = 0
    isolation: tuple[str, ...] = ()  # tiers whose probe passed on this machine
