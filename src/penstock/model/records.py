"""What the store holds and the feed hands out: records, the changes of one revision, and what a reader may meet.

The same types travel in memory, in the log on disk and over the feed's socket; only the store makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec

from penstock.core.errors import Kind, PenstockError


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One key with its value. Revisions are the store's; `version` counts the writes since it was created, from 1.

    `labels` never change in a record's life and must not be altered by readers. `lease` is 0 without one.
    """

    key: str
    value: bytes
    labels: Mapping[str, str]
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Change(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What happened to one key. A "delete" carries a tombstone: no value, version 0, labels as they were."""

    kind: Literal["put", "delete"]
    record: Record


class Batch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One whole revision: all of its changes under the reader's prefix, in the order they were written.

    An empty batch says only that the reader has seen everything up to `revision`.
    """

    revision: int
    changes: tuple[Change, ...]


class Listing(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The records under a prefix, by key, as of `revision`: watch on from there and nothing is missed."""

    revision: int
    records: tuple[Record, ...]


class Compacted(PenstockError):
    """The revision asked for is not kept (any more, or not yet written here). Its catcher lists again."""

    kind: ClassVar[Kind] = Kind.CONFLICT
    code: ClassVar[str] = "compacted"

    def __init__(self, asked: int, *, compacted: int, revision: int) -> None:
        self.asked, self.compacted, self.revision = asked, compacted, revision
        super().__init__(
            "revision is not kept", which=str(asked), why=f"kept are {compacted} to {revision}", now="list again"
        )


class ReaderCut(PenstockError):
    """A watch was ended because its reader fell too far behind. Its catcher watches on from its own revision."""

    kind: ClassVar[Kind] = Kind.UNAVAILABLE
    code: ClassVar[str] = "reader_cut"
