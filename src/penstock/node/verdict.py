"""What the kernel says of a sandbox that a record remembers: here, gone, or cannot tell."""

from __future__ import annotations

import msgspec

from penstock.model.sandbox import KillReason
from penstock.node.evict import cgroup_name
from penstock.node.ports import Ports, Process, Slot
from penstock.node.record import Remembered


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`process` and `slot` both set: it is here. `gone`: provably not. Neither: doubt, and `because` says why."""

    process: Process | None = None
    slot: Slot | None = None
    gone: bool = False
    because: str = ""
    reason: KillReason | None = None


def look(remembered: Remembered, ports: Ports, boot_id: str) -> Verdict:
    """Pure reading of the kernel by (boot id, pid, start time, cgroup, slot). Never raises for what it finds."""
    pid = remembered.pid
    if remembered.born.boot_id != boot_id:
        return Verdict(gone=True, because="the machine was started anew", reason=KillReason.REBOOT)
    if pid is None:
        return Verdict(gone=True, because="it never had a first process")
    process: Process | None = None
    try:
        process = ports.launcher.adopt(pid.pid, pid.start_ticks)
        if process is None:
            return Verdict(gone=True, because="its first process ended while no daemon ran")
        if pid.pid not in ports.cgroups.pids(cgroup_name(remembered.born.id)):
            return Verdict(process=process, because=f"pid {pid.pid} lives outside its cgroup")
        return Verdict(process=process, slot=ports.network.retake(pid.slot, pid.pid))
    except Exception as error:
        # Safe: not knowing is an answer here. It is reported, never acted on, and asked again.
        return Verdict(process=process, because=f"cannot tell: {error}")
