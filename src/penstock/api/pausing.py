"""Pausing and resuming: one order each, written once, joined by whoever asks for the same meanwhile.

Three things look alike from outside. *Frozen*: its processes stand still on its node; an order and its opposite.
*Paused to disk*: it has ended, and its snapshot is what is left; the order is never taken back. *Resumed from there*: a
new spec of the same id. A request that finds it on the way between two of them waits, bounded, and looks again.
"""

from __future__ import annotations

from typing import ClassVar, Final

import msgspec
from structlog import get_logger

from penstock.api import chronicle, creation, drains, snapshots
from penstock.api.front import Front
from penstock.api.roster import missing
from penstock.api.standing import CHANGING, Standing, State
from penstock.core.deadlines import DeadlinePassed
from penstock.core.errors import PenstockError
from penstock.model import keys
from penstock.model.errors import Conflict, Internal, NoFreeSlot, NotFound, Unavailable
from penstock.model.event import LoggedEvent
from penstock.model.ids import SandboxId, TeamId, mint_snapshot_id
from penstock.model.sandbox import KillReason, Phase, SandboxSpec, SandboxStatus, wants_frozen
from penstock.model.snapshot import Snapshot
from penstock.store.errors import AlreadyExists, RevisionConflict
from penstock.store.store import Delete, Put

log = get_logger("api")

PAUSED_WITHIN_S: Final = 20.0  # a guest has 5 s to write out what it was told is written
PARKED_WITHIN_S: Final = 60.0
RESUMED_WITHIN_S: Final = 20.0
REMOVED_WITHIN_S: Final = 10.0  # the records of the life before, which control removes
ROUNDS_MAX: Final = 6  # changes of state that one request waits out
TRAFFIC: Final = "traffic"  # who asks, when the ingress does


class GuestUnresponsive(Unavailable):
    """Its guest did not say that everything is written, and the caller would rather not pause it then."""

    code: ClassVar[str] = "guest_unresponsive"


class StillChanging(Conflict):
    """It went from one state to the next for as long as the caller was ready to wait."""

    code: ClassVar[str] = "still_changing"

    def __init__(self, sandbox: SandboxId) -> None:
        super().__init__("sandbox is still transitioning", which=sandbox, now="try again", retry_after_s=1)


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """Whose wish it is, and about which sandbox."""

    team: TeamId
    sandbox: SandboxId
    actor: str


# ---- pausing


async def pause(front: Front, asking: Asking, *, memory: bool, healthy: bool) -> None:
    """Return once it is paused: frozen with `memory`, else on disk. A pause that goes on is joined.

    `healthy`: only if its guest answers, which a pause to disk always asks for. Raises NotFound, Conflict (paused
    already), GuestUnresponsive and Unavailable (in both cases it runs on).
    """
    joined = False
    for _ in range(ROUNDS_MAX):
        found = _stand(front, asking)
        if found.state in (State.PAUSED, State.PARKED):
            if joined:
                return
            raise Conflict("the sandbox is paused already", which=asking.sandbox)
        if found.state is State.RUNNING:
            await _freeze(front, asking, found, healthy=healthy or not memory)
            if not memory:
                await _park(front, asking)
            return
        joined = joined or found.state in (State.PAUSING, State.PARKING)
        await _settled(front, asking, PARKED_WITHIN_S)
    raise StillChanging(asking.sandbox)


async def _freeze(front: Front, asking: Asking, found: Standing, *, healthy: bool) -> None:
    before = found.status.durable_up_to if found.status is not None else 0.0
    # Its end must not come while it is being paused: that would kill what is to be kept.
    least = front.clock.wall() + PAUSED_WITHIN_S
    await _edit(
        front,
        asking,
        lambda spec: msgspec.structs.replace(spec, frozen=True, end_at=max(spec.end_at, least)),
        kind="sandbox.pause_ordered",
        because="paused, its memory kept",
    )
    try:
        after = await _settled(front, asking, PAUSED_WITHIN_S)
    except DeadlinePassed:
        await _take_back(front, asking, "it could not be paused in time")
        raise Unavailable("the sandbox could not be paused; it runs on", retry_after_s=5) from None
    if after is None:
        raise missing(asking.sandbox)
    durable = after.status.durable_up_to if after.status is not None else 0.0
    if healthy and after.state is State.PAUSED and durable <= before:
        await _take_back(front, asking, "its guest does not answer")
        raise GuestUnresponsive("the sandbox's guest does not answer; it runs on", retry_after_s=5)


