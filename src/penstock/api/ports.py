"""What the front door asks of the rest, as Protocols: bytes and samples, never decisions."""

from __future__ import annotations

from typing import Protocol

from penstock.model.ids import SandboxId
from penstock.model.observed import LogLine, Sample


class Measurements(Protocol):
    """The samples and logs a node keeps of its sandboxes."""

    def samples(self, sandbox: SandboxId, *, start: float, end: float) -> list[Sample]:
        """Oldest first, bounded. Empty for a sandbox that is not on a node we can ask."""

    def log_lines(self, sandbox: SandboxId, *, count_max: int) -> list[LogLine]:
        """The newest `count_max` lines, oldest first."""
