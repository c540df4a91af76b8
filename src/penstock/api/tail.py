"""The event log as it grows, as text/event-stream.

An id is a revision of the store, and stands at the last line of its revision: whoever comes back with it has seen that
revision whole, misses nothing and sees nothing twice. A reader that does not keep up is ended (the store queues a
bounded number of revisions for it), and comes back with its id; the store never waits for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from penstock.api.event_log import Wanted, may_see, shown
from penstock.api.front import Caller, Front
from penstock.core.deadlines import DeadlinePassed, within
from penstock.model import keys
from penstock.model.errors import Unavailable
from penstock.model.event import decode
from penstock.model.records import Batch, Compacted, ReaderCut
from penstock.store.store import Watch

TICK_S: Final = 1.0  # how soon a stream notices that the daemon stops
ALIVE: Final = ": alive\n\n"


class Tail:
    """Lines after revision `after`; `first` are shown before them, `going_on` says when to end.

    Opens its watch at once: from then on `after` need not be kept. Close it with `aclose`.
    """

    def __init__(
        self,
        front: Front,
        caller: Caller,
        wanted: Wanted,
        *,
        after: int,
        first: list[dict[str, Any]],
        going_on: Callable[[], bool],
    ) -> None:
        self._caller, self._wanted, self._going_on = caller, wanted, going_on
        self._keepalive_s = front.keepalive_s
        self._after, self._first = after, first
        self._watch: Watch = front.store.watch(keys.EVENT, after)
        self._clock = front.clock

    async def text(self) -> AsyncIterator[str]:
        """Until the daemon stops, the reader falls behind, or its connection ends. The first lines carry no id but
        the last, whose id is where the watch began."""
        for line in self._first[:-1]:
            yield _event(line, None)
        yield _event(self._first[-1], self._after) if self._first else f"id: {self._after}\n{ALIVE}"
        spoke_at = self._clock.monotonic()
        while self._going_on():
            try:
                async with within(min(TICK_S, self._keepalive_s), "the next line of the event log"):
                    batch = await anext(self._watch)
            except DeadlinePassed:
                if self._clock.monotonic() - spoke_at < self._keepalive_s:
                    continue
                text = ALIVE
            except (Compacted, ReaderCut, Unavailable):
                return  # fell behind, or the store closes: the reader comes back with its id
            else:
                text = self._render(batch)
            if text:
                spoke_at = self._clock.monotonic()
                yield text

    async def aclose(self) -> None:
        await self._watch.aclose()

    def _render(self, batch: Batch) -> str:
        lines: list[dict[str, Any]] = []
        for change in batch.changes:
            if change.kind == "put":
                event = decode(change.record.value)
                if self._wanted.matches(event) and may_see(self._caller, event):
                    lines.append(shown(change.record, event))
        ids = [None] * (len(lines) - 1) + [batch.revision]
        return "".join(_event(line, id) for line, id in zip(lines, ids, strict=False))


class TailResponse(StreamingResponse):
    """Closes the tail, and gives its place back, however the connection ends."""

    def __init__(self, tail: Tail, place: AsyncExitStack) -> None:
        super().__init__(tail.text(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._tail, self._place = tail, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._place:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._tail.aclose()


def _event(line: dict[str, Any], id: int | None) -> str:
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}event: {line['kind']}\ndata: {msgspec.json.encode(line).decode()}\n\n"
