"""How everything that was opened is closed: last opened first, each within its bound, whatever happens meanwhile.

A closer runs although one before it raised or was late, and although whoever waits was cancelled: a context that is
over bounds what is waited for, never what is given back (a descriptor that is not closed outlives the reason to hurry).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import msgspec

from penstock.core.settle import rearm_cancellation, settle

CLOSER_S: Final = 20.0

T = TypeVar("T")
Close = Callable[[T], Awaitable[None]]


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """How a stop ended; a line each."""

    forced: tuple[str, ...] = ()  # sandboxes that did not end by themselves and are gone
    stuck: tuple[str, ...] = ()  # sandboxes that could not be verified gone
    errors: tuple[str, ...] = ()  # what closers raised

    def code(self, *, force_was_asked: bool = False) -> int:
        """Of the process that stopped, or that asked for it: 0: nothing failed, and nothing was forced unasked."""
        return int(bool(self.stuck or self.errors or (self.forced and not force_was_asked)))

    def lines(self) -> list[str]:
        return [
            *(f"forced: {line}" for line in self.forced),
            *(f"not verified gone: {line}" for line in self.stuck),
            *(f"failed: {line}" for line in self.errors),
        ]


class Closers(Generic[T]):
    """`run` is given how to close, and hands it to each. One run at a time; one that comes later finds less to do."""

    def __init__(self) -> None:
        self._closers: list[tuple[str, float, Close[T]]] = []

    def add(self, name: str, close: Close[T], *, within_s: float = CLOSER_S) -> None:
        self._closers.append((name, within_s, close))

    async def run(self, how: T) -> list[Exception]:
        """What they raised, in order, each with a note. A cancellation strikes at the caller's next await."""
        errors: list[Exception] = []
        cancelled = False
        while self._closers:
            name, within_s, close = self._closers.pop()
            try:
                await settle(close(how), within_s=within_s, what=f"closing the {name}")
            except asyncio.CancelledError:
                cancelled = True
            except Exception as error:
                error.add_note(f"while closing the {name}")
                errors.append(error)
        if cancelled:
            rearm_cancellation()
        return errors


def describe(error: BaseException) -> str:
    """One line: the leaves of nested groups, each with its notes."""
    notes = ", ".join(getattr(error, "__notes__", ()))
    if isinstance(error, BaseExceptionGroup):
        text = "; ".join(describe(each) for each in error.exceptions)
    else:
        text = str(error) or type(error).__name__
    return f"{notes}: {text}" if notes else text
