"""Every living record in memory, found by key, by folder and by label. Authoritative for reads.

A listing costs what it returns. For that each record is entered once per folder above it, and once per folder and
label: three small dictionary writes when a record is created or deleted, one when it is updated. A sorted list of keys
was the alternative; it makes each creation cost more the more is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from penstock.model.records import Change, Record

_Name = TypeVar("_Name")
_Keys = dict[str, None]  # an insertion-ordered set: the same seed replays in the same order


def folders(key: str) -> list[str]:
    """`"a/b/c"` → `["a/", "a/b/"]`."""
    found = []
    end = key.find("/") + 1
    while end:
        found.append(key[:end])
        end = key.find("/", end) + 1
    return found


class Index:
    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._by_folder: dict[str, _Keys] = {}
        self._by_label: dict[tuple[str, str, str], _Keys] = {}  # (folder, name, text)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def records(self) -> Iterable[Record]:
        return self._records.values()

    def list(self, prefix: str, labels: Mapping[str, str] | None = None) -> tuple[Record, ...]:
        """The records whose key starts with `prefix` and which carry all of `labels`, by key.

        A prefix that does not end with a slash costs what its folder holds.
        """
        folder = prefix[: prefix.rfind("/") + 1]
        keys = self._candidates(folder, labels)
        if folder != prefix:
            keys = [key for key in keys if key.startswith(prefix)]
        found = [self._records[key] for key in sorted(keys)]
        if labels and len(labels) > 1:
            wanted = labels.items()
            found = [record for record in found if wanted <= record.labels.items()]
        return tuple(found)

    def newest(self, folder: str) -> Iterator[Record]:
        """The last entered first. After a start the order is that of the keys, then of creation."""
        return (self._records[key] for key in reversed(self._by_folder.get(folder, {})))

    def _candidates(self, folder: str, labels: Mapping[str, str] | None) -> Iterable[str]:
        if labels:
            sets = [self._by_label.get((folder, name, text), {}) for name, text in labels.items()]
            return min(sets, key=len)
        return self._by_folder.get(folder, {}) if folder else self._records

    def apply(self, change: Change) -> None:
        record = change.record
        if change.kind == "delete":
            self._remove(record.key)
            return
        created = record.key not in self._records
        self._records[record.key] = record
        if created:
            self._enter(record)

    def _enter(self, record: Record) -> None:
        key = record.key
        for folder in folders(key):
            self._by_folder.setdefault(folder, {})[key] = None
            for name, text in record.labels.items():
                self._by_label.setdefault((folder, name, text), {})[key] = None
        for name, text in record.labels.items():
            self._by_label.setdefault(("", name, text), {})[key] = None

    def _remove(self, key: str) -> None:
        record = self._records.pop(key)
        for folder in folders(key):
            _drop(self._by_folder, folder, key)
            for name, text in record.labels.items():
                _drop(self._by_label, (folder, name, text), key)
        for name, text in record.labels.items():
            _drop(self._by_label, ("", name, text), key)


def _drop(sets: dict[_Name, _Keys], name: _Name, key: str) -> None:
    keys = sets[name]
    del keys[key]
    if not keys:  # an empty set left behind would be a leak per id ever used
        del sets[name]
