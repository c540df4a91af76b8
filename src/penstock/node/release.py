"""The end of a sandbox: everything it holds given back, each verified, however long it takes.

**Quarantine** is a release that got no further for PATIENCE_S: a failed undo that was tried again, or one that is still
at work. It is a word, not an end: the attempts go on, and the first that succeeds frees it. But nobody waits for it any
more: a drain ends without it and says so, which is why the patience is less than what a drain may take beyond its hard
deadline. A sandbox that fails once and is gone a moment later was never in quarantine.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from penstock.core.deadlines import backoff_s, within
from penstock.core.hold import Hold
from penstock.model.sandbox import Event, Phase
from penstock.node.pause import publish
from penstock.node.record import Moved

if TYPE_CHECKING:
    from penstock.node.supervisor import Supervisor

PATIENCE_S: Final = 1.5
AGAIN_BASE_S: Final = 0.1
AGAIN_CAP_S: Final = 30.0


async def release(one: Supervisor, hold: Hold) -> None:
    """Unwind its ledger, publish its snapshot if it is one, unlink its record, and say so."""
    means = one.means
    means.expiry.forget(one.id)
    one.record.note(
        Moved(
            phase=one.phase,
            because=one.status.because,
            kill_reason=one.status.kill_reason,
            forced=one.forced,
        )
    )
    begun = one.ordered_at or means.clock.monotonic()
    watch = _Watch(one, hold)
    one.attempts = 0
    try:
        while not await _attempt(one, watch):
            await _rest(one)
    finally:
        watch.stop()
    one.released_ms = (means.clock.monotonic() - begun) * 1000
    done = {Phase.UNWINDING: Event.CLEAN, Phase.STOPPING: Event.GONE, Phase.QUARANTINED: Event.REAPED}
    failed = one.phase is Phase.UNWINDING
    one.fire(done[one.phase])
    means.tally.ended(one.status.kill_reason, failed=failed, released_ms=one.released_ms)


async def _attempt(one: Supervisor, watch: _Watch) -> bool:
    """One way down the ladder. False: something could not be verified gone, and pins what lies beneath it."""
    try:
        await one.ledger.unwind(one.means.settings.unwind_within_s)
        await publish(one)
        one.record.remove()
    except Exception as error:
        one.attempts += 1
        one.stuck.cause = _innermost(error)
        watch.failed(one.stuck.cause)
        return False
    return True


async def _rest(one: Supervisor) -> None:
    """Until the next attempt: each time longer, unless an operator wants it now."""
    rest_s = backoff_s(max(1, one.attempts), base_s=AGAIN_BASE_S, cap_s=AGAIN_CAP_S, rng=one.means.rng)
    one.stuck.next_at = one.means.clock.wall() + rest_s
    one.poked.clear()
    try:
        async with within(rest_s, f"the next release of {one.id}"):
            await one.poked.wait()  # the kernel tells nobody that EBUSY is over, but an operator may
    except TimeoutError:
        pass
    one.stuck.next_at = 0.0
    one.stuck.retries += 1
    one.means.tally.release_retries_total += 1


class _Watch:
    """Sends it to quarantine when its release gets no further."""

    def __init__(self, one: Supervisor, hold: Hold) -> None:
        self._one, self._hold = one, hold
        self._why = ""
        self._left = len(one.ledger.labels()) + 1
        self._timer: asyncio.TimerHandle | None = None
        if one.phase is not Phase.QUARANTINED:
            self._arm()
        else:
            one.stuck.since = one.means.clock.wall()

    def failed(self, why: str) -> None:
        self._why = why
        if self._one.phase is Phase.QUARANTINED:
            self._one.report(because=f"release failed: {why}")

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._look)

    def _look(self) -> None:
        one, left = self._one, len(self._one.ledger.labels())
        if left < self._left:
            self._left = left
            self._arm()
            return
        top = one.ledger.labels()[-1:]
        one.stuck.since = one.means.clock.wall()
        waits = f"its {top[0]} is not released yet" if top else "its snapshot is not in the store yet"
        one.stuck.cause = one.stuck.cause or waits
        one.fire(Event.PINNED, f"release failed: {self._why}" if self._why else waits)
        self._hold.release()


def _innermost(error: BaseException) -> str:
    """The first leaf of nested groups: what a person wants to read."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
