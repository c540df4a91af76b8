"""What a node tells of its sandboxes: who, what, why, by whom; and that telling holds nothing up and loses nothing."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable, Mapping

import msgspec
import pytest

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalReports
from penstock.model import keys
from penstock.model.drain import DrainReport, DrainStage, Fate, Outcome, Step
from penstock.model.errors import Unavailable
from penstock.model.event import LoggedEvent, decode, labels_of_related
from penstock.model.ids import NodeId, SandboxId, TeamId
from penstock.model.sandbox import TRANSITIONS, Event, KillReason, Phase, SandboxStatus
from penstock.node import report
from penstock.node.chronicle import KINDS, Chronicle, autopsy
from penstock.node.report import Reporter
from penstock.store.memory import MemoryLog
from penstock.store.store import Store
from tests.unit.core.virtual import virtual

Records = Iterable[tuple[str, bytes, Mapping[str, str]]]


class Heard:
    def __init__(self) -> None:
        self.events: list[LoggedEvent] = []

    def tell(self, event: LoggedEvent) -> None:
        self.events.append(event)


def status(phase: Phase, because: str = "", reason: KillReason | None = None, **more: object) -> SandboxStatus:
    known = SandboxStatus(id=SandboxId("ia"), phase=phase, node=NodeId("n1"), team=TeamId("t"))
    return msgspec.structs.replace(known, because=because, kill_reason=reason, **more)


def say(before: Phase, event: Event, after: SandboxStatus, **facts: str) -> LoggedEvent | None:
    heard = Heard()
    chronicle = Chronicle(heard, SystemClock(), NodeId("n1"))
    chronicle.phase(before, event, after, **facts)
    assert sum(chronicle.told_total.values()) == len(heard.events)
    return heard.events[0] if heard.events else None


@pytest.mark.parametrize(
    ("before", "event", "after", "kind", "actor"),
    [
        (Phase.STARTING, Event.GUEST_HELLO, status(Phase.READY), "sandbox.ready", "node n1"),
        (
            Phase.READY,
            Event.KILL,
            status(Phase.STOPPING, "stopped by key k1", KillReason.REQUEST),
            "sandbox.killed",
            "key k1",
        ),
        (
            Phase.READY,
            Event.KILL,
            status(Phase.STOPPING, "its time was over", KillReason.TIMEOUT),
            "sandbox.killed",
            "expiry",
        ),
        (
            Phase.READY,
            Event.KILL,
            status(Phase.STOPPING, "the node drains", KillReason.NODE_SHUTDOWN),
            "sandbox.killed",
            "node n1",
        ),
        (Phase.READY, Event.DIED, status(Phase.STOPPING, "x", KillReason.CRASHED), "sandbox.died", "node n1"),
        (
            Phase.STOPPING,
            Event.PINNED,
            status(Phase.QUARANTINED, "release failed: EBUSY"),
            "sandbox.quarantined",
            "node n1",
        ),
        (Phase.BOUND, Event.REFUSE, status(Phase.PENDING, "refused: gate is closed"), "sandbox.refused", "node n1"),
        (
            Phase.BOUND,
            Event.CANCEL,
            status(Phase.STOPPED, "stopped by operator", KillReason.REQUEST),
            "sandbox.cancelled",
            "operator",
        ),
    ],
)
def test_a_transition_says_who_what_why_and_by_whom(before, event, after, kind, actor) -> None:
    told = say(before, event, after)
    assert told is not None
    assert (told.kind, told.subject, told.team, told.because, told.actor) == (kind, "ia", "t", after.because, actor)
    assert told.facts["from"] == before.value
    assert told.facts["to"] == after.phase.value
    assert told.facts["node"] == "n1"
    assert told.facts.get("reason") == (after.kill_reason.value if after.kill_reason else None)


def test_every_transition_that_a_node_makes_is_told_but_the_steps_of_a_start() -> None:
    silent = {event for _, event in TRANSITIONS if event not in KINDS}
    assert silent == {Event.BIND, Event.ACCEPT, Event.STARTED, Event.EVICT}


def test_a_ready_sandbox_says_what_its_start_spent_its_time_on() -> None:
    steps_ms = {"slot": 0.25, "launch": 21.0, "launch.proc": 3.0}
    told = say(Phase.STARTING, Event.GUEST_HELLO, status(Phase.READY, steps_ms=steps_ms))
    assert told is not None
    assert told.facts["steps_ms"] == "slot=0.2 launch=21.0"


def test_a_rung_of_the_ladder_stands_in_the_chain_of_its_drain_with_what_comes_next() -> None:
    heard = Heard()
    chronicle = Chronicle(heard, SystemClock(), NodeId("n1"))
    chronicle.step(Step.TERM, status(Phase.DRAINING), "asked to end: kernel update", epoch=4, deadline=99.0)
    chronicle.step(Step.PARK, status(Phase.DRAINING), "park", epoch=4, failed="disk is full")
    chronicle.step(Step.NOTICE, status(Phase.DRAINING), "the node stops")
    term, park, stop = heard.events
    assert (term.kind, term.related, term.deadline) == ("sandbox.term", ("drain-n1-4",), 99.0)
    assert (park.kind, park.facts["failed"]) == ("sandbox.park_failed", "disk is full")
    assert stop.related == ()


def test_a_drain_tells_its_stages_its_force_attempts_and_each_fate_once() -> None:
    heard = Heard()
    chronicle = Chronicle(heard, SystemClock(), NodeId("n1"))
    report = DrainReport(node=NodeId("n1"), epoch=4, stage=DrainStage.LIVE, began_at=1.0, reason="update", live=2)
    replace = msgspec.structs.replace
    for seen in (
        report,
        replace(report, live=1),
        replace(report, stage=DrainStage.FORCING),
        replace(report, forced_number=1, force_errors=("ia: EBUSY",), quarantined=1),
        replace(report, stage=DrainStage.FORCING, forced_number=1),
        replace(report, stage=DrainStage.ENDED, forced_number=2, succeeded=True, live=0, fates={"force": 2}),
        replace(report, stage=DrainStage.ENDED, forced_number=2, succeeded=True, live=0, fates={"force": 2}),
    ):
        chronicle.drain(seen)
    chronicle.outcome(4, Outcome(sandbox=SandboxId("ia"), fate=Fate.FORCE, at=5.0, because="killed"), team="t")
    *drain, fate = heard.events
    assert [event.kind for event in drain] == [
        "drain.live",
        "drain.forcing",
        "drain.force_failed",
        "drain.live",
        "drain.forcing",
        "drain.forced",
        "drain.ended",
    ]
    assert {(event.subject, event.related) for event in drain} == {("drain-n1-4", ("n1",))}
    assert drain[2].because == "ia: EBUSY"
    assert drain[-1].facts == {"force": "2", "succeeded": "true"}
    assert (fate.subject, fate.related, fate.facts["fate"], fate.team) == ("ia", ("drain-n1-4",), "force", "t")


@pytest.mark.parametrize(
    ("wait_status", "oom_kills", "text"),
    [
        (0, 0, "exit code 0"),
        (3 << 8, 0, "exit code 3"),
        (signal.SIGKILL, 2, "killed by SIGKILL; the kernel killed in it for lack of memory 2 times"),
        (signal.SIGSEGV | 0x80, 0, "killed by SIGSEGV"),
        (signal.SIGRTMIN + 1, 0, "killed by 35"),
        (None, 1, "how is not known: it was not our child; the kernel killed in it for lack of memory once"),
    ],
)
def test_an_autopsy_reads_as_a_clause(wait_status: int | None, oom_kills: int, text: str) -> None:
    assert autopsy(wait_status, oom_kills) == text


def event(number: int) -> LoggedEvent:
    return LoggedEvent(at=1.0, kind="x", subject=f"i{number}", actor="node n1", related=("d",))


@virtual
async def test_told_events_are_in_the_log_in_order_and_few_commits() -> None:
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    async with Crew("c") as crew:
        reporter = Reporter(LocalReports(store, by="node", rng=random.Random(1)), crew=crew, rng=random.Random(2))
        for number in range(250):
            reporter.tell(event(number))
        assert not store.list(keys.EVENT).records, "telling waits for nothing"
        await reporter.flush(5)
        assert [decode(record.value) for record in store.list(keys.EVENT).records] == [event(n) for n in range(250)]
        assert store.revision == 3
        assert len(store.list(keys.EVENT, labels={"subject": "i7"}).records) == 1
        assert len(store.list(keys.EVENT, labels=labels_of_related("d")).records) == 250


class Away:
    """A store that is away, then takes everything, but loses its first answer."""

    def __init__(self) -> None:
        self.calls = 0
        self.taken: dict[str, bytes] = {}

    async def put(self, key: str, value: bytes, labels: Mapping[str, str] | None = None) -> None:
        raise AssertionError

    async def remove(self, key: str) -> None:
        raise AssertionError

    async def add(self, records: Records) -> None:
        self.calls += 1
        if self.calls > 2:
            self.taken |= {key: value for key, value, _ in records}
        if self.calls < 4:
            raise Unavailable("away")


@virtual
async def test_a_store_that_is_away_gets_all_of_it_later_and_nothing_twice() -> None:
    away = Away()
    async with Crew("c") as crew:
        reporter = Reporter(away, crew=crew, rng=random.Random(2))
        for number in range(3):
            reporter.tell(event(number))
        await reporter.flush(60)
    assert [decode(value).subject for value in away.taken.values()] == ["i0", "i1", "i2"]


@virtual
async def test_what_finds_no_room_to_wait_is_counted_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EVENTS_WAITING_MAX", 2)
    away = Away()
    async with Crew("c") as crew:
        reporter = Reporter(away, crew=crew, rng=random.Random(2))
        for number in range(5):
            reporter.tell(event(number))
        await reporter.flush(60)
        reporter.tell(event(9))
        await reporter.flush(60)
    told = [decode(value) for value in away.taken.values()]
    assert [one.subject for one in told if one.kind == "x"] == ["i0", "i1", "i9"]
    assert [one.because for one in told if one.kind == "events.lost"] == [
        "3 events before this one found no room to wait in"
    ]
    assert reporter.lost_total == 3
