"""Finish what was begun, cancelled or not, by a deadline.

An undo that a second cancellation can interrupt is no undo: measured on 3.11, a second `cancel()` during
`AsyncExitStack.__aexit__` aborts the running callback, so a cgroup was emptied and never removed. `settle` runs the
awaitable in a task of its own, keeps waiting through any number of cancellations, and hands the cancellation back once
the work has ended. The deadline is the only thing that cuts it short.

Error against cancellation, when both happened: the error is raised (it is knowledge about the world) and the
cancellation is requested again, so that it strikes at the caller's next await. Neither is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import CoroutineType
from typing import Final, Generic, TypeVar, cast

from penstock.core.deadlines import DeadlinePassed, Pulse, within
from penstock.core.errors import Kind, PenstockError

CANCEL_S: Final = 5.0  # how long work that missed its deadline may take to end after being cancelled

T = TypeVar("T")

_abandoned: set[asyncio.Future[object]] = set()  # keeps deaf work referenced until it ends; see `_abandon`


class Interrupted(PenstockError):
    """The settled work was cancelled by somebody who is not its caller. Whether it did anything is unknown."""

    kind = Kind.INTERNAL
    code = "interrupted"


class Outcome(Generic[T]):
    """How settled work ended: `error` or a value; and the cancellation that came meanwhile, if one did."""

    __slots__ = ("_value", "cancelled", "error")

    def __init__(self, value: T | None, error: Exception | None, cancelled: asyncio.CancelledError | None) -> None:
        self._value, self.error, self.cancelled = value, error, cancelled

    @property
    def value(self) -> T:
        assert self.error is None, "the work failed: it has no value"
        return cast(T, self._value)

    def hand_back(self) -> T:
        """The value; or raise the error; or raise the cancellation. An error beside a cancellation re-arms it."""
        if self.error is not None:
            if self.cancelled is not None:
                self.error.add_note("its caller was cancelled meanwhile; the cancellation follows")
                rearm_cancellation()
            raise self.error
        if self.cancelled is not None:
            raise self.cancelled
        return self.value


async def settle(aw: Awaitable[T], *, within_s: float, what: str) -> T:
    """Await `aw` to its end, whatever cancels the caller, then hand the cancellation back.

    Raises what `aw` raises, or DeadlinePassed naming `what` after `within_s` (plus at most CANCEL_S, while the late
    work reacts to being cancelled). A result that is there when the deadline passes is returned.
    """
    return (await settled(aw, within_s=within_s, what=what)).hand_back()


async def settled(aw: Awaitable[T], *, within_s: float, what: str) -> Outcome[T]:
    """Like `settle`, for callers that must know how the work ended before a cancellation goes on.

    Raises nothing, except what is no Exception (KeyboardInterrupt; a simulated process that was killed): that ends the
    program, not the work.
    """
    loop = asyncio.get_running_loop()
    work = loop.create_task(_bounded(aw, within_s, what), name=f"settle {what}")
    ended = Pulse()
    work.add_done_callback(lambda _: ended.fire())
    if isinstance(aw, CoroutineType):
        # Cancelled before its first step, a task never awaits what it was given. A no-op for what has ended.
        work.add_done_callback(lambda _: aw.close())
    give_up_at = loop.time() + within_s + CANCEL_S
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await ended.wait_for(work.done, until=give_up_at)
            break
        except asyncio.CancelledError as request:
            cancelled = request
    error = _error(work, within_s, what)
    return Outcome(work.result() if error is None else None, error, cancelled)


async def _bounded(aw: Awaitable[T], within_s: float, what: str) -> T:
    bound = within(within_s, what)
    try:
        async with bound:
            return await aw
    except DeadlinePassed:
        raise
    except Exception as error:
        if bound.passed:  # its answer to being cancelled: the deadline is the news, the answer its cause
            raise DeadlinePassed(what, within_s=within_s) from error
        raise


def _error(work: asyncio.Task[T], within_s: float, what: str) -> Exception | None:
    """Why `work` has no result; None when it has one."""
    if not work.done():
        _abandon(work)
        return DeadlinePassed(what, within_s=within_s, why=f"waited {within_s:g} s, and it ignores its cancellation")
    if work.cancelled():
        return Interrupted("interrupted", which=what, why="somebody else cancelled it")
    error = work.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


def _abandon(work: asyncio.Task[T]) -> None:
    """Let deaf work run on unwatched. Safe: its caller has an error, so what it may still do counts as undone."""
    kept = cast("asyncio.Future[object]", work)
    _abandoned.add(kept)
    kept.add_done_callback(_forget)


def _forget(work: asyncio.Future[object]) -> None:
    _abandoned.discard(work)
    if not work.cancelled():
        work.exception()  # seen, so that the loop does not report it a second time


def rearm_cancellation() -> None:
    """Request once more the cancellations that the current task received and swallowed, the count unchanged."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        task.uncancel()
        task.cancel()
