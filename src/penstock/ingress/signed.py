"""Which sandbox a signed file URL belongs to, when the URL does not say.

Under one base URL for every sandbox, the SDKs make signed URLs without any sandbox id (spec/e2b-sdk.md 0.8). The
signature covers the sandbox's access token, so the sandbox is the one whose token makes it: recomputed over those that
live, 3 µs each. That is linear, so it is bounded: one search at a time, in slices that let other work go on in between,
a bounded queue, and what was found is remembered. What was not found is not: an attacker would only fill the memory.
"""

from __future__ import annotations

import asyncio
from typing import Final

from penstock.core.breaker import Breaker
from penstock.ingress.decide import Signed
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.table import Route, Table
from penstock.wire.tokens import same, sign

SLICE: Final = 128  # sandboxes tried without giving way: about 0.4 ms
PAUSE_S: Final = 0.0015  # between slices, so that a flood of forged URLs takes a fifth of the core at most
WAITING_MAX: Final = 64  # searches in the queue; beyond it 429
WITHIN_S: Final = 10.0
FOUND_MAX: Final = 1024  # URLs remembered; then all are forgotten at once


class SignedRoutes:
    """Finds the route of a signed URL among the sandboxes of `table`."""

    def __init__(self, table: Table, tokens: Tokens) -> None:
        self._table, self._tokens = table, tokens
        self._found: dict[Signed, str] = {}
        self._breaker = Breaker(running_max=1, waiting_max=WAITING_MAX, name="signed URLs")

    async def find(self, signed: Signed) -> Route | None:
        """The live route whose token made the signature, or None. Expiry is the guest's to check.

        Raises BreakerFull when too many search already, DeadlinePassed when the turn did not come within WITHIN_S.
        """
        known = self._found.get(signed)
        if known is not None:
            return self._table.find(known)
        async with self._breaker.enter("signed URL", within_s=WITHIN_S):
            return await self._search(signed)

    async def _search(self, signed: Signed) -> Route | None:
        for tried, route in enumerate(self._table.reachable()):
            if tried and tried % SLICE == 0:
                await asyncio.sleep(PAUSE_S)
            alive = self._table.find(route.sandbox) is not None  # it may have ended while we gave way
            if alive and route.secure and self._made_by(route.sandbox, signed):
                if len(self._found) >= FOUND_MAX:
                    self._found.clear()
                self._found[signed] = route.sandbox
                return self._table.find(route.sandbox)
        return None

    def _made_by(self, sandbox: str, signed: Signed) -> bool:
        token = self._tokens.access(sandbox)
        return same(signed.signature, sign(signed.path, signed.operation, signed.username, token, signed.expires))
