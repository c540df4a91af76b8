"""The port beneath the store: an append-only log of whole revisions, on some medium.

Promises every adapter keeps (`tests/contract/test_store_log.py`):

- `logged(revision)` is called on the event loop once everything up to `revision` is kept: in order, and once per group
  of entries rather than once per entry;
- after a failure nothing that was appended since is kept, `failed(error)` is called once, and entries are dropped until
  `reset()`; a `StoreFull` may be reset, anything else is final;
- what was reported as logged is there after a crash of the process. After a loss of power, so is everything up to the
  last entry appended with `durable`;
- compaction is cut into bounded steps, so that it never holds up entries for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from penstock.model.records import Batch, Record

OnLogged = Callable[[int], None]
OnFailed = Callable[[BaseException], None]


class Image(msgspec.Struct, frozen=True, gc=False):
    """All records as of `revision`. History is promised from `compacted` on, which is at least `revision`."""

    revision: int
    compacted: int
    records: tuple[Record, ...]


class Log(Protocol):
    async def open(self, *, logged: OnLogged, failed: OnFailed) -> None:
        """Take the medium. Raises StoreDamaged, StoreTooNew, StoreHeld with the medium left untouched."""

    async def image(self) -> Image:
        """The oldest state the log still holds; entries after it are `read`."""

    async def read(self, after_revision: int, count_max: int) -> list[Batch]:
        """The next revisions, at most `count_max` but at least one while there is one. Whole, in order, no gaps.

        Empty at the end. Raises Compacted when the log no longer holds what follows `after_revision`.
        """

    def append(self, entry: Batch, *, durable: bool) -> None:
        """Hand over the next revision. Never blocks; the caller bounds what is in flight."""

    def reset(self) -> None:
        """Take entries again after `failed`."""

    def compact(self, revision: int) -> asyncio.Future[None]:
        """Fold everything up to `revision` (which is logged) into the image. Done when the returned future is."""

    async def close(self) -> None:
        """Log what was appended, then give the medium back. Idempotent."""
