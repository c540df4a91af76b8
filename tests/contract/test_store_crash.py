"""kill -9 in the middle of writes: what was acknowledged is there, what is there is whole."""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.core.clock import SystemClock
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Store

ROUNDS = 6

WRITER = """
import asyncio, os, sys
from penstock.core.clock import SystemClock
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Put, Store

async def client(store, first):
    n = first
    while True:
        value = str(n).encode()
        durable = n % 50 == 0
        await store.commit([Put(f"a/{n}", value), Put(f"b/{n}", value)], by="t", durable=durable)
        os.write(1, b"%d\\n" % n)
        n += 16

async def main(path, first):
    store = Store(SqliteLog(path), SystemClock(), writers={"": frozenset({"t"})}, keep_revisions=200)
    await store.open()
    await asyncio.gather(*[client(store, first + n) for n in range(16)])

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def run_and_kill(path: Path, first: int, seconds: float) -> set[int]:
    """Let a writer run for a while after its first acknowledgement, kill it; the numbers it acknowledged."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    fd, text, kill_at = writer.stdout.fileno(), b"", time.monotonic() + 30
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := kill_at - time.monotonic()) > 0 and selector.select(left):
            if not text:
                kill_at = time.monotonic() + seconds
            text += os.read(fd, 1 << 16)
    writer.send_signal(signal.SIGKILL)
    text += writer.stdout.read()
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    # The last line may have been cut by the kill; every other one was acknowledged.
    return {int(line) for line in text.split(b"\n")[:-1]}


@pytest.mark.slow
async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, rng = tmp_path / "store.db", random.Random(7)
    acknowledged: set[int] = set()
    for number in range(ROUNDS):
        new = run_and_kill(path, number * 1_000_000, 0.05 + rng.random() * 0.4)
        assert new, "the writer acknowledged nothing"
        acknowledged |= new
        store = Store(SqliteLog(path), SystemClock(), writers={"": frozenset({"t"})})
        await store.open()
        left = {int(record.value) for record in store.list("a/").records}
        right = {int(record.value) for record in store.list("b/").records}
        await store.close()
        assert left == right, "half a commit is there"
        assert acknowledged <= left
