"""Pools of single-use resources made ahead of need: network slots, and disks of the default size.

A pooled object has a number from a claimed block. Its record is on disk before it exists and unlinked after its
absence was verified, and only then may the number be used again. What comes back is destroyed, never scrubbed: 0.9 ms
to make a slot anew, against proving that nothing of its last tenant is left in it.

Refused designs: scrubbing (conntrack, routes, neighbours and counters each need their own proof); one pool of pairs
(an odd disk size would throw a good disk away).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Final, Generic, TypeVar

import msgspec

from penstock.core.crew import Crew
from penstock.core.deadlines import backoff_s, within
from penstock.model.errors import NoFreeSlot, PoolClosed
from penstock.node.ports import Files
from penstock.node.record import Lent, Pooled, encode

T = TypeVar("T")

READY_DEFAULT: Final = 32  # about 0.6 MB of kernel memory per slot
MAKING_MAX_DEFAULT: Final = 4
REFILL_QUIET_S: Final = 0.05  # since the last take, before one more is made ahead of need
OPENING_COUNT: Final = 8  # the first of a pool's life are made at once; the others
OPENING_QUIET_S: Final = 1.0  # after its opening, when the rest of the daemon has started, too
MENDING_MAX: Final = 4  # destroyed at once of what nobody waits for: a sandbox's own release must not queue behind it
CLEARING_MAX: Final = 16  # destroyed at once by a closing pool: the kernel takes many links away as fast as one
RETRY_BASE_S: Final = 0.1
RETRY_CAP_S: Final = 10.0


class State(Enum):
    MAKING = "making"
    READY = "ready"
    TAKEN = "taken"
    RETURNING = "returning"
    BROKEN = "broken"  # to be destroyed, not verified yet: its number stays out of use until a retry succeeds
    PINNED = "pinned"  # perhaps somebody's whom this daemon does not understand: never touched


_ALL_OUT: Final = (State.MAKING, State.RETURNING, State.TAKEN, State.BROKEN)


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for metrics, `penstock why` and tests. Counts of numbers, except where the unit says otherwise."""

    kind: str
    ready: int
    making: int
    taken: int
    returning: int
    broken: int
    pinned: int
    free: int  # numbers nothing exists for
    waiting: int  # takers
    made_total: int
    destroyed_total: int
    refused_total: int
    make_failures_total: int


