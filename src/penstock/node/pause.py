"""Pausing: frozen on the node, parked to disk, or copied while it goes on.

- **Freeze** keeps memory where it is: the processes stand still, and go with the node. What was acknowledged is
  written to the disk first, as far as the guest answers.
- **Park** ends the sandbox and keeps its disk as an image. The intent is in its record before anything is ended, so
  that whatever ends it from there on (a crash, a kill, another daemon) keeps the image too. The snapshot is in the
  store before the record is unlinked.
- **Checkpoint** copies the disk while everything stands still for a moment. It holds the node's gate from before the
  freeze until its snapshot is in the store: a drain waits for it, and never sees it half done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from penstock.core.deadlines import within
from penstock.core.gate import GateClosed
from penstock.model.errors import Unavailable
from penstock.model.ids import SnapshotId
from penstock.model.sandbox import Checkpoint, Event, KillReason, Phase
from penstock.model.snapshot import Snapshot, SnapshotKind
from penstock.node.calls import unless_ended
from penstock.node.evict import cgroup_name
from penstock.node.life import Order
from penstock.node.record import Moved, Parking

if TYPE_CHECKING:
    from penstock.node.supervisor import Supervisor

QUIESCE_S: Final = 5.0  # a guest that has more to write than that is paused all the same
COPY_S: Final = 60.0
SPEC_S: Final = 30.0  # for the spec of a sandbox that was being parked when the daemon died


async def freeze(one: Supervisor, because: str) -> None:
    """READY to PAUSED. When it fails it goes on running, and is asked again after a while."""
    await _quiesce(one)
    if one.order is not None or one.died:
        return
    try:
        # On record first: a daemon that dies right after must find a sandbox that is meant to stand still.
        one.record.write(Moved(phase=Phase.PAUSED, because=because))
        await _stop(one)
    except Exception as error:
        await _go_on(one)
        one.record.note(Moved(phase=Phase.READY))
        one.report(because=f"cannot be paused: {error}")
        one.poke_later()
        return
    one.means.expiry.forget(one.id)
    one.stands_still = True
    one.fire(Event.PAUSE, because)


async def freeze_again(one: Supervisor) -> None:
    """A daemon that died between the record and the freezer left one that is called paused and runs."""
    try:
        await _stop(one)
    except Exception as error:
        one.report(because=f"cannot be paused: {error}")
        one.poke_later()
        return
    one.stands_still = True


async def thaw(one: Supervisor) -> None:
    """PAUSED to READY. Not a start: a draining node admits it, and its notice comes right after."""
    if not await _go_on(one):
        return
    one.stands_still = False
    one.record.note(Moved(phase=Phase.READY))
    one.means.expiry.watch(one.id, one.end_at)
    one.climb.forget_notice()
    one.fire(Event.RESUME, "resumed")


async def thaw_again(one: Supervisor) -> None:
    """One that runs on record, and that a daemon's death or a failed thaw perhaps left standing still."""
    await _go_on(one)


async def park(one: Supervisor, snapshot: SnapshotId, because: str) -> None:
    """Begin its end as a snapshot. Raises OSError when the intent cannot be written; nothing has happened then."""
    one.record.write(Parking(snapshot=snapshot, because=because))
    one.undo.keep = snapshot
    if one.phase is Phase.PAUSED:
        await _go_on(one)  # as far as it can be: whoever kills thaws again
    await _quiesce(one)
    if one.order is None:
        one.order = Order(KillReason.PAUSED, because)
        one.ordered_at = one.means.clock.monotonic()
    one.poked.set()


async def publish(one: Supervisor) -> None:
    """The snapshot of a parked sandbox into the store, once its image is verified. Raises what the store raises.

    A daemon that died in between comes back with the record alone, so the spec is waited for.
    """
    image = one.undo.keep
    if image is None:
        return
    async with within(SPEC_S, f"the spec of {one.id}"):
        while one.spec is None:
            one.poked.clear()
            await one.poked.wait()
    used = one.undo.kept_bytes
    now = one.means.clock.wall()
    await _tell(one, image, SnapshotKind.PAUSED, used=used, durable_up_to=one.undo.kept_at or now)


