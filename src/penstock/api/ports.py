"""What the front door asks of the rest, as Protocols: bytes and samples, never decisions."""

from __future__ import annotations

from typing import Protocol

import msgspec

from penstock.model.ids import SandboxId


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a sandbox. Sizes in bytes, `at` in wall seconds, `cpu_used_pct` of one CPU × 100 / count."""

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


class Measurements(Protocol):
    """The samples and logs a node keeps of its sandboxes."""

    def samples(self, sandbox: SandboxId, *, start: float, end: float) -> list[Sample]:
        """Oldest first, at most 1,000. Empty for a sandbox that was never sampled."""

    def log_lines(self, sandbox: SandboxId, *, count_max: int) -> list[LogLine]:
        """The newest `count_max` lines, oldest first."""
