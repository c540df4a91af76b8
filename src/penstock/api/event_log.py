"""Looking into the event log: which lines a caller asked for, which of them it may see, and how a line is shown.

The operator sees everything. A team's key sees what happened to the team's sandboxes, also of those that are long gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final

import msgspec

from penstock.api.front import Caller, Front
from penstock.api.shapes import rfc3339
from penstock.model import keys
from penstock.model.errors import Invalid
from penstock.model.event import LoggedEvent, decode, key_bound, labels_of_related
from penstock.model.records import Record
from penstock.model.units import parse_seconds

LINES_MAX: Final = 1_000  # in one answer: the newest of those that match
_REVISION: Final = re.compile(r"\d{1,18}")
_TEAMS_KINDS: Final = "sandbox."  # what a team may read of; keys, nodes and the daemon are the operator's


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`since_at` in wall seconds; `since_revision` leaves out what was written up to it. Empty texts: any."""

    since_at: float | None = None
    since_revision: int | None = None
    subject: str = ""
    kind: str = ""

    def covers(self, record: Record) -> bool:
        """Whether it is new enough; cheap, without decoding."""
        if self.since_revision is not None and record.create_revision <= self.since_revision:
            return False
        return self.since_at is None or record.key >= key_bound(self.since_at)

    def matches(self, event: LoggedEvent) -> bool:
        if self.subject and event.subject != self.subject and self.subject not in event.related:
            return False
        return not self.kind or event.kind == self.kind or event.kind.startswith(f"{self.kind}.")


def read(front: Front, *, since: str | None, subject: str | None, kind: str | None) -> Wanted:
    """`since`: a revision (`104`), a moment (RFC 3339) or a span until now (`10m`). Raises Invalid naming the field."""
    wanted = Wanted(subject=subject or "", kind=(kind or "").removesuffix(".*"))
    if not since:
        return wanted
    if _REVISION.fullmatch(since):
        return msgspec.structs.replace(wanted, since_revision=int(since))
    if since[-1:].isalpha() and since[-1:] not in "Zz":
        since_at = front.clock.wall() - parse_seconds(since, field="since")
        return msgspec.structs.replace(wanted, since_at=since_at)
    return msgspec.structs.replace(wanted, since_at=_moment(since))


def may_see(caller: Caller, event: LoggedEvent) -> bool:
    if caller.key is None:
        return True
    return event.team == caller.team and event.kind.startswith(_TEAMS_KINDS)


def select(front: Front, caller: Caller, wanted: Wanted, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """(the newest `limit` lines that match, oldest first; whether there were more)."""
    found: list[Record] = []
    events: list[LoggedEvent] = []
    for record in _candidates(front, wanted):
        if not wanted.covers(record):
            continue
        event = decode(record.value)
        if wanted.matches(event) and may_see(caller, event):
            if len(found) == limit:
                return _in_order(found, events), True
            found.append(record)
            events.append(event)
    return _in_order(found, events), False


def shown(record: Record, event: LoggedEvent) -> dict[str, Any]:
    return {
        "revision": record.create_revision,
        "at": rfc3339(event.at),
        "kind": event.kind,
        "subject": event.subject,
        "actor": event.actor,
        "because": event.because,
        "deadline": rfc3339(event.deadline) if event.deadline is not None else None,
        "related": list(event.related),
        "facts": event.facts,
        "team": event.team,
    }


def _candidates(front: Front, wanted: Wanted) -> Iterator[Record]:
    """Newest first. Of one subject: what is labelled with it; else all of the log."""
    if not wanted.subject:
        return front.store.newest(keys.EVENT)
    own = front.store.list(keys.EVENT, labels={"subject": wanted.subject}).records
    related = front.store.list(keys.EVENT, labels=labels_of_related(wanted.subject)).records
    return iter(sorted({record.key: record for record in (*own, *related)}.values(), key=_by_key, reverse=True))


def _in_order(records: Iterable[Record], events: Iterable[LoggedEvent]) -> list[dict[str, Any]]:
    pairs = sorted(zip(records, events, strict=True), key=lambda pair: pair[0].key)
    return [shown(record, event) for record, event in pairs]


def _by_key(record: Record) -> str:
    return record.key


def _moment(text: str) -> float:
    try:
        # A '+' of the offset arrives as a space when the client did not encode it.
        moment = datetime.fromisoformat(text.replace(" ", "+") if text.count(":") > 2 else text)
    except ValueError:
        raise Invalid("since", f"{text!r} is no revision, no RFC 3339 time and no span like 10m") from None
    if moment.tzinfo is None:
        raise Invalid("since", f"{text!r} has no time zone")
    return moment.timestamp()
