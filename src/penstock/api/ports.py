"""What the front door asks of the rest, as Protocols: samples to show, and plans to show and bind orders to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from penstock.model.drain import DrainOrder, DrainPlan
from penstock.model.ids import SandboxId
from penstock.model.node import NodeSpec
from penstock.model.observed import LogLine, Quarantined, Sample
from penstock.model.sandbox import SandboxSpec, SandboxStatus


class Measurements(Protocol):
    """The samples and logs a node keeps of its sandboxes."""

    def samples(self, sandbox: SandboxId, *, start: float, end: float) -> list[Sample]:
        """Oldest first, bounded. Empty for a sandbox that is not on a node we can ask."""

    def log_lines(self, sandbox: SandboxId, *, count_max: int) -> list[LogLine]:
        """The newest `count_max` lines, oldest first."""


class Planner(Protocol):
    """Foresees drains, as the room that decides would have them done."""

    def __call__(
        self,
        spec: NodeSpec,
        order: DrainOrder,
        sandboxes: Sequence[tuple[SandboxSpec, SandboxStatus | None]],
        now: float,
    ) -> DrainPlan:
        """The fate of each of the node's sandboxes under `order`. Pure; `now` in wall seconds."""


class Reasons(Protocol):
    """Why the room that decides did what it last did."""

    def why(self, sandbox: str) -> tuple[str, ...]:
        """The reasons of its last plan, a clause each; empty when it never made one."""


class Holdings(Protocol):
    """What a node holds for a sandbox, and how far it is with its release."""

    def explain(self, sandbox: str) -> msgspec.Struct | None:
        """A snapshot; None when the sandbox is not there."""


class Quarantine(Protocol):
    """Releases that do not get done."""

    def list(self) -> Sequence[Quarantined]:
        """Each sandbox that has ended and is not verified gone. Some milliseconds."""

    def retry(self, sandbox: str) -> bool:
        """Try its release now. False when it is in no quarantine there."""
