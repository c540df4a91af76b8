"""The feed inside the process that has the store: no socket, no copy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol

from penstock.core.deadlines import Rng, backoff_s
from penstock.feed.source import Watching
from penstock.model.errors import Unavailable
from penstock.model.records import Listing

RETRY_BASE_S: Final = 0.05
RETRY_CAP_S: Final = 2.0


class Readable(Protocol):
    """What of a store a source needs."""

    def list(self, prefix: str) -> Listing: ...

    def watch(self, prefix: str, after_revision: int) -> Watching: ...


class Writable(Protocol):
    """What of a store reports need."""

    async def put(self, key: str, value: bytes, *, by: str, labels: Mapping[str, str] | None = None) -> int: ...

    async def put_all(self, records: Iterable[tuple[str, bytes, Mapping[str, str]]], *, by: str) -> int: ...

    async def delete(self, key: str, *, by: str) -> int: ...


class LocalSource:
    def __init__(self, store: Readable) -> None:
        self._store = store

    async def list(self, prefix: str) -> Listing:
        return self._store.list(prefix)

    def watch(self, prefix: str, after_revision: int) -> Watching:
        return self._store.watch(prefix, after_revision)


class LocalReports:
    """Writes as the room `by`. Facts about one key reach the store in the order in which they were put."""

    def __init__(self, store: Writable, *, by: str, rng: Rng) -> None:
        self._store, self._by, self._rng = store, by, rng
        self._turns: dict[str, int] = {}  # key → number of its newest fact, while it is being written
        self._given = 0

    async def put(self, key: str, value: bytes, labels: Mapping[str, str] | None = None) -> None:
        await self._write(key, lambda: self._store.put(key, value, labels=labels, by=self._by))

    async def add(self, records: Iterable[tuple[str, bytes, Mapping[str, str]]]) -> None:
        records = list(records)
        failures = 0
        while not await self._took(lambda: self._store.put_all(records, by=self._by)):
            failures += 1
            await asyncio.sleep(backoff_s(failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))

    async def remove(self, key: str) -> None:
        await self._write(key, lambda: self._store.delete(key, by=self._by))

    async def _write(self, key: str, attempt: Callable[[], Awaitable[int]]) -> None:
        """Retry while the store is full or busy, until a newer fact about the key takes over."""
        self._given += 1
        turn, failures = self._given, 0
        self._turns[key] = turn
        try:
            while self._turns.get(key) == turn:
                if await self._took(attempt):
                    return
                failures += 1
                await asyncio.sleep(backoff_s(failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng))
        finally:
            if self._turns.get(key) == turn:
                del self._turns[key]

    async def _took(self, attempt: Callable[[], Awaitable[int]]) -> bool:
        """False when it pays to try again later."""
        try:
            await attempt()
        except Unavailable as error:
            if error.retry_after_s is None:  # closed: waiting will not help
                raise
            return False
        return True
