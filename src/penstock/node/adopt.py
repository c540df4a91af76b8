"""After a daemon's death: every record becomes a supervisor again, every pooled object finds its owner or its end.

What a record says and the kernel confirms is taken up; what was half made is undone; what was half removed is
finished. Doubt is a state (UNKNOWN), not a reason to kill or to forget. Nothing here writes to the kernel: the
supervisors do, each for its own sandbox.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.node.evict import DISK, SLOT
from penstock.node.means import Means
from penstock.node.ports import Disk, Files
from penstock.node.reap import DISK_RECORD, SLOT_RECORD
from penstock.node.record import RecordUnreadable, Remembered, read_pooled, read_sandbox
from penstock.node.supervisor import Supervisor
from penstock.node.verdict import Verdict, look

_POOLED: Final = re.compile(rf"({SLOT_RECORD}|{DISK_RECORD})(\d+)")


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    supervisors: list[Supervisor]
    pinned: dict[str, str]  # sandbox id → why its record cannot be understood
    empty: list[str]  # records that named nothing, removed


def adopt(means: Means) -> Adopted:
    """Read every record of the node. Call once, before the pools open and before the first sweep."""
    files = means.ports.files
    pinned: dict[str, str] = {}
    empty: list[str] = []
    remembered: dict[str, tuple[Remembered, Verdict]] = {}
    pooled: list[tuple[str, int]] = []
    for record in sorted(files.list_records()):
        match = _POOLED.fullmatch(record)
        if match is not None:
            pooled.append((match[1], int(match[2])))
            continue
        try:
            found = read_sandbox(files, record)
        except RecordUnreadable as error:
            pinned[record] = str(error)
            continue
        if found is None:
            # The crash came before its first line was whole, so nothing was taken for it.
            files.remove_record(record)
            empty.append(record)
        else:
            remembered[record] = (found, look(found, means.ports, means.boot_id))
    for kind, number in pooled:
        _settle(kind, number, means, remembered, pinned)
    supervisors = [Supervisor.of_record(found, verdict, means) for found, verdict in remembered.values()]
    return Adopted(supervisors=supervisors, pinned=pinned, empty=empty)


def _settle(
    kind: str,
    number: int,
    means: Means,
    remembered: dict[str, tuple[Remembered, Verdict]],
    pinned: dict[str, str],
) -> None:
    """Give a pooled object to its living owner, or to its end."""
    pool, label = (means.slots, SLOT) if kind == SLOT_RECORD else (means.disks, DISK)
    owner = _owner(means.ports.files, f"{kind}{number}")
    if owner is None or owner in pinned:
        pool.hold_back(number)
    elif owner in remembered and label in remembered[owner][0].held:
        verdict = remembered[owner][1]
        if kind == SLOT_RECORD:
            means.slots.reclaim(number, verdict.slot, owner=owner)
        else:
            means.disks.reclaim(number, Disk(name=f"{kind}{number}", path=""), owner=owner)
    else:
        pool.condemn(number)


def _owner(files: Files, record: str) -> str | None:
    """Who has it; empty: nobody. None when the record cannot be read."""
    try:
        found = read_pooled(files, record)
    except RecordUnreadable:
        return None
    return found[1] if found is not None else ""