async def _take_back(front: Front, asking: Asking, why: str) -> None:
    await _edit(
        front,
        asking,
        lambda spec: msgspec.structs.replace(spec, frozen=False),
        kind="sandbox.pause_taken_back",
        because=why,
    )


async def _park(front: Front, asking: Asking) -> None:
    snapshot = mint_snapshot_id(front.rng)
    await _edit(
        front,
        asking,
        lambda spec: spec if spec.park is not None else msgspec.structs.replace(spec, park=snapshot),
        kind="sandbox.park_ordered",
        because="paused to disk",
    )
    try:
        after = await _settled(front, asking, PARKED_WITHIN_S)
    except DeadlinePassed:
        raise Unavailable("the sandbox is still being written to disk", retry_after_s=5) from None
    if after is None:
        raise missing(asking.sandbox)


# ---- resuming


async def wake(
    front: Front, asking: Asking, *, seconds: float, reboot: bool = False, from_disk: bool = True, extend: bool = True
) -> tuple[SandboxSpec, bool]:
    """Return once it runs: its spec, and whether it was paused. One that ran lives `seconds` from now at least, unless
    told not to `extend`; one that was paused lives so long from now.

    `reboot`: a frozen one begins anew from its disk. Without `from_disk` one that is paused there stays so. Raises
    NotFound, StillChanging, LimitReached, NoFreeSlot, Unavailable, Internal; whatever it raises, nothing is lost.
    """
    was_paused = ordered = False
    for _ in range(ROUNDS_MAX):
        found = _stand(front, asking)
        was_paused = was_paused or found.paused
        if found.state is State.RUNNING:
            if extend and not ordered:
                await _extend(front, asking, seconds)
            return front.roster.specs.get(asking.sandbox) or found.spec, was_paused
        if not from_disk and found.state in (State.PARKED, State.PARKING):
            raise NotFound("a file-system-only pause is not resumed by traffic", which=asking.sandbox)
        if found.state is State.PAUSED and reboot:
            await _park(front, asking)
        elif found.state is State.PAUSED:
            await _thaw(front, asking, seconds)
            ordered = True
        elif found.state is State.PARKED:
            ordered = await _start_again(front, asking, seconds)
        elif found.state is State.RESUMING and found.snapshot is not None:
            await _started(front, asking)
        else:
            await _settled(front, asking, PARKED_WITHIN_S)
    raise StillChanging(asking.sandbox)


async def for_traffic(front: Front, sandbox: str) -> None:
    """Resume it because a request for it has come, if it was created so. Return once it runs. Raises as `wake`, and
    nothing that is no PenstockError: who calls serves others too."""
    spec = front.roster.specs.get(sandbox)
    if spec is None or not spec.auto_resume:
        raise NotFound("the sandbox is not resumed by traffic", which=sandbox)
    asking = Asking(team=spec.team, sandbox=spec.id, actor=TRAFFIC)
    seconds = min(spec.timeout_s, front.limits_of(spec.team).timeout_s_max)
    try:
        await wake(front, asking, seconds=seconds, from_disk=False, extend=False)
    except PenstockError:
        raise
    except Exception as error:
        log.error("a resume by traffic failed", sandbox=sandbox, exc_info=error)
        raise Internal("the sandbox could not be resumed", which=sandbox) from error