class Pool(Generic[T]):
    """Ready-made `T`s, each handed out once.

    `make(number)` and `destroy(number)` are the port's two verbs; destroy treats absent as success and returns only
    after verifying. `numbers` is the claimed block. At most `making_max` are made at once, for takers that wait;
    `ready_target` are kept ready, made one after the other and while nobody takes: a make costs the machine as much as
    a start, and in a burst of creates the sandboxes come first. `files` keeps a record named `<kind><number>` for each.
    Not thread-safe: one loop.
    """

    def __init__(
        self,
        *,
        kind: str,
        numbers: Iterable[int],
        make: Callable[[int], Awaitable[T]],
        destroy: Callable[[int], Awaitable[None]],
        files: Files,
        crew: Crew,
        rng: random.Random,
        ready_target: int = READY_DEFAULT,
        making_max: int = MAKING_MAX_DEFAULT,
    ) -> None:
        self.kind = kind
        self._make, self._destroy, self._files, self._crew, self._rng = make, destroy, files, crew, rng
        self._ready_target, self._making_max = ready_target, making_max
        self._free: deque[int] = deque(numbers)
        self._numbers = frozenset(self._free)
        self._states: dict[int, State] = {}
        self._counts = dict.fromkeys(State, 0)  # kept beside _states: a take must not cost what exists
        self._values: dict[int, T] = {}  # of READY and TAKEN
        self._ready: deque[int] = deque()
        self._waiters: deque[tuple[asyncio.Future[int], str]] = deque()
        self._returns: dict[int, asyncio.Future[None]] = {}
        self._owners: dict[int, str] = {}
        self._owned: dict[str, set[int]] = {}
        self._changed = asyncio.Event()  # set at each change while somebody closes
        self._mending = asyncio.Semaphore(MENDING_MAX)
        self._failures = 0  # makes that failed in a row
        self._opened = False
        self._quiet_from = 0.0  # of the loop's clock: from then on one is made ahead of need
        self._resting = False  # a refill is put off until then
        self._closed = False
        self._made = self._destroyed = self._refused = self._make_failures = 0

    def name(self, number: int) -> str:
        """Of the record, and of a disk image."""
        return f"{self.kind}{number}"

    def open(self) -> None:
        """Start filling. Call after `reclaim` and `condemn` told what an earlier daemon left."""
        self._opened = True
        self._quiet_from = asyncio.get_running_loop().time() + OPENING_QUIET_S
        self._refill()

    def reclaim(self, number: int, value: T | None, *, owner: str) -> None:
        """An object that a sandbox of an earlier daemon holds. Without a value it can only be given back."""
        self._claim(number, State.TAKEN)
        if value is not None:
            self._values[number] = value
        self._own(number, owner)

    def condemn(self, number: int) -> None:
        """An object nobody holds any more: destroyed in the background, its number out of use until then."""
        self._claim(number, State.BROKEN)
        self._crew.spawn(self._mend(number), name=f"{self.kind} {number} mend")

    def hold_back(self, number: int) -> None:
        """Never use `number` in this life: somebody this daemon does not understand may have it."""
        self._claim(number, State.PINNED)

    @property
    def at_hand(self) -> bool:
        """Whether `take_nowait` would give one, with nobody waiting before."""
        return bool(self._ready) and not self._waiters and not self._closed

    def take_nowait(self, owner: str) -> tuple[int, T]:
        """A ready one, now. Raises NoFreeSlot when none is ready, PoolClosed when closed, OSError on a full disk."""
        if self._closed:
            raise self._closed_error()
        if not self._ready:
            raise self._exhausted("none is ready")
        number = self._ready[0]
        self._lend(number, owner)
        self._ready.popleft()
        self._refill()
        return number, self._values[number]

    async def take(self, owner: str, *, within_s: float) -> tuple[int, T]:
        """A ready one, waiting in order while one can still become ready.

        Raises NoFreeSlot at once when every number is in use, PoolClosed, the error of a failed make, or
        DeadlinePassed. If cancelled, nothing stays taken.
        """
        if self.at_hand:
            return self.take_nowait(owner)
        if self._closed:
            raise self._closed_error()
        coming = len(self._free) + self._counts[State.MAKING] + self._counts[State.RETURNING]
        if coming <= len(self._waiters):
            self._refused += 1
            raise self._exhausted(f"all {len(self._numbers)} are in use")
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append((waiter, owner))
        self._refill()
        try:
            async with within(within_s, f"a ready {self.kind} for {owner}"):
                number = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._put_back_unused(waiter.result())
            else:
                waiter.cancel()
                self._waiters = deque(entry for entry in self._waiters if entry[0] is not waiter)
            raise
        return number, self._values[number]

    async def give_back(self, number: int) -> None:
        """Destroy it and free its number. Returns when its absence is verified; already destroyed is success.

        A second call while the first runs waits for the same outcome. Raises what `destroy` raised: the number stays
        taken. On a closed pool it is destroyed all the same, then PoolClosed is raised, joined with any error.
        """
        running = self._returns.get(number)
        if running is not None:
            await asyncio.shield(running)
            return
        try:
            if number in self._states:
                await self._return(number)
        except Exception as error:
            if self._closed:
                raise ExceptionGroup(f"{self.kind} {number} came back", [self._closed_error(), error]) from None
            raise
        if self._closed:
            raise self._closed_error()

    async def close(self, *, within_s: float, leave_taken: bool = False) -> None:
        """Stop making, destroy what lies ready, and wait until everything taken came back. Idempotent.

        With `leave_taken`, what sandboxes hold stays theirs (a daemon that stops, not a node that ends).
        What could not be destroyed is tried again meanwhile. Raises DeadlinePassed: what is still out stays recorded,
        and the next daemon comes back for it.
        """
        self._closed = True
        self._opened = False
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(self._closed_error())
        clearing = [self._crew.spawn(self._clear(), name=f"{self.kind} pool clearing") for _ in range(CLEARING_MAX)]
        for each in clearing:
            await each
        busy = (State.MAKING, State.RETURNING) if leave_taken else _ALL_OUT
        async with within(within_s, f"the return of every {self.kind}"):
            while any(self._counts[state] for state in busy):
                self._changed.clear()
                await self._changed.wait()

    def owned_by(self, owner: str) -> list[int]:
        """What `owner` holds and has not given back, in numeric order."""
        return sorted(self._owned.get(owner, ()))

    def owns(self, record: str) -> bool:
        """Whether that record is of something this pool makes, lends or destroys; what it holds back is not."""
        digits = record.removeprefix(self.kind)
        state = self._states.get(int(digits)) if digits.isdigit() and digits != record else None
        return state is not None and state is not State.PINNED

    def value(self, number: int) -> T:
        return self._values[number]

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            kind=self.kind,
            ready=len(self._ready),
            making=self._counts[State.MAKING],
            taken=self._counts[State.TAKEN],
            returning=self._counts[State.RETURNING],
            broken=self._counts[State.BROKEN],
            pinned=self._counts[State.PINNED],
            free=len(self._free),
            waiting=len(self._waiters),
            made_total=self._made,
            destroyed_total=self._destroyed,
            refused_total=self._refused,
            make_failures_total=self._make_failures,
        )

    # -- filling --

    def _refill(self) -> None:
        if not self._opened:
            return
        while self._free and self._counts[State.MAKING] < self._making_max and self._awaited() > 0:
            self._begin_make()
        if self._free and not self._counts[State.MAKING] and self._short() > 0:
            quiet_in_s = self._quiet_from - asyncio.get_running_loop().time()
            if quiet_in_s <= 0 or self._made < OPENING_COUNT:
                self._begin_make()
            elif not self._resting:
                self._resting = True
                self._crew.spawn(self._rest(quiet_in_s), name=f"{self.kind} refill")

    async def _rest(self, for_s: float) -> None:
        await asyncio.sleep(for_s)
        self._resting = False
        self._refill()

    def _begin_make(self) -> None:
        number = self._free.popleft()
        self._set_state(number, State.MAKING)
        self._crew.spawn(self._make_one(number), name=f"{self.kind} {number} make")

    def _awaited(self) -> int:
        """How many more should be on their way for takers that wait."""
        return len(self._waiters) - len(self._ready) - self._counts[State.MAKING]

    def _short(self) -> int:
        """How many more should lie ready. After a failure only takers drive tries; `_calm` drives the rest."""
        return 0 if self._failures else self._ready_target - len(self._ready)

    async def _make_one(self, number: int) -> None:
        assert self._states[number] is State.MAKING
        try:
            self._files.append_record(self.name(number), encode(Pooled(kind=self.kind, number=number)))
            value = await self._make(number)
        except Exception as error:
            await self._make_failed(number, error)
            return
        self._failures = 0
        self._made += 1
        self._values[number] = value
        self._set_state(number, State.READY)
        if self._closed:
            await self._discard(number)
            return
        self._offer(number)
        self._refill()

    async def _make_failed(self, number: int, error: Exception) -> None:
        self._failures += 1
        self._make_failures += 1
        error.add_note(f"while making {self.kind} {number}")
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)
                break
        first = self._failures == 1
        await self._discard(number)
        if first and not self._closed:
            self._crew.spawn(self._calm(), name=f"{self.kind} pool calm")
        self._refill()

    async def _calm(self) -> None:
        """After failures, probe with back-off until one make works; only then fill ahead of need again."""
        while self._failures and not self._closed:
            await asyncio.sleep(backoff_s(self._failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))
            if self._failures and not self._closed and self._free and self._counts[State.MAKING] < self._making_max:
                number = self._free.popleft()
                self._set_state(number, State.MAKING)
                await self._make_one(number)

    async def _clear(self) -> None:
        """One of those that destroy what lies ready in a closing pool."""
        while self._ready:
            await self._discard(self._ready.popleft())

    async def _discard(self, number: int) -> None:
        """Destroy what nobody has. Where that fails, somebody keeps trying."""
        try:
            await self._return(number)
        except Exception:
            # Safe: the number stays BROKEN and recorded, and `_mend` tries again until its absence is verified.
            self._crew.spawn(self._mend(number), name=f"{self.kind} {number} mend")

    async def _mend(self, number: int) -> None:
        """Retry a failed destruction for ever, each time later: the kernel object is ours to remove."""
        attempt = 0
        while self._states.get(number) is State.BROKEN:
            try:
                async with self._mending:
                    await self._return(number)
            except Exception:
                attempt += 1  # Safe: it stays BROKEN, is counted in statistics(), and we come again.
                await asyncio.sleep(backoff_s(attempt, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))

    # -- hand over and return --

    def _offer(self, number: int) -> None:
        """Give a READY one to the longest waiting taker, or lay it ready."""
        while self._waiters and not self._closed:
            waiter, owner = self._waiters.popleft()
            if waiter.done():
                continue
            try:
                self._lend(number, owner)
            except OSError as error:
                waiter.set_exception(error)
                continue
            waiter.set_result(number)
            return
        self._ready.append(number)

    def _lend(self, number: int, owner: str) -> None:
        assert self._states[number] is State.READY and number not in self._owners
        self._files.append_record(self.name(number), encode(Lent(owner=owner)))
        self._own(number, owner)
        self._set_state(number, State.TAKEN)
        self._quiet_from = max(self._quiet_from, asyncio.get_running_loop().time() + REFILL_QUIET_S)

    def _put_back_unused(self, number: int) -> None:
        """A taker was cancelled between hand-over and waking: nobody used it, so it is as good as new."""
        self._disown(number)
        self._set_state(number, State.READY)
        try:
            self._files.append_record(self.name(number), encode(Lent(owner="")))
        except OSError:
            # Safe: the record names an owner that never recorded it; a restart finds that and destroys it.
            pass
        self._offer(number)

    async def _return(self, number: int) -> None:
        """Destroy `number`, verified; then forget it. Single-flight."""
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = self._states[number]
        self._returns[number] = outcome
        self._set_state(number, State.RETURNING)
        try:
            await self._destroy(number)
            self._files.remove_record(self.name(number))
        except BaseException as error:
            # A taken one stays its owner's to return; any other is nobody's but ours, and `_mend` comes back for it.
            self._set_state(number, State.TAKEN if before is State.TAKEN else State.BROKEN)
            error.add_note(f"while destroying {self.kind} {number}")
            outcome.set_exception(error if isinstance(error, Exception) else self._closed_error())
            outcome.exception()  # retrieved: nobody may be waiting for it
            raise
        else:
            self._forget(number)
            outcome.set_result(None)
        finally:
            del self._returns[number]
            self._refill()

    def _forget(self, number: int) -> None:
        self._set_state(number, None)
        self._values.pop(number, None)
        self._disown(number)
        self._destroyed += 1
        if number in self._numbers:
            self._free.append(number)

    # -- small things --

    def _claim(self, number: int, state: State) -> None:
        """Take `number` out of the free ones; a number outside the block keeps its own state all the same."""
        assert number not in self._states
        if number in self._numbers:
            self._free.remove(number)
        self._set_state(number, state)

    def _own(self, number: int, owner: str) -> None:
        self._owners[number] = owner
        self._owned.setdefault(owner, set()).add(number)

    def _disown(self, number: int) -> None:
        owner = self._owners.pop(number, None)
        if owner is not None:
            self._owned[owner].discard(number)
            if not self._owned[owner]:
                del self._owned[owner]

    def _set_state(self, number: int, state: State | None) -> None:
        before = self._states.pop(number, None)
        if before is not None:
            self._counts[before] -= 1
        if state is not None:
            self._states[number] = state
            self._counts[state] += 1
        self._changed.set()

    def _exhausted(self, why: str) -> NoFreeSlot:
        return NoFreeSlot(f"no free {self.kind}", why=why, now="retry when a sandbox has ended", retry_after_s=1.0)

    def _closed_error(self) -> PoolClosed:
        return PoolClosed(f"{self.kind} pool is closed", why="the node stops", retry_after_s=5.0)
