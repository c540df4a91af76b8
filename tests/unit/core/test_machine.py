from __future__ import annotations

from enum import StrEnum

import pytest

from penstock.core.errors import Kind
from penstock.core.machine import IllegalTransition, Machine, draw, reachable
from penstock.model.sandbox import SERVING, TERMINAL, TRANSITIONS, Event, Phase


class Door(StrEnum):
    OPEN = "open"
    SHUT = "shut"
    WALLED = "walled"


TABLE = {
    (Door.OPEN, "close"): Door.SHUT,
    (Door.OPEN, "slam"): Door.SHUT,
    (Door.SHUT, "open"): Door.OPEN,
    (Door.SHUT, "wall"): Door.WALLED,
}


def test_a_machine_follows_its_table() -> None:
    door = Machine(TABLE, Door.OPEN, name="door 7")
    assert door.can("close")
    assert not door.can("wall")
    assert door.fire("close") is Door.SHUT
    assert door.state is Door.SHUT


def test_an_absent_pair_is_an_error_naming_both_and_changes_nothing() -> None:
    door = Machine(TABLE, Door.OPEN, name="door 7")
    with pytest.raises(IllegalTransition, match=r"door 7.*'wall' while 'open'") as caught:
        door.fire("wall")
    assert door.state is Door.OPEN
    assert caught.value.kind is Kind.CONFLICT


def test_the_picture_is_drawn_from_the_table() -> None:
    assert draw(TABLE, start=Door.OPEN) == (
        "stateDiagram-v2\n"
        "    [*] --> open\n"
        "    open --> shut: close, slam\n"
        "    shut --> open: open\n"
        "    shut --> walled: wall\n"
        "    walled --> [*]\n"
    )


# -- the sandbox's table -----------------------------------------------------------------------------------------------


def test_every_phase_of_a_sandbox_is_reachable() -> None:
    assert set(reachable(TRANSITIONS, Phase.PENDING)) == set(Phase)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_of_a_sandbox_can_reach_an_end(phase: Phase) -> None:
    assert TERMINAL & set(reachable(TRANSITIONS, phase))


@pytest.mark.parametrize("phase", Phase)
def test_every_pair_of_a_sandbox_is_in_the_table_or_refused(phase: Phase) -> None:
    for event in Event:
        machine = Machine(TRANSITIONS, phase, name="sb")
        if (phase, event) in TRANSITIONS:
            assert machine.fire(event) is TRANSITIONS[phase, event]
        else:
            with pytest.raises(IllegalTransition):
                machine.fire(event)
            assert machine.state is phase


def test_an_ended_sandbox_stays_ended_and_every_event_means_something() -> None:
    assert not TERMINAL & {phase for phase, _ in TRANSITIONS}
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert not TERMINAL & SERVING


def test_a_sandbox_ends_only_after_its_release_was_verified() -> None:
    ways_out = {(phase, event) for (phase, event), following in TRANSITIONS.items() if following in TERMINAL}
    nothing_taken_yet = {(Phase.PENDING, Event.CANCEL), (Phase.BOUND, Event.CANCEL)}
    verified = {Event.CLEAN, Event.GONE, Event.REAPED}
    assert {event for phase, event in ways_out - nothing_taken_yet} <= verified