async def _extend(front: Front, asking: Asking, seconds: float) -> None:
    """Its end never comes nearer by this."""
    end_at = front.clock.wall() + seconds

    def edit(spec: SandboxSpec) -> SandboxSpec:
        if wants_frozen(spec, front.clock.wall()):  # its end came in between; the next look finds it paused
            return spec
        return msgspec.structs.replace(spec, end_at=max(spec.end_at, end_at))

    await _edit(front, asking, edit, kind="sandbox.end_moved", because=f"it lives {seconds:.0f} s more at least")


async def _thaw(front: Front, asking: Asking, seconds: float) -> None:
    def edit(spec: SandboxSpec) -> SandboxSpec:
        now = front.clock.wall()
        if not wants_frozen(spec, now):
            return spec  # somebody else was faster, and it is theirs
        return msgspec.structs.replace(spec, frozen=False, end_at=now + max(1.0, seconds))

    await _edit(front, asking, edit, kind="sandbox.resume_ordered", because="resumed, its memory kept")
    try:
        await _settled(front, asking, RESUMED_WITHIN_S)
    except DeadlinePassed:
        raise Unavailable("the sandbox is not resumed yet", which=asking.sandbox, retry_after_s=2) from None


async def _start_again(front: Front, asking: Asking, seconds: float) -> bool:
    """A new life from its snapshot. False when somebody else has begun one: look again."""
    async with front.turns.of(turn(asking.sandbox)):
        found = _stand(front, asking)
        if found.state is not State.PARKED or found.snapshot is None:
            return False
        front.check_room()
        node, _ = drains.read(front, found.snapshot.node)
        if node.why_not:
            raise Unavailable("its node takes no sandboxes now", which=node.id, why=node.why_not, retry_after_s=5)
        try:
            await front.roster.wait(asking.sandbox, lambda: front.roster.forgotten(asking.sandbox), REMOVED_WITHIN_S)
        except DeadlinePassed:
            raise Unavailable("the sandbox's last life is not over yet", retry_after_s=2) from None
        await _commit(front, asking, found.snapshot, seconds)
    await _started(front, asking)
    return True


async def _commit(front: Front, asking: Asking, snapshot: Snapshot, seconds: float) -> None:
    """The snapshot's spec with a new end. Raises LimitReached, StillChanging."""
    roster, now = front.roster, front.clock.wall()
    spec = msgspec.structs.replace(
        snapshot.spec, snapshot=snapshot.id, end_at=now + max(1.0, seconds), node=None, stop=None, park=None
    )
    told = _event(front, asking, "sandbox.resume_ordered", f"resumed from {snapshot.id}", deadline=spec.end_at)
    put = Put(keys.SANDBOX_SPEC + spec.id, msgspec.json.encode(spec), labels={"team": spec.team}, expect=0)
    roster.reserve(spec.team, spec.id, sandboxes_max=front.limits_of(spec.team).sandboxes_max)
    try:
        revision = await front.store.commit([put, chronicle.line(front, told)], by="api")
    except (RevisionConflict, AlreadyExists):
        roster.release(spec.id)
        raise StillChanging(spec.id) from None
    except BaseException:
        roster.release(spec.id)
        raise
    await roster.specs.wait_revision(revision, within_s=snapshots.SEEN_S)


async def _started(front: Front, asking: Asking) -> None:
    """Wait for a life that was begun from a snapshot. Raises Unavailable, NoFreeSlot, Internal: it is paused still."""
    room_s = min(front.room_s, front.ready_s)
    try:
        found = await _settled(front, asking, room_s)
    except DeadlinePassed:
        if await _withdraw(front, asking):
            raise NoFreeSlot("no room to resume it", which=asking.sandbox, retry_after_s=front.room_s) from None
        try:
            found = await _settled(front, asking, front.ready_s - room_s)
        except DeadlinePassed:
            raise Unavailable("the sandbox is not resumed yet", which=asking.sandbox, retry_after_s=2) from None
    if found is None:
        raise missing(asking.sandbox)
    if found.state is State.PARKED:
        status = front.roster.statuses.get(asking.sandbox)
        why = status.because if status is not None else ""
        if status is None or status.kill_reason in (KillReason.START_REFUSED, KillReason.NODE_SHUTDOWN):
            raise Unavailable("Failed to resume the sandbox", which=asking.sandbox, why=why, retry_after_s=2)
        raise Internal("Failed to resume the sandbox", which=asking.sandbox, why=why)


