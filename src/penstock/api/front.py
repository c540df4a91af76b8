"""What every handler needs, and who is calling."""

from __future__ import annotations

import asyncio
import hmac
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Final

from fastapi import Depends, Header, Request

from penstock.api.ports import Holdings, Measurements, Planner, Quarantine, Reasons
from penstock.api.roster import Roster
from penstock.core.breaker import Breaker
from penstock.core.clock import Clock
from penstock.feed.view import View
from penstock.model.drain import DrainPlan
from penstock.model.errors import Forbidden, Unauthenticated
from penstock.model.event import EventWriter
from penstock.model.ids import KeyId, TeamId, mint
from penstock.model.node import NodeStatus
from penstock.model.team import ApiKey, Team, TeamLimits
from penstock.model.template import Build, Template
from penstock.store.store import Store
from penstock.wire import tokens

ENVD_VERSION: Final = "0.6.13"  # the guest protocol we answer; the SDKs compare it (e2b-sdk 5)
CLIENT_ID: Final = "6532622b"  # a dummy the SDKs require (e2b 1.3)
TAILS_MAX: Final = 64  # readers that follow the event log at once; beyond it 429
PLANS_MAX: Final = 64  # plans of drains that are remembered


class Turns:
    """One holder at a time per key. Keeps nothing of a key that nobody holds or waits for."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            users = self._locks[key][1] - 1
            if users:
                self._locks[key] = (lock, users)
            else:
                del self._locks[key]


class Plans:
    """The last plans that were shown, by digest: whoever applies one that no longer holds is told what has moved."""

    def __init__(self) -> None:
        self._plans: dict[str, DrainPlan] = {}

    def remember(self, plan: DrainPlan) -> None:
        self._plans.pop(plan.digest, None)
        self._plans[plan.digest] = plan
        if len(self._plans) > PLANS_MAX:
            del self._plans[next(iter(self._plans))]

    def recall(self, digest: str) -> DrainPlan | None:
        return self._plans.get(digest)


@dataclass(frozen=True, kw_only=True)
class Front:
    """The API's world. `domain` may carry a port (`sbx.localhost:3943`); `seed` derives every sandbox's tokens."""

    store: Store
    roster: Roster
    templates: View[Template]
    builds: View[Build]
    keys: View[ApiKey]
    teams: View[Team]
    nodes: View[NodeStatus]
    planner: Planner
    measurements: Measurements
    clock: Clock
    rng: random.Random
    seed: bytes
    domain: str
    admin_token: str
    limits: TeamLimits
    check_room: Callable[[], None] = lambda: None  # raises Unavailable when the host has no room for another sandbox
    turns: Turns = field(default_factory=Turns)  # of idempotency keys and of specs being changed
    ready_s: float = 60.0  # how long a create may take before it answers 503
    room_s: float = 5.0  # how much of that it waits for a node that is full; less than any client waits for an answer
    answer_s: float = 5.0  # how long a node may take to say that it has an order
    forced_s: float = 25.0  # how long a forced stop is waited for before it answers 202 (e2b 6.7)
    keepalive_s: float = 15.0  # between two signs of life on a stream of events
    plans: Plans = field(default_factory=Plans)
    tails: Breaker = field(default_factory=lambda: Breaker(TAILS_MAX, 0, "readers that follow the event log"))
    reasons: Reasons | None = None  # None: nobody to ask
    holdings: Holdings | None = None
    quarantine: Quarantine | None = None

    @cached_property
    def chronicle(self) -> EventWriter:
        """Names our lines of the event log."""
        return EventWriter("api", mint(self.rng, 6))

    def limits_of(self, team: TeamId) -> TeamLimits:
        found = self.teams.get(team)
        return found.limits if found is not None else self.limits


@dataclass(frozen=True)
class Caller:
    """An authenticated request: the team it acts for, and the key that said so (None for the operator)."""

    team: TeamId
    key: KeyId | None

    @property
    def name(self) -> str:
        return f"key {self.key}" if self.key else "operator"


# These are coroutines although they wait for nothing: FastAPI runs a plain function on a thread, 0.2 ms a piece.


async def front_of(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


async def caller_of(
    front: Annotated[Front, Depends(front_of)],
    x_api_key: Annotated[str | None, Header()] = None,
    x_admin_token: Annotated[str | None, Header()] = None,
    x_team_id: Annotated[str | None, Header()] = None,
) -> Caller:
    """The caller by `X-API-Key`, or the operator by `X-Admin-Token` with an optional `X-Team-ID`.

    Raises Unauthenticated. Keys are compared by their hash, so the look-up's timing tells nothing about a key.
    """
    if x_admin_token is not None:
        if not hmac.compare_digest(x_admin_token.encode(), front.admin_token.encode()):
            raise Unauthenticated("the admin token is not this installation's")
        return Caller(TeamId(x_team_id or "default"), None)
    if not x_api_key:
        raise Unauthenticated("no API key", now="send it in the X-API-Key header (E2B_API_KEY)")
    digest = tokens.hash_key(x_api_key)
    for key in front.keys.by("hash", digest) if digest else ():
        if key.revoked_at:
            raise Unauthenticated("the API key was revoked", now="make a new one: penstock key create")
        return Caller(key.team, key.id)
    raise Unauthenticated("the API key is not known here", now="see: penstock env, penstock key create")


async def operator_of(caller: Annotated[Caller, Depends(caller_of)]) -> Caller:
    """Only the operator (admin token) passes. Raises Forbidden."""
    if caller.key is not None:
        raise Forbidden("this needs the admin token", now="send X-Admin-Token")
    return caller


FrontDep = Annotated[Front, Depends(front_of)]
CallerDep = Annotated[Caller, Depends(caller_of)]
OperatorDep = Annotated[Caller, Depends(operator_of)]
