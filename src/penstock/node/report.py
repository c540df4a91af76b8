"""Facts upward: the latest status of each sandbox, never held up by a store that is away, nor by one another.

`say` is synchronous and keeps one status per key, so what waits is bounded by what exists. Each key with something to
say has one task that sends until nothing newer waits: a hundred starts share the store's group commits instead of
queueing for them (one sender in turn would add a commit to every ready sandbox before it).
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import msgspec

from penstock.core.crew import Crew, CrewClosed
from penstock.core.deadlines import Pulse, backoff_s, within
from penstock.feed.report import Reports
from penstock.model import keys
from penstock.model.drain import DrainReport, Outcome
from penstock.model.ids import NodeId
from penstock.model.node import NodeStatus
from penstock.model.sandbox import SandboxStatus

PUT_WITHIN_S: Final = 10.0
RETRY_BASE_S: Final = 0.05
RETRY_CAP_S: Final = 5.0


_encode = msgspec.json.Encoder().encode


class Reporter:
    """Call `say` at each change; tasks of `crew` send. One per node."""

    def __init__(self, reports: Reports, *, crew: Crew, rng: random.Random) -> None:
        self._reports, self._crew, self._rng = reports, crew, rng
        self._waiting: dict[str, tuple[bytes, dict[str, str]]] = {}
        self._sending: set[str] = set()
        self._sent = Pulse()
        self.sent_total = self.failed_total = 0

    def say(self, status: SandboxStatus) -> None:
        self._put(keys.SANDBOX_STATUS + status.id, _encode(status), {"team": status.team, "node": status.node})

    def say_node(self, status: NodeStatus) -> None:
        self._put(keys.NODE_STATUS + status.id, _encode(status), {})

    def say_drain(self, report: DrainReport) -> None:
        """The head of a drain's receipt."""
        self._put(keys.drain(report.node, report.epoch), _encode(report), {"node": report.node})

    def say_outcome(self, node: NodeId, epoch: int, outcome: Outcome) -> None:
        self._put(f"{keys.drain(node, epoch)}/{outcome.sandbox}", _encode(outcome), {"node": node})

    async def flush(self, within_s: float) -> None:
        """Wait until everything said was taken by the store. Raises DeadlinePassed."""
        async with within(within_s, "the last reports"):
            await self._sent.wait_for(lambda: not self._sending, until=None)

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
