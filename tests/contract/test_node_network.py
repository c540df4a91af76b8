"""The ports Network and Strays, on both machines."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from penstock.model.errors import Invalid, NotTheSlot
from penstock.model.sandbox import EgressRules

from .machines import LIMITS, WITHIN_S, Machine, linux_network, on_each, simulated

on_both = on_each({"simulated": simulated, "linux": linux_network})
GONE = 2**22 + 1  # above every pid


@on_both
async def test_slots_are_made_listed_destroyed_and_made_again_under_the_same_number(machine: Machine) -> None:
    for _ in range(2):
        slot = await machine.network.create_slot(3)
        assert slot.number == 3
        assert machine.network.list_slots() == {3}
        await machine.network.apply(3, EgressRules(deny=("203.0.113.0/24",)))
        await machine.network.destroy_slot(3, within_s=WITHIN_S)
        assert machine.network.list_slots() == set()


@on_both
async def test_every_slot_has_an_address_and_a_range_of_its_own(machine: Machine) -> None:
    slots = [await machine.network.create_slot(number) for number in (0, 1, 15)]
    assert len({slot.address for slot in slots}) == 3
    bases = sorted(slot.uid_base for slot in slots)
    assert all(later - earlier >= 65_536 for earlier, later in itertools.pairwise(bases))


@on_both
async def test_a_number_in_use_is_refused_and_what_is_there_stays(machine: Machine) -> None:
    slot = await machine.network.create_slot(3)
    pid = machine.start(None, slot=slot)
    with pytest.raises(FileExistsError):
        await machine.network.create_slot(3)
    assert machine.network.retake(3, pid).address == slot.address


@on_both
async def test_absent_is_success_for_destroy(machine: Machine) -> None:
    await machine.network.destroy_slot(3, within_s=WITHIN_S)
    assert machine.network.list_slots() == set()


@on_both
async def test_rules_for_no_slot_and_rules_that_mean_nothing_change_nothing(machine: Machine) -> None:
    with pytest.raises(NotTheSlot):
        await machine.network.apply(3, EgressRules())
    assert machine.network.list_slots() == set()
    await machine.network.create_slot(3)
    with pytest.raises(Invalid):
        await machine.network.apply(3, EgressRules(deny=("not an address/33",)))
    await machine.network.destroy_slot(3, within_s=WITHIN_S)
    with pytest.raises(NotTheSlot):
        await machine.network.apply(3, EgressRules())


@on_both
async def test_a_slot_with_a_process_in_it_is_destroyed_all_the_same(machine: Machine) -> None:
    slot = await machine.network.create_slot(3)
    machine.start(None, slot=slot)
    await machine.network.destroy_slot(3, within_s=WITHIN_S)
    assert machine.network.list_slots() == set()


@on_both
async def test_the_next_daemon_finds_retakes_and_destroys(machine: Machine) -> None:
    lived_in = await machine.network.create_slot(3)
    other = await machine.network.create_slot(4)
    pid, elsewhere = machine.start(None, slot=lived_in), machine.start(None, slot=other)
    await machine.restart()
    assert {3, 4} <= machine.network.list_slots()
    with pytest.raises(FileExistsError):
        await machine.network.create_slot(4)
    with pytest.raises(NotTheSlot):
        machine.network.retake(3, elsewhere)
    with pytest.raises(OSError):
        machine.network.retake(3, GONE)
    with pytest.raises(NotTheSlot):
        machine.network.retake(5, pid)
    with pytest.raises(NotTheSlot):
        await machine.network.apply(5, EgressRules())
    taken = machine.network.retake(3, pid)
    assert (taken.number, taken.address, taken.uid_base) == (3, lived_in.address, lived_in.uid_base)
    await machine.network.apply(3, EgressRules(internet=False))
    for number in (3, 4):
        await machine.network.destroy_slot(number, within_s=WITHIN_S)
    assert machine.network.list_slots() == set()


@on_both
async def test_a_cancelled_create_or_destroy_shows_all_or_nothing(machine: Machine) -> None:
    for after_s in (0, 0.0005, 0.002, 0.01):
        making = asyncio.ensure_future(machine.network.create_slot(3))
        await asyncio.sleep(after_s)
        making.cancel()
        await asyncio.wait([making])
        await machine.network.destroy_slot(3, within_s=WITHIN_S)
        assert machine.network.list_slots() == set()
        await machine.network.create_slot(3)
        ending = asyncio.ensure_future(machine.network.destroy_slot(3, within_s=WITHIN_S))
        await asyncio.sleep(after_s)
        ending.cancel()
        await asyncio.wait([ending])
        await machine.network.destroy_slot(3, within_s=WITHIN_S)
        assert machine.network.list_slots() == set()


@on_both
async def test_closing_twice_is_once(machine: Machine) -> None:
    await machine.network.close(destroy=False)
    await machine.network.close(destroy=False)
    await machine.restart()
    assert machine.network.list_slots() == set()


@on_both
async def test_who_pins_a_slot_from_outside_its_cgroup_is_named(machine: Machine) -> None:
    slot = await machine.network.create_slot(3)
    await machine.cgroups.create("sb-i1", LIMITS)
    inhabitant, stray = machine.start("sb-i1", slot=slot), machine.start(None, slot=slot)
    found = {each.pid: each.why for each in machine.strays.list_strays()}
    assert inhabitant not in found
    assert found[stray].endswith("slot 3")
    machine.end(stray)
    assert not {inhabitant, stray} & {each.pid for each in machine.strays.list_strays()}
    await machine.cgroups.kill("sb-i1", within_s=WITHIN_S)
