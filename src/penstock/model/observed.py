"""What is measured and logged of a sandbox. Made by its node, shown by the API."""

from __future__ import annotations

import msgspec

from penstock.model.ids import NodeId, SandboxId, TeamId


class Sample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One measurement. Sizes in bytes, `at` in wall seconds; `cpu_used_pct` is 100 when all its CPUs are busy."""

    at: float
    cpu_count: int
    cpu_used_pct: float
    memory_used: int
    memory_total: int
    memory_cache: int
    disk_used: int
    disk_total: int


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    at: float  # wall seconds
    level: str  # debug | info | warn | error
    message: str
    fields: dict[str, str] = {}


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox that has ended and whose release does not get done. Times are wall seconds."""

    sandbox: SandboxId
    team: TeamId
    node: NodeId
    cause: str
    since: float  # as far as the daemon of now knows
    pinned: tuple[str, ...]  # what it still holds, the topmost first: each pins those after it
    pinned_by: tuple[str, ...]  # processes seen to keep something of it alive, a clause each
    retries: int
    next_retry_at: float | None  # None: an attempt is under way
