"""The one drain primitive: a Gate admits Holds, and can be emptied by a deadline.

A **hold** is one admitted piece of work: a connection, a request, an exec, a sandbox on a node. `cordon` stops
admission at once and disturbs nobody. `drain` cordons, gives every holder *notice* with an absolute deadline, waits for
the gate to be empty, and then forces what is left and says whom:

    with gate.hold("exec", session.id) as hold:      # GateClosed when cordoned
        hold.on_force(session.kill)
        await session.run(stop_when=hold.notice)     # hold.deadline: until when

Rules, each a test:

- What continues admitted work takes `hold.child()`, admitted also while cordoned, until force begins: a checkpoint that
  pauses and resumes must not be refused its second half. There is no ambient hold: a task that was not handed one has
  none, wherever it was spawned from.
- A second drain joins the first and can only shorten its deadline.
- Force is single-flight and retryable. It runs every `on_force` callback, each settled, and success is reported only
  when the gate is empty; otherwise StillHeld names who is left, and the next drain forces again.
- A drain has no task of its own. Those who called it drive it, one leads the force, and it finishes the force even if
  cancelled; when all callers are cancelled before the force, the gate stays cordoned and the next drain continues.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.core.deadlines import Pulse
from penstock.core.errors import Kind, PenstockError
from penstock.core.hold import Hold
from penstock.core.settle import CANCEL_S, settle, settled

RETRY_AFTER_S: Final = 5.0  # told to whom a cordoned gate refuses, unless the cordon says better
SHOWN_MAX: Final = 10  # holds named in an error's text; its `labels` has all


class GateClosed(PenstockError):
    """Raised by `hold` and `child`: nothing was admitted. `reason` is the cordon's; try elsewhere, or later."""

    kind = Kind.UNAVAILABLE
    code = "gate_closed"

    def __init__(self, reason: str, *, gate: str = "", retry_after_s: float | None = RETRY_AFTER_S) -> None:
        self.reason = reason
        super().__init__("not admitted", which=gate, why=reason, retry_after_s=retry_after_s)


class StillHeld(PenstockError):
    """Raised by `drain`: forced, and `labels` are held all the same. The gate stays cordoned; drain again.

    Its `__cause__` groups what the force callbacks raised, if they did.
    """

    kind = Kind.DEADLINE
    code = "still_held"

    def __init__(self, gate: str, holds: Sequence[Hold], *, within_s: float) -> None:
        self.labels = tuple(hold.label for hold in holds)
        shown = ", ".join(str(hold) for hold in holds[:SHOWN_MAX])
        if len(holds) > SHOWN_MAX:
            shown += f" and {len(holds) - SHOWN_MAX} more"
        super().__init__("gate is not empty", which=gate, why=f"{within_s:g} s after force: {shown}")


class DrainAbandoned(PenstockError):
    """Raised by `drain` when somebody uncordoned the gate meanwhile. The remaining holds go on."""

    kind = Kind.CONFLICT
    code = "drain_abandoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainPolicy:
    """`grace_s` from notice to force; `force_s` from force to empty, the force callbacks included."""

    grace_s: float
    force_s: float
    reason: str = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainResult:
    """The gate is empty. `forced` are the labels of the holds that did not leave by themselves, oldest first."""

    forced: tuple[str, ...]
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateStatistics:
    name: str
    cordoned: str | None  # the reason
    deadline: float | None  # loop seconds; None unless draining
    forcing: bool
    held: tuple[tuple[str, int], ...]  # by kind, sorted
    admitted_total: int
    refused_total: int
    forced_total: int


class _Run:
    """A drain in progress: shared by all its callers."""

    def __init__(self, now: float, policy: DrainPolicy) -> None:
        self.began_at = now
        self.deadline = now + policy.grace_s
        self.force_s = policy.force_s
        self.forced: dict[Hold, None] = {}
        self.force: asyncio.Future[None] | None = None  # while one caller leads it
        self.has_forced = False
        self.abandoned = False

    def tighten(self, now: float, policy: DrainPolicy) -> None:
        self.deadline = min(self.deadline, now + policy.grace_s)
        self.force_s = min(self.force_s, policy.force_s)


