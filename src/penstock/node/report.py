"""Facts upward: the latest status of each sandbox, never held up by a store that is away, nor by one another.

`say` is synchronous and keeps one status per key, so what waits is bounded by what exists. Each key with something to
say has one task that sends until nothing newer waits: a hundred starts share the store's group commits instead of
queueing for them (one sender in turn would add a commit to every ready sandbox before it).

Events (`tell`) are never overtaken by newer ones, so they are sent in order, many to a commit, a moment after they were
told: off the path of the start that told them. A daemon that is killed loses what it told in its last LINGER_S.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Final

import msgspec

from penstock.core.crew import Crew, CrewClosed
from penstock.core.deadlines import Pulse, backoff_s, within
from penstock.feed.report import Reports
from penstock.model import keys
from penstock.model.drain import DrainReport, Outcome
from penstock.model.event import EventRecord, EventWriter, LoggedEvent
from penstock.model.ids import NodeId, mint
from penstock.model.node import NodeStatus
from penstock.model.sandbox import SandboxStatus
from penstock.model.snapshot import Snapshot

PUT_WITHIN_S: Final = 10.0
RETRY_BASE_S: Final = 0.05
RETRY_CAP_S: Final = 5.0
LINGER_S: Final = 0.02  # from an event to its commit: a start or an end tells its few in one
EVENTS_AT_ONCE: Final = 100  # in one commit, which may hold 128
EVENTS_WAITING_MAX: Final = 10_000  # beyond it events are lost, counted, and the log says how many


_encode = msgspec.json.Encoder().encode


class Reporter:
    """Call `say` at each change; tasks of `crew` send. One per node."""

    def __init__(self, reports: Reports, *, crew: Crew, rng: random.Random) -> None:
        self._reports, self._crew, self._rng = reports, crew, rng
        self._waiting: dict[str, tuple[bytes, dict[str, str]]] = {}
        self._sending: set[str] = set()
        self._sent = Pulse()
        self._events: deque[EventRecord] = deque()
        self._writer = EventWriter("node", mint(rng, 6))
        self._telling = False
        self.kept: set[str] = set()  # snapshots that are in the store because of us, whatever a view shows so far
        self._lost = 0  # events that found no room, since the log last said so
        self.sent_total = self.failed_total = self.lost_total = 0

    def say(self, status: SandboxStatus) -> None:
        self._put(keys.SANDBOX_STATUS + status.id, _encode(status), {"team": status.team, "node": status.node})

    def say_node(self, status: NodeStatus) -> None:
        self._put(keys.NODE_STATUS + status.id, _encode(status), {})

    def say_drain(self, report: DrainReport) -> None:
        """The head of a drain's receipt."""
        self._put(keys.drain(report.node, report.epoch), _encode(report), {"node": report.node})

    def say_outcome(self, node: NodeId, epoch: int, outcome: Outcome) -> None:
        self._put(f"{keys.drain(node, epoch)}/{outcome.sandbox}", _encode(outcome), {"node": node})

    async def keep(self, snapshot: Snapshot) -> None:
        """Return once the snapshot is in the store. Raises DeadlinePassed, or what the store raised: say it again."""
        labels = {"team": snapshot.team, "sandbox": snapshot.sandbox, "kind": snapshot.kind.value}
        async with within(PUT_WITHIN_S, f"the record of snapshot {snapshot.id}"):
            await self._reports.put(keys.SNAPSHOT + snapshot.id, _encode(snapshot), labels)
        self.kept.add(snapshot.id)

    def tell(self, event: LoggedEvent) -> None:
        """Into the event log, in order. Never waits and never fails; see EVENTS_WAITING_MAX for what that costs."""
        if len(self._events) >= EVENTS_WAITING_MAX:
            self._lost += 1
            self.lost_total += 1
            return
        if self._lost:
            because = f"{self._lost} events before this one found no room to wait in"
            self._lost = 0
            gap = LoggedEvent(at=event.at, kind="events.lost", subject=event.subject, actor="node", because=because)
            self._events.append(self._writer.record(gap))
        self._events.append(self._writer.record(event))
        if not self._telling:
            self._telling = True
            try:
                self._crew.spawn(self._tell(), name="report events")
            except CrewClosed:
                self._telling = False  # Safe: the daemon ends, and the next one tells what it finds.

    async def flush(self, within_s: float) -> None:
        """Wait until everything said was taken by the store. Raises DeadlinePassed."""
        async with within(within_s, "the last reports"):
            await self._sent.wait_for(lambda: not self._sending and not self._telling, until=None)

    @property
    def waiting(self) -> int:
        return len(self._sending)

    def _put(self, key: str, value: bytes, labels: dict[str, str]) -> None:
        self._waiting[key] = (value, labels)
        if key in self._sending:
            return
        self._sending.add(key)
        try:
            self._crew.spawn(self._send(key), name=f"report {key}")
        except CrewClosed:
            # Safe: the daemon ends. What is true then, the next one finds in the kernel and reports.
            self._sending.discard(key)

    async def _send(self, key: str) -> None:
        attempt = 0
        try:
            while key in self._waiting:
                value, labels = self._waiting.pop(key)
                try:
                    async with within(PUT_WITHIN_S, f"report of {key}"):
                        await self._reports.put(key, value, labels)
                    self.sent_total += 1
                except Exception:
                    # Safe: put back unless something newer waits, and tried until the store answers.
                    self._waiting.setdefault(key, (value, labels))
                    self.failed_total += 1
                    attempt += 1
                    await asyncio.sleep(backoff_s(attempt, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))
        finally:
            self._sending.discard(key)
            self._sent.fire()

    async def _tell(self) -> None:
        try:
            while self._events:
                await asyncio.sleep(LINGER_S)
                batch = [self._events.popleft() for _ in range(min(len(self._events), EVENTS_AT_ONCE))]
                await self._add(batch)
        finally:
            self._telling = False
            self._sent.fire()

    async def _add(self, batch: list[EventRecord]) -> None:
        """Until the store has them: adding twice is harmless, losing is not."""
        attempt = 0
        while True:
            try:
                async with within(PUT_WITHIN_S, "events of the node"):
                    await self._reports.add([(record.key, record.value, record.labels) for record in batch])
                return
            except Exception:
                # Safe: they are held here, and tried until the store answers; meanwhile others wait, bounded.
                self.failed_total += 1
                attempt += 1
                await asyncio.sleep(backoff_s(attempt, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))
