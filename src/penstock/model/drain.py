"""A drain as an object: what was ordered, what is foreseen for each sandbox, and what became of it.

The order is intent (in the node's spec), the report and the outcomes are facts (written by the node). `ladder` gives
the stages of one sandbox as data, to the planner and to the node that climbs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from penstock.model.ids import NodeId, SandboxId

TERM_BEFORE_HARD_S: Final = 10.0  # SIGTERM comes at the latest this long before the kill
WAITING_SHOWN_MAX: Final = 100


class Disposition(StrEnum):
    """What a drain does, at the soft deadline, to a sandbox that has not ended by then."""

    STOP = "stop"  # SIGTERM to its first process, which ends what runs in it
    PARK = "park"  # pause it to disk, so that it can be resumed; what cannot be parked is stopped


class Step(StrEnum):
    """The rungs of the ladder, in order."""

    NOTICE = "notice"
    PARK = "park"
    TERM = "term"
    KILL = "kill"
    QUARANTINE = "quarantine"


class Fate(StrEnum):
    FINISH = "finish"  # it ended by itself, or somebody ended it, before anything was done to it
    PARK = "park"
    STOP = "stop"  # it went after SIGTERM
    FORCE = "force"  # it was killed
    QUARANTINE = "quarantine"  # its release could not be verified
    SPARED = "spared"  # the drain was undone before anything was done to it


class DrainStage(StrEnum):
    """Where a drain as a whole is."""

    STARTS = "starts"  # waits for starts under way
    BUILDS = "builds"  # waits for builds, then for those who poll their status
    LIVE = "live"  # waits for sandboxes
    FORCING = "forcing"
    ENDED = "ended"
    UNDONE = "undone"


class DrainOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked. Times are wall seconds; `hard_at` None: wait for ever; `soft_at` None: nothing before `hard_at`.

    `force_number` counts the requests to force: a greater one than was answered makes another attempt.
    """

    at: float
    epoch: int = 0  # set by `model.node.drain`
    reason: str = ""
    by: str = ""
    soft_at: float | None = None
    hard_at: float | None = None
    propagation_s: float = 0.0  # how long readers may take to learn of it before anybody is asked to leave
    disposition: Disposition | None = None  # None: the sandbox's own, its node's, then STOP
    force_number: int = 0
    plan: str = ""  # digest of the plan it applies; empty: the plan of the moment


class Foreseen(msgspec.Struct, frozen=True, kw_only=True):
    """What will become of one sandbox, by when at the latest (wall; None: open), and what is lost by it."""

    sandbox: SandboxId
    fate: Fate
    by: float | None
    loses: str = ""
    because: str = ""


class DrainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The foreseen fates, sorted by sandbox, and what stands in the way. `digest` covers all of it but the clock."""

    node: NodeId
    epoch: int  # of the node when the plan was made
    foreseen: tuple[Foreseen, ...]
    blocks: tuple[str, ...]  # what can keep it from ending, a line each
    digest: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one sandbox. `error` is why its release or its parking failed."""

    sandbox: SandboxId
    fate: Fate
    at: float
    because: str = ""
    error: str = ""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Who is left, which rung comes next for it and when (wall; None: nothing is due), and why it is still here."""

    sandbox: SandboxId
    next: Step | None
    at: float | None
    because: str = ""


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """Progress, and in the end the receipt's head. Written by the node; the outcomes are records of their own."""

    node: NodeId
    epoch: int
    stage: DrainStage
    began_at: float
    reason: str = ""
    ended_at: float = 0.0
    succeeded: bool | None = None  # None while it goes on; False: something is in quarantine
    starts: int = 0
    builds: int = 0
    live: int = 0
    quarantined: int = 0
    waiting: tuple[Waiting, ...] = ()  # the first WAITING_SHOWN_MAX
    fates: dict[str, int] = {}  # outcomes so far, by fate
    forced_number: int = 0  # the newest force request that was answered
    force_errors: tuple[str, ...] = ()  # of the last attempt, one per sandbox, in order


class Rung(msgspec.Struct, frozen=True):
    """One step for one sandbox, due at `at` (wall seconds)."""

    step: Step
    at: float


def ladder(order: DrainOrder, disposition: Disposition, *, may_park: bool) -> tuple[Rung, ...]:
    """What is done to one sandbox, and when: for the planner to foresee and for its node to do.

    Notice at once. At the soft deadline it is parked, or asked to end. SIGTERM comes at the latest TERM_BEFORE_HARD_S
    before the hard deadline, the kill at it, whatever happened before. Without deadlines nothing follows the notice.
    """
    begin = order.at + order.propagation_s
    rungs = [Rung(Step.NOTICE, begin)]
    latest = None if order.hard_at is None else max(begin, order.hard_at - TERM_BEFORE_HARD_S)
    due = [at for at in (order.soft_at, latest) if at is not None]
    if not due:
        return tuple(rungs)
    first = max(begin, min(due))
    if disposition is Disposition.PARK and may_park:
        rungs.append(Rung(Step.PARK, first))
        if latest is not None:
            rungs.append(Rung(Step.TERM, max(first, latest)))
    else:
        rungs.append(Rung(Step.TERM, first))
    if order.hard_at is not None:
        rungs.append(Rung(Step.KILL, max(begin, order.hard_at)))
    return tuple(rungs)


def digest(node: NodeId, epoch: int, order: DrainOrder, foreseen: Iterable[Foreseen]) -> str:
    """Names a plan: equal for equal fates under an equal order. Moments are left out, or no plan could be applied."""
    asked = (
        None if order.soft_at is None else round(order.soft_at - order.at, 3),
        None if order.hard_at is None else round(order.hard_at - order.at, 3),
        order.disposition,
        order.propagation_s,
    )
    fates = sorted((each.sandbox, each.fate.value, each.loses) for each in foreseen)
    return hashlib.sha256(msgspec.json.encode((node, epoch, asked, fates))).hexdigest()[:16]
