"""Sandboxes: create, connect, list, get, kill, timeout, refresh, network."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Body, Header, Path, Query, Response
from fastapi.responses import JSONResponse

from penstock.api import creation, egress, listing, pausing, shapes
from penstock.api.front import Caller, CallerDep, Front, FrontDep
from penstock.api.standing import State
from penstock.model.errors import Conflict, Invalid, NotFound
from penstock.model.event import LoggedEvent
from penstock.model.ids import SANDBOX_ID_PATTERN, SandboxId
from penstock.model.sandbox import TERMINAL, TIMEOUT_S_DEFAULT, Phase, SandboxSpec, SandboxStatus

router = APIRouter(tags=["sandboxes"])

KILLED_WITHIN_S: Final = 15.0
APPLIED_WITHIN_S: Final = 10.0
REFRESH_S_DEFAULT: Final = 15
CONNECT_S_DEFAULT: Final = 300.0  # of the second version; the first has that of a create

_GONE: Final = TERMINAL | {Phase.QUARANTINED}


def sandbox_id(id: Annotated[str, Path(max_length=128)]) -> SandboxId:
    """The path's sandbox id. The old composite form `id-client` is shortened (e2b 1.3)."""
    short = id.partition("-")[0]
    if not SANDBOX_ID_PATTERN.fullmatch(short):
        raise Invalid("sandboxID", "Invalid sandbox ID")
    return SandboxId(short)


@router.post("/sandboxes", status_code=201)
@router.post("/v2/sandboxes", status_code=201)
async def create(
    front: FrontDep,
    caller: CallerDep,
    asked: shapes.NewSandbox,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    spec = await creation.create(front, caller, asked, idempotency_key=idempotency_key)
    return JSONResponse(shapes.sandbox(front, spec), status_code=201)


@router.get("/sandboxes")
async def list_running(front: FrontDep, caller: CallerDep, metadata: str | None = None) -> Response:
    """Version 1: running ones only, newest first, one page."""
    query = listing.read(metadata=metadata, state=["running"])
    rows: list[dict[str, Any]] = []
    while True:
        page, token, _ = listing.select(front, caller.team, query)
        rows += [shapes.listed(row) for row in page]
        if token is None:
            return JSONResponse(rows)
        query = listing.read(metadata=metadata, state=["running"], next_token=token)


@router.get("/v2/sandboxes")
async def list_all(
    front: FrontDep,
    caller: CallerDep,
    metadata: str | None = None,
    state: Annotated[list[str] | None, Query()] = None,
    order: str | None = None,
    startedAfter: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    nextToken: str | None = None,
) -> Response:
    query = listing.read(
        metadata=metadata,
        state=state,
        order=order,
        started_after=startedAfter,
        template=template,
        limit=limit,
        next_token=nextToken,
    )
    page, token, running = listing.select(front, caller.team, query)
    headers = {"X-Next-Token": token} if token else {}
    if "running" in query.states:
        headers["X-Total-Running"] = str(running)
    return JSONResponse([shapes.listed(row) for row in page], headers=headers)


@router.get("/sandboxes/{id}")
async def get(front: FrontDep, caller: CallerDep, id: str) -> Response:
    found = front.roster.stand(caller.team, sandbox_id(id), front.clock.wall())
    return JSONResponse(shapes.detail(front, found))


@router.delete("/sandboxes/{id}", status_code=204)
async def kill(front: FrontDep, caller: CallerDep, id: str) -> Response:
    """Answers when the sandbox is verified gone, and what it was paused as; 404 when it had ended already."""
    sandbox = front.roster.stand(caller.team, sandbox_id(id), front.clock.wall()).spec.id
    await pausing.forget(front, pausing.Asking(team=caller.team, sandbox=sandbox, actor=caller.name))

    def gone() -> bool | None:
        status = front.roster.statuses.get(sandbox)
        ended = status is None or status.phase in _GONE
        return (ended and not front.roster.paused_as(sandbox)) or None

    await front.roster.wait(sandbox, gone, KILLED_WITHIN_S)
    return Response(status_code=204)


@router.post("/v2/sandboxes/{id}/connect")
async def connect(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.ConnectSandbox | None, Body()] = None
) -> Response:
    """200 and a later end for a running sandbox, which never comes nearer by this; 201 for one that was paused."""
    spec, was_paused = await _wake(front, caller, id, asked, default_s=CONNECT_S_DEFAULT)
    return JSONResponse(shapes.sandbox(front, spec), status_code=201 if was_paused else 200)


@router.post("/sandboxes/{id}/connect")
async def connect_v1(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.ConnectSandbox | None, Body()] = None
) -> Response:
    spec, was_paused = await _wake(front, caller, id, asked)
    return JSONResponse(shapes.sandbox(front, spec), status_code=201 if was_paused else 200)


@router.post("/sandboxes/{id}/resume", status_code=201)
async def resume(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.ConnectSandbox | None, Body()] = None
) -> Response:
    """`connect`, but for a paused sandbox only."""
    if front.roster.stand(caller.team, sandbox_id(id), front.clock.wall()).state is State.RUNNING:
        raise Conflict("the sandbox is running", now="connect to it")
    spec, _ = await _wake(front, caller, id, asked)
    return JSONResponse(shapes.sandbox(front, spec), status_code=201)


