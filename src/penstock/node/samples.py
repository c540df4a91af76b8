"""Measures the sandboxes of a node: a bounded ring of samples each, and the newest lines of the guest's log.

Sampling walks through the sandboxes one at a time, spread over the interval, so that a thousand of them never stall
the loop at once (a sample is six small reads of cgroup files, about 0.1 ms).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import msgspec

from penstock.core.clock import Clock
from penstock.model.ids import SandboxId
from penstock.model.observed import LogLine, Sample
from penstock.model.sandbox import SandboxSpec
from penstock.node.evict import cgroup_name
from penstock.node.ports import Cgroups, Disks

EVERY_S: Final = 5.0
KEPT: Final = 120  # samples a sandbox: ten minutes
FRESH_S: Final = 1.0  # a request finds nothing older than this
LOG_BYTES_MAX: Final = 512 * 1024  # read from the end of the log


class Living(Protocol):
    def __call__(self) -> Iterable[SandboxSpec]:
        """Specs of the sandboxes that run on this node now."""


class Samples:
    """`living` names what to sample; `run()` does so until it is cancelled."""

    def __init__(
        self,
        *,
        cgroups: Cgroups,
        disks: Disks,
        clock: Clock,
        living: Living,
        disk_name: Callable[[str], str],
        run_dirs: str,
    ) -> None:
        self._cgroups, self._disks, self._clock, self._living = cgroups, disks, clock, living
        self._disk_name, self._run_dirs = disk_name, run_dirs
        self._rings: dict[SandboxId, deque[Sample]] = {}
        self._cpu: dict[SandboxId, tuple[float, float]] = {}  # (monotonic, CPU seconds) of the last look

    async def run(self) -> None:
        while True:
            living = list(self._living())
            present = {spec.id for spec in living}
            for gone in self._rings.keys() - present:
                self._rings.pop(gone, None)
                self._cpu.pop(gone, None)
            pause_s = EVERY_S / max(1, len(living))
            for spec in living:
                self._take(spec)
                await asyncio.sleep(pause_s)
            if not living:
                await asyncio.sleep(EVERY_S)

    def samples(self, sandbox: SandboxId, *, start: float, end: float) -> list[Sample]:
        """Oldest first. Takes a fresh one when the newest is older than a second."""
        ring = self._rings.get(sandbox)
        if not ring or self._clock.wall() - ring[-1].at > FRESH_S:
            for spec in self._living():
                if spec.id == sandbox:
                    self._take(spec)
        return [sample for sample in self._rings.get(sandbox, ()) if start <= sample.at <= end]

    def log_lines(self, sandbox: SandboxId, *, count_max: int) -> list[LogLine]:
        """The newest `count_max` lines of the guest's log, oldest first. A line that is no JSON is shown as it is."""
        try:
            fd = os.open(os.path.join(self._run_dirs, sandbox, "guest.log"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            size = os.fstat(fd).st_size
            text = os.pread(fd, LOG_BYTES_MAX, max(0, size - LOG_BYTES_MAX))
        finally:
            os.close(fd)
        lines = text.split(b"\n")[1 if size > LOG_BYTES_MAX else 0 :]
        return [_line(line) for line in lines if line][-count_max:]

    def _take(self, spec: SandboxSpec) -> None:
        name = cgroup_name(spec.id)
        try:
            usage = self._cgroups.usage(name)
            disk_used = self._disks.used_bytes(self._disk_name(spec.id))
        except FileNotFoundError:
            return  # Safe: it is being created or removed; the next look tells.
        now, limits = self._clock.monotonic(), spec.limits
        before_at, before_s = self._cpu.get(spec.id, (now, usage.cpu_s))
        self._cpu[spec.id] = (now, usage.cpu_s)
        cpus = max(1, limits.cpu_milli // 1000)
        elapsed = now - before_at
        used = (usage.cpu_s - before_s) / elapsed / cpus * 100 if elapsed > 0 else 0.0
        self._rings.setdefault(spec.id, deque(maxlen=KEPT)).append(
            Sample(
                at=self._clock.wall(),
                cpu_count=cpus,
                cpu_used_pct=max(0.0, used),
                memory_used=usage.memory_bytes,
                memory_total=limits.memory_bytes_max,
                memory_cache=usage.memory_cache_bytes,
                disk_used=disk_used,
                disk_total=limits.disk_bytes_max,
            )
        )


def _line(raw: bytes) -> LogLine:
    """As `guest.log` writes them."""
    try:
        told: Any = msgspec.json.decode(raw)
        at, level, message = float(told.pop("ts")), str(told.pop("level", "info")), str(told.pop("event"))
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
        return LogLine(at=0.0, level="info", message=raw.decode(errors="replace"))
    level = level if level in ("debug", "info", "warn", "error") else "info"
    return LogLine(at=at, level=level, message=message, fields={key: str(value) for key, value in told.items()})
