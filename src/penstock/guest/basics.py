"""The small routes: is it alive, which environment it has, and the daemon's `/init`."""

from __future__ import annotations

import json
from typing import Any, Final

from penstock.guest.exchange import Exchange, HttpError
from penstock.guest.parts import Parts
from penstock.guest.settings import ENVD_VERSION

INIT_BYTES_MAX: Final = 1024 * 1024
ENV_NAMES_MAX: Final = 1024


def register(parts: Parts) -> None:
    basics = Basics(parts)
    parts.routes.add("GET", "/health", basics.health, guarded=False)
    parts.routes.add("GET", "/envs", basics.envs)
    parts.routes.add("POST", "/init", basics.init, guarded=False, internal=True)


class Basics:
    def __init__(self, parts: Parts) -> None:
        self._settings = parts.settings

    async def health(self, exchange: Exchange) -> None:
        exchange.answer(204, [(b"cache-control", b"no-store")])

    async def envs(self, exchange: Exchange) -> None:
        await exchange.respond_json(200, self._settings.public_env(), [(b"cache-control", b"no-store")])

    async def init(self, exchange: Exchange) -> None:
        """Change what the sandbox was told at birth. A field that is absent stays; `envVars` replaces all of them,
        an empty `accessToken` opens the sandbox. All or nothing: a bad field changes nothing."""
        wish = _parse(await exchange.read_body(INIT_BYTES_MAX))
        settings = self._settings
        env = _env(wish.get("envVars"))
        token = _text(wish, "accessToken")
        user = _text(wish, "defaultUser")
        workdir = _text(wish, "defaultWorkdir")
        if env is not None:
            settings.env = env
        if token is not None:
            settings.access_token = token or None
        if user:
            settings.user = user
        if workdir is not None:
            settings.workdir = workdir
        exchange.answer(204, [(b"x-envd-version", ENVD_VERSION.encode())])


def _parse(body: bytes) -> dict[str, Any]:
    try:
        wish = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    if not isinstance(wish, dict):
        raise HttpError(400, "the body is not a JSON object")
    return wish


def _text(wish: dict[str, Any], name: str) -> str | None:
    value = wish.get(name)
    if value is not None and not isinstance(value, str):
        raise HttpError(400, f"{name} must be a string")
    return value


def _env(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HttpError(400, "envVars must map strings to strings")
    if len(value) > ENV_NAMES_MAX:
        raise HttpError(400, f"envVars has more than {ENV_NAMES_MAX} names")
    return value
