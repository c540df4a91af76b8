"""Two hundred seeded worlds hold; equal seeds are equal worlds; and a broken promise is seen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from penstock.core.gate import Gate
from penstock.model.drain import DrainStage
from penstock.model.node import NodeSpec
from penstock.node import release
from penstock.node.drain import Drain
from penstock.node.evict import Undo
from penstock.node.record import SandboxRecord
from penstock.node.slots import Pool
from penstock.node.supervisor import Supervisor
from penstock.sim.faults import Rates
from penstock.sim.world import run

SEEDS = 200
CALM = Rates()


@pytest.mark.timeout(180)
def test_two_hundred_worlds_hold() -> None:
    outcomes = [run(seed) for seed in range(SEEDS)]  # a failure carries its seed, its trace and how to replay it
    assert sum(outcome.crashes for outcome in outcomes) > SEEDS / 2, "worlds without crashes prove little"
    answers: dict[str, int] = {}
    for outcome in outcomes:
        for word, count in outcome.answers.items():
            answers[word] = answers.get(word, 0) + count
    assert answers["ready"] > answers["failed"] > SEEDS / 2


def test_a_calm_world_answers_everybody_ready() -> None:
    outcome = run(3, rates=CALM)
    assert "failed" not in outcome.answers or outcome.answers["failed"] <= 2  # the builds nobody has, and full blocks


def test_a_seed_replays_identically_whatever_the_hash_seed() -> None:
    seeds = range(40, 44)
    told = "from penstock.sim.world import run; print([run(s).digest for s in range(40, 44)])"
    here = str([run(seed).digest for seed in seeds])
    for hash_seed in ("0", "4711"):
        there = subprocess.run(
            [sys.executable, "-c", told],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here


def broken(seeds: range, rates: Rates | None = None) -> str:
    """What the first world says that does not hold; fails when all hold."""
    for seed in seeds:
        try:
            run(seed, rates=rates)
        except BaseException as error:
            return f"{error!r} {getattr(error, '__notes__', ())}"
    pytest.fail("nobody noticed")


def test_a_release_that_does_not_verify_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def believes(self: Undo) -> None:
        self.process = None

    monkeypatch.setattr(Undo, "_process", believes)
    assert "busy" in (said := broken(range(4), CALM)).lower() or "living" in said or "left" in said


def test_a_record_removed_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = release._attempt

    async def too_early(one: Supervisor, watch: object) -> bool:
        one.record.remove()
        return await original(one, watch)  # type: ignore[arg-type]

    monkeypatch.setattr(release, "_attempt", too_early)
    assert "removed while" in broken(range(4), CALM)


def test_an_object_made_before_its_record_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SandboxRecord, "begin", lambda self, spec, *, boot_id, now: None)
    monkeypatch.setattr(SandboxRecord, "write", lambda self, line: None)
    assert "without a record" in broken(range(4), CALM)


def test_a_slot_lent_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_the_same(self: Pool[object], owner: str) -> tuple[int, object]:
        return next(iter(self._values.items()))

    monkeypatch.setattr(Pool, "take_nowait", always_the_same)
    monkeypatch.setattr(Pool, "at_hand", True)
    assert "two processes on one" in broken(range(4), CALM)


def test_a_missed_expiry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.node.sync.Sync.on_due", lambda self, sandbox: None)
    assert "after its end" in broken(range(4), CALM)


def test_a_start_forgotten_by_the_dead_daemon_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.node.sync.Sync.take_up", lambda self, adopted: None)
    assert broken(range(8), Rates(crash_after=(40,)))


def test_a_draining_node_refuses_also_what_control_still_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NodeSpec, "why_not", "")
    for seed in range(40):
        run(seed, rates=CALM)
    monkeypatch.setattr(Gate, "cordon", lambda self, reason: None)
    assert "was admitted in epoch" in broken(range(40), CALM)


def test_a_drain_that_ends_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drain, "_stage", lambda self, order: (DrainStage.ENDED, None))
    assert "ended with" in broken(range(60), CALM)
