"""Limits hold for a launched sandbox, its guest outlives what they do to others, and paused ones end in time."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.linux.launchlab import MIB, Lab, Sandbox, make_layer

from penstock.model.sandbox import Limits
from penstock.node.linux.base import REQUIRED_PACKAGES, build_base

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
LIMITS = Limits(cpu_milli=250, memory_bytes_max=96 * MIB, pids_max=40, disk_bytes_max=256 * MIB, disk_inodes_max=2_048)
V1_FREEZER = Path("/sys/fs/cgroup/freezer/tasks").exists()
END_S = 2.0  # the promise: from the order to everything verified gone


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("limits")
    made = Lab(folder, "testlm")
    made.layer = make_layer(folder / "layer")
    try:
        await made.open()
        yield made
    finally:
        await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def inside(lab: Lab) -> AsyncIterator[Sandbox]:
    async with lab.sandbox("limited", limits=LIMITS) as sandbox:
        yield sandbox


def usage(lab: Lab, sandbox: Sandbox):  # type: ignore[no-untyped-def]
    return lab.cgroups.usage(sandbox.order.cgroup)


async def still_serves(sandbox: Sandbox) -> None:
    assert sandbox.process.alive()
    assert (await asyncio.to_thread(sandbox.get)).startswith(b"HTTP/1.1 204")


FILL = """
import mmap, os, sys
kind, size = sys.argv[1], int(sys.argv[2])
if kind == "anonymous":
    held = mmap.mmap(-1, size)
    for at in range(0, size, 4096): held[at] = 1
else:
    fd = os.memfd_create("x") if kind == "memfd" else os.open(kind, os.O_CREAT | os.O_WRONLY)
    done = 0
    while done < size: done += os.write(fd, bytes(1 << 20))
print("held")
"""

BOMB = """
import os, time
n = 1
try:
    while True:
        if os.fork() == 0:
            os.close(1), os.close(2), time.sleep(2), os._exit(0)
        n += 1
except OSError as error:
    print(n, error.errno)
"""
MANY_FILES = """
import os
os.mkdir("/root/d")
n = 0
try:
    while True:
        os.close(os.open(f"/root/d/{n}", os.O_CREAT | os.O_WRONLY))
        n += 1
except OSError as error:
    print(n, error.errno)
