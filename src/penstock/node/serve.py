"""From ready until something ends it: what a sandbox's owner does while it serves.

Control, the API and the store may all be away meanwhile. Each pass takes the one thing that matters most: an end, the
next step of a drain, or the spec as it now stands.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Final

from penstock.core.deadlines import within
from penstock.model.drain import Step
from penstock.model.sandbox import Event, KillReason, Phase
from penstock.node.record import Moved

if TYPE_CHECKING:
    from penstock.node.supervisor import Supervisor

SERVING: Final = frozenset({Phase.READY, Phase.PAUSED, Phase.DRAINING})


async def serve(one: Supervisor) -> None:
    """From READY until something ends it. Control, the API and the store may all be away meanwhile."""
    while one.phase in SERVING:
        await _until_poked(one)
        step = one.climb.due(one.means.clock.monotonic())
        if one.died and one.order is None:
            asked = one.climb.did(Step.TERM)
            reason = KillReason.NODE_SHUTDOWN if asked else KillReason.CRASHED
            one.fire(Event.DIED, "it ended when asked to" if asked else "its first process ended", reason)
        elif one.order is not None:
            one.fire(Event.KILL, one.order.because, one.order.reason)
        elif step is not None:
            await _take_step(one, step)
        elif one.phase is Phase.DRAINING and one.climb.eviction is None:
            one.fire(Event.SPARE, "the drain was undone")
        else:
            await _conform(one)


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
    if step is Step.TERM:
        # On record before it is done: a daemon that dies in between must not take the end for a crash.
        one.record.note(Moved(phase=Phase.DRAINING, because=eviction.reason))
        if one.phase is not Phase.DRAINING:
            one.fire(Event.EVICT, f"asked to end: {eviction.reason}")
        else:
            one.report(because=f"asked to end: {eviction.reason}")
        if one.process is not None:
            one.process.signal(signal.SIGTERM)
    elif step is Step.NOTICE and one.phase is Phase.READY:
        one.fire(Event.EVICT, f"notice given: {eviction.reason}")
    one.climb.do(step)


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
            one.means.crew.spawn(_poke_later(one), name=f"{one.id} egress retry")
            return
        one.rules = spec.egress
        one.attempts = 0
    one.report(spec_revision=revision)


async def _poke_later(one: Supervisor) -> None:
    one.attempts += 1
    await asyncio.sleep(one.pause_s())
    one.poked.set()
