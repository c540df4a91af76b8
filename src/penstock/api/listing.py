"""Lists of sandboxes: filters, order and pages exactly as the SDKs page through them (e2b 2.3)."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import parse_qsl, unquote

from penstock.api.front import Front
from penstock.api.standing import Standing
from penstock.model.errors import Invalid
from penstock.model.ids import TeamId

PAGE_MAX: Final = 100


@dataclass(frozen=True, kw_only=True)
class Query:
    """One list request, parsed. `after` is the cursor: (started_at, id) of the last row already shown."""

    metadata: dict[str, str]
    states: frozenset[str]
    ascending: bool
    started_after: float | None
    template: str | None
    limit: int
    after: tuple[float, str] | None


def read(
    *,
    metadata: str | None = None,
    state: list[str] | None = None,
    order: str | None = None,
    started_after: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    next_token: str | None = None,
) -> Query:
    """Raises Invalid naming the query field."""
    if order not in (None, "asc", "desc"):
        raise Invalid("order", f"{order!r} is neither asc nor desc")
    if limit is not None and not 1 <= limit <= PAGE_MAX:
        raise Invalid("limit", f"{limit} is not between 1 and {PAGE_MAX}")
    return Query(
        metadata=parse_metadata(metadata),
        states=_states(state),
        ascending=order == "asc",
        started_after=_instant(started_after) if started_after else None,
        template=template,
        limit=limit or PAGE_MAX,
        after=read_cursor(next_token) if next_token else None,
    )


def parse_metadata(text: str | None) -> dict[str, str]:
    """`k=v&k2=v2`, over-encoded by the SDKs: decoded once by the web layer, once as a query, once per value."""
    if not text:
        return {}
    pairs = parse_qsl(text, keep_blank_values=True)
    if not pairs:
        raise Invalid("metadata", f"{text!r} is not key=value")
    return {unquote(key): unquote(value) for key, value in pairs}


def select(front: Front, team: TeamId, query: Query) -> tuple[list[Standing], str | None, int]:
    """(rows of this page, token of the next page or None, count of running sandboxes after the filters)."""
    rows = [row for row in front.roster.standings(team, front.clock.wall()) if _matches(row, query)]
    running = sum(1 for row in rows if not row.paused)
    rows.sort(key=lambda row: (-row.started_at, row.spec.id))
    if query.ascending:
        rows.reverse()
    if query.after is not None:
        rows = rows[_position(rows, query) :]
    page = rows[: query.limit]
    token = cursor(page[-1].started_at, page[-1].spec.id) if len(rows) > query.limit else None
    return page, token, running


def cursor(at: float, id: str) -> str:
    """The token of the page that begins after the row of that time and id."""
    return base64.urlsafe_b64encode(f"{at!r}__{id}".encode()).decode().rstrip("=")


def _matches(row: Standing, query: Query) -> bool:
    spec = row.spec
    if ("paused" if row.paused else "running") not in query.states:
        return False
    if query.template is not None and query.template not in (spec.template, spec.build):
        return False
    if query.started_after is not None and row.started_at < query.started_after:
        return False
    return all(spec.metadata.get(key) == value for key, value in query.metadata.items())


def _position(rows: list[Standing], query: Query) -> int:
    """Index of the first row after the cursor. The cursor's own row may have ended meanwhile."""
    assert query.after is not None
    at, id_ = query.after
    sign = 1 if query.ascending else -1

    def passed(row: Standing) -> bool:
        start = row.started_at
        if start != at:
            return sign * (start - at) > 0
        return row.spec.id < id_ if query.ascending else row.spec.id > id_

    return next((index for index, row in enumerate(rows) if passed(row)), len(rows))


def _states(given: list[str] | None) -> frozenset[str]:
    states = frozenset(part for item in given or () for part in item.split(",") if part)
    unknown = states - {"running", "paused"}
    if unknown:
        raise Invalid("state", f"{sorted(unknown)[0]!r} is neither running nor paused")
    return states or frozenset({"running", "paused"})


def _instant(text: str) -> float:
    try:
        # A '+' of the offset arrives as a space when the client did not encode it.
        moment = datetime.fromisoformat(text.replace(" ", "+") if text.count(":") > 2 else text)
    except ValueError:
        raise Invalid("startedAfter", f"{text!r} is not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise Invalid("startedAfter", f"{text!r} has no time zone")
    return moment.timestamp()


def read_cursor(token: str) -> tuple[float, str]:
    """Raises Invalid."""
    try:
        text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
        at, _, id_ = text.partition("__")
        return float(at), id_
    except (ValueError, binascii.Error):
        raise Invalid("nextToken", "is not a token of an earlier page") from None
