"""Where a view reads from: list once, then watch on from the listing's revision.

The same two verbs local and remote.
"""

from __future__ import annotations

from typing import Protocol

from penstock.model.records import Batch, Listing


class Watching(Protocol):
    """An async iterator of whole revisions under one prefix. One reader."""

    @property
    def connected(self) -> bool:
        """False while the other side is away; the watch goes on by itself when it is back."""

    def __aiter__(self) -> Watching: ...

    async def __anext__(self) -> Batch:
        """The next revision. Raises Compacted (list again) or ReaderCut (watch on from the last revision seen)."""

    def want(self, revision: int) -> None:
        """Ask for a batch, empty if need be, once `revision` is reached. The smallest of several counts, once."""

    async def aclose(self) -> None:
        """Stop. Idempotent."""


class Source(Protocol):
    async def list(self, prefix: str) -> Listing:
        """Everything under `prefix`. May wait for the other side: bound it."""

    def watch(self, prefix: str, after_revision: int) -> Watching:
        """Everything under `prefix` after that revision. Errors show when it is iterated."""
