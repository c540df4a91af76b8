from __future__ import annotations

import asyncio

from penstock.core.clock import SystemClock
from penstock.core.events import Event, Events
from penstock.sim.loop import EPOCH, SimClock

from .virtual import virtual


@virtual
async def test_events_carry_both_times_and_reach_every_sink_in_order() -> None:
    clock = SimClock(asyncio.get_running_loop())
    events = Events(clock)
    seen: list[tuple[str, Event]] = []
    events.subscribe(lambda event: seen.append(("log", event)))
    leave = events.subscribe(lambda event: seen.append(("trace", event)))
    await asyncio.sleep(5)
    clock.jump(-3600)
    event = events.emit("sandbox.ready", "sb-1", took_ms=31)
    leave()
    leave()
    events.emit("daemon.stopping")
    assert (event.number, event.at, event.after_s) == (1, EPOCH + 5 - 3600, 5)
    assert str(event) == "sandbox.ready sb-1 took_ms=31"
    assert [name for name, _ in seen] == ["log", "trace", "log"]


@virtual
async def test_only_the_last_ones_are_kept_and_found_by_subject_and_kind() -> None:
    events = Events(SystemClock(), keep_max=3)
    for number in range(5):
        events.emit("even" if number % 2 == 0 else "odd", f"s{number}")
    assert [event.subject for event in events.recent()] == ["s2", "s3", "s4"]
    assert [event.subject for event in events.recent(kind="even")] == ["s2", "s4"]
    assert [event.kind for event in events.recent(subject="s3")] == ["odd"]
    assert events.statistics().emitted == 5


@virtual
async def test_a_failing_sink_neither_fails_the_emitter_nor_goes_unseen() -> None:
    events = Events(SystemClock())

    def fail(event: Event) -> None:
        raise OSError("log is full")

    events.subscribe(fail)
    events.emit("x", "y")
    assert events.statistics().sink_errors == 1
    assert str(events.last_sink_error) == "log is full"


def test_the_system_clock_works_without_a_loop() -> None:
    clock = SystemClock()
    assert clock.wall() > EPOCH / 2
    assert clock.monotonic() <= clock.monotonic()