@router.post("/sandboxes/{id}/pause", status_code=204)
async def pause(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.PauseSandbox | None, Body()] = None
) -> Response:
    """Answers when it is paused; 409 when it was already."""
    asking = pausing.Asking(team=caller.team, sandbox=sandbox_id(id), actor=caller.name)
    asked = asked or shapes.PauseSandbox()
    await pausing.pause(front, asking, memory=asked.memory, healthy=asked.requireHealthyGuest)
    return Response(status_code=204)


@router.post("/sandboxes/{id}/timeout", status_code=204)
async def set_timeout(front: FrontDep, caller: CallerDep, id: str, asked: shapes.SetTimeout) -> Response:
    """The end is now + timeout, sooner or later than before. A negative timeout counts as 0 (e2b 2.3)."""
    spec = _running(front, caller, id)
    seconds = creation.timeout_s(max(0, asked.timeout), front.limits_of(caller.team), least=0)
    end_at = front.clock.wall() + seconds
    await _require_changed(
        front, spec, lambda now: msgspec.structs.replace(now, end_at=end_at), _end_moved(front, caller)
    )
    return Response(status_code=204)


@router.post("/sandboxes/{id}/refreshes", status_code=204)
async def refresh(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.Refresh | None, Body()] = None
) -> Response:
    spec = _running(front, caller, id)
    duration = asked.duration if asked is not None and asked.duration is not None else REFRESH_S_DEFAULT
    await _extend(front, caller, spec, float(max(REFRESH_S_DEFAULT, duration)))
    return Response(status_code=204)


@router.put("/sandboxes/{id}/network", status_code=204)
async def update_network(front: FrontDep, caller: CallerDep, id: str, asked: shapes.NetworkUpdate) -> Response:
    """Replaces the egress rules whole; answers when the node enforces them."""
    spec = _running(front, caller, id)
    rules = egress.read(
        asked.allowOut,
        asked.denyOut,
        internet=asked.allow_internet_access,
        rules=asked.rules,
        egress_proxy=asked.egressProxy,
    )
    revision = await _require_changed(
        front, spec, lambda now: msgspec.structs.replace(now, egress=rules), _network_changed(front, caller)
    )

    def applied(status: SandboxStatus | None) -> bool:
        return status is None or status.phase in _GONE or status.spec_revision >= revision

    status = await front.roster.statuses.wait_for(spec.id, applied, within_s=APPLIED_WITHIN_S)
    if status is None or status.phase in _GONE:
        raise NotFound(f"sandbox {spec.id!r} ended meanwhile")
    return Response(status_code=204)


async def _wake(
    front: Front,
    caller: Caller,
    id: str,
    asked: shapes.ConnectSandbox | None,
    *,
    default_s: float = TIMEOUT_S_DEFAULT,
) -> tuple[SandboxSpec, bool]:
    asked = asked or shapes.ConnectSandbox()
    asking = pausing.Asking(team=caller.team, sandbox=sandbox_id(id), actor=caller.name)
    seconds = creation.timeout_s(asked.timeout, front.limits_of(caller.team), default=default_s, least=0)
    return await pausing.wake(front, asking, seconds=seconds, reboot=asked.memory is False)


def _running(front: Front, caller: Caller, id: str) -> SandboxSpec:
    """Raises NotFound; Conflict when it is paused."""
    return front.roster.require_running(caller.team, sandbox_id(id), front.clock.wall())


async def _extend(front: Front, caller: Caller, spec: SandboxSpec, seconds: float) -> None:
    end_at = front.clock.wall() + seconds
    await _require_changed(
        front,
        spec,
        lambda now: msgspec.structs.replace(now, end_at=max(now.end_at, end_at)),
        _end_moved(front, caller),
    )


def _end_moved(front: Front, caller: Caller) -> creation.Tell:
    def tell(before: SandboxSpec, after: SandboxSpec) -> LoggedEvent:
        return LoggedEvent(
            at=front.clock.wall(),
            kind="sandbox.end_moved",
            subject=after.id,
            actor=caller.name,
            because=f"its end moves by {after.end_at - before.end_at:+.0f} s",
            deadline=after.end_at,
            team=after.team,
        )

    return tell


def _network_changed(front: Front, caller: Caller) -> creation.Tell:
    def tell(_: SandboxSpec, after: SandboxSpec) -> LoggedEvent:
        rules = after.egress
        return LoggedEvent(
            at=front.clock.wall(),
            kind="sandbox.network_changed",
            subject=after.id,
            actor=caller.name,
            because="its egress rules are replaced",
            facts={
                "allow": " ".join((*rules.allow, *rules.allow_domains)),
                "deny": " ".join(rules.deny),
                "internet": str(rules.internet).lower(),
            },
            team=after.team,
        )

    return tell


async def _require_changed(front: Front, spec: SandboxSpec, edit: Any, tell: creation.Tell) -> int:
    def guarded(now: SandboxSpec) -> SandboxSpec:
        if now.stop is not None:
            raise NotFound(f"sandbox {now.id!r} is being stopped")
        changed: SandboxSpec = edit(now)
        return changed

    revision = await creation.change(front, spec.id, guarded, tell=tell)
    if revision is None:
        raise NotFound(f"sandbox {spec.id!r} doesn't exist or you don't have access to it")
    await front.roster.specs.wait_revision(revision, within_s=APPLIED_WITHIN_S)
    return revision
