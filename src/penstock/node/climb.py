"""Where one sandbox is on the ladder of a drain: what was done to it, and what comes next, when.

Orders carry wall-clock times, because they outlive daemons; each is anchored to the monotonic clock when it is first
seen, so that a clock step during a drain moves no deadline.
"""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.model.drain import Fate, Rung, Step, Waiting
from penstock.model.ids import SandboxId

EARLY_S: Final = 0.001  # wall plus anchor is exact to a microsecond at best: never sleep for less than this


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """What a drain wants of one sandbox. `anchor_s` is monotonic minus wall seconds when the order was seen.

    The kill at the hard deadline is not the sandbox's own affair: whoever drains the node forces its gate.
    """

    epoch: int
    reason: str
    rungs: tuple[Rung, ...]
    anchor_s: float
    soft_at: float | None = None  # wall, as told to the sandbox
    hard_at: float | None = None


class Climb:
    """The steps of one sandbox under one eviction after another; a step is done once, a notice once per deadline.

    `was_asked`: an earlier daemon wrote down that it asks it to end. Whether it did is not known, so it is done again.
    """

    def __init__(self, *, was_asked: bool = False) -> None:
        self.eviction: Eviction | None = None
        self.was_asked = was_asked
        self._done: set[Step] = set()
        self.failed: dict[Step, str] = {}  # what could not be done, and why

    def begin(self, eviction: Eviction) -> bool:
        """Follow this eviction from now on. False when it is the one already followed."""
        before = self.eviction
        if before == eviction:
            return False
        if before is None or (before.soft_at, before.hard_at) != (eviction.soft_at, eviction.hard_at):
            self._done.discard(Step.NOTICE)  # the new deadlines have to be told
        self.eviction = eviction
        return True

    def end(self) -> bool:
        """The drain was undone. False when it is too late: it was asked to end, and does."""
        if self.was_asked:
            return False
        self.eviction = None
        self._done.discard(Step.NOTICE)
        return True

    def forget_notice(self) -> None:
        """Nobody could read the notice while it stood still: give it again."""
        self._done.discard(Step.NOTICE)

    def did(self, step: Step) -> bool:
        return step in self._done

    def do(self, step: Step) -> None:
        self._done.add(step)
        self.was_asked = self.was_asked or step is Step.TERM

    def fail(self, step: Step, why: str) -> None:
        """A step that could not be done: the next one is due at once, if there is any."""
        self._done.add(step)
        self.failed[step] = why

    def next(self) -> tuple[Step, float] | None:
        """The next step and when it is due (monotonic)."""
        if self.eviction is None or Step.TERM in self._done:
            return None
        for rung in self.eviction.rungs:
            if rung.step not in self._done and rung.step is not Step.KILL:
                at_once = rung.step is Step.TERM and Step.PARK in self.failed
                return rung.step, (0.0 if at_once else rung.at + self.eviction.anchor_s)
        if Step.PARK in self.failed:
            return Step.TERM, 0.0  # what cannot be parked is stopped, also where no hard deadline says so
        return None

    def due(self, now: float) -> Step | None:
        """The step to do now (`now` is monotonic)."""
        coming = self.next()
        return coming[0] if coming is not None and coming[1] <= now + EARLY_S else None

    def fate(self, *, forced: bool, parked: bool, quarantined: bool) -> Fate:
        """What became of a sandbox that is no more, or cannot be released."""
        if quarantined:
            return Fate.QUARANTINE
        if parked:
            return Fate.PARK
        if forced:
            return Fate.FORCE
        return Fate.STOP if self.was_asked else Fate.FINISH

    def waiting(self, sandbox: SandboxId, because: str) -> Waiting:
        """For the progress of a drain; `at` is wall seconds."""
        eviction, coming = self.eviction, self.next()
        if coming is None or eviction is None:
            hard_at = eviction.hard_at if eviction is not None else None
            step = Step.KILL if hard_at is not None else None
            return Waiting(sandbox=sandbox, next=step, at=hard_at, because=because)
        return Waiting(sandbox=sandbox, next=coming[0], at=coming[1] - eviction.anchor_s, because=because)
