"""Who may call: the access token, signatures of file URLs, the user a call acts as.

Secrets are compared in constant time.
"""

from __future__ import annotations

import binascii
from typing import Final

from penstock.core.clock import Clock
from penstock.guest.exchange import Exchange, HttpError, Peer
from penstock.guest.settings import Settings
from penstock.wire import tokens
from penstock.wire.routing import ACCESS_TOKEN_HEADER

_BASIC: Final = "basic "


class TokenAccess:
    """The rules for `Settings.access_token`; without a token everything is open."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings, self._clock = settings, clock

    def require(self, exchange: Exchange) -> None:
        """The rule of RPC, /envs and /metrics: the header X-Access-Token must match. Raises HttpError(401)."""
        token = self._settings.access_token
        if token is None or exchange.peer is Peer.CONTROL:
            return
        if not tokens.same(exchange.header_text(ACCESS_TOKEN_HEADER), token):
            raise HttpError(401, "unauthorized access, please provide a valid access token")

    def require_file(self, exchange: Exchange, operation: str) -> None:
        """The rule of /files: a given header must match; without one the query must be signed for `operation`
        (`read` or `write`). Raises HttpError(401) with E2B's words."""
        token = self._settings.access_token
        if token is None or exchange.peer is Peer.CONTROL:
            return
        given = exchange.header_text(ACCESS_TOKEN_HEADER)
        if given:
            if not tokens.same(given, token):
                raise HttpError(401, "access token present in header but does not match")
            return
        query = exchange.query
        signature = query.get("signature", "")
        if not signature:
            raise HttpError(401, "missing signature query parameter")
        why_not = tokens.check(
            signature,
            path=query.get("path", ""),
            operation=operation,
            username=query.get("username", ""),
            token=token,
            expires=_expiration(query.get("signature_expiration", "")),
            now=self._clock.wall(),
        )
        if why_not is not None:
            raise HttpError(401, why_not)


def basic_user(exchange: Exchange) -> str:
    """User name of the Basic credentials, password ignored; empty without credentials. Raises HttpError(401)."""
    value = exchange.header_text(b"authorization")
    if not value.lower().startswith(_BASIC):
        return ""
    try:
        name = binascii.a2b_base64(value[len(_BASIC) :].strip().encode("latin-1"), strict_mode=True)
        return name.partition(b":")[0].decode()
    except ValueError:
        raise HttpError(401, "malformed Basic credentials") from None


def _expiration(text: str) -> int | None:
    if not text:
        return None
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise HttpError(400, "signature_expiration is not a number of seconds")
    return int(text)
