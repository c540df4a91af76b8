"""Nodes, for operators: E2B's node API (e2b 2.6, 6.7), and drains that are planned, watched and taken back.

Everything here needs the admin token. Times in bodies are seconds from now; in answers, moments.
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from penstock.api import drains, node_shapes, problems, receipt
from penstock.api.front import Front, FrontDep, OperatorDep
from penstock.api.node_shapes import WORDS, Cordon, DrainApplied, Extension, NodeStatusChange
from penstock.model.drain import DrainReport, Fate, Step
from penstock.model.errors import Invalid
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec, NodeWord
from penstock.model.sandbox import TERMINAL

router = APIRouter(tags=["nodes"], prefix="/nodes")

_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_EMPTY_404: Final[dict[int | str, dict[str, Any]]] = {404: {"description": "No such node; no body"}}
_FORCED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"description": "Still stopping: look at the drain"},
    404: {"description": "No such node"},
    409: {"description": "The node's state forbids it; the message says why"},
    500: {"description": "A force attempt failed: `remaining` and `errors` say whom it could not end. Repeat it"},
    503: {"description": "The node does not answer; the order stands"},
}


async def node_of(front: FrontDep, operator: OperatorDep, id: str) -> NodeId:
    """The node of the path. Raises NotFound; the operator is checked first."""
    return drains.known(front, id if _ID.fullmatch(id) else "").id


NodeDep = Annotated[NodeId, Depends(node_of)]


# ---- as E2B has it --------------------------------------------------------------------------------------------------


@router.get("")
async def list_nodes(front: FrontDep, operator: OperatorDep, clusterID: str | None = None) -> Response:
    """All nodes, by id. There is one cluster, whatever `clusterID` says."""
    found = sorted(front.nodes.items())
    specs = ((drains.read(front, NodeId(id))[0], status) for id, status in found)
    return JSONResponse([node_shapes.node(spec, status, drains.sandboxes(front, spec.id)) for spec, status in specs])


@router.get("/{id}", responses=_EMPTY_404)
async def get_node(front: FrontDep, operator: OperatorDep, id: str, clusterID: str | None = None) -> Response:
    status = front.nodes.get(id)
    if status is None:
        return Response(status_code=404)
    spec, _ = drains.read(front, status.id)
    return JSONResponse(node_shapes.node_detail(spec, status, drains.sandboxes(front, spec.id)))


@router.post("/{id}", status_code=204, responses={**_FORCED, **_EMPTY_404})
async def set_status(front: FrontDep, operator: OperatorDep, id: str, asked: NodeStatusChange) -> Response:
    """Draining is sticky, also by way of unhealthy: 409 on its reversal. Repeating changes nothing."""
    word = WORDS[asked.status]
    if asked.forceStop and word is not NodeWord.DRAINING:
        raise Invalid("forceStop", "goes with status draining only")
    status = front.nodes.get(id)
    if status is None:
        return Response(status_code=404)
    if word is not NodeWord.DRAINING:
        await drains.set_word(front, operator, status.id, word)
        return Response(status_code=204)
    await drains.begin(front, operator, status.id)
    if asked.forceStop:
        return _forced(front, status.id, await drains.force(front, operator, status.id))
    return Response(status_code=204)


# ---- ours -----------------------------------------------------------------------------------------------------------


@router.post("/{id}/cordon", status_code=204)
async def cordon(
    front: FrontDep, operator: OperatorDep, node: NodeDep, asked: Annotated[Cordon | None, Body()] = None
) -> Response:
    """Nothing new is placed on it; what runs there goes on."""
    await drains.set_word(front, operator, node, NodeWord.STANDBY, reason=asked.reason if asked else "")
    return Response(status_code=204)


@router.post("/{id}/uncordon", status_code=204)
async def uncordon(front: FrontDep, operator: OperatorDep, node: NodeDep) -> Response:
    await drains.set_word(front, operator, node, NodeWord.HEALTHY)
    return Response(status_code=204)


@router.post("/{id}/drain/plan")
async def plan_drain(
    front: FrontDep, operator: OperatorDep, node: NodeDep, asked: Annotated[DrainApplied | None, Body()] = None
) -> Response:
    """What would become of each sandbox, and what stands in the way. Changes nothing; its `digest` binds an order."""
    spec, _ = drains.read(front, node)
    return JSONResponse(node_shapes.plan(drains.foresee(front, operator, spec, asked or DrainApplied())))


@router.post("/{id}/drain", responses=_FORCED)
async def drain(front: FrontDep, operator: OperatorDep, node: NodeDep, asked: DrainApplied) -> Response:
    """Order the drain that was planned (`planDigest`), or the plan of this moment (`yes`).

    A drain under way gets these deadlines. 409 with `changed` and the plan of now when the plan no longer holds.
    """
    try:
        spec, plan = await drains.apply(front, operator, node, asked)
    except drains.PlanMoved as moved:
        return _moved(front, moved, asked)
    if asked.force:
        reply = _forced(front, node, await drains.force(front, operator, node))
        if reply.status_code >= 500:
            return reply
    return JSONResponse({"drain": _drain_block(front, spec), "plan": node_shapes.plan(plan)})


@router.post("/{id}/drain/extend")
async def extend(front: FrontDep, operator: OperatorDep, node: NodeDep, asked: Extension) -> Response:
    """Move the deadlines of the drain under way; never nearer."""
    spec = await drains.extend(front, operator, node, asked)
    return JSONResponse({"drain": _drain_block(front, spec)})


@router.post("/{id}/drain/force", status_code=204, responses=_FORCED)
async def force(front: FrontDep, operator: OperatorDep, node: NodeDep) -> Response:
    """Kill what is left of the drain under way. A running attempt is joined, a failed one repeated."""
    return _forced(front, node, await drains.force(front, operator, node))


@router.post("/{id}/undrain", responses={202: {"description": "Not yet: a force attempt is under way"}})
async def undrain(front: FrontDep, operator: OperatorDep, node: NodeDep) -> Response:
    """Take the drain back, in a new epoch. `done` says what had been parked or ended, `ending` who was asked to end."""
    spec, was, last = await drains.undrain(front, operator, node)
    shown = last or was
    found = await receipt.all_outcomes(front, shown) if shown is not None else []
    gone = {each.sandbox for each in found}
    body = {
        "node": node,
        "epoch": spec.epoch,
        "status": node_shapes.word(spec),
        "done": [node_shapes.outcome(each) for each in found if each.fate is not Fate.SPARED],
        "spared": sorted(each.sandbox for each in found if each.fate is Fate.SPARED),
        "ending": [] if was is None else [one for one in _asked_to_end(was) if one not in gone],
    }
    return JSONResponse(body, status_code=200 if last is not None else 202)


@router.get("/{id}/drain")
async def get_drain(
    front: FrontDep, operator: OperatorDep, node: NodeDep, epoch: Annotated[int | None, Query(ge=1)] = None
) -> Response:
    """The receipt: the report, and what became of each sandbox. Of the newest drain, or of that `epoch`."""
    spec, _ = drains.read(front, node)
    told = receipt.report(front, node, epoch if epoch is not None else receipt.newest(front, spec))
    body = node_shapes.receipt(told, receipt.outcomes(front, node, told.epoch))
    if spec.drain is not None and spec.epoch == told.epoch:
        body["order"] = node_shapes.order(spec.drain)
    return JSONResponse(body)


@router.get("/{id}/drain/events", responses={200: {"content": {"text/event-stream": {}}}})
async def drain_events(
    request: Request,
    front: FrontDep,
    operator: OperatorDep,
    node: NodeDep,
    epoch: Annotated[int | None, Query(ge=1)] = None,
    cursor: Annotated[int | None, Query(ge=0)] = None,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """The drain as it goes on, as server-sent events: `report`, `outcome`, in the end `end` with the receipt.

    `id` is the cursor from which a later request resumes (`cursor`, or the header `Last-Event-ID`).
    """
    spec, _ = drains.read(front, node)
    shown = epoch if epoch is not None else receipt.newest(front, spec)
    place = AsyncExitStack()
    await place.enter_async_context(front.tails.enter(f"drain of {node}", 0))
    from_ = cursor if cursor is not None else last_event_id
    stream = receipt.Stream(front, node, shown, from_, serving=request.app.state.ready)
    return receipt.StreamResponse(stream, place)


# ---- answers --------------------------------------------------------------------------------------------------------


def _drain_block(front: Front, spec: NodeSpec) -> dict[str, Any] | None:
    return node_shapes.drain(spec, drains.told(front, spec))


def _asked_to_end(was: DrainReport) -> list[str]:
    """Those who had had their SIGTERM, which no undrain takes back: the kill is all that was left to come."""
    return sorted(each.sandbox for each in was.waiting if each.next is Step.KILL)


def _forced(front: Front, node: NodeId, report: DrainReport | None) -> Response:
    """204 done, 202 still stopping, 500 with whom the attempt could not end."""
    spec, _ = drains.read(front, node)
    if report is None:
        return JSONResponse({"drain": _drain_block(front, spec)}, status_code=202)
    if not report.force_errors:
        return Response(status_code=204)
    left = drains.sandboxes(front, node)
    remaining = [one.id for one, status in left if status is not None and status.phase not in TERMINAL]
    body = {
        "code": 500,
        "message": f"the force attempt on {node} failed: {'; '.join(report.force_errors)}",
        "error_code": "force_failed",
        "remaining": remaining,
        "errors": list(report.force_errors),
    }
    return JSONResponse(body, status_code=500)


def _moved(front: Front, moved: drains.PlanMoved, asked: DrainApplied) -> Response:
    body: dict[str, Any] = {
        "code": problems.STATUS[moved.kind],
        "message": str(moved),
        "error_code": moved.code,
        "plan": node_shapes.plan(moved.plan),
    }
    before = front.plans.recall(asked.planDigest or "")
    # None: the plan was made by an earlier daemon, or long ago, or never.
    body["changed"] = node_shapes.changes(before, moved.plan) if before is not None else None
    return JSONResponse(body, status_code=body["code"])
