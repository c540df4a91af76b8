"""A drain as it goes on and as it ended: its report, each sandbox's fate, and both as a stream of events.

The stream's ids are revisions of the store, so a reader that comes back with the last one it saw misses nothing and
sees nothing twice; one whose revision is no longer kept begins with the state of now.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from penstock.api import node_shapes
from penstock.api.front import Front
from penstock.core.deadlines import DeadlinePassed, within
from penstock.model import keys
from penstock.model.drain import DrainReport, DrainStage, Outcome
from penstock.model.errors import NotFound, Unavailable
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec
from penstock.model.records import Batch, Change, Compacted, ReaderCut

LAST_OUTCOMES_S: Final = 2.0  # outcomes are records of their own, and may come just after the report that counts them
TICK_S: Final = 1.0  # how soon a stream notices that the daemon stops


def report(front: Front, id: NodeId, epoch: int) -> DrainReport:
    """What the node said of that drain. Raises NotFound."""
    record = front.store.get(keys.drain(id, epoch))
    if record is None:
        raise NotFound(f"node {id!r} has no drain of epoch {epoch}")
    return _decode_report(record.value)


def newest(front: Front, spec: NodeSpec) -> int:
    """The epoch of the drain that is ordered, else of the last that was. Raises NotFound."""
    if spec.drain is not None:
        return spec.epoch
    status = front.nodes.get(spec.id)
    if status is None or status.drain is None:
        raise NotFound(f"node {spec.id!r} has never drained")
    return status.drain.epoch


def outcomes(front: Front, id: NodeId, epoch: int) -> list[Outcome]:
    """By time."""
    listing = front.store.list(keys.drain(id, epoch) + "/")
    return sorted((_decode_outcome(record.value) for record in listing.records), key=lambda each: each.at)


async def all_outcomes(front: Front, last: DrainReport) -> list[Outcome]:
    """Those that `last` counts, as soon as they are there; after LAST_OUTCOMES_S those that are."""
    prefix = keys.drain(last.node, last.epoch) + "/"
    watch = front.store.watch(prefix, front.store.revision)
    try:
        async with within(LAST_OUTCOMES_S, "the last outcomes of a drain"):
            while not _complete(front, last):
                await anext(watch)
    except (DeadlinePassed, ReaderCut, Compacted):
        pass  # Safe: the caller shows what there is, beside the report's counts.
    finally:
        await watch.aclose()
    return outcomes(front, last.node, last.epoch)


class Stream:
    """The events of one drain from a cursor on, as text/event-stream; ends when the drain has ended or was undone.

    `report` and `outcome` events; then `end`, with the whole receipt. Only the last event of a revision carries its id:
    whoever comes back with it has seen the revision whole.
    """

    def __init__(
        self, front: Front, id: NodeId, epoch: int, cursor: int | None, *, serving: Callable[[], bool]
    ) -> None:
        self._front, self._id, self._epoch = front, id, epoch
        self._prefix = keys.drain(id, epoch)
        self._cursor = cursor
        self._serving = serving
        self._last: DrainReport | None = None  # as the reader has it
        record = front.store.get(self._prefix)
        if record is not None and cursor is not None and record.mod_revision <= cursor <= front.store.revision:
            self._last = _decode_report(record.value)

    async def text(self) -> AsyncGenerator[str, None]:
        """Back-pressure is the reader's: the store queues a bounded number of revisions for it, then we list anew."""
        if self._cursor is None:
            yield self._now()
        while True:
            assert self._cursor is not None
            watch = self._front.store.watch(self._prefix, self._cursor)
            try:
                while self._last is None or not has_ended(self._front, self._last):
                    if not self._serving():
                        return  # the daemon stops: the reader comes back with its cursor
                    yield await self._next(watch) or ": alive\n\n"
                yield await self._end()
                return
            except (Compacted, ReaderCut):
                self._cursor = None
            except Unavailable:
                return  # the store closes, and the daemon with it
            finally:
                await watch.aclose()
            yield self._now()

    def _now(self) -> str:
        """Everything as it is, as one revision."""
        listing = self._front.store.list(self._prefix)
        self._cursor = listing.revision
        changes = tuple(Change("put", record) for record in listing.records)
        return self._render(Batch(listing.revision, changes)) or _event("none", {}, listing.revision)

    async def _next(self, watch: Any) -> str:
        """The next revision as text; empty when nothing came for `keepalive_s`, or the daemon stops."""
        monotonic = self._front.clock.monotonic
        until = monotonic() + self._front.keepalive_s
        while self._serving() and monotonic() < until:
            try:
                async with within(min(TICK_S, self._front.keepalive_s), "the next event of a drain"):
                    batch: Batch = await anext(watch)
            except DeadlinePassed:
                continue
            self._cursor = batch.revision
            return self._render(batch)
        return ""

    def _render(self, batch: Batch) -> str:
        events: list[tuple[str, dict[str, Any]]] = []
        for change in batch.changes:
            if change.kind != "put":
                continue
            if change.record.key == self._prefix:
                self._last = _decode_report(change.record.value)
                events.append(("report", node_shapes.report(self._last)))
            else:
                events.append(("outcome", node_shapes.outcome(_decode_outcome(change.record.value))))
        ids = [None] * (len(events) - 1) + [batch.revision]
        return "".join(_event(kind, body, id) for (kind, body), id in zip(events, ids, strict=False))

    async def _end(self) -> str:
        last = report(self._front, self._id, self._epoch)
        found = await all_outcomes(self._front, last)
        return _event("end", node_shapes.receipt(last, found), self._front.store.revision)


class StreamResponse(StreamingResponse):
    """Ends the stream and gives its place back, however the connection ends."""

    def __init__(self, stream: Stream, place: AsyncExitStack) -> None:
        self._text, self._place = stream.text(), place
        super().__init__(self._text, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._place, aclosing(self._text):
            await super().__call__(scope, receive, send)


def has_ended(front: Front, last: DrainReport) -> bool:
    """Whether nothing more will be said of it: it ended and every force that was asked for is answered, or undone."""
    if last.stage is DrainStage.UNDONE:
        return True
    record = front.store.get(keys.NODE_SPEC + last.node)
    order = _decode_spec(record.value).drain if record is not None else None
    asked = order.force_number if order is not None and order.epoch == last.epoch else 0
    return last.stage is DrainStage.ENDED and last.forced_number >= asked


def _complete(front: Front, last: DrainReport) -> bool:
    return len(front.store.list(keys.drain(last.node, last.epoch) + "/").records) >= sum(last.fates.values())


def _event(kind: str, body: dict[str, Any], id: int | None) -> str:
    head = f"id: {id}\n" if id is not None else ""
    # The kind also within, for readers that see the data alone.
    return f"{head}event: {kind}\ndata: {msgspec.json.encode({'event': kind, **body}).decode()}\n\n"


_decode_report: Final = msgspec.json.Decoder(DrainReport).decode
_decode_outcome: Final = msgspec.json.Decoder(Outcome).decode
_decode_spec: Final = msgspec.json.Decoder(NodeSpec).decode