async def _withdraw(front: Front, asking: Asking) -> bool:
    """Take back a resume that no node has taken up: the sandbox is paused as before. False: one has.

    No order to stop: that would be a kill, and its snapshot would go with it.
    """
    record = front.store.get(keys.SANDBOX_SPEC + asking.sandbox)
    if record is None:
        return True
    spec = msgspec.json.decode(record.value, type=SandboxSpec)
    told = front.store.get(keys.SANDBOX_STATUS + asking.sandbox)
    refused = told is not None and msgspec.json.decode(told.value, type=SandboxStatus).phase is Phase.PENDING
    if spec.node is not None and not refused:
        return False
    event = _event(front, asking, "sandbox.resume_taken_back", "no node had room for it")
    try:
        delete = Delete(record.key, expect=record.mod_revision)
        await front.store.commit([delete, chronicle.line(front, event)], by="api")
    except RevisionConflict:
        return False
    return True


# ---- killing


async def forget(front: Front, asking: Asking) -> None:
    """Order the end of a sandbox in whatever form it is: its life, and what it was paused as. Absent is success."""
    async with front.turns.of(turn(asking.sandbox)):
        if await creation.order_stop(front, asking.sandbox, KillReason.REQUEST, by=asking.actor):
            return  # control drops the snapshots once it has ended
        kept = front.roster.paused_as(asking.sandbox)
        event = _event(front, asking, "sandbox.stop_ordered", f"stopped by {asking.actor} while it was paused to disk")
        deletes = [Delete(keys.SNAPSHOT + each.id) for each in kept]
        if deletes:
            await front.store.commit([*deletes, chronicle.line(front, event)], by="api")


# ---- small things


def turn(sandbox: SandboxId) -> str:
    """Of whoever begins a new life of it, or ends what is left of the last."""
    return f"life/{sandbox}"


def _stand(front: Front, asking: Asking) -> Standing:
    return front.roster.stand(asking.team, asking.sandbox, front.clock.wall())


async def _settled(front: Front, asking: Asking, within_s: float) -> Standing | None:
    """How it stands once nothing is under way; None: it is gone. Raises DeadlinePassed."""

    def look() -> tuple[Standing | None] | None:
        found = front.roster.look(asking.team, asking.sandbox, front.clock.wall())
        return (found,) if found is None or found.state not in CHANGING else None

    return (await front.roster.wait(asking.sandbox, look, within_s))[0]


async def _edit(front: Front, asking: Asking, edit: creation.Edit, *, kind: str, because: str) -> None:
    """Change its spec, unless its end was ordered. Raises NotFound. Returns once everybody here sees it."""

    def guarded(spec: SandboxSpec) -> SandboxSpec:
        if spec.stop is not None:
            raise missing(asking.sandbox)
        return edit(spec)

    def tell(_: SandboxSpec, after: SandboxSpec) -> LoggedEvent:
        return _event(front, asking, kind, because, deadline=None if after.frozen else after.end_at)

    revision = await creation.change(front, asking.sandbox, guarded, tell=tell)
    if revision is None:
        if front.roster.look(asking.team, asking.sandbox, front.clock.wall()) is None:
            raise missing(asking.sandbox)
        return  # paused to disk meanwhile: the next look finds that
    await front.roster.specs.wait_revision(revision, within_s=snapshots.SEEN_S)


def _event(front: Front, asking: Asking, kind: str, because: str, *, deadline: float | None = None) -> LoggedEvent:
    return LoggedEvent(
        at=front.clock.wall(),
        kind=kind,
        subject=asking.sandbox,
        actor=asking.actor,
        because=because,
        deadline=deadline,
        team=asking.team,
    )
