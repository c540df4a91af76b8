"""The store's numbers: acknowledged writes per second, watch latency, what a listing costs.

    python bench/store.py [--json] [--seconds 2] [--loop uvloop|asyncio] [--folder DIR]

Writes: 64 clients on one loop, each waiting for its acknowledgement before it writes again; records of 300 bytes,
updated under compare-and-swap; SQLite on the file system of --folder. Latency: one writer, back to back, from the call
of `commit` to the callback of a view in the same process; "rested" with 5 ms between the writes. Listing: 20 records
under a label, among 100 and among 100,000 others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.view import View
from penstock.store.memory import MemoryLog
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Put, Store

CLIENTS = 64
VALUE = b"x" * 300
WRITERS = {"": frozenset({"bench"})}
LATENCY_SAMPLES = 2_000
RESTED_SAMPLES = 400
REST_S = 0.005  # long enough for a processor to fall asleep: its waking is then part of the latency, twice
LIST_ROUNDS = 500


@asynccontextmanager
async def opened(folder: Path | None) -> AsyncIterator[Store]:
    log = SqliteLog(folder / f"{time.monotonic_ns()}.db") if folder else MemoryLog()
    store = Store(log, SystemClock(), writers=WRITERS)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def writes(folder: Path | None, seconds: float, *, durable: bool) -> dict[str, float]:
    async with opened(folder) as store:
        counts = [0] * CLIENTS
        end_at = time.perf_counter() + seconds

        async def client(number: int) -> None:
            key, revision = f"sandbox/status/{number}", 0
            while time.perf_counter() < end_at:
                revision = await store.commit([Put(key, VALUE, expect=revision)], by="bench", durable=durable)
                counts[number] += 1

        began, cpu = time.perf_counter(), time.process_time()
        async with Crew("clients") as crew:
            for task in [crew.spawn(client(number), name=f"client {number}") for number in range(CLIENTS)]:
                await task
        wall_s, cpu_s, total = time.perf_counter() - began, time.process_time() - cpu, sum(counts)
        return {
            "per_s": round(total / wall_s),
            "cpu_us_per_write": round(cpu_s / total * 1e6, 1),
            "slowest_client_share": round(min(counts) * CLIENTS / total, 2),
        }


async def watch_latency(folder: Path | None, *, samples: int, rest_s: float) -> dict[str, Any]:
    async with opened(folder) as store, Crew("views") as crew:
        view: View[bytes] = View(LocalSource(store), "sandbox/status/", bytes)
        await view.start(crew)
        seen_at: list[float] = []
        view.subscribe(lambda id_, value: seen_at.append(time.perf_counter()))
        called_at, acknowledged_at = [], []
        for number in range(samples):
            called_at.append(time.perf_counter())
            await store.commit([Put(f"sandbox/status/{number % 100}", VALUE)], by="bench")
            acknowledged_at.append(time.perf_counter())
            if rest_s:
                await asyncio.sleep(rest_s)
        await view.wait_revision(store.revision, within_s=5)
        to_view = [(seen - called) * 1e3 for seen, called in zip(seen_at, called_at, strict=True)]
        to_caller = [(seen - called) * 1e3 for seen, called in zip(acknowledged_at, called_at, strict=True)]
        return {"view": percentiles(to_view), "acknowledged": percentiles(to_caller)}


async def listing(amid: tuple[int, ...]) -> list[float]:
    """Microseconds per listing of 20 records, by how many others there are. Alternating, the best of ten."""
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(filled(others)) for others in amid]
        best = [float("inf")] * len(amid)
        for _ in range(10):
            for number, store in enumerate(stores):
                began = time.perf_counter()
                for _ in range(LIST_ROUNDS):
                    assert len(store.list("sandbox/status/", {"team": "mine"}).records) == 20
                best[number] = min(best[number], (time.perf_counter() - began) / LIST_ROUNDS * 1e6)
        return [round(us, 1) for us in best]


@asynccontextmanager
async def filled(others: int) -> AsyncIterator[Store]:
    async with opened(None) as store:
        for first in range(0, others, 100):
            puts = [Put(f"sandbox/status/{n}", VALUE, labels={"team": f"t{n % 50}"}) for n in range(first, first + 100)]
            await store.commit(puts, by="bench")
        mine = [Put(f"sandbox/status/mine{n}", VALUE, labels={"team": "mine"}) for n in range(20)]
        await store.commit(mine, by="bench")
        yield store


def percentiles(samples_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples_ms, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3), "max_ms": round(max(samples_ms), 3)}


async def measure(folder: Path, seconds: float) -> dict[str, Any]:
    return {
        "writes_normal": await writes(folder, seconds, durable=False),
        "writes_full": await writes(folder, seconds, durable=True),
        "writes_memory": await writes(None, seconds / 2, durable=False),
        "watch_sqlite": await watch_latency(folder, samples=LATENCY_SAMPLES, rest_s=0),
        "watch_sqlite_rested": await watch_latency(folder, samples=RESTED_SAMPLES, rest_s=REST_S),
        "watch_memory": await watch_latency(None, samples=LATENCY_SAMPLES, rest_s=0),
        "list_us": dict(zip(("among_100", "among_100000"), await listing((100, 100_000)), strict=True)),
    }


def show(found: dict[str, Any]) -> None:
    for name, label in (("normal", "NORMAL"), ("full", "FULL"), ("memory", "in memory")):
        row = found[f"writes_{name}"]
        print(
            f"writes, {CLIENTS} clients, {label:9}  {row['per_s']:>7,}/s   {row['cpu_us_per_write']:>5} µs CPU each   "
            f"slowest client {row['slowest_client_share']:.0%} of its share"
        )
    for name in ("sqlite", "sqlite_rested", "memory"):
        for what, text in (("view", "commit → view"), ("acknowledged", "commit → caller")):
            row = found[f"watch_{name}"][what]
            print(f"{text:15} {name:13} p50 {row['p50_ms']} ms   p99 {row['p99_ms']} ms   max {row['max_ms']} ms")
    few, many = found["list_us"]["among_100"], found["list_us"]["among_100000"]
    print(f"list 20 records among 100: {few} µs, among 100,000: {many} µs ({many / few:.2f}×)")


def run(work: Coroutine[Any, Any, dict[str, Any]], loop: str) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        return runner.run(work)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the store")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each writing measurement")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder otherwise")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        found = run(measure(Path(folder), asked.seconds), asked.loop)
    found["machine"] = {"cpus": os.cpu_count(), "loop": asked.loop, "load_1m": round(os.getloadavg()[0], 1)}
    print(json.dumps(found, indent=2)) if asked.json else show(found)


if __name__ == "__main__":
    main()
