"""What one commit may ask for, and the checks that need no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from penstock.model.errors import Invalid
from penstock.store.errors import WrongWriter

OPS_MAX: Final = 128  # per commit
KEY_BYTES_MAX: Final = 512
KEY_DEPTH_MAX: Final = 8  # slashes; each costs one entry in the index
VALUE_BYTES_MAX: Final = 1024 * 1024
COMMIT_BYTES_MAX: Final = 4 * 1024 * 1024  # keys and values of one commit; a feed's frame must hold a revision
LABELS_MAX: Final = 8
LABEL_CHARS_MAX: Final = 256
LEASE_NONE: Final = 0
LEASE_PREFIX: Final = "lease/"  # the store's own records; no other room writes there


class Put(msgspec.Struct, frozen=True, gc=False):
    """Write `value` (empty is a value). Creates the record when it is absent.

    `expect` is the mod revision the caller saw: 0 the record must not exist, None whatever there is.
    `labels` are given at creation; later None or the same. `lease`: None leaves it as it was, 0 detaches it.
    """

    key: str
    value: bytes
    labels: Mapping[str, str] | None = None
    expect: int | None = None
    lease: int | None = None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Remove the record. Without `expect`, absent is success; with it, absent is a RevisionConflict."""

    key: str
    expect: int | None = None


Op = Put | Delete


class Writers:
    """Which rooms may write under which prefix. The longest matching prefix decides; no match means nobody."""

    def __init__(self, rooms_of: Mapping[str, frozenset[str]]) -> None:
        self._rooms_of = dict(sorted(rooms_of.items(), key=lambda item: -len(item[0])))

    def check(self, key: str, by: str) -> None:
        """Raises WrongWriter."""
        # The exact parent folder is nearly always the declared prefix: one look-up instead of a scan.
        rooms = self._rooms_of.get(key[: key.rfind("/") + 1])
        if rooms is None:
            rooms = next((rooms for prefix, rooms in self._rooms_of.items() if key.startswith(prefix)), frozenset())
        if by not in rooms:
            allowed = ", ".join(sorted(rooms)) or "nobody"
            raise WrongWriter("room may not write this record", which=key, why=f"{by!r} wrote, {allowed} may")


def check_ops(ops: Sequence[Op]) -> int:
    """Bounds of one commit; returns the bytes it carries. Raises Invalid naming the key."""
    if not 0 < len(ops) <= OPS_MAX:
        raise Invalid("ops", f"{len(ops)} operations in one commit, allowed are 1 to {OPS_MAX}")
    size_bytes = 0
    for op in ops:
        _check_key(op.key)
        size_bytes += len(op.key)
        if isinstance(op, Put):
            size_bytes += len(op.value)
            _check_put(op)
        elif op.expect == 0:
            raise Invalid(op.key, "a deletion cannot expect that the record is absent")
    if size_bytes > COMMIT_BYTES_MAX:
        raise Invalid("ops", f"a commit of {size_bytes} bytes, allowed are {COMMIT_BYTES_MAX}")
    if len(ops) > 1 and len({op.key for op in ops}) < len(ops):
        raise Invalid("ops", "a commit names a key twice", now="decide what its one change is")
    return size_bytes


def _check_key(key: str) -> None:
    if not key or key[0] == "/" or "\0" in key:
        raise Invalid("key", f"{key!r} is empty, starts with a slash or holds a NUL")
    if key.count("/") > KEY_DEPTH_MAX or len(key) > KEY_BYTES_MAX or (not key.isascii() and _too_long(key)):
        raise Invalid("key", f"{key[:64]!r} is over {KEY_BYTES_MAX} bytes or {KEY_DEPTH_MAX} slashes")


def _too_long(key: str) -> bool:
    try:
        return len(key.encode()) > KEY_BYTES_MAX
    except UnicodeEncodeError:
        raise Invalid("key", f"{key!r} is not valid Unicode") from None


def _check_put(op: Put) -> None:
    if not isinstance(op.value, bytes):
        raise Invalid(op.key, f"its value is {type(op.value).__name__}, not bytes")
    if len(op.value) > VALUE_BYTES_MAX:
        raise Invalid(op.key, f"its value has {len(op.value)} bytes, allowed are {VALUE_BYTES_MAX}")
    if op.labels:
        if len(op.labels) > LABELS_MAX:
            raise Invalid(op.key, f"{len(op.labels)} labels, allowed are {LABELS_MAX}")
        for name, text in op.labels.items():
            if not name or len(name) + len(text) > LABEL_CHARS_MAX:
                raise Invalid(op.key, f"label {name[:64]!r} is empty or over {LABEL_CHARS_MAX} characters")
