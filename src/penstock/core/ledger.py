"""What one owner has taken, in order, so that all of it is given back, in reverse, whatever happens in between.

This is `AsyncExitStack` plus five promises:

1. The intent is in the book before the object exists.
2. An acquire is settled: cancelled half-way it is finished, then undone. Nothing is half recorded.
3. Undo goes last in, first out; each is settled and bounded, so a second cancellation cannot abort it.
4. Errors are gathered into one group, each with a note naming its label; the first is not lost to the second.
5. A failed undo pins everything beneath it: a slot is not reused while its cgroup still has a process.

An entry is released in the book only after its undo returned, and an undo returns only when absence was verified
(absent is success). So after a crash, `adopt` rebuilds the ledger from the book alone: an entry with an intent and no
`held` may or may not exist, and is undone like the others.

Refused: undo closures pickled into the book (a new version could not read them); instead an entry carries a kind and
string arguments, and whoever adopts brings one undo per kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, Protocol, TypeVar

from penstock.core.deadlines import DeadlinePassed
from penstock.core.errors import Kind, PenstockError
from penstock.core.settle import CANCEL_S, Outcome, settled

ENTRIES_MAX: Final = 256  # a sandbox takes about ten
ACQUIRE_S: Final = 60.0  # bound of an acquire whose caller names none
UNDO_S: Final = 30.0

T = TypeVar("T")


class State(Enum):
    INTENT = "intent"  # about to be taken: may or may not exist
    HELD = "held"  # exists
    RELEASED = "released"  # verified gone


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the book. `kind` and `args` are enough to undo it in another process."""

    label: str
    state: State
    kind: str = ""
    args: Mapping[str, str] = field(default_factory=dict)


class Book(Protocol):
    """Where entries survive the process. Appends are few and small, hence synchronous."""

    def append(self, entry: Entry) -> None:
        """On disk (page cache is enough against a crash of the process) when it returns. Raises OSError."""


class LedgerClosed(PenstockError):
    """Raised by `take` once unwinding has begun. Nothing was taken."""

    kind = Kind.UNAVAILABLE
    code = "ledger_closed"


class NoUndo(PenstockError):
    """An adopted entry's kind is not known here (written by a newer version?). It pins what is beneath it."""

    kind = Kind.INTERNAL
    code = "no_undo"


class UnwindFailed(ExceptionGroup[Exception]):
    """Raised by `unwind`. `pinned`: the labels not released, the one whose undo failed first, then what it pins.

    The ledger keeps them. The catcher quarantines the owner and unwinds again later.
    """

    pinned: tuple[str, ...]

    def __new__(cls, message: str, errors: Sequence[Exception], pinned: tuple[str, ...] = ()) -> UnwindFailed:
        self = super().__new__(cls, message, errors)
        self.pinned = pinned
        return self

    def derive(self, excs: Sequence[Exception]) -> UnwindFailed:  # type: ignore[override]
        return UnwindFailed(self.message, excs, self.pinned)


@dataclass(slots=True)
class _Held:
    entry: Entry
    undo: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerStatistics:
    owner: str
    entries: tuple[tuple[str, str], ...]  # (label, state), in order of taking
    pinned: tuple[str, ...]
    unwinding: bool


