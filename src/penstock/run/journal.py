"""What happens to the daemon itself, as lines of the event log: it started, it stops, a process of ours was replaced.

The daemon does not wait for these lines, and none of them may fail it: what cannot be written is in its own log, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from structlog import get_logger

from penstock.core.clock import Clock
from penstock.core.crew import Crew, CrewClosed
from penstock.core.deadlines import within
from penstock.core.errors import PenstockError
from penstock.model import keys
from penstock.model.event import EventWriter, LoggedEvent, decode
from penstock.model.ids import mint
from penstock.store.store import Put, Store

log = get_logger("journal")

WRITE_S: Final = 5.0
WAITING_MAX: Final = 100  # lines not yet written; beyond it they are in the daemon's own log alone
STARTED: Final = "daemon.started"
STOPPING: Final = "daemon.stopping"
ACTOR: Final = "run"


class Journal:
    """`subject` is the node this daemon runs: what happens to one, happens to the other."""

    def __init__(self, store: Store, clock: Clock, rng: random.Random, *, subject: str) -> None:
        self._store, self._clock, self._subject = store, clock, subject
        self._writer = EventWriter("run", mint(rng, 6))
        self._waiting = 0

    def line(self, kind: str, because: str = "", *, subject: str = "", team: str = "", **facts: str) -> Put:
        """The operation that writes a line, for the commit of what it explains. Use it once."""
        event = LoggedEvent(
            at=self._clock.wall(),
            kind=kind,
            subject=subject or self._subject,
            actor=ACTOR,
            because=because,
            facts=facts,
            team=team,
        )
        record = self._writer.record(event)
        return Put(record.key, record.value, labels=record.labels, expect=0)

    async def write(self, kind: str, because: str = "", **facts: str) -> None:
        """Write a line now, within WRITE_S."""
        try:
            async with within(WRITE_S, f"the line {kind}"):
                await self._store.commit([self.line(kind, because, **facts)], by="run")
        except PenstockError as error:
            # Safe: nothing depends on it, and the daemon's own log keeps what was to be said.
            log.warning("not in the event log", kind=kind, because=because, error=str(error), **facts)

    def tell(self, crew: Crew, kind: str, because: str = "", **facts: str) -> None:
        """Write a line soon. Never waits."""
        if self._waiting >= WAITING_MAX:
            log.warning("not in the event log: too many wait", kind=kind, because=because, **facts)
            return
        self._waiting += 1
        try:
            crew.spawn(self._write_soon(kind, because, facts), name=f"line {kind}")
        except CrewClosed:
            self._waiting -= 1  # Safe: the daemon ends, which is in the log already.

    async def _write_soon(self, kind: str, because: str, facts: dict[str, str]) -> None:
        try:
            await self.write(kind, because, **facts)
        finally:
            self._waiting -= 1

    def teller(self, crew: Crew, kind: str, also: Callable[[str], None]) -> Callable[[str], None]:
        """For whoever keeps a process alive: each of its words goes to `also` and becomes a line of `kind`."""

        def tell(text: str) -> None:
            also(text)
            self.tell(crew, kind, text)

        return tell

    def how_the_last_one_ended(self) -> str:
        """What the log knows of the daemon before this one, as a clause. Call it before this one's first line."""
        records = self._store.list(keys.EVENT, labels={"subject": self._subject}).records
        events = [decode(record.value) for record in records]
        ours = [event for event in events if event.kind in (STARTED, STOPPING)]
        if not ours:
            return "there was none before"
        if ours[-1].kind == STARTED:
            return "the one before ended without a word"
        return f"the one before ended in order: {ours[-1].because}"
