"""Mark and sweep: what the kernel shows minus what the records name, and the other way round.

`find_leaks` is read-only and works with the daemon dead or alive; `penstock leaks` prints its findings. With a daemon
at work a sandbox between its first record line and its first object looks like a record without objects: whoever asks
from outside looks twice and keeps what both looks show. Objects without a record have no such window, because a record
is written first and unlinked last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from penstock.node.evict import cgroup_name
from penstock.node.ports import Ports
from penstock.node.record import RecordUnreadable, Remembered, read_pooled, read_sandbox

REMNANTS: Final = frozenset({"loop", "mount", "namespace", "element", "socket", "ids"})
UNRECORDED: Final = "no record names it"
NO_SLOT: Final = "its slot does not exist"
NO_DISK: Final = "its disk does not exist"
NO_OBJECTS: Final = "none of the objects it names exists"
SLOT_RECORD: Final = "slot"  # + number; see `slots.Pool.name`
DISK_RECORD: Final = "disk"


class Leak(msgspec.Struct, frozen=True, order=True):
    """One finding. `kind`: process, cgroup, slot, disk, run_dir, record, or that of a `Remnant`; or sweep, when one
    could not even look.
    """

    kind: str
    name: str
    why: str


def find_leaks(ports: Ports) -> list[Leak]:
    """Every object of this installation without a record, and every record without its objects. Sorted."""
    world = _World(ports)
    found = [*_unrecorded(world), *_without_objects(world)]
    if ports.strays is not None:
        for stray in ports.strays.list_strays():
            found.append(Leak("process", str(stray.pid), f"outside every cgroup of ours, and it pins {stray.why}"))
    if ports.remnants is not None:
        for remnant in ports.remnants.list_remnants():
            if remnant.owner not in world.records:
                found.append(Leak(remnant.kind, remnant.name, f"{remnant.why}; {UNRECORDED}"))
    return sorted(set(found))


class Sweeper:
    """Removes what no record owns. Runs when the daemon opens, now and then after, and without one for `leaks --fix`.

    `owned(record)`: somebody here is at work on it. A record that nobody works on and of whose objects none exists
    goes, too, once it was seen so `looks` times.
    """

    def __init__(
        self, ports: Ports, *, step_within_s: float, owned: Callable[[str], bool] | None = None, looks: int = 2
    ) -> None:
        self._ports, self._within_s, self._looks = ports, step_within_s, looks
        self._owned = owned
        self._seen: Counter[str] = Counter()  # records without objects, by how often in a row
        self.removed: Counter[str] = Counter()  # by kind

    @property
    def removed_total(self) -> int:
        return self.removed.total()

    def count(self, kind: str, number: int) -> None:
        """Also what others removed of what nobody owns."""
        if number:
            self.removed[kind] += number

    async def sweep(self) -> list[Leak]:
        """Remove every unrecorded object; the findings that stay: records somebody works on, strays, refusals."""
        try:
            found = find_leaks(self._ports)
        except Exception as error:
            # Safe: looking changes nothing, and the next sweep looks again; until then statistics say so.
            return [Leak("sweep", "", f"could not look: {error}")]
        bare = [leak.name for leak in found if leak.kind == "record" and leak.why in (NO_SLOT, NO_DISK, NO_OBJECTS)]
        self._seen = Counter({name: self._seen[name] + 1 for name in bare})
        left: list[Leak] = []
        for leak in found:
            remove = self._way(leak)
            if remove is None:
                left.append(leak)
                continue
            try:
                await remove()
                self.removed[leak.kind] += 1
            except Exception as error:
                # Safe: it is still listed at the next sweep, and counted in statistics until then.
                left.append(Leak(leak.kind, leak.name, f"{leak.why}; not removed: {error}"))
        return left

    def _is_dead(self, record: str) -> bool:
        """Nobody works on it, nothing it names exists, and it was so before."""
        if self._owned is None or self._owned(record) or self._seen[record] < self._looks:
            return False
        ports = self._ports
        try:
            if _number(record, SLOT_RECORD) is not None or _number(record, DISK_RECORD) is not None:
                return _lent_to(ports, record) not in ports.files.list_records()  # else its tenant's release needs it
            remembered = read_sandbox(ports.files, record)
            lent = [name for name in ports.files.list_records() if _lent_to(ports, name) == record]
        except RecordUnreadable:
            return False  # it may name anything
        if lent or record in ports.disks.list_names():
            return False
        pid = remembered.pid if remembered is not None else None
        process = ports.launcher.adopt(pid.pid, pid.start_ticks) if pid is not None else None
        if process is not None:
            process.close()
        return process is None

    def _way(self, leak: Leak) -> Callable[[], Awaitable[None]] | None:
        ports, within_s, name = self._ports, self._within_s, leak.name
        if leak.kind == "record":
            return _removal_of(ports, name) if self._is_dead(name) else None

        async def cgroup() -> None:
            await ports.cgroups.kill(name, within_s=within_s)
            await ports.cgroups.remove(name, within_s=within_s)

        async def slot() -> None:
            # Looked at again: since the findings were made, the pool may have begun to make this number anew.
            if f"{SLOT_RECORD}{name}" not in ports.files.list_records():
                await ports.network.destroy_slot(int(name), within_s=within_s)

        async def disk() -> None:
            if name not in ports.files.list_records():
                await ports.disks.remove(name, within_s=within_s)

        async def run_dir() -> None:
            ports.files.remove_run_dir(name)

        ways = {"cgroup": cgroup, "slot": slot, "disk": disk, "run_dir": run_dir}
        remnants = ports.remnants
        if leak.kind in ways or remnants is None:
            return ways.get(leak.kind)

        async def remnant() -> None:
            # Looked at again, as above; one that is gone by now is not listed any more.
            for each in remnants.list_remnants():
                if (each.kind, each.name) == (leak.kind, name) and each.owner not in ports.files.list_records():
                    await remnants.remove(each, within_s=within_s)

        return remnant if leak.kind in REMNANTS else None


class _World:
    """One look at everything. Objects first, records second: what vanishes in between was released in order."""

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        self.cgroups = ports.cgroups.list_names()
        self.slots = ports.network.list_slots()
        self.disks = ports.disks.list_names()
        self.run_dirs = ports.files.list_run_dirs()
        self.records = ports.files.list_records()


def _unrecorded(world: _World) -> list[Leak]:
    owners = {cgroup_name(record) for record in world.records}
    why = UNRECORDED
    return [
        *(Leak("cgroup", name, why) for name in world.cgroups - owners),
        *(Leak("slot", str(number), why) for number in world.slots if f"{SLOT_RECORD}{number}" not in world.records),
        *(Leak("disk", name, why) for name in world.disks - world.records),
        *(Leak("run_dir", name, why) for name in world.run_dirs - world.records),
    ]


def _without_objects(world: _World) -> list[Leak]:
    found: list[Leak] = []
    for record in world.records:
        if _number(record, SLOT_RECORD) is not None:
            if _number(record, SLOT_RECORD) not in world.slots:
                found.append(Leak("record", record, NO_SLOT))
        elif _number(record, DISK_RECORD) is not None:
            if record not in world.disks:
                found.append(Leak("record", record, NO_DISK))
        else:
            found.extend(_sandbox(world, record))
    return found


def _sandbox(world: _World, sandbox: str) -> list[Leak]:
    try:
        remembered = read_sandbox(world.ports.files, sandbox)
    except RecordUnreadable as error:
        return [Leak("record", sandbox, str(error))]
    if cgroup_name(sandbox) not in world.cgroups and sandbox not in world.run_dirs:
        return [Leak("record", sandbox, NO_OBJECTS)]
    return _escaped(world, remembered) if remembered is not None else []


def _escaped(world: _World, remembered: Remembered) -> list[Leak]:
    """Its recorded first process, alive outside its cgroup."""
    pid, sandbox = remembered.pid, remembered.born.id
    if pid is None:
        return []
    process = world.ports.launcher.adopt(pid.pid, pid.start_ticks)
    if process is None:
        return []
    try:
        inside = cgroup_name(sandbox) in world.cgroups and pid.pid in world.ports.cgroups.pids(cgroup_name(sandbox))
    finally:
        process.close()
    return [] if inside else [Leak("process", str(pid.pid), f"first process of {sandbox}, outside its cgroup")]


def _removal_of(ports: Ports, name: str) -> Callable[[], Awaitable[None]]:
    async def remove() -> None:
        ports.files.remove_record(name)

    return remove


def _lent_to(ports: Ports, record: str) -> str:
    """Whose a pooled object is by its record; empty for other records."""
    if _number(record, SLOT_RECORD) is None and _number(record, DISK_RECORD) is None:
        return ""
    found = read_pooled(ports.files, record)
    return found[1] if found is not None else ""


def _number(record: str, prefix: str) -> int | None:
    digits = record.removeprefix(prefix)
    return int(digits) if digits != record and digits.isdigit() else None
