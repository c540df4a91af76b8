"""Virtual time: an asyncio loop whose selector advances a clock instead of sleeping.

The seam is under asyncio, so the code under test just sleeps. A `SelectorEventLoop` asks its selector to wait until the
next timer; ours moves the clock there and returns at once. When nothing is ready and no timer is set, the world would
sleep for ever: that is a Deadlock, and it names every task and the line it waits at.

asyncio's ready queue and timers are ordered, so equal programs run equally, provided that nothing reaches in from
outside: real descriptors and threads are refused. `tests/unit/core/test_loop.py` fails loudly should a Python release
change the seam.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import random
import select
import selectors
from collections.abc import Callable, Coroutine, Mapping
from types import CoroutineType
from typing import Any, Final, NoReturn, TypeVar

from penstock.core.errors import Kind, PenstockError

EPOCH: Final = 1_767_225_600.0  # wall seconds at virtual zero: 2026-01-01 00:00 UTC
# Timers this near are due. asyncio's own 1e-9 is lost in the rounding beyond 9e6 s: a timer due now never fires there.
RESOLUTION_S: Final = 1e-7
STALL_SELECTS_MAX: Final = 1_000_000  # passes of the loop at one virtual instant before it counts as a livelock

# Which process of the world runs: inherited by its tasks, and by what its connections call. "" is the world itself.
PROCESS: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("simulated process", default="")

T = TypeVar("T")


class Deadlock(PenstockError):
    """Nothing can run and no timer is set. `which` is the seed; the text lists every task and where it waits."""

    kind = Kind.INTERNAL
    code = "deadlock"


class Livelock(PenstockError):
    """Tasks run and run while virtual time stands still: somebody polls without sleeping."""

    kind = Kind.INTERNAL
    code = "livelock"


class OutsideWorld(PenstockError):
    """A real descriptor or a thread inside a simulation: its timing could not be replayed."""

    kind = Kind.INTERNAL
    code = "outside_world"


class _TimeSelector(selectors.BaseSelector):
    """Registers one descriptor, the loop's own wake-up pipe, and never looks at it: nobody outside writes to it.

    Only descriptors of inotify are let in beside it: what they tell was done by this very thread a moment ago, so it is
    as repeatable as the rest.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.on_idle: Callable[[], None] = lambda: None
        self.on_stall: Callable[[], None] = lambda: None
        self._keys: dict[Any, selectors.SelectorKey] = {}
        self._selects = 0
        self._own: dict[int, selectors.SelectorKey] = {}  # by descriptor, inotify's

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if self._keys:
            if not _is_inotify(fd):
                raise OutsideWorld("real descriptor in a simulation", which=repr(fileobj), now="use a simulated stream")
            self._own[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(fileobj)
        self._own.pop(key.fd, None)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._own:
            ready, _, _ = select.select(sorted(self._own), (), (), 0)
            if ready:
                return [(self._own[fd], selectors.EVENT_READ) for fd in ready]
        if timeout is None:
            self.on_idle()
        elif timeout > 0:
            self.now += timeout
            self._selects = 0
        else:
            self._selects += 1
            if self._selects > STALL_SELECTS_MAX:
                self._selects = 0
                self.on_stall()
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in virtual seconds from 0. `rng` is the world's only source of chance."""

    def __init__(self, seed: int) -> None:
        self._time = _TimeSelector()
        super().__init__(self._time)
        self._clock_resolution = RESOLUTION_S
        self.seed = seed
        self.rng = random.Random(seed)
        self._tasks_in_order: dict[asyncio.Task[Any], str] = {}  # with the process each belongs to
        self._time.on_idle = self._raise_deadlock
        self._time.on_stall = self._raise_livelock
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._time.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:  # type: ignore[override]
        raise OutsideWorld("thread in a simulation", which=getattr(func, "__qualname__", repr(func)))

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Every unfinished task, oldest first."""
        return list(self._tasks_in_order)

    def process_of(self, task: asyncio.Task[Any]) -> str:
        """The process an unfinished task belongs to."""
        return self._tasks_in_order.get(task, "")

    def _raise_deadlock(self) -> None:
        raise Deadlock("nothing can happen any more", which=f"seed {self.seed}", why=self._describe())

    def _raise_livelock(self) -> None:
        raise Livelock("time stands still", which=f"seed {self.seed}", why=self._describe())

    def _describe(self) -> str:
        lines = [f"  {task.get_name()} waits at {_place(task.get_coro())}" for task in self.tasks()]
        return "\n".join((f"at virtual {self._time.now:.6f} s, {len(lines)} tasks:", *lines))


def _make_task(loop: asyncio.AbstractEventLoop, coro: Any, *, context: Any = None, **options: Any) -> asyncio.Task[Any]:
    """Keep tasks in order of birth: asyncio's own register is a set, and walking it would follow addresses."""
    assert isinstance(loop, VirtualLoop)
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, context=context, **options)
    loop._tasks_in_order[task] = PROCESS.get() if context is None else context.get(PROCESS, "")
    task.add_done_callback(lambda done: loop._tasks_in_order.pop(done, None))
    return task


class SimClock:
    """The `core.clock.Clock` of a world. Wall time can be made to jump; the loop's clock cannot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, epoch: float = EPOCH) -> None:
        self._loop, self._offset = loop, epoch

    def wall(self) -> float:
        return self._offset + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()

    def jump(self, seconds: float) -> None:
        """Step the wall clock, either way."""
        self._offset += seconds


def run(coro: Coroutine[Any, Any, T], seed: int) -> T:
    """Run `coro` to its end in virtual time and return what it returns.

    Afterwards what it left running is cancelled, oldest last, and given its turn. Whatever is raised carries a note
    with the seed and the virtual time. Inside, `asyncio.get_running_loop()` is the VirtualLoop; its `rng` is seeded.
    """
    loop = VirtualLoop(seed)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coro)
    except BaseException as error:
        error.add_note(f"seed {seed}, at virtual {loop.time():.6f} s")
        raise
    finally:
        _wind_up(loop)
        asyncio.set_event_loop(None)
        loop.close()


def _wind_up(loop: VirtualLoop) -> None:
    for task in reversed(loop.tasks()):
        task.cancel("the simulation ended")
    for task in reversed(loop.tasks()):
        # Safe: the world has ended, and its result or error is already on its way to the caller.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.run_until_complete(loop.shutdown_asyncgens())


def start_process(name: str, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run `coro` as the first task of a process of the world. Nobody is above it: who starts it watches its end."""
    context = contextvars.copy_context()
    context.run(PROCESS.set, name)
    return asyncio.get_running_loop().create_task(coro, name=name, context=context)


def _is_inotify(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify"


def _place(coro: Any) -> str:
    """file:line of the innermost await of a suspended coroutine that is not asyncio's own."""
    place = "?"
    while isinstance(coro, CoroutineType):
        frame = coro.cr_frame
        if frame is None:
            break
        if "/asyncio/" not in frame.f_code.co_filename:
            place = f"{frame.f_code.co_filename.rpartition('/penstock/')[2]}:{frame.f_lineno}"
        coro = coro.cr_await
    return place
