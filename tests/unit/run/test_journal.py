"""The daemon's own lines: what the one before left, and that a store that cannot take them holds nothing up."""

from __future__ import annotations

import random

import pytest

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.model import keys
from penstock.model.event import LoggedEvent, decode
from penstock.run import journal
from penstock.run.journal import STARTED, STOPPING, Journal
from penstock.store.memory import MemoryLog
from penstock.store.store import Store
from tests.unit.core.virtual import virtual


async def opened() -> tuple[Store, MemoryLog]:
    log = MemoryLog()
    store = Store(log, SystemClock())
    await store.open()
    return store, log


def one(store: Store, seed: int = 1) -> Journal:
    return Journal(store, SystemClock(), random.Random(seed), subject="local")


def lines(store: Store) -> list[LoggedEvent]:
    return [decode(record.value) for record in store.list(keys.EVENT).records]


@virtual
async def test_a_daemon_knows_how_the_one_before_ended() -> None:
    store, _ = await opened()
    assert one(store).how_the_last_one_ended() == "there was none before"
    await one(store, 1).write(STARTED)
    assert one(store).how_the_last_one_ended() == "the one before ended without a word"
    await one(store, 2).write(STOPPING, "keep")
    await one(store, 3).write("zygote.replaced", "the zygote, pid 1, has died; starting it anew")
    assert one(store).how_the_last_one_ended() == "the one before ended in order: keep"


@virtual
async def test_whoever_keeps_a_process_alive_is_heard_by_the_log() -> None:
    store, _ = await opened()
    also: list[str] = []
    async with Crew("c") as crew:
        says = one(store).teller(crew, "ingress.replaced", also.append)
        says("the ingress, pid 7, has died; starting it anew")
        await crew.join()
    assert also == ["the ingress, pid 7, has died; starting it anew"]
    (line,) = lines(store)
    assert (line.kind, line.subject, line.actor, line.because) == ("ingress.replaced", "local", "run", also[0])


@virtual
async def test_a_store_that_is_away_fails_nobody_and_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "WAITING_MAX", 3)
    store, _ = await opened()
    kept = one(store)
    async with Crew("c") as crew:
        for _ in range(10):
            kept.tell(crew, "x")
        await crew.join()
        assert len(lines(store)) == 3
        await store.close()
        await kept.write(STOPPING, "keep")
        kept.tell(crew, "x")
        await crew.join()
    kept.tell(crew, "x")  # the daemon has ended
