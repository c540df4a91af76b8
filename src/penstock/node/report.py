"""Facts upward: the latest status of each sandbox, in the order they changed, never held up by a store that is away.

`say` is synchronous and keeps one status per sandbox, so that what is waiting is bounded by what exists. A store that
cannot be written is tried again; the sandboxes do not notice.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import msgspec

from penstock.core.deadlines import backoff_s, within
from penstock.feed.report import Reports
from penstock.model import keys
from penstock.model.node import NodeStatus
from penstock.model.sandbox import SandboxStatus

PUT_WITHIN_S: Final = 10.0
RETRY_BASE_S: Final = 0.05
RETRY_CAP_S: Final = 5.0

_encode = msgspec.json.Encoder().encode


class Reporter:
    """Call `say` at each change; `run` sends. One per node."""

    def __init__(self, reports: Reports, rng: random.Random) -> None:
        self._reports, self._rng = reports, rng
        self._waiting: dict[str, tuple[bytes, dict[str, str]]] = {}  # insertion order is the order of sending
        self._sending = ""
        self._poked = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.sent_total = self.failed_total = 0

    def say(self, status: SandboxStatus) -> None:
        self._put(keys.SANDBOX_STATUS + status.id, _encode(status), {"team": status.team, "node": status.node})

    def say_node(self, status: NodeStatus) -> None:
        self._put(keys.NODE_STATUS + status.id, _encode(status), {})

    async def run(self) -> None:
        """Until cancelled. What waits then is lost to the store, not to the node: a restart reports anew."""
        attempt = 0
        while True:
            if not self._waiting:
                self._quiet.set()
            await self._poked.wait()
            self._poked.clear()
            while self._waiting:
                key = next(iter(self._waiting))
                value, labels = self._waiting.pop(key)
                try:
                    async with within(PUT_WITHIN_S, f"report of {key}"):
                        await self._reports.put(key, value, labels)
                    attempt = 0
                    self.sent_total += 1
                except Exception:
                    # Safe: it is put back unless something newer waits already, and tried until the store answers.
                    self._waiting.setdefault(key, (value, labels))
                    self.failed_total += 1
                    attempt += 1
                    await asyncio.sleep(backoff_s(attempt, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))

    async def flush(self, within_s: float) -> None:
        """Wait until everything said was taken by the store. Raises DeadlinePassed."""
        async with within(within_s, "the last reports"):
            await self._quiet.wait()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _put(self, key: str, value: bytes, labels: dict[str, str]) -> None:
        self._waiting[key] = (value, labels)
        self._quiet.clear()
        self._poked.set()
