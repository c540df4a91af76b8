"""Who is alive, per team, at the cost of a dictionary look-up.

Follows the spec and status views. A sandbox is live from the moment its spec is accepted (or reserved, in the
moment between the check of a limit and the commit) until its status is terminal or its spec is gone.
"""

from __future__ import annotations

from penstock.feed.view import View
from penstock.model.errors import LimitReached, NotFound
from penstock.model.ids import SandboxId, TeamId
from penstock.model.sandbox import TERMINAL, Phase, SandboxSpec, SandboxStatus

_DYING = frozenset({Phase.STOPPING, Phase.UNWINDING, Phase.QUARANTINED})


class Roster:
    """Takes up both views at construction; starting them is their owner's, before or after."""

    def __init__(self, specs: View[SandboxSpec], statuses: View[SandboxStatus]) -> None:
        self.specs, self.statuses = specs, statuses
        self._live: dict[TeamId, dict[SandboxId, None]] = {}
        self._team_of: dict[SandboxId, TeamId] = {}
        specs.subscribe(self._spec_changed)
        statuses.subscribe(self._status_changed)
        for sandbox, spec in specs.items():
            self._spec_changed(sandbox, spec)  # those of before: subscribing tells only of what comes

    def count(self, team: TeamId) -> int:
        return len(self._live.get(team, {}))

    def live(self, team: TeamId) -> list[SandboxSpec]:
        """Specs of the team's live sandboxes, in the order in which they were accepted."""
        found = (self.specs.get(id_) for id_ in self._live.get(team, {}))
        return [spec for spec in found if spec is not None and self.serving(spec)]

    def serving(self, spec: SandboxSpec) -> bool:
        """Whether a caller may still use it: not asked to stop, not dying, not ended."""
        if spec.stop is not None:
            return False
        status = self.statuses.get(spec.id)
        return status is not None and status.phase not in TERMINAL | _DYING

    def require(self, team: TeamId, sandbox: SandboxId) -> SandboxSpec:
        """The spec of a sandbox the team may use. Raises NotFound, also for another team's."""
        spec = self.specs.get(sandbox)
        if spec is None or spec.team != team or not self.serving(spec):
            raise NotFound(f"sandbox {sandbox!r} doesn't exist or you don't have access to it")
        return spec

    def reserve(self, team: TeamId, sandbox: SandboxId, *, sandboxes_max: int) -> None:
        """Count `sandbox` as live before its spec is committed. Raises LimitReached; `release` takes it back."""
        if self.count(team) >= sandboxes_max:
            raise LimitReached(
                "the team has reached its limit of concurrent sandboxes",
                which=f"{sandboxes_max}",
                now="kill some, or ask for a higher limit",
                retry_after_s=5,
            )
        self._add(team, sandbox)

    def release(self, sandbox: SandboxId) -> None:
        """Forget a reservation whose commit failed. Absent is success."""
        team = self._team_of.pop(sandbox, None)
        if team is not None:
            self._live[team].pop(sandbox, None)

    def _add(self, team: TeamId, sandbox: SandboxId) -> None:
        self._team_of[sandbox] = team
        self._live.setdefault(team, {})[sandbox] = None

    def _spec_changed(self, sandbox: str, spec: SandboxSpec | None) -> None:
        id_ = SandboxId(sandbox)
        if spec is None:
            self.release(id_)
            return
        status = self.statuses.get(sandbox)
        if status is None or status.phase not in TERMINAL:
            self._add(spec.team, id_)

    def _status_changed(self, sandbox: str, status: SandboxStatus | None) -> None:
        if status is not None and status.phase in TERMINAL:
            self.release(SandboxId(sandbox))
