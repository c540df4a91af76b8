"""Who is alive, per team, at the cost of a dictionary look-up.

Follows the views of specs, statuses and snapshots. A sandbox is live from the moment its spec is accepted (or reserved,
in the moment between the check of a limit and the commit) until its status is terminal or its spec is gone. One that is
frozen is live: it holds its memory and its slot. One that is paused to disk is not, and counts for nobody's limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from penstock.api.standing import Standing, State, judge
from penstock.core.deadlines import within
from penstock.feed.view import View
from penstock.model.errors import Conflict, LimitReached, NotFound
from penstock.model.ids import SandboxId, TeamId
from penstock.model.sandbox import TERMINAL, Phase, SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot, SnapshotKind

_DYING = frozenset({Phase.STOPPING, Phase.UNWINDING, Phase.QUARANTINED})


T = TypeVar("T")


class _Look:
    """Somebody who waits for `check` to say something."""

    def __init__(self, check: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        self._check, self.answer = check, answer

    def again(self) -> None:
        if self.answer.done():
            return
        try:
            found = self._check()
        except Exception as error:
            self.answer.set_exception(error)
            return
        if found is not None:
            self.answer.set_result(found)


class Roster:
    """Takes up the views at construction; starting them is their owner's, before or after."""

    def __init__(self, specs: View[SandboxSpec], statuses: View[SandboxStatus], snapshots: View[Snapshot]) -> None:
        self.specs, self.statuses, self.snapshots = specs, statuses, snapshots
        self._live: dict[TeamId, dict[SandboxId, None]] = {}
        self._team_of: dict[SandboxId, TeamId] = {}
        self._kept: dict[str, SandboxId] = {}  # snapshots, by whose they are
        self._looking: dict[str, dict[_Look, None]] = {}
        specs.subscribe(self._spec_changed)
        statuses.subscribe(self._status_changed)
        snapshots.subscribe(self._snapshot_changed)
        for sandbox, spec in specs.items():
            self._spec_changed(sandbox, spec)  # those of before: subscribing tells only of what comes
        for snapshot, kept in snapshots.items():
            self._snapshot_changed(snapshot, kept)

    def count(self, team: TeamId) -> int:
        return len(self._live.get(team, {}))

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
            raise missing(sandbox)
        return spec

    def paused_as(self, sandbox: str) -> list[Snapshot]:
        """What it was paused to disk as, oldest first; the last one is what it would resume from."""
        found = [each for each in self.snapshots.by("sandbox", sandbox) if each.kind is SnapshotKind.PAUSED]
        return sorted(found, key=lambda each: (each.created_at, each.id))

    def look(self, team: TeamId, sandbox: SandboxId, now: float) -> Standing | None:
        """How it stands at `now` (wall seconds); None when there is none of that name the team may use."""
        spec, kept = self.specs.get(sandbox), self.paused_as(sandbox)
        newest = kept[-1] if kept else None
        found = judge(spec, self.statuses.get(sandbox), newest, now)
        return found if found is not None and found.spec.team == team else None

    def stand(self, team: TeamId, sandbox: SandboxId, now: float) -> Standing:
        """`look`. Raises NotFound."""
        found = self.look(team, sandbox, now)
        if found is None:
            raise missing(sandbox)
        return found

    def require_running(self, team: TeamId, sandbox: SandboxId, now: float) -> SandboxSpec:
        """Raises NotFound, and Conflict for one that is paused or on its way into or out of it."""
        found = self.stand(team, sandbox, now)
        if found.paused:
            raise Conflict(f"the sandbox is {found.state.value}", which=sandbox, now="connect to it: that resumes it")
        return found.spec

    def standings(self, team: TeamId, now: float) -> list[Standing]:
        """The team's sandboxes that callers are shown: those that have begun, and the paused. Each once."""
        ids = dict.fromkeys(self._live.get(team, {}))
        ids |= {each.sandbox: None for each in self.snapshots.by("team", team) if each.kind is SnapshotKind.PAUSED}
        found = (self.look(team, id_, now) for id_ in ids)
        return [each for each in found if each is not None and each.state is not State.STARTING]

    def checkpoints(self, team: TeamId) -> list[Snapshot]:
        """The team's snapshots that sandboxes can start from, newest first."""
        found = [each for each in self.snapshots.by("team", team) if each.kind is SnapshotKind.CHECKPOINT]
        return sorted(found, key=lambda each: (-each.created_at, each.id))

    def forgotten(self, sandbox: SandboxId) -> bool | None:
        """True once the records of its last life are gone. None, not False: a check for `wait`."""
        return (self.specs.get(sandbox) is None and self.statuses.get(sandbox) is None) or None

    async def wait(self, sandbox: SandboxId, check: Callable[[], T | None], within_s: float) -> T:
        """What `check` says, once it says something; asked now, and at each change of what is known of the sandbox.

        Raises DeadlinePassed, and what `check` raises.
        """
        found = check()
        if found is not None:
            return found
        look = _Look(check, asyncio.get_running_loop().create_future())
        looks = self._looking.setdefault(sandbox, {})
        looks[look] = None
        try:
            async with within(within_s, f"a change of sandbox {sandbox}"):
                answer: T = await look.answer
                return answer
        finally:
            looks.pop(look, None)
            if not looks and self._looking.get(sandbox) is looks:
                del self._looking[sandbox]

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
        status = self.statuses.get(sandbox)
        if spec is None:
            self.release(id_)
        elif status is None or status.phase not in TERMINAL:
            self._add(spec.team, id_)
        self._look_again(sandbox)

    def _status_changed(self, sandbox: str, status: SandboxStatus | None) -> None:
        if status is not None and status.phase in TERMINAL:
            self.release(SandboxId(sandbox))
        self._look_again(sandbox)

    def _snapshot_changed(self, snapshot: str, found: Snapshot | None) -> None:
        if found is not None:
            self._kept[snapshot] = found.sandbox
            self._look_again(found.sandbox)
        elif (sandbox := self._kept.pop(snapshot, None)) is not None:
            self._look_again(sandbox)

    def _look_again(self, sandbox: str) -> None:
        for look in list(self._looking.get(sandbox, ())):
            look.again()


def missing(sandbox: str) -> NotFound:
    return NotFound(f"sandbox {sandbox!r} doesn't exist or you don't have access to it")
