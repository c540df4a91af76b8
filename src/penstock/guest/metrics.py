"""GET /metrics: what the sandbox uses, as far as it can be seen from inside.

The sandbox's cgroup is not visible here, and /proc/stat and /proc/meminfo are the machine's. So processor time and
memory are summed over the processes of the sandbox: shared pages count once per process, which overstates; the
daemon's own numbers, from the cgroup, are the exact ones. Where the limits are not told, the machine's totals stand in.
Sources: proc_pid_stat(5), proc_pid_statm(5), proc_meminfo(5), statvfs(3).
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from penstock.core.clock import Clock
from penstock.guest.exchange import Exchange
from penstock.guest.parts import Parts

FILE_BYTES_MAX: Final = 16 * 1024
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_MIB: Final = 1 << 20


class Used(NamedTuple):
    cpu_s: float  # of all processes, the dead ones that were waited for included
    memory_bytes: int  # resident


def register(parts: Parts) -> None:
    """Serve /metrics, within the limits of the sandbox as far as they are known."""
    settings = parts.settings
    metrics = Metrics(parts.clock, memory_bytes_total=settings.memory_bytes_total, cpu_count=settings.cpu_count)

    async def serve(exchange: Exchange) -> None:
        await exchange.respond_json(200, metrics.read(), [(b"cache-control", b"no-store")])

    parts.routes.add("GET", "/metrics", serve)


class Metrics:
    def __init__(self, clock: Clock, *, memory_bytes_total: int, cpu_count: int, proc: str = "/proc") -> None:
        self._clock, self._proc = clock, proc
        self._memory_bytes_total = memory_bytes_total
        self._cpu_count = cpu_count or os.cpu_count() or 1
        self._seen: tuple[float, float] | None = None  # monotonic seconds, processor seconds

    def read(self) -> dict[str, Any]:
        """One reading. `cpu_used_pct` is of all processors together (100: all busy), since the reading before."""
        used = used_by_processes(self._proc)
        machine = machine_memory(self._proc)
        total = self._memory_bytes_total or machine.get("MemTotal", 0)
        memory = min(used.memory_bytes, total) if total else used.memory_bytes
        disk = os.statvfs("/")
        return {
            "ts": int(self._clock.wall()),
            "cpu_count": self._cpu_count,
            "cpu_used_pct": self._cpu_pct(used.cpu_s),
            "mem_total_mib": total // _MIB,
            "mem_used_mib": memory // _MIB,
            "mem_total": total,
            "mem_used": memory,
            "mem_cache": 0 if self._memory_bytes_total else machine.get("Cached", 0),
            "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
            "disk_total": disk.f_blocks * disk.f_frsize,
        }

    def _cpu_pct(self, cpu_s: float) -> float:
        now = self._clock.monotonic()
        before, self._seen = self._seen, (now, cpu_s)
        if before is None or now <= before[0]:
            return 0.0
        share = (cpu_s - before[1]) / (now - before[0]) / self._cpu_count
        return round(min(max(share, 0.0), 1.0) * 100, 2)


def used_by_processes(proc: str) -> Used:
    """Sums over every process of this pid namespace; one that ends while we look counts as far as it was read."""
    ticks = pages = 0
    try:
        names = os.listdir(proc)
    except OSError:
        return Used(0.0, 0)
    for name in names:
        if not name.isdigit():
            continue
        # After the name, which may hold blanks and brackets: state is field 3, so utime (14) is at 11.
        fields = _read(f"{proc}/{name}/stat").rpartition(b")")[2].split()
        if len(fields) > 21:
            ticks += sum(int(field) for field in fields[11:15])
            pages += max(0, int(fields[21]))
    return Used(ticks / _TICKS_PER_S, pages * _PAGE_BYTES)


def machine_memory(proc: str) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in _read(f"{proc}/meminfo").splitlines():
        name, _, value = line.partition(b":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[name.decode("ascii", "replace")] = int(number[0]) * 1024
    return found


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, FILE_BYTES_MAX)
    except OSError:
        return b""  # Safe: the process ended, so it uses nothing.
    finally:
        os.close(fd)
