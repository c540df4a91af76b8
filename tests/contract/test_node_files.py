"""The port Files, on both machines."""

from __future__ import annotations

import pytest

from .machines import Machine, on_both


@on_both
async def test_lines_come_back_in_order_and_whole(machine: Machine) -> None:
    files = machine.files
    lines = [b'{"k":1}', b"", b"x" * 9_000]
    for line in lines:
        files.append_record("ia", line)
    assert files.read_record("ia") == lines
    assert files.list_records() == {"ia"}


@on_both
async def test_what_is_absent_reads_as_nothing_and_is_removed_with_success(machine: Machine) -> None:
    files = machine.files
    assert files.read_record("ia") == []
    assert files.list_records() == files.list_run_dirs() == set()
    files.remove_record("ia")
    files.remove_run_dir("ia")
    files.append_record("ia", b"1")
    files.remove_record("ia")
    files.remove_record("ia")
    assert files.read_record("ia") == []
    assert files.list_records() == set()


@on_both
async def test_a_torn_last_line_was_never_written_and_gives_way_to_the_next(machine: Machine) -> None:
    files = machine.files
    files.append_record("ia", b"first")
    machine.tear_record("ia", b"second, but cut o")
    assert files.read_record("ia") == [b"first"]
    files.append_record("ia", b"third")
    assert files.read_record("ia") == [b"first", b"third"]


@on_both
async def test_a_record_of_a_torn_line_alone_exists_and_says_nothing(machine: Machine) -> None:
    files = machine.files
    machine.tear_record("ia", b"fir")
    assert files.list_records() == {"ia"}
    assert files.read_record("ia") == []
    files.append_record("ia", b"first")
    assert files.read_record("ia") == [b"first"]


@on_both
async def test_on_a_full_disk_the_record_stays_as_it_was(machine: Machine) -> None:
    files = machine.files
    files.append_record("ia", b"first")
    with machine.fill_disk_of_records(), pytest.raises(OSError):
        files.append_record("ia", b"no room for this")
    assert files.read_record("ia") == [b"first"]
    files.append_record("ia", b"second")
    assert files.read_record("ia") == [b"first", b"second"]


@on_both
async def test_a_run_directory_that_is_there_is_kept(machine: Machine) -> None:
    files = machine.files
    path = files.make_run_dir("ia")
    assert files.make_run_dir("ia") == path
    assert files.make_run_dir("ib") != path
    assert files.list_run_dirs() == {"ia", "ib"}
    files.remove_run_dir("ia")
    assert files.list_run_dirs() == {"ib"}


@on_both
async def test_another_installations_are_not_listed(machine: Machine) -> None:
    machine.neighbour.files.make_run_dir("ia")
    machine.neighbour.files.append_record("ia", b"1")
    assert machine.files.list_run_dirs() == machine.files.list_records() == set()
