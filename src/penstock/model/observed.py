"""What is measured and logged of a sandbox. Made by its node, shown by the API."""

from __future__ import annotations

import msgspec


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
