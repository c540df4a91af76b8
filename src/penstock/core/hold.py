"""A hold: one admitted piece of work, as its holder sees it. Only a Gate makes one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.core.deadlines import Pulse

if TYPE_CHECKING:
    from penstock.core.gate import Gate


class Notice:
    """Whether a holder was asked to leave. Level-triggered: a holder that looks late still sees it."""

    __slots__ = ("_changed", "_set")

    def __init__(self) -> None:
        self._set = False
        self._changed = Pulse()

    def is_set(self) -> bool:
        return self._set

    async def wait(self) -> None:
        """Return once notice is given. Unbounded: race it against the work it stops."""
        await self._changed.wait_for(self.is_set, until=None)

    def _give(self) -> None:
        self._set = True
        self._changed.fire()

    def _withdraw(self) -> None:
        self._set = False


class Hold:
    """One admitted piece of work. Give it back with `release()` or by leaving its `with` block."""

    __slots__ = ("_called", "_gate", "_on_force", "_released", "kind", "label", "notice")

    def __init__(self, gate: Gate, kind: str, label: str) -> None:
        self._gate = gate
        self.kind, self.label = kind, label
        self.notice = Notice()
        self._on_force: list[Callable[[], object]] = []
        self._called = 0  # how many of its callbacks the present force has begun
        self._released = False

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __str__(self) -> str:
        return f"{self.kind} {self.label}"

    @property
    def deadline(self) -> float | None:
        """Loop seconds by which to be gone; None without notice. May move nearer, never away."""
        return self._gate.deadline

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, never negative; None without notice."""
        at = self.deadline
        return None if at is None else max(0.0, at - asyncio.get_running_loop().time())

    def on_force(self, callback: Callable[[], object]) -> None:
        """Call `callback` (its awaitable is awaited) when force comes; after `release` never. Must be idempotent.

        Callbacks of one hold run in the order given. One that is registered while force runs is called by that force.
        """
        self._on_force.append(callback)
        self._gate._changed.fire()

    def child(self, label: str | None = None, *, kind: str | None = None) -> Hold:
        """A hold for the continuation of this work: not gated by a cordon, refused once force has begun.

        Taken before this one is released, it leaves no moment at which the gate looks empty (a start that becomes a
        life). Raises GateClosed also when this hold was given back: nothing admitted is left to continue.
        """
        return self._gate._admit_child(self, kind or self.kind, label or self.label)

    def release(self) -> None:
        """Idempotent."""
        if not self._released:
            self._released = True
            self._gate._released(self)
