"""What the store raises. `Compacted` and `ReaderCut`, which readers meet too, live in `model.records`."""

from __future__ import annotations

from typing import ClassVar

from penstock.model.errors import Conflict, Forbidden, Internal, NotFound, Unavailable
from penstock.model.records import Compacted, ReaderCut

__all__ = [
    "AlreadyExists",
    "Compacted",
    "LeaseNotFound",
    "ReaderCut",
    "RevisionConflict",
    "StoreBusy",
    "StoreClosed",
    "StoreDamaged",
    "StoreFailed",
    "StoreFull",
    "StoreHeld",
    "StoreTooNew",
    "WrongWriter",
]


class RevisionConflict(Conflict):
    """Somebody else wrote the key since the caller read it. Read again and decide again."""

    code: ClassVar[str] = "revision_conflict"

    def __init__(self, key: str, *, expected: int, found: int) -> None:
        self.key, self.expected, self.found = key, expected, found
        why = f"expected revision {expected}, found {found}" if found else f"expected revision {expected}, found none"
        super().__init__("record was written by somebody else", which=key, why=why, now="read it again")


class AlreadyExists(RevisionConflict):
    """A create met a living record."""

    code: ClassVar[str] = "already_exists"


class WrongWriter(Forbidden):
    """A room wrote what another room owns (`model.writers`): a bug in the caller."""

    code: ClassVar[str] = "wrong_writer"


class LeaseNotFound(NotFound):
    """The lease has expired, was revoked, or never was. Grant a new one."""

    code: ClassVar[str] = "lease_not_found"


class StoreBusy(Unavailable):
    """More commits or watches are waiting than the store admits. Retry after `retry_after_s`."""

    code: ClassVar[str] = "store_busy"


class StoreFull(Unavailable):
    """The disk has no room. Nothing of the refused commits was kept; the store goes on as soon as there is room."""

    code: ClassVar[str] = "store_full"


class StoreClosed(Unavailable):
    """The store was closed, or is not open yet."""

    code: ClassVar[str] = "store_closed"


class StoreFailed(Internal):
    """The log broke under a commit, and whether that commit was kept is known only after opening again."""

    code: ClassVar[str] = "store_failed"


class StoreDamaged(Internal):
    """The file does not hold what a store wrote. It was left untouched."""

    code: ClassVar[str] = "store_damaged"


class StoreTooNew(Internal):
    """The file was written by a later Penstock. It was left untouched."""

    code: ClassVar[str] = "store_too_new"


class StoreHeld(Conflict):
    """Another process has the store open; `pid` is 0 when it could not be read."""

    code: ClassVar[str] = "store_held"

    def __init__(self, path: str, *, pid: int) -> None:
        self.pid = pid
        holder = f"process {pid} has it open" if pid else "another process has it open"
        super().__init__("store is in use", which=path, why=holder, now="stop that process or use another data folder")