async def checkpoint(one: Supervisor, wanted: Checkpoint) -> None:
    """A snapshot of the running (or frozen) sandbox, answered in its status either way."""
    made_before = wanted.id in one.means.ports.disks.list_images()
    try:
        with one.means.gate.hold("start", f"checkpoint of {one.id}"):
            await _copy(one, wanted)
    except GateClosed as closed:
        one.report(checkpoint_done=wanted.id, checkpoint_failed=str(closed))
    except Exception as error:
        if not made_before:
            one.means.ports.disks.remove_image(wanted.id)
        one.report(checkpoint_done=wanted.id, checkpoint_failed=str(error))
    else:
        one.report(checkpoint_done=wanted.id, checkpoint_failed="")


async def _answer_again(one: Supervisor, wanted: Checkpoint) -> None:
    """Its image is whole, but the daemon died before it had said so."""
    name, durable = wanted.name, one.status.durable_up_to  # of when it was copied nothing is left
    await _tell(one, wanted.id, SnapshotKind.CHECKPOINT, used=0, durable_up_to=durable, name=name)


async def _copy(one: Supervisor, wanted: Checkpoint) -> None:
    means, was_frozen = one.means, one.phase is Phase.PAUSED
    if wanted.id in means.ports.disks.list_images():
        await _answer_again(one, wanted)
        return
    disks = means.disks.owned_by(one.id)
    name = means.disks.name(disks[0]) if disks else one.id
    if not was_frozen:
        await _quiesce(one)
    try:
        if not was_frozen:
            await _stop(one)
        at = means.clock.wall()
        used = await means.ports.disks.copy(name, wanted.id, within_s=COPY_S)
    finally:
        if not was_frozen:
            await _go_on(one)  # what fails here is tried again before anything else is done for it
    await _tell(one, wanted.id, SnapshotKind.CHECKPOINT, used=used, durable_up_to=at, name=wanted.name)


async def _tell(
    one: Supervisor, image: SnapshotId, kind: SnapshotKind, *, used: int, durable_up_to: float, name: str = ""
) -> None:
    if one.spec is None:
        raise Unavailable("its spec was not seen yet", which=one.id, retry_after_s=1.0)
    word = "parked" if kind is SnapshotKind.PAUSED else "checkpointed"
    cleared = msgspec.structs.replace(one.spec, node=None, stop=None, frozen=False, park=None, checkpoint=None)
    await one.means.reporter.keep(
        Snapshot(
            id=image,
            kind=kind,
            sandbox=one.id,
            team=one.status.team,
            node=one.means.settings.id,
            spec=cleared,
            created_at=one.means.clock.wall(),
            durable_up_to=durable_up_to,
            disk_bytes=used,
            started_at=one.status.started_at,
            name=name,
            because=one.status.because,
        )
    )
    one.means.chronicle.snapshot(one.status, word, image, disk_bytes=used)


async def _quiesce(one: Supervisor) -> None:
    """What its programs were told is written goes to its disk. One that does not answer is not waited for."""
    if one.phase is Phase.PAUSED or not one.status.guest_socket:
        return
    run_dir = one.status.guest_socket.rpartition("/")[0]
    try:
        durable = await unless_ended(one, one.means.ports.guests.quiesce(run_dir, within_s=QUIESCE_S), "quiesce")
    except Exception as error:
        # Safe: a freeze loses nothing by it, and a park unmounts the disk, which writes everything out.
        one.means.chronicle.node("node.quiesce_failed", str(error), sandbox=one.id)
        return
    one.report(durable_up_to=durable)


async def _stop(one: Supervisor) -> None:
    """Into the freezer. From the first attempt on it may stand still, whatever the attempt raises."""
    one.may_be_frozen = True
    await one.means.ports.cgroups.freeze(cgroup_name(one.id), within_s=one.means.settings.step_within_s)


async def _go_on(one: Supervisor) -> bool:
    """Out of the freezer, verified. False when that failed: it is tried again, and a kill thaws by itself."""
    try:
        await one.means.ports.cgroups.thaw(cgroup_name(one.id), within_s=one.means.settings.step_within_s)
    except Exception as error:
        one.report(because=f"cannot be resumed: {error}")
        one.poke_later()
        return False
    one.may_be_frozen = False
    return True
