"""From ready until something ends it: what a sandbox's owner does while it serves.

Control, the API and the store may all be away meanwhile. Each pass takes the one thing that matters most: an end, the
next step of a drain, or the spec as it now stands.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from penstock.core.deadlines import within
from penstock.model.drain import Step
from penstock.model.ids import SnapshotId
from penstock.model.sandbox import Event, KillReason, Phase, wants_frozen, wants_parked
from penstock.node import pause
from penstock.node.calls import unless_ended
from penstock.node.climb import Eviction
from penstock.node.ports import Notice
from penstock.node.record import Moved

if TYPE_CHECKING:
    from penstock.node.supervisor import Supervisor

NOTICE_S: Final = 2.0
SERVING: Final = frozenset({Phase.READY, Phase.PAUSED, Phase.DRAINING})


async def serve(one: Supervisor) -> None:
    """One pass per poke or step that is due. Returns in a phase that does not serve."""
    while one.phase in SERVING:
        await _until_poked(one)
        if one.died and one.order is None:
            _bury(one)
        elif one.order is not None:
            one.fire(Event.KILL, one.order.because, one.order.reason)
        else:
            before = _mark(one)
            await _once(one)
            if _mark(one) != before:
                one.poked.set()  # one poke may stand for several wishes: look again until nothing is left to do


def _mark(one: Supervisor) -> tuple[object, ...]:
    """What a pass changes when it did something; what failed leaves it as it was, and comes again later."""
    return one.phase, one.may_be_frozen, one.stands_still, one.status.checkpoint_done, one.climb.next()


async def _once(one: Supervisor) -> None:
    """The one thing that matters most now. What is to be kept is kept before a drain takes its next step."""
    now, spec = one.means.clock.wall(), one.spec
    step = one.climb.due(one.means.clock.monotonic())
    parked = wants_parked(spec, now) if spec is not None else None
    frozen = wants_frozen(spec, now) if spec is not None else one.phase is Phase.PAUSED
    if one.may_be_frozen and one.phase is not Phase.PAUSED:
        await pause.thaw_again(one)
    elif spec is not None and parked is not None:
        await _park(one, parked, "paused" if spec.park is not None else "its time was over")
    elif step is not None:
        await _take_step(one, step)
    elif frozen and one.phase is not Phase.PAUSED:
        assert spec is not None
        await pause.freeze(one, "paused" if spec.frozen else "its time was over")
    elif frozen and not one.stands_still:
        await pause.freeze_again(one)
    elif not frozen and one.phase is Phase.PAUSED:
        await pause.thaw(one)
    elif one.phase is Phase.DRAINING and one.climb.eviction is None:
        one.fire(Event.SPARE, "the drain was undone")
        await _withdraw(one)
    elif spec is not None and spec.checkpoint is not None and spec.checkpoint.id != one.status.checkpoint_done:
        await pause.checkpoint(one, spec.checkpoint)
    else:
        await _conform(one)


def _bury(one: Supervisor) -> None:
    asked = one.climb.was_asked
    reason = KillReason.NODE_SHUTDOWN if asked else KillReason.CRASHED
    how = f" ({one.autopsy})" if one.autopsy else ""
    one.fire(Event.DIED, ("it ended when asked to" if asked else "its first process ended") + how, reason)


async def _park(one: Supervisor, snapshot: SnapshotId, because: str) -> bool:
    try:
        await pause.park(one, snapshot, because)
    except OSError as error:
        one.report(because=f"cannot be paused to disk: {error}")
        one.poke_later()
        return False
    return True


async def _until_poked(one: Supervisor) -> None:
    """Until somebody pokes, or a step of a drain is due."""
    coming = one.climb.next()
    left_s = None if coming is None else max(0.0, coming[1] - one.means.clock.monotonic())
    try:
        async with within(left_s, f"the next step of {one.id}"):
            await one.poked.wait()
    except TimeoutError:
        return
    one.poked.clear()


async def _take_step(one: Supervisor, step: Step) -> None:
    """One rung of the ladder. What fails here is followed by the next rung, and in the end by the kill."""
    eviction = one.climb.eviction
    assert eviction is not None
    failed = ""
    match step:
        case Step.NOTICE:
            failed = await _notify(one, eviction)
        case Step.PARK:
            snapshot = SnapshotId(f"{one.id}-d{eviction.epoch}-{int(one.means.clock.wall() * 1000)}")
            if not await _park(one, snapshot, f"parked: {eviction.reason}"):
                failed = one.status.because
        case _:
            await _ask_to_end(one, eviction)
    if failed:
        one.climb.fail(step, failed)
    else:
        one.climb.do(step)
    coming = one.climb.waiting(one.id, "")
    one.means.chronicle.step(step, one.status, eviction.reason, epoch=eviction.epoch, deadline=coming.at, failed=failed)


async def _ask_to_end(one: Supervisor, eviction: Eviction) -> None:
    """SIGTERM to its first process. A frozen one could not hear it, and is thawed."""
    # On record before it is done: a daemon that dies in between must not take the end for a crash.
    one.record.note(Moved(phase=Phase.DRAINING, because=eviction.reason))
    if one.phase is Phase.PAUSED:
        await pause.thaw(one)
    if one.phase is not Phase.DRAINING:
        one.fire(Event.EVICT, f"asked to end: {eviction.reason}")
    else:
        one.report(because=f"asked to end: {eviction.reason}")
    if one.process is not None:
        one.process.signal(signal.SIGTERM)


async def _notify(one: Supervisor, eviction: Eviction) -> str:
    """Tell its programs of the deadlines. A frozen one is told when it is thawed. Returns why that failed."""
    if one.phase is Phase.PAUSED:
        return ""
    if one.phase is Phase.READY:
        one.fire(Event.EVICT, f"notice given: {eviction.reason}")
    notice = Notice(epoch=eviction.epoch, reason=eviction.reason, soft_by=eviction.soft_at, hard_by=eviction.hard_at)
    one.noticed_epoch = eviction.epoch
    try:
        await unless_ended(one, one.means.ports.guests.notify(one.run_dir, notice, within_s=NOTICE_S), "notice")
    except Exception as error:
        # Safe: the ladder goes on, and the kill waits for nobody's answer.
        return str(error)
    return ""


async def _withdraw(one: Supervisor) -> None:
    """The drain was undone: its programs are told, as far as they listen."""
    notice = Notice(epoch=one.noticed_epoch, reason="", soft_by=None, hard_by=None, withdrawn=True)
    try:
        await unless_ended(one, one.means.ports.guests.notify(one.run_dir, notice, within_s=NOTICE_S), "notice")
    except Exception as error:
        one.means.chronicle.node("node.notice_not_withdrawn", str(error), sandbox=one.id)


async def _conform(one: Supervisor) -> None:
    """Put the spec's egress rules in force, then say which spec revision is."""
    spec = one.spec
    if spec is None:
        return
    revision = one.seen_revision  # of `spec`, read together: both may move on while the rules are applied
    if spec.egress != one.rules and one.status.slot >= 0:
        try:
            async with within(one.means.settings.step_within_s, f"egress rules of {one.id}"):
                await one.means.ports.network.apply(one.status.slot, spec.egress)
        except Exception:
            # Safe: `spec_revision` is not reported, so nobody believes the rules are in force; we come again.
            one.rules = None
            one.poke_later()
            return
        one.rules = spec.egress
    one.attempts = 0
    if one.phase is not Phase.PAUSED:
        one.means.expiry.watch(one.id, one.end_at)  # told once, and the clock was perhaps stepped back since
    one.report(spec_revision=revision)
