"""The routes of snapshots: take one of a running sandbox, list them, delete one. And of forks, which are refused."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Body, Response
from fastapi.responses import JSONResponse

from penstock.api import creation, listing, shapes, snapshots
from penstock.api.front import Caller, CallerDep, Front, FrontDep
from penstock.api.roster import missing
from penstock.api.sandboxes import sandbox_id
from penstock.api.standing import CHANGING, State
from penstock.core.deadlines import DeadlinePassed
from penstock.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from penstock.model.event import LoggedEvent
from penstock.model.ids import SandboxId, mint_snapshot_id
from penstock.model.sandbox import Checkpoint, SandboxSpec
from penstock.model.snapshot import Snapshot, SnapshotKind

router = APIRouter(tags=["snapshots"])

TAKEN_WITHIN_S: Final = 90.0  # the node gives the copy 60 s


@router.post("/sandboxes/{id}/snapshots", status_code=201)
async def take(
    front: FrontDep, caller: CallerDep, id: str, asked: Annotated[shapes.NewSnapshot | None, Body()] = None
) -> Response:
    """A copy of its disk at this moment; the sandbox goes on. Answers once the snapshot can be started from."""
    asked = asked or shapes.NewSnapshot()
    if asked.memory:
        raise Unsupported("a snapshot with memory is not built yet", now="leave `memory` out: its files are kept")
    name = snapshots.check_name(caller.team, asked.name)
    if name and creation.find_template(front, name) is not None:
        raise Invalid("name", f"{asked.name!r} is the name of a template")
    snapshot = await _take(front, caller, sandbox_id(id), name)
    for older in snapshots.older(front, caller.team, snapshot.id, name):
        await snapshots.drop(front, caller, older, f"its name now stands for {snapshot.id}")
    return JSONResponse(shapes.snapshot(snapshot), status_code=201)


@router.get("/snapshots")
async def list_snapshots(
    front: FrontDep,
    caller: CallerDep,
    sandboxID: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    nextToken: str | None = None,
) -> Response:
    """The team's, newest first."""
    query = listing.read(limit=limit, next_token=nextToken)
    rows = front.roster.checkpoints(caller.team)
    if sandboxID is not None:
        rows = [each for each in rows if each.sandbox == sandbox_id(sandboxID)]
    if name is not None:
        found = snapshots.find(front, caller.team, name)
        rows = [each for each in rows if found is not None and each.id == found.id]
    if query.after is not None:
        at, last = query.after
        rows = [each for each in rows if (-each.created_at, each.id) > (-at, last)]
    page = rows[: query.limit]
    more = len(rows) > query.limit
    headers = {"X-Next-Token": listing.cursor(page[-1].created_at, page[-1].id)} if more else {}
    return JSONResponse([shapes.snapshot(each) for each in page], headers=headers)


@router.delete("/templates/{id:path}", status_code=204)
async def delete(front: FrontDep, caller: CallerDep, id: str) -> Response:
    """A snapshot is a template to the SDKs, and deleted as one."""
    try:
        await snapshots.delete(front, caller, id)
    except NotFound:
        if creation.find_template(front, id) is not None:
            raise Unsupported("template deletion is not built yet") from None
        raise
    return Response(status_code=204)


@router.post("/sandboxes/{id}/fork")
async def fork(front: FrontDep, caller: CallerDep, id: str) -> Response:
    front.roster.stand(caller.team, sandbox_id(id), front.clock.wall())
    raise Unsupported(
        "forks are not built yet: they copy memory, and this tier of isolation cannot snapshot it",
        now="take a snapshot of the sandbox, and create others from that: they start cold, with its files",
    )


async def _take(front: Front, caller: Caller, sandbox: SandboxId, name: str) -> Snapshot:
    """Raises NotFound, Conflict (one is being taken, or it is paused to disk), Unavailable (it could not be taken)."""
    wanted = Checkpoint(id=mint_snapshot_id(front.rng), name=name)

    def edit(spec: SandboxSpec) -> SandboxSpec:
        found = front.roster.stand(caller.team, sandbox, front.clock.wall())
        if found.state in CHANGING or found.state is State.PARKED:
            raise Conflict(f"the sandbox is {found.state.value}", which=sandbox)
        done = found.status.checkpoint_done if found.status is not None else None
        if spec.checkpoint is not None and spec.checkpoint.id != done:
            raise Conflict("a snapshot of the sandbox is being taken", which=sandbox, now="try again", retry_after_s=1)
        return msgspec.structs.replace(spec, checkpoint=wanted)

    def tell(_: SandboxSpec, spec: SandboxSpec) -> LoggedEvent:
        return LoggedEvent(
            at=front.clock.wall(),
            kind="sandbox.snapshot_ordered",
            subject=sandbox,
            actor=caller.name,
            because=f"a snapshot named {name}" if name else "a snapshot",
            related=(wanted.id,),
            team=spec.team,
        )

    if await creation.change(front, sandbox, edit, tell=tell) is None:
        front.roster.stand(caller.team, sandbox, front.clock.wall())
        raise Conflict("the sandbox is paused to disk", which=sandbox, now="connect to it: that resumes it")
    return await _answer(front, caller, sandbox, wanted)


async def _answer(front: Front, caller: Caller, sandbox: SandboxId, wanted: Checkpoint) -> Snapshot:
    roster = front.roster

    def look() -> Snapshot | str | None:
        """The snapshot, or why there is none."""
        status, found = roster.statuses.get(sandbox), roster.snapshots.get(wanted.id)
        if status is not None and status.checkpoint_done == wanted.id:
            return status.checkpoint_failed or found
        if found is None and roster.look(caller.team, sandbox, front.clock.wall()) is None:
            return "the sandbox ended"
        return None

    try:
        answer: Snapshot | str = await roster.wait(sandbox, look, TAKEN_WITHIN_S)
    except DeadlinePassed:
        raise Unavailable("the snapshot is not taken yet", which=wanted.id, retry_after_s=5) from None
    if isinstance(answer, Snapshot):
        assert answer.kind is SnapshotKind.CHECKPOINT
        return answer
    if roster.look(caller.team, sandbox, front.clock.wall()) is None:
        raise missing(sandbox)
    raise Unavailable("the snapshot could not be taken", which=sandbox, why=answer, retry_after_s=5)
