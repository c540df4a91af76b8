"""A crew: the tasks of one owner, named, cancelled in order, never outliving it.

Why not `asyncio.TaskGroup`: it keeps its tasks in a set and cancels them in address order, so two runs of one seed
differ (measured on 3.11); and it waits for its tasks at the end of the body, while a daemon's tasks run until stopped.
A crew cancels in the reverse order of spawning, always. This file is the only one that creates tasks for others.

A task sees the context variables of whoever opened the crew, not of whoever spawned it: a detached task must not
inherit the request, or the hold, it happened to be started from.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, TypeVar

from penstock.core.deadlines import DeadlinePassed, Pulse, absorb_cancellation
from penstock.core.errors import Kind, PenstockError

STOP_S: Final = 30.0  # for all tasks of a crew to end once cancelled

T = TypeVar("T")


class CrewClosed(PenstockError):
    """Raised by `spawn` on a crew that is ending or has ended. Nothing was started."""

    kind = Kind.UNAVAILABLE
    code = "crew_closed"


class Crew:
    """`async with Crew("node") as crew`: at the end of the body, every task still running is cancelled and awaited.

    A task that fails cancels the others and the body; its error, with those of others that failed while ending, is
    raised as one ExceptionGroup (always a group, so that a handler right for two failures is right for one). With
    `on_error(name, error)` a failure is handed over instead and the crew goes on. A body's own error alone is raised
    as it is. Tasks that ignore their cancellation for `stop_s` are named in a DeadlinePassed inside the group.
    """

    def __init__(
        self, name: str, *, on_error: Callable[[str, BaseException], object] | None = None, stop_s: float = STOP_S
    ) -> None:
        self.name = name
        self._on_error, self._stop_s = on_error, stop_s
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order of spawning
        self._errors: list[BaseException] = []
        self._changed = Pulse()
        self._owner: asyncio.Task[Any] | None = None
        self._baseline = 0
        self._context = contextvars.Context()
        self._open = False
        self._failed = False
        self._in_body = False
        self._struck = False  # we cancelled the body

    async def __aenter__(self) -> Crew:
        assert self._owner is None, f"crew {self.name} was entered twice"
        self._owner = asyncio.current_task()
        assert self._owner is not None
        self._baseline = self._owner.cancelling()
        self._context = contextvars.copy_context()
        self._open = self._in_body = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._owner is not None
        self._open = self._in_body = False
        if self._struck:
            self._owner.uncancel()
        self._cancel(tuple(reversed(self._tasks)))
        cancelled = await self._await_end()
        if self._struck and kind is not asyncio.CancelledError and cancelled is None:
            await absorb_cancellation(self._owner, self._baseline)
        self._raise_errors(error)
        if cancelled is not None and self._owner.cancelling() > self._baseline:
            raise cancelled

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Start a task. It runs in the crew's context. Raises CrewClosed when the crew is ending."""
        if not self._open or self._failed:
            coro.close()
            raise CrewClosed("crew takes no more tasks", which=f"{name} in {self.name}", why="it is ending")
        task = asyncio.get_running_loop().create_task(coro, name=name, context=self._context.copy())
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def cancel_all(self) -> asyncio.Future[None]:
        """Cancel every task in reverse order of spawning, except the caller. The crew stays open.

        Returns at once; awaiting what it returns waits for their end.
        """
        current = asyncio.current_task()
        tasks = [task for task in reversed(self._tasks) if task is not current]
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        left = len(tasks)

        def one_ended(_: asyncio.Task[Any]) -> None:
            nonlocal left
            left -= 1
            if not left and not ended.done():
                ended.set_result(None)

        if not tasks:
            ended.set_result(None)
        for task in tasks:
            task.add_done_callback(one_ended)
        self._cancel(tuple(tasks))
        return ended

    async def join(self) -> None:
        """Wait until no task is left. Unbounded: put it inside `within`."""
        await self._changed.wait_for(lambda: not self._tasks, until=None)

    def names(self) -> tuple[str, ...]:
        """Of the running tasks, in order of spawning."""
        return tuple(task.get_name() for task in self._tasks)

    def _cancel(self, tasks: tuple[asyncio.Task[Any], ...]) -> None:
        for task in tasks:
            task.cancel(f"crew {self.name} is ending")

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        self._changed.fire()
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._take_error(task.get_name(), error)

    def _take_error(self, name: str, error: BaseException) -> None:
        if self._on_error is not None:
            try:
                self._on_error(name, error)
                return
            except Exception as second:
                second.add_note(f"raised by on_error of crew {self.name}")
                self._errors.append(second)
        error.add_note(f"in task {name!r} of crew {self.name}")
        self._errors.append(error)
        if self._failed:
            return
        self._failed = True
        self._cancel(tuple(reversed(self._tasks)))
        if self._in_body and self._owner is not None and not self._owner.done():
            self._struck = True
            self._owner.cancel(f"a task of crew {self.name} failed")

    async def _await_end(self) -> asyncio.CancelledError | None:
        """Wait for every task, remembering cancellations of the owner. Bounded by `stop_s`."""
        until = asyncio.get_running_loop().time() + self._stop_s
        cancelled: asyncio.CancelledError | None = None
        while True:
            try:
                if not await self._changed.wait_for(lambda: not self._tasks, until=until):
                    self._errors.append(
                        DeadlinePassed(f"the end of {', '.join(self.names())} in {self.name}", within_s=self._stop_s)
                    )
                return cancelled
            except asyncio.CancelledError as error:
                cancelled = error

    def _raise_errors(self, body: BaseException | None) -> None:
        errors, self._errors = self._errors, []
        if not errors:
            return
        if body is not None and not isinstance(body, asyncio.CancelledError):
            errors.insert(0, body)
        raise BaseExceptionGroup(f"crew {self.name} failed", errors) from None
