"""Seeded worlds with traffic hold; equal seeds are equal worlds; and a broken promise to a client is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

from penstock.ingress.client import Client
from penstock.ingress.follow import Follower
from penstock.ingress.pool import Pool
from penstock.ingress.upstream import Upstream
from penstock.sim import traffic
from penstock.sim.faults import Rates

SEEDS = 66
CALM = Rates()


@pytest.mark.timeout(240)  # 10 s on an idle machine
def test_worlds_with_traffic_hold() -> None:
    outcomes = [
        traffic.run(seed) for seed in range(SEEDS)
    ]  # a failure carries its seed, its trace and how to replay it
    assert sum(outcome.crashes for outcome in outcomes) > SEEDS / 2, "worlds without crashes prove little"
    verdicts = total(outcome.verdicts for outcome in outcomes)
    # Every excuse is met, or nobody was tested for it; and most requests need none.
    assert {"served", "does not serve", "asked for", "the feed was away", "the ingress went", "cut"} <= set(verdicts)
    assert verdicts["served"] > sum(count for word, count in verdicts.items() if word != "served")


def test_a_calm_world_refuses_nobody_who_has_a_sandbox() -> None:
    for seed in range(4):
        verdicts = traffic.run(seed, rates=CALM).verdicts
        assert set(verdicts) <= {"served", "asked for", "does not serve", "full"}


def test_a_seed_replays_identically_whatever_the_hash_seed() -> None:
    told = "from penstock.sim.traffic import run; print([run(seed).digest for seed in range(40, 48)])"
    here = str([traffic.run(seed).digest for seed in range(40, 48)])
    for hash_seed in ("0", "4711"):
        there = subprocess.run(
            [sys.executable, "-c", told],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here


def total(several: Iterable[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in several:
        for word, count in each.items():
            sums[word] = sums.get(word, 0) + count
    return sums


def broken(seeds: range, rates: Rates | None = None) -> str:
    """What the first world says that does not hold; fails when all hold."""
    for seed in seeds:
        try:
            traffic.run(seed, rates=rates)
        except BaseException as error:
            return f"{error!r} {getattr(error, '__notes__', ())}"
    pytest.fail("nobody noticed")


def test_a_route_that_is_not_looked_for_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def believes(self: Follower) -> None:
        pass

    monkeypatch.setattr(Follower, "catch_up", believes)
    assert "was not found" in broken(range(8), CALM)


def test_a_route_lost_with_the_daemon_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = traffic.TrafficWorld.daemon_died

    def forgets(self: traffic.TrafficWorld, process: str) -> None:
        original(self, process)
        if self.ingress is not None:
            for sandbox in list(self.ingress.table.routes):
                self.ingress.table.put(sandbox, None)

    monkeypatch.setattr(traffic.TrafficWorld, "daemon_died", forgets)
    assert "which serves, got" in broken(range(12), Rates(crash_after=(60,)))


def test_a_stream_left_open_after_its_sandbox_ended_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "sandbox_ended", lambda self: None)
    monkeypatch.setattr(Client, "upstream_lost", lambda self, upstream, untouched: None)
    said = broken(range(12))
    assert "after the sandbox ended" in said or "no answer" in said


def test_an_answer_of_another_sandbox_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "take", lambda self, route, port, *, replayable: take_any(self, port))
    said = broken(range(12), CALM)
    assert "echoed" in said or "another's" in said or "401" in said


def take_any(pool: Pool, port: int) -> Upstream | None:
    """A pool that does not look whose connection it gives."""
    for (_, of_port), upstreams in pool._kept.items():
        if of_port == port and upstreams and not upstreams[-1].transport.is_closing():
            pool._count -= 1
            return upstreams.pop()
    return None


def test_a_changed_byte_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Client.send

    def send(self: Client, data: bytes) -> None:
        original(self, data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 3_000 else data)

    monkeypatch.setattr(Client, "send", send)
    said = broken(range(12), CALM)
    assert "not what was put there" in said or "echoed" in said or "changed what went through it" in said
