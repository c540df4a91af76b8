"""Facts upward: how a room that reads through the feed tells the store what is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class Reports(Protocol):
    """The newest fact per key counts: one that was overtaken while the store could not take it is never written."""

    async def put(self, key: str, value: bytes, labels: Mapping[str, str] | None = None) -> None:
        """Returns when the fact is in the store, or overtaken by a newer one. Waits while the store has no room."""

    async def add(self, records: Iterable[tuple[str, bytes, Mapping[str, str]]]) -> None:
        """Records (key, value, labels) that nothing overtakes, all in one revision. Waits while the store has no room.

        Adding the same once more changes nothing, so an answer that was lost is no reason to lose a record.
        """

    async def remove(self, key: str) -> None:
        """Likewise, for "there is nothing any more". Absent is success."""
