"""What a user of Penstock waits for, and what a sandbox costs the host.

    .venv/bin/python bench/sandboxes.py [--quick] [--json FILE] [--only PART ...] [--idle N]

One installation on loopback with its defaults, its clients on the same machine. `SDK` is the unmodified `e2b` package;
`raw` is `caller.py`, a socket that writes and reads HTTP. Every part stops sampling when its time is over, and says
how many samples it took.
"""

from __future__ import annotations

import os
import resource
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import figures
import house
from caller import Api, Guest
from e2b import Sandbox
from figures import Figure, quantile, spread

PART_S = 50.0  # sampling time of one part
PART_QUICK_S = 12.0
AT_ONCE = 100
BURST_REST_S = 2.0  # after what was measured before: the last sandboxes end, slots and disks are made ready
CREATORS = 6  # threads that fill the node with idle sandboxes
MIB = 1024 * 1024

BOMB = "b() { b | b & }; b"
HOG = "while :; do python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 22))'; done"
FILLER = "while :; do dd if=/dev/zero of=/home/user/full bs=1M; rm -f /home/user/full; done"


class Bench:
    """The parts share one installation; `quick` cuts samples, `idle` is how many sandboxes lie idle at once."""

    def __init__(self, home: house.Installation, *, quick: bool, idle: int) -> None:
        self.home, self.quick, self.idle_wanted = home, quick, idle
        self.api = Api(home.env)
        self.part_s = PART_QUICK_S if quick else PART_S

    def samples(self, wanted: int) -> Iterator[int]:
        """0, 1, … `wanted` - 1, fewer when the part's time is over."""
        until = time.monotonic() + self.part_s
        for number in range(wanted // 5 if self.quick else wanted):
            if time.monotonic() > until:
                return
            yield number

    @contextmanager
    def sandbox(self) -> Iterator[tuple[str, Guest]]:
        made = self.api.create()
        guest = Guest(self.home.env, made)
        try:
            yield made["sandboxID"], guest
        finally:
            guest.close()
            self.api.kill(made["sandboxID"])

    # ---- parts

    def create(self) -> list[Figure]:
        """A fresh sandbox each time, one after the other: create, first command, second command."""
        whole, creates, raw = [], [], []
        for _ in self.samples(120):
            began = time.perf_counter()
            sandbox = Sandbox.create(timeout=60)
            made = time.perf_counter()
            sandbox.commands.run("true")
            ran = time.perf_counter()
            sandbox.kill()
            whole.append(ms(ran - began))
            creates.append(ms(made - began))
            began = time.perf_counter()
            bare = self.api.create()
            raw.append(ms(time.perf_counter() - began))
            self.api.kill(bare["sandboxID"])
        p50 = quantile(whole, 0.5)
        return [
            *spread("SDK create to first result", whole, p50_at_most=40.0, p99_at_most=3 * p50),
            *spread("SDK create alone", creates),
            *spread("raw create", raw),
        ]

    def burst(self) -> list[Figure]:
        """AT_ONCE creates at once: a raw connection each, every request sent before any reply is read.

        One thread and a selector: the client's share of the machine's CPU is 0.5 ms a create.
        """
        time.sleep(BURST_REST_S)
        lines = [Api(self.home.env) for _ in range(AT_ONCE)]
        took, sandboxes, wall_ms = _all_at_once(lines)
        for sandbox in sandboxes:
            self.api.kill(sandbox)
        for line in lines:
            line.close()
        return [
            Figure(f"{AT_ONCE} creates at once: succeeded", 100 * len(sandboxes) / AT_ONCE, "%", at_least=100.0),
            *spread(f"{AT_ONCE} creates at once", took, p99_at_most=1000.0),
            Figure(f"{AT_ONCE} creates at once: all of them", wall_ms, "ms"),
        ]

    def run(self) -> list[Figure]:
        """Commands in a running sandbox: the SDK's shell, and Process.Start of /bin/true."""
        sandbox = Sandbox.create(timeout=120)
        shell, start = [], []
        try:
            made = {"sandboxID": sandbox.sandbox_id, "envdAccessToken": sandbox._envd_access_token}
            guest = Guest(self.home.env, made)
            sandbox.commands.run("true")
            for _ in self.samples(500):
                shell.append(timed(lambda: sandbox.commands.run("true")))
                start.append(timed(lambda: guest.run("/bin/true")))
            guest.close()
        finally:
            sandbox.kill()
        return [
            *spread('SDK commands.run("true")', shell, p50_at_most=5.0),
            *spread("raw Process.Start /bin/true", start, p50_at_most=2.5, p99_at_most=8.0),
        ]

    def kill(self) -> list[Figure]:
        """From the DELETE until no process, cgroup, folder or held image of it exists."""
        took = []
        for _ in self.samples(100):
            made = self.api.create()
            sandbox, guest = made["sandboxID"], Guest(self.home.env, made)
            guest.run("/bin/true")
            guest.close()
            traces = house.Traces(self.home, sandbox)
            began = time.perf_counter()
            self.api.kill(sandbox)
            while traces.left():
                if time.perf_counter() - began > 10:
                    raise RuntimeError(f"{sandbox} left {traces.left()}")
                time.sleep(0.0005)
            took.append(ms(time.perf_counter() - began))
        return spread("kill to everything gone", took, p50_at_most=50.0, p99_at_most=2000.0)

    def pause(self) -> list[Figure]:
        """One sandbox, paused and resumed again and again, in memory and (less often) to disk."""
        memory, disk, both = [], [], []
        with self.sandbox() as (sandbox, guest):
            guest.run("/bin/true")
            for number in self.samples(300):
                began = time.perf_counter()
                self.api.pause(sandbox)
                paused = time.perf_counter()
                self.api.connect(sandbox)
                memory.append(ms(time.perf_counter() - began))
                both.append((ms(paused - began), ms(time.perf_counter() - paused)))
                if number % 10 == 0:
                    disk.append(timed(lambda: (self.api.pause(sandbox, memory=False), self.api.connect(sandbox))))
            guest.run("/bin/true")
        return [
            *spread("pause and resume", memory, p50_at_most=15.0),
            *spread("of that, the pause", [one for one, _ in both]),
            *spread("of that, the resume", [one for _, one in both]),
            *spread("pause to disk and resume", disk),
        ]

    def neighbours(self) -> list[Figure]:
        """Process.Start in one sandbox while another one misbehaves."""
        with self.sandbox() as (_, guest):
            quiet = self._starts(guest)
            found = spread("raw Process.Start, quiet neighbour", quiet)
            allowed = 2 * quantile(quiet, 0.99)
            for name, script in (("fork bomb", BOMB), ("memory hog", HOG), ("disk filler", FILLER)):
                with self.sandbox() as (_, bad):
                    evil = threading.Thread(target=_ignore, args=(bad, script), daemon=True)
                    evil.start()
                    time.sleep(0.5)
                    found += spread(f"raw Process.Start beside a {name}", self._starts(guest), p99_at_most=allowed)
        return found

    def _starts(self, guest: Guest) -> list[float]:
        until = time.monotonic() + min(self.part_s / 6, 5.0)
        took = []
        while time.monotonic() < until:
            took.append(timed(lambda: guest.run("/bin/true")))
            time.sleep(0.002)
        return took

    def files(self) -> list[Figure]:
        """A large file through the ingress, up and down, and the memory it took at its peak."""
        size = (256 if self.quick else 1024) * MIB
        made = self.api.create()
        sandbox = made["sandboxID"]
        guest = Guest(self.home.env, made)
        pids = {"guest": house.Traces(self.home, sandbox).pid, "ingress": house.ingress_pid(self.home)}
        for pid in pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
        before = {name: peak_mib(pid) for name, pid in pids.items()}
        try:
            up = timed(lambda: guest.upload("/files?path=/tmp/large&username=user", size))
            down = timed(lambda: guest.download("/files?path=/tmp/large&username=user"))
            grown = {name: peak_mib(pid) - before[name] for name, pid in pids.items()}
        finally:
            guest.close()
            self.api.kill(sandbox)
        each = f"{size // MIB} MiB"
        return [
            Figure(f"{each} up", size / MIB / (up / 1000), "MiB/s", at_least=300.0),
            Figure(f"{each} down", size / MIB / (down / 1000), "MiB/s", at_least=300.0),
            *(Figure(f"{each} up and down: growth of the {name}", grown[name], "MiB", at_most=32.0) for name in grown),
        ]

    def idle(self) -> list[Figure]:
        """What an idle sandbox takes from the host, and a create among many of them."""
        alone = self._creates(60)
        before = _meminfo()
        ids = self._fill()
        time.sleep(2.0)  # slots and disks in the making, frees that wait for the kernel
        among = self._creates(60)
        time.sleep(2.0)
        after = _meminfo()
        pids = [house.Traces(self.home, sandbox).pid for sandbox in ids]
        pss = sum(_pss_kib(pid) for pid in pids) / 1024 / len(pids)
        per = {name: (after[name] - before[name]) / 1024 / len(ids) for name in after}
        each = f"{len(ids)} idle: "
        return [
            Figure(each + "host memory of each", -per["MemAvailable"], "MiB", at_most=4.0),
            Figure(each + "of that, pid 1 (PSS)", pss, "MiB"),
            Figure(each + "kernel objects, not reclaimable", per["SUnreclaim"] + per["KernelStack"], "MiB"),
            Figure(each + "kernel objects, reclaimable", per["SReclaimable"], "MiB"),
            Figure(each + "page tables, per-CPU", per["PageTables"] + per["Percpu"], "MiB"),
            Figure(each + "tmpfs", per["Shmem"], "MiB"),
            *spread(each + "none present, raw create", alone),
            *spread(each + "raw create", among, p99_at_most=2 * quantile(alone, 0.99)),
        ]

    def _creates(self, wanted: int) -> list[float]:
        took = []
        for _ in self.samples(wanted):
            began = time.perf_counter()
            made = self.api.create()
            took.append(ms(time.perf_counter() - began))
            self.api.kill(made["sandboxID"])
        return took

    def _fill(self) -> list[str]:
        until = time.monotonic() + self.part_s
        with ThreadPoolExecutor(CREATORS, initializer=_with_api, initargs=(self.home.env,)) as creators:
            made = creators.map(
                lambda _: _own.api.create(timeout_s=3600) if time.monotonic() < until else None, range(self.idle_wanted)
            )
            return [each["sandboxID"] for each in made if each]


def _all_at_once(lines: list[Api]) -> tuple[list[float], list[str], float]:
    """Milliseconds of each create, from its own send to its reply; the sandboxes; milliseconds until the last one."""
    sent: dict[Api, float] = {}
    took, sandboxes = [], []
    requests = [(line, line.create_request()) for line in lines]
    began = time.perf_counter()
    with selectors.DefaultSelector() as readable:
        for line, request in requests:
            sent[line] = time.perf_counter()
            line.send(request)
            readable.register(line, selectors.EVENT_READ, line)
        while readable.get_map():
            for key, _ in readable.select():
                readable.unregister(key.fileobj)
                try:
                    sandboxes.append(key.data.created()["sandboxID"])
                except (RuntimeError, OSError) as error:
                    print(f"a create failed: {error}", file=sys.stderr)
                else:
                    took.append(ms(time.perf_counter() - sent[key.data]))
    return took, sandboxes, ms(time.perf_counter() - began)


_own = threading.local()


def _with_api(env: dict[str, str]) -> None:
    _own.api = Api(env)


def _ignore(guest: Guest, script: str) -> None:
    try:
        guest.run("/bin/bash", "-c", script)
    except (RuntimeError, OSError):
        pass  # it is killed in the end


def ms(seconds: float) -> float:
    return seconds * 1000


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    work()
    return ms(time.perf_counter() - began)


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"pid {pid} shows no peak")


def _pss_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))


def _meminfo() -> dict[str, int]:
    """KiB. Page cache and dentries that the kernel would give back are dropped first: they are nobody's cost."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    wanted = ("MemAvailable", "SUnreclaim", "SReclaimable", "KernelStack", "PageTables", "Percpu", "Shmem")
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if words[0][:-1] in wanted}


PARTS = ("create", "burst", "run", "kill", "pause", "neighbours", "files", "idle")


def main() -> None:
    parser = figures.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--idle", type=int, metavar="N", help="idle sandboxes at once (1000; quick: 50)")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    found: list[Figure] = []
    try:
        with house.installation() as home:
            bench = Bench(home, quick=asked.quick, idle=asked.idle or (50 if asked.quick else 1000))
            bench.api.kill(bench.api.create()["sandboxID"])  # the first one warms what all share
            for part in asked.only:
                began = time.monotonic()
                found += getattr(bench, part)()
                print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            bench.api.close()
        found.append(Figure("sandboxes: left behind (penstock leaks)", 0, "", at_most=0))  # else `destroy` had raised
    finally:
        figures.publish(found, asked.json)  # what was measured until something failed is worth knowing


if __name__ == "__main__":
    main()