class Ledger:
    """Everything `owner` holds. One task takes at a time; any number may unwind (they join)."""

    def __init__(self, owner: str, book: Book, *, undo_s: float = UNDO_S) -> None:
        self.owner = owner
        self._book, self._undo_s = book, undo_s
        self._stack: list[_Held] = []
        self._unwinding: asyncio.Future[None] | None = None
        self._closed = False
        self._taking = False
        self.pinned: tuple[str, ...] = ()  # as of the last unwind

    async def take(
        self,
        label: str,
        acquire: Callable[[], Awaitable[T]],
        undo: Callable[[], Awaitable[None]],
        *,
        kind: str = "",
        args: Mapping[str, str] | None = None,
        within_s: float = ACQUIRE_S,
    ) -> T:
        """Write the intent, acquire, write `held`, and return what `acquire` gave.

        `label` is unique among what is held; `kind` (default: the label's first word) and `args` are for `adopt`.
        `acquire` gets `within_s`. If it fails, its undo runs before its error is raised. If the caller is cancelled,
        the acquire is finished and undone, then the cancellation goes on. If that undo fails too, the entry stays, the
        error says so in a note, and `unwind` tries again.
        Raises LedgerClosed, what `acquire` or the book raised, or DeadlinePassed.
        """
        self._check(label)
        entry = Entry(label, State.INTENT, kind or label.split(maxsplit=1)[0], dict(args or {}))
        self._book.append(entry)
        held = _Held(entry, undo)
        self._stack.append(held)
        self._taking = True
        try:
            outcome = await settled(_call(acquire), within_s=within_s, what=f"taking {label} for {self.owner}")
        finally:
            self._taking = False
        if outcome.error is None and outcome.cancelled is None:
            try:
                self._write(held, State.HELD)
            except Exception as error:
                outcome = Outcome(None, error, None)
            else:
                return outcome.value
        return await self._take_back(held, outcome)

    async def take_now(
        self, label: str, acquire: Callable[[], T], undo: Callable[[], Awaitable[None]], *, kind: str = ""
    ) -> T:
        """As `take`, of what is there without waiting: nothing can cancel it half-way, so no task is made to settle it.

        Waits only for its undo, when `acquire` or the book raised. Four fifths of what `take` costs are saved.
        """
        self._check(label)
        entry = Entry(label, State.INTENT, kind or label.split(maxsplit=1)[0])
        self._book.append(entry)
        held = _Held(entry, undo)
        self._stack.append(held)
        try:
            value = acquire()
            self._write(held, State.HELD)
        except Exception as error:
            return await self._take_back(held, Outcome(None, error, None))
        return value

    async def unwind(self, within_s: float) -> None:
        """Undo everything, last first. Returns when all is verified gone and so written.

        Bounded by `within_s` in all and `undo_s` each. A failed undo, or the end of the time, pins the rest: raises
        UnwindFailed, and a later call goes on from there. Finishes even if cancelled, then hands the cancellation back.
        A second caller joins the first. No take is admitted afterwards.
        """
        self._closed = True
        if self._unwinding is not None:
            await asyncio.shield(self._unwinding)
            return
        assert not self._taking, f"{self.owner} unwinds while it takes"
        finished = self._unwinding = asyncio.get_running_loop().create_future()
        finished.add_done_callback(_seen)
        # The bound is a net: `_unwind` keeps `within_s` by itself, and what ignores it for CANCEL_S is given up.
        bound_s = within_s + 2 * CANCEL_S
        try:
            outcome = await settled(self._unwind(within_s), within_s=bound_s, what=f"unwinding {self.owner}")
        except BaseException:
            finished.cancel()
            raise
        finally:
            self._unwinding = None
        if outcome.error is None:
            finished.set_result(None)
        else:
            finished.set_exception(outcome.error)
        outcome.hand_back()

    def adopt(
        self, entries: Iterable[Entry], undos: Mapping[str, Callable[[Mapping[str, str]], Awaitable[None]]]
    ) -> tuple[str, ...]:
        """Rebuild from a book after a crash. `undos` maps a kind to its undo, called with the entry's arguments.

        Nothing is written. Returns the labels now in the ledger, in order of taking: held, or possibly existing. A kind
        without an undo is adopted all the same; undoing it raises NoUndo, which pins it and what is beneath.
        """
        assert not self._stack, f"{self.owner} already holds {self.labels()}"
        found: dict[str, Entry] = {}
        for entry in entries:
            if entry.state is State.RELEASED:
                found.pop(entry.label, None)
            elif entry.label in found:
                known = found[entry.label]
                found[entry.label] = replace(known, state=entry.state)
            else:
                found[entry.label] = entry
        self._stack = [_Held(entry, self._undo_of(entry, undos)) for entry in found.values()]
        return self.labels()

    def labels(self) -> tuple[str, ...]:
        """In order of taking."""
        return tuple(held.entry.label for held in self._stack)

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(
            owner=self.owner,
            entries=tuple((held.entry.label, held.entry.state.value) for held in self._stack),
            pinned=self.pinned,
            unwinding=self._unwinding is not None,
        )

    # -- private -----------------------------------------------------------------------------------------------------

    def _check(self, label: str) -> None:
        assert not self._taking, f"{self.owner} takes {label} while it takes another"
        assert label.strip(), "a label has a word"
        assert label not in self.labels(), f"{self.owner} already holds {label}"
        assert len(self._stack) < ENTRIES_MAX, f"{self.owner} holds {ENTRIES_MAX} objects"
        if self._closed:
            raise LedgerClosed("ledger takes nothing more", which=f"{label} for {self.owner}", why="it was unwound")

    def _write(self, held: _Held, state: State) -> None:
        entry = replace(held.entry, state=state)
        self._book.append(entry)
        held.entry = entry

    async def _take_back(self, held: _Held, outcome: Outcome[T]) -> T:
        """Undo one entry whose take did not succeed, then raise why it did not."""
        error, cancelled = await self._undo(held, self._undo_s)
        if held.entry.state is State.RELEASED:
            self._stack.remove(held)
        ended: Outcome[T] = Outcome(None, outcome.error, outcome.cancelled or cancelled)
        if error is not None:
            (ended.error or ended.cancelled or error).add_note(f"undoing {held.entry.label} failed too: {error!r}")
        return ended.hand_back()

    async def _unwind(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        errors: list[Exception] = []
        while self._stack:
            held = self._stack[-1]
            left_s = until - loop.time()
            if left_s > 0:
                error, _ = await self._undo(held, min(self._undo_s, left_s))
            else:
                error = DeadlinePassed(f"the turn of {held.entry.label}", within_s=within_s)
            if error is not None:
                error.add_note(f"undoing {held.entry.label} of {self.owner}")
                errors.append(error)
            if held.entry.state is not State.RELEASED:
                break
            self._stack.pop()
        self.pinned = tuple(reversed(self.labels()))
        if errors:
            raise UnwindFailed(f"unwinding {self.owner}", errors, self.pinned)

    async def _undo(self, held: _Held, within_s: float) -> tuple[Exception | None, asyncio.CancelledError | None]:
        """Run the undo and write the release. Raises nothing; the entry's state says whether the object is gone."""
        what = f"undo of {held.entry.label} for {self.owner}"
        outcome = await settled(_call(held.undo), within_s=within_s, what=what)
        if outcome.error is not None:
            return outcome.error, outcome.cancelled
        released = held.entry = replace(held.entry, state=State.RELEASED)
        try:
            self._book.append(released)
        except Exception as error:
            # The object is verified gone; only the book does not say so. After a crash it is undone once more.
            return error, outcome.cancelled
        return None, outcome.cancelled

    def _undo_of(
        self, entry: Entry, undos: Mapping[str, Callable[[Mapping[str, str]], Awaitable[None]]]
    ) -> Callable[[], Awaitable[None]]:
        undo = undos.get(entry.kind)

        async def run() -> None:
            if undo is None:
                raise NoUndo("no undo for this kind", which=entry.label, why=entry.kind)
            await undo(entry.args)

        return run


async def _call(function: Callable[[], Awaitable[T]]) -> T:
    """So that what `function` raises before its first await is settled like the rest."""
    return await function()


def _seen(future: asyncio.Future[None]) -> None:
    """Mark the outcome as retrieved: its leader raises it, joiners may be none."""
    if not future.cancelled():
        future.exception()
