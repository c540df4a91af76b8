"""What is said of one sandbox's life: why it must end, what a person may know of it, and its first status."""

from __future__ import annotations

import msgspec

from penstock.model.ids import SandboxId
from penstock.model.sandbox import CAPABILITIES, KillReason, Phase, SandboxSpec, SandboxStatus
from penstock.node.means import Means
from penstock.node.record import Remembered


class Stuck(msgspec.Struct):
    """How the release of one sandbox goes that does not get done. Times are wall seconds; 0: not yet."""

    since: float = 0.0  # in quarantine, as far as this daemon knows
    cause: str = ""
    retries: int = 0  # attempts after the first
    next_at: float = 0.0  # 0: an attempt is under way


class Order(msgspec.Struct, frozen=True):
    """Why a sandbox must end."""

    reason: KillReason
    because: str


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for `penstock why`, the page and tests."""

    id: SandboxId
    phase: Phase
    because: str
    holds: tuple[str, ...]  # ledger labels, oldest first
    end_at: float
    release_attempts: int
    released_ms: float  # from the order to end until everything was verified gone; 0 while it lives


def status_of_spec(spec: SandboxSpec, revision: int, means: Means) -> SandboxStatus:
    """Of a sandbox that control bound to this node, of which nothing exists yet."""
    return SandboxStatus(
        id=spec.id,
        phase=Phase.BOUND,
        node=means.settings.id,
        team=spec.team,
        boot_id=means.boot_id,
        spec_revision=revision,
        capabilities=CAPABILITIES,
    )


def status_of_record(remembered: Remembered, means: Means) -> SandboxStatus:
    """Of a sandbox that an earlier daemon began, as its record tells."""
    born, pid = remembered.born, remembered.pid
    status = SandboxStatus(
        id=born.id,
        phase=remembered.phase,
        node=means.settings.id,
        team=born.team,
        because=remembered.because,
        kill_reason=remembered.kill_reason,
        boot_id=born.boot_id,
        capabilities=CAPABILITIES,
    )
    if pid is None:
        return status
    return msgspec.structs.replace(
        status,
        pid=pid.pid,
        start_ticks=pid.start_ticks,
        slot=pid.slot,
        address=pid.address,
        guest_socket=f"{pid.run_dir}/guest.sock",
        started_at=pid.started_at,
        steps_ms=pid.steps_ms,
    )
