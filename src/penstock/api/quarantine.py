"""Releases that do not get done, for the operator: what is pinned, why, since when; and trying again now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from penstock.api.chronicle import line
from penstock.api.front import FrontDep, OperatorDep
from penstock.api.sandboxes import sandbox_id
from penstock.api.shapes import rfc3339
from penstock.model.errors import NotFound
from penstock.model.event import LoggedEvent
from penstock.model.observed import Quarantined

router = APIRouter(tags=["operate"], prefix="/quarantine")


@router.get("")
async def list_quarantine(front: FrontDep, operator: OperatorDep) -> Response:
    """Oldest first. What is not in it was verified gone."""
    found = front.quarantine.list() if front.quarantine is not None else ()
    return JSONResponse([_shown(each) for each in sorted(found, key=lambda each: (each.since, each.sandbox))])


@router.post("/{id}/retry", status_code=202)
async def retry(front: FrontDep, operator: OperatorDep, id: str) -> Response:
    """Try its release now, whatever its back-off says. 404 when it is in no quarantine (any more)."""
    sandbox = sandbox_id(id)
    quarantine = front.quarantine
    held = {each.sandbox: each for each in quarantine.list()} if quarantine is not None else {}
    found = held.get(sandbox)
    if found is None or quarantine is None:
        raise NotFound("not in quarantine", which=sandbox, now="see: penstock quarantine list")
    event = LoggedEvent(
        at=front.clock.wall(),
        kind="sandbox.retried",
        subject=sandbox,
        actor=operator.name,
        because=f"its release was to be tried again now; it failed by: {found.cause}",
        team=found.team,
    )
    await front.store.commit([line(front, event)], by="api")
    quarantine.retry(sandbox)
    return Response(status_code=202)


def _shown(one: Quarantined) -> dict[str, Any]:
    return {
        "sandboxID": one.sandbox,
        "teamID": one.team,
        "nodeID": one.node,
        "cause": one.cause,
        "since": rfc3339(one.since),
        "pinned": list(one.pinned),
        "pinnedBy": list(one.pinned_by),
        "retries": one.retries,
        "nextRetryAt": rfc3339(one.next_retry_at) if one.next_retry_at is not None else None,
    }
