"""Looking into the event log: which lines a caller asked for, which of them it may see, and how a line is shown.

The operator sees everything. A team's key sees what happened to the team's sandboxes, also of those that are long gone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
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
LOOK_AT_ONCE: Final = 2_000  # records before others get the loop: some 3 ms
_REVISION: Final = re.compile(r"\d{1,18}")
_TEAMS_KINDS: Final = "sandbox."  # what a team may read of; keys, nodes and the daemon are the operator's


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`since_key` is the least key of its time; `since_revision` leaves out what was written up to it. Empty: any."""

    since_key: str = ""
    since_revision: int = 0
    subject: str = ""
    kind: str = ""

    def covers(self, record: Record) -> bool:
        """Whether it is new enough; cheap, without decoding."""
        return record.create_revision > self.since_revision and record.key >= self.since_key

    def is_of_kind(self, kind: str) -> bool:
        return not self.kind or kind == self.kind or kind.startswith(f"{self.kind}.")

    def matches(self, event: LoggedEvent) -> bool:
        if self.subject and event.subject != self.subject and self.subject not in event.related:
            return False
        return self.is_of_kind(event.kind)


class Gist(msgspec.Struct, frozen=True):
    """What decides whether a caller is shown a line: a third of the cost of decoding all of it."""

    kind: str
    team: str = ""


def read(front: Front, *, since: str | None, subject: str | None, kind: str | None) -> Wanted:
    """`since`: a revision (`104`), a moment (RFC 3339) or a span until now (`10m`). Raises Invalid naming the field."""
    wanted = Wanted(subject=subject or "", kind=(kind or "").removesuffix(".*"))
    if not since:
        return wanted
    if _REVISION.fullmatch(since):
        return msgspec.structs.replace(wanted, since_revision=int(since))
    if since[-1:].isalpha() and since[-1:] not in "Zz":
        since_at = front.clock.wall() - parse_seconds(since, field="since")
        return msgspec.structs.replace(wanted, since_key=key_bound(since_at))
    return msgspec.structs.replace(wanted, since_key=key_bound(_moment(since)))


def may_see(caller: Caller, event: LoggedEvent | Gist) -> bool:
    if caller.key is None:
        return True
    return event.team == caller.team and event.kind.startswith(_TEAMS_KINDS)


async def select(front: Front, caller: Caller, wanted: Wanted, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """(the newest `limit` lines that match, oldest first; whether there were more), as of the moment of the call.

    Looks at the whole log if it must, a few at a time: others come in between.
    """
    found: list[Record] = []
    candidates = _candidates(front, wanted)
    for first in range(0, len(candidates), LOOK_AT_ONCE):
        for record in candidates[first : first + LOOK_AT_ONCE]:
            if not wanted.covers(record):
                continue
            gist = _gist(record.value)
            if wanted.is_of_kind(gist.kind) and may_see(caller, gist):
                found.append(record)
                if len(found) > limit:
                    return _in_order(found[:limit]), True
        await asyncio.sleep(0)
    return _in_order(found), False


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


def _candidates(front: Front, wanted: Wanted) -> list[Record]:
    """Newest first. Of one subject: what is labelled with it; else all of the log."""
    if not wanted.subject:
        return list(front.store.newest(keys.EVENT))
    own = front.store.list(keys.EVENT, labels={"subject": wanted.subject}).records
    related = front.store.list(keys.EVENT, labels=labels_of_related(wanted.subject)).records
    return sorted({record.key: record for record in (*own, *related)}.values(), key=_by_key, reverse=True)


def _in_order(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [shown(record, decode(record.value)) for record in sorted(records, key=_by_key)]


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


_gist: Final = msgspec.json.Decoder(Gist).decode
