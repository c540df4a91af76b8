"""What a drain's plan foresees is what comes: 200 worlds whose machine misbehaves and whose people keep still."""

from __future__ import annotations

import random

import msgspec
import pytest

from penstock.model.drain import DrainOrder, DrainStage
from penstock.node.drain import Drain
from penstock.sim import loop as virtual
from penstock.sim.faults import draw_rates
from penstock.sim.operator import Operator
from penstock.sim.workload import Client
from penstock.sim.world import World

SEEDS = 200


class Still(Client):
    """Creates, and looks on. A plan cannot foresee that somebody changes his mind."""

    async def live(self) -> None:
        await self._world.sleep(self._rng.uniform(0.0, 5.0))
        await self._create()
        await self._world.until(self._answered, 400.0, f"an answer for {self.sandbox}")


class Planner(Operator):
    """One drain, as it was planned."""

    async def live(self) -> None:
        await self._world.sleep(self._rng.uniform(4.0, 8.0))
        soft_s, hard_s = self._rng.choice(((0.0, 15.0), (3.0, 25.0), (None, 20.0), (30.0, 12.0)))
        await self._write(lambda spec: self._order(spec, soft_s, hard_s))
        spec = self._drains.spec
        assert spec is not None
        self._drains.plan(spec)
        await self._world.until(lambda: spec.epoch in self._drains.ended, 400.0, "the end of the drain")
        await self._world.sleep(60.0)  # what was stuck is freed, and its real fate known


class StillWorld(World):
    def __init__(self, rng: random.Random, odd_guests: float = 0.0) -> None:
        # A guest that is deaf, mortal or stubborn cannot be known as such before it is asked.
        rates = msgspec.structs.replace(draw_rates(rng), odd_guests=odd_guests, reboot=False, clock_jumps=0, stops=())
        super().__init__(rng, rates=rates)
        self._clients = [Still(self, random.Random(rng.getrandbits(64))) for _ in range(rng.randint(3, 12))]
        self._operator = Planner(self, random.Random(rng.getrandbits(64)))


async def play(seed: int, *, odd_guests: float = 0.0) -> World:
    world = StillWorld(random.Random(seed), odd_guests)
    await world.play()
    return world


@pytest.mark.timeout(180)
def test_fates_are_as_foreseen_in_99_of_100() -> None:
    foreseen = came_true = 0
    for seed in range(SEEDS):
        world = virtual.run(play(seed), seed)
        foreseen += world.drains.foreseen
        came_true += world.drains.came_true
    assert foreseen > 3 * SEEDS
    assert came_true / foreseen >= 0.99, f"{came_true} of {foreseen}"


def test_a_drain_that_does_not_kill_at_its_hard_deadline_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Drain._maybe_force

    def patient(self: Drain, order: DrainOrder, stage: DrainStage, wake_at: float | None) -> float | None:
        return wake_at if self._stop is None else original(self, order, stage, wake_at)

    monkeypatch.setattr(Drain, "_maybe_force", patient)
    with pytest.raises(BaseExceptionGroup) as noticed:
        for seed in range(20):
            virtual.run(play(seed, odd_guests=0.5), seed)
    assert "past its hard deadline" in repr(noticed.value)
