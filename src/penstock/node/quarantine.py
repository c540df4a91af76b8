"""What of a node is in quarantine: for operators to see, with whoever can be seen to pin it, and to try again now."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.model.observed import Quarantined
from penstock.model.sandbox import Phase
from penstock.node.means import Means
from penstock.node.ports import Stray
from penstock.node.supervisor import Supervisor


class Quarantine:
    """A view of the supervisors; the attempts themselves are `release`'s, and go on by themselves."""

    def __init__(self, means: Means, *, supervised: Callable[[], dict[str, Supervisor]]) -> None:
        self._means, self._supervised = means, supervised

    def list(self) -> Sequence[Quarantined]:
        """Blocks for milliseconds when there is any: it walks /proc for who pins it."""
        stuck = [one for one in self._supervised().values() if one.phase is Phase.QUARANTINED]
        walker = self._means.ports.strays
        strays = walker.list_strays() if stuck and walker is not None else []
        return [self._told(one, strays) for one in stuck]

    def retry(self, sandbox: str) -> bool:
        """Try its release now. False when it is in no quarantine here."""
        one = self._supervised().get(sandbox)
        if one is None or one.phase is not Phase.QUARANTINED:
            return False
        one.retry()
        return True

    def _told(self, one: Supervisor, strays: Sequence[Stray]) -> Quarantined:
        slots, disks = self._means.slots.owned_by(one.id), self._means.disks.owned_by(one.id)
        # As strays name what they pin: the slot by its number, mounts and disk by the sandbox they are the root of.
        names = {one.id, *(f"slot {number}" for number in slots), *(self._means.disks.name(number) for number in disks)}
        stuck = one.stuck
        return Quarantined(
            sandbox=one.id,
            team=one.status.team,
            node=self._means.settings.id,
            cause=stuck.cause or one.status.because,
            since=stuck.since,
            pinned=tuple(reversed(one.ledger.labels())),
            pinned_by=tuple(
                f"pid {each.pid}: {each.why}" for each in strays if any(each.why.endswith(name) for name in names)
            ),
            retries=stuck.retries,
            next_retry_at=stuck.next_at or None,
        )
