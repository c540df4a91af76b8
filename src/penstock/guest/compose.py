"""POST /files/compose: join files inside the sandbox into one, as the last step of an upload in pieces.

The result is written beside the destination and renamed over it, so the destination is whole or untouched; then the
sources are removed.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from contextlib import suppress
from typing import Any, Final

from penstock.guest import trees
from penstock.guest.exchange import Exchange, HttpError
from penstock.guest.files import as_http_error, open_regular
from penstock.guest.parts import Parts
from penstock.guest.paths import make_directories, resolve, shown
from penstock.guest.users import User

BODY_BYTES_MAX: Final = 1024 * 1024
SOURCES_MAX: Final = 10_000


def register(parts: Parts) -> None:
    compose = Compose(parts)
    parts.routes.add("POST", "/files/compose", compose.serve)


class Compose:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def serve(self, exchange: Exchange) -> None:
        order = _decode(await exchange.read_body(BODY_BYTES_MAX))
        name = order.get("username") or exchange.query.get("username") or self._parts.settings.user
        if not isinstance(name, str):
            raise HttpError(400, "username must be a string")
        user = self._parts.users.get(name)
        sources = [resolve(raw, user.home) for raw in _sources(order)]
        raw = order.get("destination")
        if not isinstance(raw, str) or not raw:
            raise HttpError(400, "destination is required")
        destination = resolve(raw, user.home)
        await _join(sources, destination, user)
        answer = {"path": shown(destination), "name": shown(os.path.basename(destination)), "type": "file"}
        await exchange.respond_json(200, answer)


async def _join(sources: list[str], destination: str, user: User) -> None:
    for source in sources:  # before anything is made
        os.close(open_regular(source))
    folder, name = os.path.split(destination)
    beside = os.path.join(folder, f".{name[:200]}.{os.urandom(6).hex()}")
    try:
        if _is_directory(destination):
            raise HttpError(400, f"path '{shown(destination)}' is a directory")
        make_directories(folder, user)
        writer = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.fchown(writer, user.uid, user.gid)
            for source in sources:
                reader = open_regular(source)
                try:
                    await trees.pour(reader, writer)
                finally:
                    os.close(reader)
            os.rename(beside, destination)
        except BaseException:
            with suppress(OSError):  # Safe: what was written is named like nothing a program looks for.
                os.unlink(beside)
            raise
        finally:
            os.close(writer)
        for source in dict.fromkeys(sources):
            if source != destination:
                with suppress(FileNotFoundError):
                    os.unlink(source)
            await asyncio.sleep(0)
    except OSError as error:
        raise as_http_error(error, destination) from error


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _decode(body: bytes) -> dict[str, Any]:
    try:
        order = json.loads(body)
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    if not isinstance(order, dict):
        raise HttpError(400, "the body is not a JSON object")
    return order


def _sources(order: dict[str, Any]) -> list[str]:
    sources = order.get("source_paths")
    if not isinstance(sources, list) or not sources or not all(isinstance(raw, str) and raw for raw in sources):
        raise HttpError(400, "source_paths must be a list of at least one path")
    if len(sources) > SOURCES_MAX:
        raise HttpError(400, f"more than {SOURCES_MAX} source_paths")
    return sources
