"""Kept connections into sandboxes, by sandbox and port.

A kept connection may have been closed by its server a moment ago. A request that may be sent twice takes that risk (and
is sent again if it loses); any other takes a connection that was used in the last FRESH_S only, well below the shortest
keep-alive limit servers use (5 s in uvicorn and Node), or a new one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from penstock.ingress.dial import Dialler, NoDescriptor, PortClosed, SandboxGone
from penstock.ingress.table import Route
from penstock.ingress.upstream import Key, Upstream

if TYPE_CHECKING:
    from penstock.ingress.hub import Hub

KEPT_PER_PORT_MAX: Final = 128  # with more requests at once than this each dials: 55 us of CPU instead of 33
KEPT_MAX: Final = 2048
IDLE_S: Final = 30.0
FRESH_S: Final = 2.0
SWEEP_S: Final = 5.0


class Pool:
    """Idle upstreams. Those in use belong to their clients."""

    def __init__(self, hub: Hub, dialler: Dialler) -> None:
        self._hub, self._dialler = hub, dialler
        self._kept: dict[Key, deque[Upstream]] = {}
        self._count = 0
        self._dialling = 0

    def __len__(self) -> int:
        return self._count

    @property
    def dialling(self) -> int:
        return self._dialling

    def take(self, route: Route, port: int, *, replayable: bool) -> Upstream | None:
        """The most recently used connection that suits, or None: dial."""
        kept = self._kept.get((route.sandbox, port))
        if not kept:
            return None
        upstream = kept[-1]
        limit_s = IDLE_S if replayable else FRESH_S
        if self._hub.loop.time() - upstream.idle_since > limit_s or upstream.transport.is_closing():
            return None
        kept.pop()
        self._count -= 1
        return upstream

    def give(self, upstream: Upstream) -> None:
        """Keep it for the next request."""
        kept = self._kept.get(upstream.key)
        if kept is None:
            kept = self._kept[upstream.key] = deque()
        full = len(kept) >= KEPT_PER_PORT_MAX or self._count >= KEPT_MAX or self._hub.stopping
        if full or upstream.key[0] not in self._hub.table.routes:
            upstream.transport.close()
            return
        upstream.idle_since = self._hub.loop.time()
        kept.append(upstream)
        self._count += 1

    def forget(self, upstream: Upstream) -> None:
        """It has died, or was taken out of turn. Absent is success."""
        kept = self._kept.get(upstream.key)
        if kept is not None and upstream in kept:
            kept.remove(upstream)
            self._count -= 1
            if not kept:
                del self._kept[upstream.key]

    def drop_sandbox(self, sandbox: str) -> None:
        for key in [key for key in self._kept if key[0] == sandbox]:
            self._close_all(key)

    def drop_oldest(self) -> bool:
        """Make room by one descriptor. False: nothing is kept."""
        for key in list(self._kept):
            kept = self._kept[key]
            if kept:
                self._count -= 1
                kept.popleft().transport.abort()
                return True
            del self._kept[key]
        return False

    async def sweep(self) -> None:
        """Close what was idle for IDLE_S, for ever. A task of the hub's crew."""
        while True:
            await asyncio.sleep(SWEEP_S)
            stale_before = self._hub.loop.time() - IDLE_S
            for key, kept in list(self._kept.items()):
                while kept and kept[0].idle_since < stale_before:
                    self._count -= 1
                    kept.popleft().transport.close()
                if not kept:
                    del self._kept[key]

    def close(self) -> None:
        for key in list(self._kept):
            self._close_all(key)

    async def dial(self, route: Route, port: int) -> Upstream:
        """A new connection. Raises PortClosed, SandboxGone, NoDescriptor."""
        if not self._hub.make_room():
            raise NoDescriptor("no descriptor is left", which=route.sandbox, retry_after_s=1.0)
        began, result = self._hub.loop.time(), "failed"
        self._dialling += 1
        try:
            upstream = await self._dialler.dial(route, port, lambda: Upstream(self._hub, (route.sandbox, port)))
            result = "connected"
            return upstream
        except PortClosed:
            result = "port_closed"
            raise
        except SandboxGone:
            result = "sandbox_gone"
            raise
        finally:
            self._dialling -= 1
            self._hub.tally.dialled(result, self._hub.loop.time() - began)

    def _close_all(self, key: Key) -> None:
        kept = self._kept.pop(key)
        self._count -= len(kept)
        for upstream in kept:
            upstream.abandon()