class Gate:
    """Admits holds until cordoned. Not thread-safe: one loop. Bounded by what its callers admit elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._holds: dict[Hold, None] = {}  # in order of admission
        self._reason: str | None = None
        self._run: _Run | None = None
        self._changed = Pulse()
        self._on_release: Callable[[], object] = lambda: None
        self._admitted = self._refused = self._forced = 0

    @property
    def cordoned(self) -> str | None:
        """The reason, or None when open."""
        return self._reason

    @property
    def deadline(self) -> float | None:
        """Of the drain in progress, in loop seconds."""
        return None if self._run is None else self._run.deadline

    @property
    def empty(self) -> bool:
        return not self._holds

    def hold(self, kind: str, label: str) -> Hold:
        """Admit one piece of work. Raises GateClosed when cordoned."""
        if self._reason is not None:
            raise self._closed(self._reason)
        return self._admit(kind, label)

    def readmit(self, kind: str, label: str) -> Hold:
        """A hold for what lived before this gate did, and cannot be refused: a sandbox found after a restart."""
        hold = self._admit(kind, label)
        if self._run is not None:
            hold.notice._give()
        return hold

    def on_release(self, callback: Callable[[], object]) -> None:
        """Call `callback` after each release, synchronously. There is one: whoever drains."""
        self._on_release = callback

    def held(self, *kinds: str) -> list[Hold]:
        """The holds of these kinds (none given: all), in order of admission."""
        return [hold for hold in self._holds if not kinds or hold.kind in kinds]

    def cordon(self, reason: str) -> None:
        """Stop admission. Nobody gets notice. A later reason does not replace the first."""
        if self._reason is None:
            self._reason = reason

    def uncordon(self) -> None:
        """Admit again. A drain in its grace time is abandoned, notice withdrawn. Raises GateClosed while it forces."""
        run = self._run
        if run is not None:
            if run.force is not None:
                raise GateClosed("force has begun", gate=self.name)
            run.abandoned = True
            self._run = None
            for hold in self._holds:
                hold.notice._withdraw()
        self._reason = None
        self._changed.fire()

    async def drain(self, policy: DrainPolicy) -> DrainResult:
        """Cordon, give notice, wait for empty until the deadline, force what is left, and say whom.

        Returns only when the gate is empty; it stays cordoned. Joins a drain in progress, shortening its deadline if
        this policy's is nearer. Raises StillHeld; DrainAbandoned; or, the gate being empty, an ExceptionGroup of what
        force callbacks raised. If cancelled before the force, leaves; a leader of the force finishes it first.
        """
        loop = asyncio.get_running_loop()
        self.cordon(policy.reason)
        if self._run is None:
            self._run = _Run(loop.time(), policy)
        else:
            self._run.tighten(loop.time(), policy)
        run = self._run
        for hold in self._holds:
            hold.notice._give()
        self._changed.fire()
        while not await self._changed.wait_for(lambda: self._ended(run), until=run.deadline):
            if loop.time() < run.deadline:
                continue
            await self._force(run)
        if run.abandoned:
            raise DrainAbandoned("drain was abandoned", which=self.name, why="uncordoned")
        if self._run is run:
            self._run = None
        return DrainResult(forced=tuple(hold.label for hold in run.forced), took_s=loop.time() - run.began_at)

    async def expel(self, kind: str, *, within_s: float) -> None:
        """Force the holds of one kind out and leave the others alone. Call while cordoned, or more may come.

        Raises StillHeld when one is held after `within_s`; else, these being gone, an ExceptionGroup of what callbacks
        raised.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        errors: list[Exception] = []
        holds = self.held(kind)
        self._forced += len(holds)
        calls = []
        for hold in holds:
            hold.notice._give()
            call = loop.create_task(self._call(hold, list(hold._on_force), until, errors), name=f"force {hold}")
            call.add_done_callback(lambda _: self._changed.fire())
            calls.append(call)
        gone = await self._changed.wait_for(lambda: not any(hold in self._holds for hold in holds), until=until)
        # As in `_force_all`: settled callbacks end at most CANCEL_S after their bound.
        await self._changed.wait_for(lambda: all(call.done() for call in calls), until=until + CANCEL_S)
        group = ExceptionGroup(f"force of {kind} out of gate {self.name}", errors) if errors else None
        if not gone:
            left = tuple(hold for hold in holds if hold in self._holds)
            raise StillHeld(self.name, left, within_s=within_s) from group
        if group is not None:
            raise group

    def statistics(self) -> GateStatistics:
        run = self._run
        return GateStatistics(
            name=self.name,
            cordoned=self._reason,
            deadline=self.deadline,
            forcing=run is not None and run.force is not None,
            held=tuple(sorted(Counter(hold.kind for hold in self._holds).items())),
            admitted_total=self._admitted,
            refused_total=self._refused,
            forced_total=self._forced,
        )

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self, kind: str, label: str) -> Hold:
        hold = Hold(self, kind, label)
        self._holds[hold] = None
        self._admitted += 1
        return hold

    def _admit_child(self, parent: Hold, kind: str, label: str) -> Hold:
        if parent not in self._holds:
            raise self._closed(f"{parent} was given back")
        if self._run is not None and self._run.has_forced:
            raise self._closed("force has begun")
        hold = self._admit(kind, label)
        if self._run is not None:
            hold.notice._give()
        return hold

    def _released(self, hold: Hold) -> None:
        del self._holds[hold]
        self._changed.fire()
        self._on_release()

    def _closed(self, reason: str) -> GateClosed:
        self._refused += 1
        return GateClosed(reason, gate=self.name)

    # -- force -------------------------------------------------------------------------------------------------------

    def _ended(self, run: _Run) -> bool:
        return not self._holds or run.abandoned

    async def _force(self, run: _Run) -> None:
        """Lead the force, or follow whoever leads it and share the outcome."""
        if run.force is not None:
            await asyncio.shield(run.force)
            return
        force = run.force = asyncio.get_running_loop().create_future()
        run.has_forced = True
        force.add_done_callback(_seen)
        # The bound is a net: every part of `_force_all` keeps its own, and none exceeds this one.
        bound_s = run.force_s + 2 * CANCEL_S
        try:
            outcome = await settled(self._force_all(run), within_s=bound_s, what=f"the force of gate {self.name}")
        except BaseException:
            force.cancel()
            raise
        finally:
            run.force = None  # re-armed: the next drain forces again
        if outcome.error is None:
            force.set_result(None)
        else:
            force.set_exception(outcome.error)
        outcome.hand_back()

    async def _force_all(self, run: _Run) -> None:
        """Run every callback of every hold, all holds at once, until the gate is empty and the callbacks have ended."""
        loop = asyncio.get_running_loop()
        until = loop.time() + run.force_s
        errors: list[Exception] = []
        calls: list[asyncio.Task[None]] = []
        for hold in self._holds:
            hold._called = 0
            run.forced[hold] = None
        self._forced += len(self._holds)

        def quiet() -> bool:
            return not self._holds and all(call.done() for call in calls)

        in_time = True
        while in_time and not quiet():
            calls += self._start_calls(until, errors)
            in_time = await self._changed.wait_for(lambda: quiet() or any(self._uncalled()), until=until)
        # Settled callbacks end at most CANCEL_S after their bound; only then is it known what they raised.
        await self._changed.wait_for(lambda: all(call.done() for call in calls), until=until + CANCEL_S)
        group = ExceptionGroup(f"force of gate {self.name}", errors) if errors else None
        if self._holds:
            raise StillHeld(self.name, tuple(self._holds), within_s=run.force_s) from group
        if group is not None:
            raise group

    def _uncalled(self) -> Iterator[Hold]:
        return (hold for hold in self._holds if hold._called < len(hold._on_force))

    def _start_calls(self, until: float, errors: list[Exception]) -> list[asyncio.Task[None]]:
        """One task per hold with callbacks not yet called, in order of admission."""
        loop = asyncio.get_running_loop()
        calls = []
        for hold in self._uncalled():
            todo, hold._called = hold._on_force[hold._called :], len(hold._on_force)
            call = loop.create_task(self._call(hold, todo, until, errors), name=f"force {hold}")
            call.add_done_callback(lambda _: self._changed.fire())
            calls.append(call)
        return calls

    async def _call(
        self, hold: Hold, callbacks: list[Callable[[], object]], until: float, errors: list[Exception]
    ) -> None:
        for callback in callbacks:
            if hold not in self._holds:
                return
            try:
                result = callback()
                if inspect.isawaitable(result):
                    left_s = max(0.0, until - asyncio.get_running_loop().time())
                    await settle(result, within_s=left_s, what=f"force of {hold}")
            except Exception as error:
                error.add_note(f"while forcing {hold} out of gate {self.name}")
                errors.append(error)


def _seen(future: asyncio.Future[None]) -> None:
    """Mark the outcome as retrieved: its leader raises it, followers may be none."""
    if not future.cancelled():
        future.exception()
