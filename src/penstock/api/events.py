"""What happened and why: the event log, the chain of one subject, and the store as it was at a revision."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from penstock.api import event_log, record_shapes
from penstock.api.front import Caller, CallerDep, Front, FrontDep, OperatorDep
from penstock.api.problems import problem
from penstock.api.tail import Tail, TailResponse
from penstock.model import keys
from penstock.model.errors import Invalid, NotFound
from penstock.model.event import SUBJECT_CHARS_MAX, parse_drain_subject
from penstock.model.records import Compacted, Record

router = APIRouter(tags=["events"])

STATE_RECORDS_MAX: Final = 10_000  # in one answer
OUTCOMES_MAX: Final = 1_000  # of a drain, beside its report

Limit = Annotated[int, Query(ge=1, le=event_log.LINES_MAX)]
Text = Annotated[str | None, Query(max_length=SUBJECT_CHARS_MAX)]


@router.get("/events")
async def events(
    front: FrontDep,
    caller: CallerDep,
    since: Text = None,
    subject: Text = None,
    kind: Text = None,
    limit: Limit = event_log.LINES_MAX,
) -> Response:
    """The newest `limit` lines that match, oldest first. `truncated`: there were more."""
    wanted = event_log.read(front, since=since, subject=subject, kind=kind)
    lines, truncated = await event_log.select(front, caller, wanted, limit)
    return JSONResponse({"revision": front.store.revision, "events": lines, "truncated": truncated})


@router.get("/events/stream")
async def stream(
    request: Request,
    front: FrontDep,
    caller: CallerDep,
    since: Text = None,
    subject: Text = None,
    kind: Text = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Lines as they are written. `Last-Event-ID` goes on from there; `since` begins with what was; else from now."""
    wanted = event_log.read(front, since=since, subject=subject, kind=kind)
    after = front.store.revision
    first: list[dict[str, Any]] = []
    if last_event_id:
        if not last_event_id.isascii() or not last_event_id.isdigit():
            raise Invalid("Last-Event-ID", f"{last_event_id!r} is not the id of a line")
        after = int(last_event_id)
        gone = _gone(front, after)
        if gone is not None:
            return gone
    elif since:
        first, _ = await event_log.select(front, caller, wanted, event_log.LINES_MAX)
    place = AsyncExitStack()
    await place.enter_async_context(front.tails.enter("another one", 0))
    try:
        going_on = request.app.state.ready
        tail = Tail(front, caller, wanted, after=after, first=first, going_on=going_on)
    except BaseException:
        await place.aclose()
        raise
    return TailResponse(tail, place)


@router.get("/why/{id}")
async def why(front: FrontDep, caller: CallerDep, id: str) -> Response:
    """The chain of a sandbox, a drain (`drain-<node>-<epoch>`), a node, a build, a template or a key.

    Its lines in the log, what is true of it now, why control did what it last did, and what its node holds for it.
    """
    if not 0 < len(id) <= SUBJECT_CHARS_MAX:
        raise Invalid("id", f"is not 1 to {SUBJECT_CHARS_MAX} characters")
    wanted = event_log.Wanted(subject=id)
    lines, truncated = await event_log.select(front, caller, wanted, event_log.LINES_MAX)
    present = {record.key: record_shapes.value(record) for record in _present(front, caller, id)}
    if not lines and not present:
        raise NotFound(f"nothing is known of {id!r}", now="see penstock events: lines older than a week are removed")
    body: dict[str, Any] = {"id": id, "events": lines, "truncated": truncated, "present": present}
    body["control"] = list(front.reasons.why(id)) if front.reasons is not None and present else []
    held = front.holdings.explain(id) if front.holdings is not None and present else None
    body["holdings"] = msgspec.to_builtins(held) if held is not None else None
    return JSONResponse(body)


@router.get("/state")
async def state(
    front: FrontDep,
    operator: OperatorDep,
    at: Annotated[int | None, Query(ge=0)] = None,
    prefix: Annotated[str, Query(max_length=512)] = "",
) -> Response:
    """The store's content at a revision (now without one); events only when `prefix` asks for them.

    410 when that revision is no longer kept.
    """
    revision = front.store.revision if at is None else at
    gone = _gone(front, revision)
    if gone is not None:
        return gone
    try:
        listing = await front.store.at(revision, prefix)
    except Compacted as error:  # meanwhile
        return _compacted(error)
    records = [one for one in listing.records if prefix.startswith(keys.EVENT) or not one.key.startswith(keys.EVENT)]
    if len(records) > STATE_RECORDS_MAX:
        raise Invalid("prefix", f"{len(records)} records are more than {STATE_RECORDS_MAX}", now="name a longer one")
    return JSONResponse({"revision": revision, "records": [record_shapes.shown(one) for one in records]})


def _present(front: Front, caller: Caller, id: str) -> list[Record]:
    """The records that are about `id` now, as far as the caller may see them."""
    get = front.store.get
    sandbox = [record for prefix in (keys.SANDBOX_SPEC, keys.SANDBOX_STATUS) if (record := get(prefix + id))]
    if caller.key is not None:
        return [record for record in sandbox if record.labels.get("team") == caller.team]
    others = (keys.NODE_SPEC, keys.NODE_STATUS, keys.TEMPLATE, keys.BUILD, keys.SNAPSHOT, keys.TEAM, keys.API_KEY)
    found = [*sandbox, *(record for prefix in others if (record := get(prefix + id)))]
    drain = parse_drain_subject(id)
    if drain is not None:
        head = get(keys.drain(*drain))
        found += [head] if head is not None else []
        found += front.store.list(keys.drain(*drain) + "/").records[:OUTCOMES_MAX]
    return found


def _gone(front: Front, revision: int) -> Response | None:
    """410 for a revision that was kept once. Raises Invalid for one that is yet to come."""
    kept = front.store.statistics()
    if revision > kept.revision:
        raise Invalid("revision", f"{revision} is beyond the last one, {kept.revision}")
    if revision < kept.compacted:
        return _compacted(Compacted(revision, compacted=kept.compacted, revision=kept.revision))
    return None


def _compacted(error: Compacted) -> Response:
    message = f"revision {error.asked} is no longer kept; kept are {error.compacted} to {error.revision}"
    return problem(410, message, code=error.code)
