"""The sync of a sandbox's disk: its bounds. That bytes get there is for tests/linux/test_guest_notices.py."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.guest import quiesce
from penstock.guest.quiesce import Disk

CHILD_S = 0.3


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path, os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    """In a sandbox pid 1 collects them."""
    yield
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[int]]:
    """Each sync takes CHILD_S. Called, it gives how many descriptors each of them had."""
    log = tmp_path / "syncs"

    def sync(_fd: int) -> int:
        time.sleep(CHILD_S)
        log.open("a").write(f"{len(os.listdir('/proc/self/fd'))}\n")
        return 0

    monkeypatch.setattr(quiesce, "_syncfs", sync)
    return lambda: [int(line) for line in log.read_text().splitlines()]


async def test_what_the_kernel_refuses_is_raised() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        await Disk(-1).sync(within_s=5)


async def test_the_loop_goes_on_while_the_disk_is_slow(fd: int, slow: Callable[[], list[int]]) -> None:
    loop = asyncio.get_running_loop()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        loop.call_later(0.01, turn)

    turn()
    await Disk(fd).sync(within_s=5)
    assert turns > 5


async def test_a_passed_deadline_is_told_and_the_next_sync_is_a_new_one(fd: int, slow: Callable[[], list[int]]) -> None:
    disk = Disk(fd)
    with pytest.raises(DeadlinePassed, match="sync of the sandbox's disk"):
        await disk.sync(within_s=CHILD_S / 10)
    await disk.sync(within_s=5)
    assert len(slow()) == 2


async def test_calls_at_once_are_one_child_after_the_other(fd: int, slow: Callable[[], list[int]]) -> None:
    disk = Disk(fd)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(disk.sync(within_s=5), disk.sync(within_s=5))
    assert asyncio.get_running_loop().time() - began >= 2 * CHILD_S
    assert len(slow()) == 2


async def test_the_child_holds_no_descriptor_of_the_guest(fd: int, slow: Callable[[], list[int]]) -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    await Disk(fd).sync(within_s=5)
    # 0, 1, 2, the disk, the pipe, the log of this test and the listing
    assert slow()[0] <= 7
    for each in held:
        os.close(each)


async def test_a_child_that_was_killed_promises_nothing(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiesce, "_syncfs", lambda _fd: os.kill(os.getpid(), 9))
    with pytest.raises(InterruptedError):
        await Disk(fd).sync(within_s=5)
