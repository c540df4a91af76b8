from __future__ import annotations

from penstock.core.clock import SystemClock
from penstock.sim.loop import EPOCH


def test_the_system_clock_works_without_a_loop() -> None:
    clock = SystemClock()
    assert clock.wall() > EPOCH / 2
    assert clock.monotonic() <= clock.monotonic()
