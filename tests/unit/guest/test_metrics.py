"""Metrics: the numbers agree with what the processes do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from penstock.guest.metrics import Metrics, machine_memory, used_by_processes
from tests.unit.guest.filesroom import open_room


class Clock:
    now = 100.0

    def wall(self) -> float:
        return 1_700_000_000.5

    def monotonic(self) -> float:
        return self.now


def fake(proc: Path, pid: int, ticks: str, pages: int) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    rest = "R 1 1 1 0 -1 0 0 0 0 0 " + ticks + " 20 0 1 0 5 1000 " + str(pages) + " 0\n"
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) b) {rest}")


def test_sums_over_processes_and_the_time_between(tmp_path: Path) -> None:
    hz, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    fake(tmp_path, 1, f"{hz} {hz} 0 0", 10)
    fake(tmp_path, 22, f"0 0 {hz} {hz}", 5)
    (tmp_path / "33").mkdir()  # ended while we looked
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nCached: 10 kB\nOdd\n")
    assert used_by_processes(str(tmp_path)) == (4.0, 15 * page)
    assert machine_memory(str(tmp_path)) == {"MemTotal": 1_024_000, "Cached": 10_240}
    clock = Clock()
    metrics = Metrics(clock, memory_bytes_total=64 << 20, cpu_count=2, proc=str(tmp_path))
    assert metrics.read()["cpu_used_pct"] == 0.0
    clock.now += 4
    fake(tmp_path, 1, f"{3 * hz} {hz} 0 0", 10)
    read = metrics.read()
    assert read["cpu_used_pct"] == 25.0  # 2 s of 4 s on 2 processors
    assert (read["ts"], read["cpu_count"], read["mem_total"], read["mem_used"], read["mem_cache"]) == (
        1_700_000_000, 2, 64 << 20, 15 * page, 0)  # fmt: skip
    without = Metrics(clock, memory_bytes_total=0, cpu_count=0, proc=str(tmp_path)).read()
    assert (without["mem_total"], without["mem_cache"]) == (1_024_000, 10_240)


def test_a_busy_process_is_seen() -> None:
    before = used_by_processes("/proc")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.5)
        after = used_by_processes("/proc")
        busy.kill()
    assert after.cpu_s > before.cpu_s
    assert after.memory_bytes > 0


async def test_metrics_are_served_guarded(tmp_path: Path) -> None:
    async with open_room(tmp_path, token="secret") as room:
        assert (await room.client.get("/metrics")).status_code == 401
        answer = await room.client.get("/metrics", headers={"x-access-token": "secret"})
        read = answer.json()
        disk = os.statvfs("/")
        assert read["disk_total"] == disk.f_blocks * disk.f_frsize
        assert read["mem_total"] == 512 << 20
        assert set(read) == {
            "ts", "cpu_count", "cpu_used_pct", "mem_total_mib", "mem_used_mib", "mem_total", "mem_used", "mem_cache",
            "disk_used", "disk_total",
        }  # fmt: skip
