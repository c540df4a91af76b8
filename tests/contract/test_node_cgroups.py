"""The port Cgroups, on both machines."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.deadlines import DeadlinePassed

from .machines import LIMITS, WITHIN_S, Machine, on_both


@on_both
async def test_made_listed_removed_and_made_again(machine: Machine) -> None:
    for _ in range(2):
        await machine.cgroups.create("sb-i1", LIMITS)
        assert machine.cgroups.list_names() == {"sb-i1"}
        assert machine.cgroups.usage("sb-i1").pids == 0
        await machine.cgroups.remove("sb-i1", within_s=WITHIN_S)
        assert machine.cgroups.list_names() == set()


@on_both
async def test_a_name_in_use_is_refused_and_what_is_there_stays(machine: Machine) -> None:
    await machine.cgroups.create("sb-i1", LIMITS)
    pid = machine.start("sb-i1")
    with pytest.raises(FileExistsError):
        await machine.cgroups.create("sb-i1", LIMITS)
    assert machine.cgroups.pids("sb-i1") == [pid]


@on_both
async def test_absent_is_success_for_kill_and_remove_and_empty_for_pids(machine: Machine) -> None:
    await machine.cgroups.kill("sb-none", within_s=WITHIN_S)
    await machine.cgroups.remove("sb-none", within_s=WITHIN_S)
    assert machine.cgroups.pids("sb-none") == []
    assert machine.cgroups.list_names() == set()


@on_both
async def test_absent_is_an_error_where_there_is_something_to_tell(machine: Machine) -> None:
    with pytest.raises(FileNotFoundError):
        machine.cgroups.usage("sb-none")
    for verb in (machine.cgroups.freeze, machine.cgroups.thaw):
        with pytest.raises(FileNotFoundError):
            await verb("sb-none", within_s=WITHIN_S)
    assert machine.cgroups.list_names() == set(), "nothing was made of it"


@on_both
async def test_a_kill_returns_when_it_is_empty_and_leaves_the_cgroup(machine: Machine) -> None:
    await machine.cgroups.create("sb-i1", LIMITS)
    pids = {machine.start("sb-i1") for _ in range(3)}
    assert set(machine.cgroups.pids("sb-i1")) == pids
    assert machine.cgroups.usage("sb-i1").pids == 3
    await machine.cgroups.kill("sb-i1", within_s=WITHIN_S)
    assert machine.cgroups.pids("sb-i1") == []
    assert machine.cgroups.list_names() == {"sb-i1"}


@on_both
async def test_a_frozen_one_is_killed_and_its_cgroup_can_be_used_again(machine: Machine) -> None:
    await machine.cgroups.create("sb-i1", LIMITS)
    machine.start("sb-i1")
    await machine.cgroups.freeze("sb-i1", within_s=WITHIN_S)
    await machine.cgroups.freeze("sb-i1", within_s=WITHIN_S)
    await machine.cgroups.kill("sb-i1", within_s=WITHIN_S)
    assert machine.cgroups.pids("sb-i1") == []
    await machine.cgroups.thaw("sb-i1", within_s=WITHIN_S)
    pid = machine.start("sb-i1")
    assert machine.cgroups.pids("sb-i1") == [pid]


@on_both
async def test_one_in_use_is_not_removed_stays_whole_and_goes_when_it_is_free(machine: Machine) -> None:
    await machine.cgroups.create("sb-i1", LIMITS)
    pid = machine.start("sb-i1")
    with pytest.raises(DeadlinePassed, match="sb-i1"):
        await machine.cgroups.remove("sb-i1", within_s=0.2)
    assert machine.cgroups.list_names() == {"sb-i1"}
    assert machine.cgroups.pids("sb-i1") == [pid]
    asyncio.get_running_loop().call_later(0.1, machine.end, pid)
    await machine.cgroups.remove("sb-i1", within_s=WITHIN_S)
    assert machine.cgroups.list_names() == set()


@on_both
async def test_a_cancelled_create_shows_all_or_nothing(machine: Machine) -> None:
    for after_s in (0, 0.0002, 0.001, 0.005):
        making = asyncio.ensure_future(machine.cgroups.create("sb-i1", LIMITS))
        await asyncio.sleep(after_s)
        making.cancel()
        await asyncio.wait([making])
        if machine.cgroups.list_names():
            pid = machine.start("sb-i1")
            assert machine.cgroups.pids("sb-i1") == [pid]
            await machine.cgroups.kill("sb-i1", within_s=WITHIN_S)
            await machine.cgroups.remove("sb-i1", within_s=WITHIN_S)
        await machine.cgroups.create("sb-i1", LIMITS)
        await machine.cgroups.remove("sb-i1", within_s=WITHIN_S)
        assert machine.cgroups.list_names() == set()


@on_both
async def test_a_cancelled_remove_shows_all_or_nothing(machine: Machine) -> None:
    for after_s in (0, 0.0002, 0.001, 0.005):
        await machine.cgroups.create("sb-i1", LIMITS)
        removing = asyncio.ensure_future(machine.cgroups.remove("sb-i1", within_s=WITHIN_S))
        await asyncio.sleep(after_s)
        removing.cancel()
        await asyncio.wait([removing])
        if machine.cgroups.list_names():
            assert machine.cgroups.usage("sb-i1").pids == 0
            await machine.cgroups.remove("sb-i1", within_s=WITHIN_S)
        assert machine.cgroups.list_names() == set()


@on_both
async def test_another_installations_are_not_listed_and_share_no_name(machine: Machine) -> None:
    await machine.neighbour.cgroups.create("sb-i1", LIMITS)
    assert machine.cgroups.list_names() == set()
    await machine.cgroups.create("sb-i1", LIMITS)
    pid = machine.start("sb-i1")
    await machine.neighbour.cgroups.kill("sb-i1", within_s=WITHIN_S)
    await machine.neighbour.cgroups.remove("sb-i1", within_s=WITHIN_S)
    assert machine.cgroups.pids("sb-i1") == [pid]