"""


@pytest.mark.parametrize("where", ["anonymous", "memfd", "/dev/shm/full"])
async def test_memory_of_every_kind_counts_and_the_guest_is_not_the_one_killed(
    lab: Lab, inside: Sandbox, where: str
) -> None:
    """/dev/shm is half of the limit large: it is full by itself before anybody is killed, and it counts."""
    before = usage(lab, inside)
    status, output = await inside.run("/usr/bin/python3", "-I", "-S", "-c", FILL, where, str(200 * MIB))
    after = usage(lab, inside)
    if where.startswith("/dev/shm"):
        assert "No space left" in output
        assert after.memory_bytes - before.memory_bytes > 40 * MIB
        await inside.ok("/bin/rm", where)
    else:
        assert status == -signal.SIGKILL, output
        assert after.oom_kills > before.oom_kills
    assert usage(lab, inside).memory_bytes < LIMITS.memory_bytes_max + 32 * MIB
    await still_serves(inside)


async def test_page_cache_counts_and_kills_nobody(lab: Lab, inside: Sandbox) -> None:
    kills = usage(lab, inside).oom_kills
    await inside.ok("/bin/dd", "if=/dev/zero", "of=/root/large", "bs=1M", "count=180", "status=none")
    found = usage(lab, inside)
    assert found.memory_cache_bytes > 20 * MIB
    assert found.memory_bytes < LIMITS.memory_bytes_max + 32 * MIB
    assert found.oom_kills == kills
    await inside.ok("/bin/rm", "/root/large")
    await still_serves(inside)


async def test_cpu_time_stays_near_the_quota(lab: Lab, inside: Sandbox) -> None:
    """By the kernel's own counters: CPU seconds over wall seconds, and how often it was held back."""
    loops = (
        "import os, time\nfor _ in range(3): os.fork()\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    )
    busy = asyncio.ensure_future(inside.run("/usr/bin/python3", "-I", "-S", "-c", loops))
    await asyncio.sleep(0.7)
    used, began = usage(lab, inside).cpu_s, time.monotonic()
    await asyncio.sleep(1.5)
    ratio = (usage(lab, inside).cpu_s - used) / (time.monotonic() - began)
    await busy
    assert 0.1 < ratio < LIMITS.cpu_milli / 1000 * 1.25  # eight loops would take both CPUs of the smallest machine
    await still_serves(inside)


async def test_a_fork_bomb_ends_at_its_limit_and_the_guest_still_forks(lab: Lab, inside: Sandbox) -> None:
    assert await inside.python(BOMB) == f"{LIMITS.pids_max} 11"
    assert usage(lab, inside).pids <= LIMITS.pids_max + 16
    await still_serves(inside)  # the stand-in guest forks for every answer


async def test_disk_ends_by_bytes_and_by_inodes_and_the_guest_still_serves(lab: Lab, inside: Sandbox) -> None:
    status, output = await inside.run("/bin/dd", "if=/dev/zero", "of=/root/full", "bs=1M", "status=none")
    assert (status, "No space left on device" in output) == (1, True)
    size = int(await inside.ok("/bin/stat", "-c", "%s", "/root/full"))
    assert 0.8 * LIMITS.disk_bytes_max < size <= LIMITS.disk_bytes_max
    assert os.stat(inside.order.disk.path).st_size < LIMITS.disk_bytes_max * 1.2
    await inside.ok("/bin/rm", "/root/full")
    made, number = map(int, (await inside.python(MANY_FILES)).split())
    assert number == errno.ENOSPC
    assert abs(made - LIMITS.disk_inodes_max) < 128, "ext4 makes whole blocks of inodes"
    await inside.ok("/bin/rm", "-r", "/root/d")
    await still_serves(inside)


async def write_much(sandbox: Sandbox) -> None:
    """300 MiB of dirty pages, of a neighbour whose limits allow them."""
    await sandbox.run("/bin/dd", "if=/dev/zero", "of=/root/dirty", "bs=1M", "count=300", "status=none", within_s=60)


@pytest.mark.parametrize("layout", ["as it is", "v1"])
async def test_a_paused_one_is_gone_in_time_while_a_neighbour_writes(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`v1`: cgroup v2 left out of sight, so that the old freezer pauses, under which SIGKILL waits for the thaw."""
    if layout == "v1":
        if not V1_FREEZER:
            pytest.skip("needs the v1 freezer")
        real = os.path.exists
        monkeypatch.setattr("os.path.exists", lambda path: "cgroup/unified" not in str(path) and real(path))
    lab = Lab(tmp_path / "lab", "testpz")
    monkeypatch.undo()
    assert layout in ("as it is", lab.cgroups.layout)
    lab.layer = make_layer(tmp_path / "layer")
    large = Limits(memory_bytes_max=900 * MIB, disk_bytes_max=500 * MIB)
    try:
        await lab.open()
        order = await lab.order("ended")
        process = await lab.launcher.launch(order, within_s=20)
        async with lab.sandbox("writer", limits=large) as writer:
            mine = Sandbox(order, process)
            dirt = ["/bin/dd", "if=/dev/zero", "of=/root/mine", "bs=1M", "count=40", "status=none"]
            await mine.ok(*dirt)
            busy = asyncio.ensure_future(mine.run("/bin/sleep", "60"))
            writing = asyncio.ensure_future(write_much(writer))
            await asyncio.sleep(0.2)
            await lab.cgroups.freeze(order.cgroup, within_s=5)
            began = time.monotonic()
            await lab.end(order, process)
            took_s = time.monotonic() - began
            left = [line for lines in lab.traces().values() for line in lines if "-ended" in line or "/ended" in line]
            await asyncio.wait([busy, writing])
        assert left == []
        assert took_s < END_S
    finally:
        await lab.close()


async def test_a_refreshed_base_is_for_new_sandboxes_and_a_running_one_keeps_its_own(lab: Lab, tmp_path: Path) -> None:
    """Looked at through /proc/<pid>/root: what the sandbox itself sees."""
    machine, layers = small_machine(tmp_path / "machine"), str(tmp_path / "layers")
    first = build_base(layers, progress=lambda _: None, root=str(machine))
    async with lab.sandbox("before", layers=[first.path]) as before:
        tool = machine / "usr/bin/bash"
        (tool.parent / "new").write_text("version 2")
        os.rename(tool.parent / "new", tool)  # as dpkg replaces a file
        assert seen(before, "usr/bin/bash") == "bash"
        second = build_base(layers, progress=lambda _: None, root=str(machine))
        assert second.digest != first.digest
        async with lab.sandbox("after", layers=[second.path]) as after:
            assert seen(after, "usr/bin/bash") == "version 2"
            assert seen(before, "usr/bin/bash") == "bash"


def seen(sandbox: Sandbox, path: str) -> str:
    return Path(f"/proc/{sandbox.process.pid}/root/{path}").read_text()


def small_machine(root: Path) -> Path:
    """A merged-usr machine whose required packages own one file each."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (root / "var/lib/dpkg/alternatives").mkdir()
    status = ""
    for relation in REQUIRED_PACKAGES:
        name = relation.split(" ")[0]
        status += f"Package: {name}\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n\n"
        (root / "usr/bin" / name).write_text(name)
        (info / f"{name}.list").write_text(f"/.\n/usr\n/bin/{name}\n")
    (root / "var/lib/dpkg/status").write_text(status)
    return root
