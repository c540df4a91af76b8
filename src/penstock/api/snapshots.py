"""Snapshots that sandboxes start from: which one a name means, taking one, and forgetting it.

A name stands for one snapshot of its team: taken again, the older one goes. Names may carry their team (`team/name`)
and a tag (`name:tag`; none means `default`), as the SDKs write them.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.api import chronicle
from penstock.api.front import Caller, Front
from penstock.model import keys
from penstock.model.errors import Invalid, NotFound
from penstock.model.event import LoggedEvent
from penstock.model.ids import SnapshotId, TeamId
from penstock.model.snapshot import Snapshot, SnapshotKind
from penstock.store.store import Delete

SEEN_S: Final = 10.0  # for our own views to show what we committed: a turn of the loop
TAG_DEFAULT: Final = "default"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}(?::[a-z0-9][a-z0-9_.-]{0,62})?")


class Named(msgspec.Struct, frozen=True):
    """A reference as a caller wrote it, taken apart."""

    name: str
    tag: str = TAG_DEFAULT

    @property
    def text(self) -> str:
        """As it is kept: the default tag is left out."""
        return self.name if self.tag == TAG_DEFAULT else f"{self.name}:{self.tag}"


def read(team: TeamId, text: str) -> Named | None:
    """`name`, `name:tag`, `team/name` or `team/name:tag`; None when it names another team."""
    owner, slash, rest = text.rpartition("/")
    if slash and owner != team:
        return None
    name, _, tag = rest.partition(":")
    return Named(name, tag or TAG_DEFAULT)


def check_name(team: TeamId, text: str | None) -> str:
    """A name for a new snapshot; empty for none. Raises Invalid."""
    if text is None:
        return ""
    named = read(team, text.lower())
    if named is None or not _NAME.fullmatch(named.text):
        raise Invalid("name", f"{text!r} is not 1 to 63 of [a-z0-9_.-], with an optional :tag")
    return named.text


def find(front: Front, team: TeamId, text: str) -> Snapshot | None:
    """The team's snapshot of that id or name."""
    named = read(team, text)
    if named is None:
        return None
    found = front.roster.snapshots.get(named.name)
    if found is not None and found.team == team and found.kind is SnapshotKind.CHECKPOINT:
        return found if named.tag == TAG_DEFAULT else None
    return next((each for each in front.roster.checkpoints(team) if each.name == named.text), None)


async def delete(front: Front, caller: Caller, text: str) -> None:
    """Forget it; its node then removes the image. What started from it has its own copy. Raises NotFound."""
    found = find(front, caller.team, text)
    if found is None:
        raise NotFound(f"snapshot or template {text!r} not found")
    await drop(front, caller, found, "deleted")


async def drop(front: Front, caller: Caller, snapshot: Snapshot, because: str) -> None:
    event = LoggedEvent(
        at=front.clock.wall(),
        kind="snapshot.deleted",
        subject=snapshot.id,
        actor=caller.name,
        because=because,
        related=(snapshot.sandbox,),
        team=snapshot.team,
    )
    revision = await front.store.commit([Delete(keys.SNAPSHOT + snapshot.id), chronicle.line(front, event)], by="api")
    await front.roster.snapshots.wait_revision(revision, within_s=SEEN_S)


def older(front: Front, team: TeamId, than: SnapshotId, name: str) -> list[Snapshot]:
    """The team's others of that name."""
    return [each for each in front.roster.checkpoints(team) if name and each.name == name and each.id != than]
