"""The ingress, put together: the table, the connections on both sides, and who may have how many.

Descriptors are the resource that runs out first. Clients, upstreams, dials and handshakes share one budget. When it is
used up, kept upstreams are closed first, then the clients that have been idle longest; when nobody is idle, a new
client is told 503. So ten thousand idle connections cost nobody else anything but memory.
"""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from penstock.core.crew import Crew
from penstock.core.deadlines import Pulse
from penstock.ingress.client import Client
from penstock.ingress.connection import Connection
from penstock.ingress.dial import Dialler
from penstock.ingress.heads import Heads
from penstock.ingress.netns import DESCRIPTORS_MAX
from penstock.ingress.pool import Pool
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.signed import SignedRoutes
from penstock.ingress.table import Route, Table
from penstock.ingress.tally import Gauges, Tally, expose
from penstock.ingress.upstream import Upstream
from penstock.ingress.waking import Ask, Waker

BACKLOG: Final = 1024  # connections the kernel holds for us; the loop takes as many at once before we may refuse any
REFUSED_LINGERING_MAX: Final = 64  # refused clients given time to read why
LAG_EVERY_S: Final = 0.25
RECENT_S: Final = 1.0  # the feed's news are a millisecond old, much more when this process had to wait for a core


def descriptor_budget() -> int:
    """How many connections this process may hold, both sides together. Raises the soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return budget_of(hard)


def budget_of(limit: int) -> int:
    """What `limit` descriptors leave after a full backlog, the refused, the namespaces and our own few."""
    reserve = BACKLOG + REFUSED_LINGERING_MAX + DESCRIPTORS_MAX + 64
    return limit - min(reserve, limit // 2)


class Hub:
    """Everything a connection needs. Constructed with ready objects; `run` or `sim` chooses them."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        table: Table,
        dialler: Dialler,
        tokens: Tokens,
        crew: Crew,
        descriptors_max: int,
        per_sandbox_max: int | None = None,
        gauges: Gauges | None = None,
        catch_up: Callable[[], Awaitable[None]] | None = None,
        ask: Ask | None = None,
        wall: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.loop, self.table, self.tokens = loop, table, tokens
        self.tally, self.heads = Tally(), Heads()
        self.signed = SignedRoutes(table, tokens)
        self.pool = Pool(self, dialler)
        # Dictionaries instead of sets: all that is cut at once is cut in the order in which it came.
        self.clients: dict[Connection, None] = {}
        self.upstreams: dict[Upstream, None] = {}
        self.idle: OrderedDict[Connection, None] = OrderedDict()  # between requests, longest first
        self.stopping = False
        self._catch_up = catch_up
        self.wall = wall
        self.waker = Waker(ask, self.catch_up, crew)
        self.handshakes = 0  # TLS connections that are no clients yet
        self._left = Pulse()  # a client has gone
        self.descriptors_max = descriptors_max
        # A quarter each (spec/e2b.md 3.1): one sandbox's clients and their upstreams take half of the budget at most.
        self.per_sandbox_max = per_sandbox_max or max(1, descriptors_max // 4)
        self._dialler, self._crew = dialler, crew
        self._exchanges: dict[str, dict[Client, None]] = {}
        self._refused: set[Connection] = set()
        self._gauges = gauges if gauges is not None else Gauges()
        self._gauges.update(
            connections_open=lambda: len(self.clients),
            connections_idle=lambda: len(self.idle),
            upstreams_open=lambda: len(self.upstreams),
            upstreams_idle=lambda: len(self.pool),
            descriptors_max=lambda: self.descriptors_max,
            routes=lambda: len(self.table.routes),
            requests_held=lambda: self.waker.held,
        )
        table.on_ended = self._sandbox_ended
        table.on_paused = self._sandbox_paused
        crew.spawn(self.pool.sweep(), name="pool sweep")
        crew.spawn(self._watch_lag(), name="loop lag")

    def spawn(self, coro: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        return self._crew.spawn(coro, name=name)

    async def catch_up(self) -> None:
        """The table hears all that was true by now, as far as its source can be asked."""
        if self._catch_up is not None:
            await self._catch_up()

    # ---- clients

    def admit(self, client: Connection) -> bool:
        """Count a new client in. False: no room, and nobody idle to make some."""
        self.tally.connections += 1
        if self.stopping or not self.make_room():
            return False
        self.clients[client] = None
        self.idle[client] = None
        return True

    def may_linger(self, client: Connection) -> bool:
        """Whether a refused client may stay for the moment it takes to read why."""
        if len(self._refused) >= REFUSED_LINGERING_MAX:
            return False
        self._refused.add(client)
        return True

    def leave(self, client: Connection) -> None:
        self.clients.pop(client, None)
        self._refused.discard(client)
        self.idle.pop(client, None)
        if self.stopping:
            self._left.fire()

    def make_room(self) -> bool:
        """Room for one more descriptor, if need be by closing something idle."""
        held = len(self.clients) + len(self.upstreams) + self.pool.dialling + self.handshakes
        if held < self.descriptors_max:
            return True
        if self.pool.drop_oldest():
            return True
        if self.idle:
            victim, _ = self.idle.popitem(last=False)
            self.clients.pop(victim, None)
            self.tally.evicted += 1
            victim.close_if_idle()
            return True
        return False

    # ---- exchanges

    def enter(self, sandbox: str, client: Client) -> bool:
        """Count an exchange in. False: the sandbox has its share already."""
        clients = self._exchanges.get(sandbox)
        if clients is None:
            clients = self._exchanges[sandbox] = {}
        elif len(clients) >= self.per_sandbox_max:
            return False
        clients[client] = None
        return True

    def exit(self, sandbox: str, client: Client) -> None:
        clients = self._exchanges.get(sandbox)
        if clients is not None:
            clients.pop(client, None)

    def exchanges(self, sandbox: str) -> int:
        return len(self._exchanges.get(sandbox, ()))

    # ---- the whole

    def expose(self) -> bytes:
        return expose(self.tally, self._gauges)

    async def stop(self, *, grace_s: float) -> int:
        """Let what is under way end, for `grace_s` at most; returns how many connections were cut then.

        The listeners are closed by now. Idle connections close at once, the others after their response.
        """
        self.stopping = True
        for client in list(self.idle):
            client.close_if_idle()
        self.pool.close()
        await self._left.wait_for(lambda: not self.clients, until=self.loop.time() + grace_s)
        left = list(self.clients)
        for client in left:
            client.reset()
        for upstream in list(self.upstreams):
            upstream.transport.abort()
        await asyncio.sleep(0)
        return len(left)

    def _sandbox_ended(self, route: Route) -> None:
        for client in list(self._exchanges.pop(route.sandbox, ())):
            client.sandbox_ended()
        self.pool.drop_sandbox(route.sandbox)
        self.tokens.forget(route.sandbox)
        self._dialler.forget(route)

    def _sandbox_paused(self, route: Route) -> None:
        """What went in a moment ago was meant for a sandbox that runs: nobody may wait for ever for this race."""
        since = self.loop.time() - RECENT_S
        for client in list(self._exchanges.get(route.sandbox, ())):
            client.sandbox_paused(since)

    async def _watch_lag(self) -> None:
        while True:
            due = self.loop.time() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.tally.lagged(max(0.0, self.loop.time() - due))
