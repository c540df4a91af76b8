"""The route table: which sandbox is where, as the last word from the feed says.

A `Route` never changes: news about a sandbox replaces its route, so whoever holds one across an await still holds a
consistent picture and can tell by `incarnation` whether it is out of date. Built from two views (spec and status),
because they have two writers; an entry exists once both were seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from penstock.model.sandbox import SERVING, Phase, SandboxSpec, SandboxStatus

# UNKNOWN: the node is not sure (its daemon restarts), so the sandbox most likely runs; dialling verifies it anyway.
ROUTED: Final = SERVING | {Phase.UNKNOWN}
# Connections of a paused sandbox are kept: its memory is, and the peers inside will go on.
KEPT: Final = ROUTED | {Phase.PAUSED}


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of one sandbox go. `incarnation` names its pid 1 for ever: a resumed sandbox has another."""

    sandbox: str
    guest_socket: str = ""  # unix socket path of the guest protocol
    pid: int = 0
    start_ticks: int = 0
    serving: bool = True  # False: keep what is open, answer new requests as if it were gone
    secure: bool = True  # the guest asks for its access token
    auto_resume: bool = False  # paused, it is resumed by the next request
    private: bool = False  # user ports ask for the traffic token
    mask_host: str | None = None  # Host shown to user ports; may hold ${PORT}

    @property
    def reachable(self) -> bool:
        """It serves, or does once somebody asks something of it."""
        return self.serving or self.auto_resume

    @property
    def incarnation(self) -> tuple[int, int]:
        return self.pid, self.start_ticks


def route_of(spec: SandboxSpec | None, status: SandboxStatus | None) -> Route | None:
    """The route that spec and status together say, or None when nothing may be reached."""
    if spec is None or status is None or status.phase not in KEPT:
        return None
    return Route(
        sandbox=status.id,
        guest_socket=status.guest_socket,
        pid=status.pid,
        start_ticks=status.start_ticks,
        serving=status.phase in ROUTED,
        secure=spec.secure,
        auto_resume=spec.auto_resume,
        private=spec.traffic_private,
        mask_host=spec.mask_request_host,
    )


class Table:
    """Routes by sandbox id. Synchronously, `on_ended(route)` is called for each incarnation that is no more, and
    `on_paused(route)` for each that stands still from now on."""

    def __init__(self, on_ended: Callable[[Route], object] | None = None) -> None:
        self.routes: dict[str, Route] = {}
        self.on_ended = on_ended
        self.on_paused: Callable[[Route], object] | None = None
        self.complete = True  # False until the feed has been read once: absence means nothing yet

    def put(self, sandbox: str, route: Route | None) -> None:
        """Replace what is known of `sandbox`; None: it has ended."""
        old = self.routes.get(sandbox)
        if route is None:
            self.routes.pop(sandbox, None)
        else:
            self.routes[sandbox] = route
        if old is not None and (route is None or route.incarnation != old.incarnation) and self.on_ended is not None:
            self.on_ended(old)
        elif old is not None and route is not None and old.serving and not route.serving and self.on_paused is not None:
            self.on_paused(route)

    def find(self, sandbox: str) -> Route | None:
        """The route of a sandbox that serves now, or would by a request; else None."""
        route = self.routes.get(sandbox)
        return route if route is not None and route.reachable else None

    def reachable(self) -> list[Route]:
        return [route for route in self.routes.values() if route.reachable]
