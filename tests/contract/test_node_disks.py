"""The port Disks, on both machines."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.deadlines import DeadlinePassed

from .machines import LIMITS, WITHIN_S, Machine, on_both


@on_both
async def test_made_listed_removed_and_made_again(machine: Machine) -> None:
    for _ in range(2):
        disk = await machine.disks.create("i1", LIMITS)
        assert disk.name == "i1"
        assert machine.disks.list_names() == {"i1"}
        assert 0 <= machine.disks.used_bytes("i1") < LIMITS.disk_bytes_max
        await machine.disks.remove("i1", within_s=WITHIN_S)
        assert machine.disks.list_names() == set()


@on_both
async def test_a_name_in_use_is_refused_and_what_is_there_stays(machine: Machine) -> None:
    await machine.disks.create("i1", LIMITS)
    with pytest.raises(FileExistsError):
        await machine.disks.create("i1", LIMITS)
    assert machine.disks.list_names() == {"i1"}
    await machine.disks.remove("i1", within_s=WITHIN_S)


@on_both
async def test_absent_is_success_for_remove_and_an_error_for_its_size(machine: Machine) -> None:
    await machine.disks.remove("none", within_s=WITHIN_S)
    with pytest.raises(FileNotFoundError):
        machine.disks.used_bytes("none")
    assert machine.disks.list_names() == set()


@on_both
async def test_one_in_use_stays_listed_and_goes_when_its_user_has_gone(machine: Machine) -> None:
    disk = await machine.disks.create("i1", LIMITS)
    pid = machine.start(None, disk=disk)
    with pytest.raises(DeadlinePassed, match="i1"):
        await machine.disks.remove("i1", within_s=0.2)
    assert machine.disks.list_names() == {"i1"}
    asyncio.get_running_loop().call_later(0.1, machine.end, pid)
    await machine.disks.remove("i1", within_s=WITHIN_S)
    assert machine.disks.list_names() == set()


@on_both
async def test_a_cancelled_create_or_remove_shows_all_or_nothing(machine: Machine) -> None:
    for after_s in (0, 0.0005, 0.002, 0.01):
        making = asyncio.ensure_future(machine.disks.create("i1", LIMITS))
        await asyncio.sleep(after_s)
        making.cancel()
        await asyncio.wait([making])
        await machine.disks.remove("i1", within_s=WITHIN_S)
        assert machine.disks.list_names() == set()
        await machine.disks.create("i1", LIMITS)
        removing = asyncio.ensure_future(machine.disks.remove("i1", within_s=WITHIN_S))
        await asyncio.sleep(after_s)
        removing.cancel()
        await asyncio.wait([removing])
        await machine.disks.remove("i1", within_s=WITHIN_S)
        assert machine.disks.list_names() == set()


@on_both
async def test_another_installations_are_not_listed(machine: Machine) -> None:
    await machine.neighbour.disks.create("i1", LIMITS)
    assert machine.disks.list_names() == set()
