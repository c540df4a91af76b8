"""A request for a sandbox that is paused, and was created to be resumed by one: who may wake it, and who is held.

The ingress itself changes nothing: it asks, by the feed's way upward, and waits until its table shows a sandbox that
serves. Whoever else has a request for it meanwhile waits for the same answer. Everything held is bounded: requests in
all, requests of one sandbox, questions at once, and the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from penstock.core.breaker import Breaker, BreakerFull
from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed, within
from penstock.ingress import pages
from penstock.ingress.decide import Signed, read_signed
from penstock.ingress.pages import Refusal
from penstock.ingress.table import Route
from penstock.wire.http1 import RequestHead
from penstock.wire.routing import GUEST_PORT, Target
from penstock.wire.tokens import same, sign

HELD_MAX: Final = 1024  # requests in all
HELD_EACH_MAX: Final = 256  # of one sandbox
QUESTIONS_MAX: Final = 16  # at once; each is a connection of the feed
WITHIN_S: Final = 30.0  # more than a resume may take; then 503

TOKEN: Final = b"x-access-token"

Ask = Callable[[str], Awaitable[str]]  # by sandbox id: the code of the refusal; empty: it runs


def may_wake(
    target: Target, head: RequestHead, route: Route, access_token: Callable[[str], str], now: float
) -> Refusal | None:
    """Why this request does not wake the sandbox; None: it does. User ports were judged by their own token before.

    A look at the guest's health is no use of it. What else comes for the guest must be what the guest will accept, at
    `now` (wall seconds): a stranger must not keep a sandbox awake.
    """
    if target.port != GUEST_PORT:
        return None
    if head.path == b"/health":
        return pages.sandbox_not_found(route.sandbox)
    if not route.secure:
        return None
    token = access_token(route.sandbox)
    given = head.header(TOKEN)
    if given and same(given.decode("latin-1"), token):
        return None
    signed = read_signed(head) if head.path == b"/files" and head.query else None
    if isinstance(signed, Signed) and _holds(signed, token, now):
        return None
    return pages.resume_denied(route.sandbox)


def _holds(signed: Signed, token: str, now: float) -> bool:
    made = sign(signed.path, signed.operation, signed.username, token, signed.expires)
    return same(signed.signature, made) and (signed.expires is None or signed.expires >= now)


class Waker:
    """`ask` resumes a sandbox; `caught_up` returns once the table shows what was true when it was called."""

    def __init__(self, ask: Ask | None, caught_up: Callable[[], Awaitable[None]], crew: Crew) -> None:
        self._ask, self._caught_up, self._crew = ask, caught_up, crew
        self._answers: dict[str, asyncio.Future[Refusal | None]] = {}
        self._held: dict[str, int] = {}
        self._questions = Breaker(QUESTIONS_MAX, HELD_MAX, "resumes asked for")
        self.held = 0  # requests that wait

    async def wake(self, sandbox: str) -> Refusal | None:
        """Return once it runs and the table shows it, or what to answer instead."""
        if self._ask is None:
            return pages.sandbox_not_found(sandbox)
        each = self._held.get(sandbox, 0)
        if self.held >= HELD_MAX or each >= HELD_EACH_MAX:
            return pages.too_many_waiting(sandbox)
        self.held += 1
        self._held[sandbox] = each + 1
        try:
            async with within(WITHIN_S, f"{sandbox} to be resumed"):
                return await asyncio.shield(self._answer(sandbox))
        except DeadlinePassed:
            return pages.not_resumed(sandbox)
        finally:
            self.held -= 1
            self._held[sandbox] -= 1
            if not self._held[sandbox]:
                del self._held[sandbox]

    def nudge(self, sandbox: str) -> None:
        """Ask, and hold nobody: a request is there already, and went in right before it was paused."""
        if self._ask is not None and len(self._answers) < HELD_MAX:
            self._answer(sandbox)

    def _answer(self, sandbox: str) -> asyncio.Future[Refusal | None]:
        found = self._answers.get(sandbox)
        if found is None:
            found = self._answers[sandbox] = asyncio.get_running_loop().create_future()
            self._crew.spawn(self._question(sandbox, found), name=f"resume of {sandbox}")
        return found

    async def _question(self, sandbox: str, answer: asyncio.Future[Refusal | None]) -> None:
        refusal: Refusal | None = pages.not_resumed(sandbox)
        try:
            assert self._ask is not None
            async with self._questions.enter(sandbox, WITHIN_S), within(WITHIN_S, f"the resume of {sandbox}"):
                refusal = _refusal(sandbox, await self._ask(sandbox))
                await self._caught_up()
        except (DeadlinePassed, BreakerFull):
            pass  # Safe: those who wait are told to come back.
        finally:
            del self._answers[sandbox]
            answer.set_result(refusal)


def _refusal(sandbox: str, code: str) -> Refusal | None:
    """What the code of an error means to whoever sent the request. What we are not told, they are not."""
    match code:
        case "":
            return None
        case "not_found":
            return pages.sandbox_not_found(sandbox)
        case "forbidden":
            return pages.resume_denied(sandbox)
        case "limit_reached":
            return pages.team_limit(sandbox)
        case "still_changing":
            return pages.still_changing(sandbox)
        case _:
            return pages.not_resumed(sandbox)
