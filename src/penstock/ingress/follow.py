"""Keeps the route table by the feed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed, Pulse, within
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.ingress.table import Table, route_of
from penstock.model import keys
from penstock.model.errors import Unavailable
from penstock.model.sandbox import SandboxSpec, SandboxStatus

CATCH_UP_S: Final = 2.0  # 0.5 ms when nothing is wrong
AGAIN_S: Final = 1.0  # after a view failed (a record that cannot be decoded), before everything is read anew

_spec: Final = msgspec.json.Decoder(SandboxSpec)
_status: Final = msgspec.json.Decoder(SandboxStatus)


class Follower:
    """Two views, one table. While the feed's other side is away, the table keeps its last state.

    Spec and status have two views because they have two writers. The table is written only once both are complete:
    one without the other would look like the end of every sandbox.
    """

    def __init__(self, source: Source, table: Table, *, on_trouble: Callable[[BaseException], object]) -> None:
        table.complete = False
        self._source, self._table, self._on_trouble = source, table, on_trouble
        self._specs: View[SandboxSpec] | None = None
        self._statuses: View[SandboxStatus] | None = None
        self._pulse = Pulse()
        self._turn = asyncio.Lock()
        self._asked = self._caught_up = 0  # tickets: the last given out, and the last whose question was answered

    @property
    def connected(self) -> bool:
        """False while the table may be old."""
        specs, statuses = self._specs, self._statuses
        return specs is not None and statuses is not None and specs.connected and statuses.connected

    async def follow(self) -> None:
        """Until cancelled. A task of the ingress."""
        while True:
            try:
                async with Crew("feed") as crew:
                    await self._read(crew)
                    await asyncio.get_running_loop().create_future()
            except* Exception as trouble:
                self._on_trouble(trouble)
            await asyncio.sleep(AGAIN_S)

    async def wait_complete(self, *, within_s: float) -> bool:
        """Whether the table was read once, by then."""
        until = asyncio.get_running_loop().time() + within_s
        return await self._pulse.wait_for(lambda: self._table.complete, until=until)

    async def catch_up(self) -> None:
        """Return once the table shows all that was true when this was called.

        Bounded by CATCH_UP_S, long enough for the feed of a restarted daemon to come back; then the table is what it
        is. All who ask meanwhile share the next question, so that
        a flood of unknown names costs the feed one small listing at a time.
        """
        if not self._table.complete:
            return
        self._asked = ticket = self._asked + 1
        try:
            async with within(CATCH_UP_S, "the feed's latest revision"), self._turn:
                if self._caught_up >= ticket:
                    return
                covers = self._asked
                # A key that cannot exist: the answer is empty and carries the store's revision.
                listing = await self._source.list(f"{keys.SANDBOX_SPEC}~")
                for view in (self._specs, self._statuses):
                    if view is not None:
                        await view.wait_revision(listing.revision, None)
                self._caught_up = covers
        except (DeadlinePassed, Unavailable):
            pass  # Safe: the caller decides by the table of now, as it would without us.

    async def _read(self, crew: Crew) -> None:
        self._specs = View(self._source, keys.SANDBOX_SPEC, _spec.decode)
        self._statuses = View(self._source, keys.SANDBOX_STATUS, _status.decode)
        # No bound: the daemon may be away for as long as it likes, and the table keeps its last state.
        await self._specs.start(crew, within_s=None)
        await self._statuses.start(crew, within_s=None)
        for sandbox in {*self._table.routes, *self._statuses.ids()}:
            self._look(sandbox)
        self._specs.subscribe(lambda sandbox, _: self._look(sandbox))
        self._statuses.subscribe(lambda sandbox, _: self._look(sandbox))
        self._table.complete = True
        self._pulse.fire()

    def _look(self, sandbox: str) -> None:
        assert self._specs is not None and self._statuses is not None
        self._table.put(sandbox, route_of(self._specs.get(sandbox), self._statuses.get(sandbox)))
