"""The port Cgroups: behaviour on this host's kernel, and what the v1 and v2 drivers write on hosts that differ."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.sandbox import Limits
from penstock.node.linux.cgroup_files import Tree
from penstock.node.linux.cgroups import LinuxCgroups

pytestmark = pytest.mark.root
MIB = 1024 * 1024
LIMITS = Limits(cpu_milli=500, memory_bytes_max=128 * MIB, pids_max=32)
ROOT = Path("/sys/fs/cgroup")
DEVICES = [f"c {each} rwm" for each in ("1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2", "136:*")]


def left(*below: str) -> list[Path]:
    """What of the test's installation any hierarchy of the host still has."""
    return list(ROOT.glob("/".join(("*", "penstock-testcg", *below))))


@pytest.fixture
async def cgroups() -> AsyncIterator[LinuxCgroups]:
    made = LinuxCgroups("testcg")
    await made.open()
    try:
        yield made
    finally:
        for name in made.list_names():
            await made.kill(name, within_s=5)
            await made.remove(name, within_s=5)
        await made.close(destroy=True)
        assert left() == []


def put(fds: list[int]) -> None:
    """Move the calling process: what the first process of a sandbox, and each child of the guest, does."""
    for fd in fds:
        os.write(fd, b"0")


class Sandbox:
    """A guest in the cgroup's own directories; `run` starts a program as a child of the guest would."""

    def __init__(self, cgroups: LinuxCgroups, name: str) -> None:
        doors = cgroups.doors(name)
        self._user = doors.user
        self._doors = [*doors.tasks, *doors.user, *([] if doors.unified is None else [doors.unified])]
        self._unified = Path(os.readlink(f"/proc/self/fd/{doors.unified}")) if doors.unified is not None else None
        self._started: list[subprocess.Popen[bytes]] = []
        self._tasks = doors.tasks
        self.guest = self._start(["sleep", "60"], [])

    def run(self, code: str) -> subprocess.Popen[bytes]:
        return self._start([sys.executable, "-c", code], self._user)

    def _start(self, argv: list[str], user: list[int]) -> subprocess.Popen[bytes]:
        def enter() -> None:
            if self._unified is not None:
                (self._unified / "cgroup.procs").write_text("0")
            put(self._tasks)
            put(user)

        started = subprocess.Popen(argv, preexec_fn=enter, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._started.append(started)
        return started

    def close(self) -> None:
        for each in self._started:
            each.kill()
            each.wait()
        for fd in self._doors:
            os.close(fd)


def start_outside() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


@pytest.fixture
async def sandbox(cgroups: LinuxCgroups) -> AsyncIterator[Sandbox]:
    await cgroups.create("sb-one", LIMITS)
    made = Sandbox(cgroups, "sb-one")
    try:
        yield made
    finally:
        await cgroups.kill("sb-one", within_s=5)
        made.close()


async def test_limits_are_in_the_kernel(cgroups: LinuxCgroups) -> None:
    await cgroups.create("sb-one", LIMITS)
    if cgroups.layout == "v2":
        return

    def read(controller: str, *parts: str) -> int:
        return int(ROOT.joinpath(controller, "penstock-testcg", "sb-one", *parts).read_text())

    assert read("memory", "user", "memory.limit_in_bytes") == 128 * MIB
    assert read("memory", "memory.limit_in_bytes") == 160 * MIB
    assert read("pids", "user", "pids.max") == 32
    assert read("pids", "pids.max") == 48
    assert read("cpu", "cpu.cfs_quota_us") == 50_000
    devices = (ROOT / "devices/penstock-testcg/sb-one/devices.list").read_text().splitlines()
    assert sorted(devices) == sorted(DEVICES)


async def test_a_bomb_by_default_is_small_enough_for_its_neighbours(cgroups: LinuxCgroups) -> None:
    """The longest queue for the locks of files that sandboxes share is as long as a sandbox has processes."""
    await cgroups.create("sb-one", Limits())
    place = ROOT if cgroups.layout == "v2" else ROOT / "pids"
    assert (place / "penstock-testcg/sb-one/user/pids.max").read_text() == "512\n"
    assert (place / "penstock-testcg/sb-one/pids.max").read_text() == "528\n"


async def test_names_are_those_of_this_installation(cgroups: LinuxCgroups) -> None:
    other = LinuxCgroups("testc2")
    await other.create("sb-two", LIMITS)
    try:
        await cgroups.create("sb-one", LIMITS)
        assert cgroups.list_names() == {"sb-one"}
        assert other.list_names() == {"sb-two"}
        await cgroups.remove("sb-one", within_s=5)
        assert other.list_names() == {"sb-two"}
    finally:
        await other.remove("sb-two", within_s=5)
        await other.close(destroy=True)


async def test_a_name_in_use_is_refused_and_stays_as_it_is(cgroups: LinuxCgroups) -> None:
    await cgroups.create("sb-one", LIMITS)
    with pytest.raises(FileExistsError):
        await cgroups.create("sb-one", Limits())
    assert cgroups.usage("sb-one").memory_bytes_max == 128 * MIB


async def test_absent_is_success_for_kill_and_remove(cgroups: LinuxCgroups) -> None:
    await cgroups.kill("sb-none", within_s=1)
    await cgroups.remove("sb-none", within_s=1)
    assert cgroups.pids("sb-none") == []


async def test_a_memory_hog_dies_and_the_guest_lives(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    hog = sandbox.run("b = bytearray(400 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1")
    assert await asyncio.to_thread(hog.wait, 20) == -signal.SIGKILL
    assert sandbox.guest.poll() is None
    assert cgroups.usage("sb-one").oom_kills == 1


async def test_tmpfs_and_shared_memory_count(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    hog = sandbox.run(
        "import os\nfd = os.memfd_create('x')\nblock = bytes(1 << 20)\nfor _ in range(400): os.write(fd, block)"
    )
    assert await asyncio.to_thread(hog.wait, 20) == -signal.SIGKILL
    assert sandbox.guest.poll() is None


async def test_page_cache_counts_and_is_given_back_rather_than_killed_for(
    cgroups: LinuxCgroups, sandbox: Sandbox, tmp_path: Path
) -> None:
    writer = sandbox.run(
        f"with open({str(tmp_path / 'big')!r}, 'wb') as f:\n for _ in range(300): f.write(bytes(1 << 20))"
    )
    assert await asyncio.to_thread(writer.wait, 60) == 0
    usage = cgroups.usage("sb-one")
    assert 16 * MIB < usage.memory_cache_bytes <= 160 * MIB
    assert usage.oom_kills == 0


async def test_a_fork_bomb_is_capped(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    bomb = sandbox.run(
        "import os, time\nn = 0\ntry:\n while True:\n  pid = os.fork()\n  if pid == 0: time.sleep(60)\n  n += 1\n"
        "except OSError as e: print(n, e.errno, flush=True)\ntime.sleep(60)"
    )
    assert bomb.stdout is not None
    line = await asyncio.to_thread(bomb.stdout.readline)
    assert line.split() == [b"31", b"11"]  # EAGAIN: with the bomb itself 32
    assert cgroups.usage("sb-one").pids == 33
    assert len(cgroups.pids("sb-one")) == 33
    started = time.monotonic()
    await cgroups.kill("sb-one", within_s=5)
    assert time.monotonic() - started < 1
    assert cgroups.pids("sb-one") == []


async def test_cpu_is_held_to_its_quota(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    sandbox.run("while True: pass")
    await asyncio.sleep(0.3)
    before, began = cgroups.usage("sb-one").cpu_s, time.monotonic()
    await asyncio.sleep(1)
    used = cgroups.usage("sb-one").cpu_s - before
    assert 0.1 < used / (time.monotonic() - began) < 0.7


async def test_a_device_node_of_the_host_cannot_be_opened(sandbox: Sandbox, tmp_path: Path) -> None:
    node = tmp_path / "disk"
    os.mknod(node, 0o60600, os.makedev(254, 0))
    code = f"import os\nos.open('/dev/null', 2)\ntry: os.open({str(node)!r}, 0)\nexcept OSError as e: print(e.errno)"
    tried = sandbox.run(code)
    out, _ = await asyncio.to_thread(tried.communicate, timeout=20)
    assert out == b"1\n"


async def test_a_frozen_sandbox_stands_still_and_is_killed_all_the_same(
    cgroups: LinuxCgroups, sandbox: Sandbox
) -> None:
    busy = sandbox.run("while True: pass")
    await asyncio.sleep(0.2)
    await cgroups.freeze("sb-one", within_s=2)
    before = cgroups.usage("sb-one").cpu_s
    await asyncio.sleep(0.3)
    assert cgroups.usage("sb-one").cpu_s - before < 0.01
    await cgroups.thaw("sb-one", within_s=2)
    await asyncio.sleep(0.3)
    assert cgroups.usage("sb-one").cpu_s - before > 0.05
    await cgroups.freeze("sb-one", within_s=2)
    await cgroups.kill("sb-one", within_s=2)
    assert await asyncio.to_thread(busy.wait, 5) == -signal.SIGKILL
    await cgroups.remove("sb-one", within_s=5)
    assert left("sb-one") == []


async def test_a_process_that_ignores_sigterm_is_killed(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    deaf = sandbox.run("import signal, time\nfor s in range(1, 32):\n try: signal.signal(s, 1)\n except OSError: pass\n"
                       "print(flush=True)\ntime.sleep(60)")  # fmt: skip
    assert deaf.stdout is not None
    await asyncio.to_thread(deaf.stdout.readline)
    await cgroups.kill("sb-one", within_s=5)
    assert await asyncio.to_thread(deaf.wait, 5) == -signal.SIGKILL


async def test_a_process_in_a_v1_group_alone_is_found_and_killed(cgroups: LinuxCgroups) -> None:
    if cgroups.layout != "hybrid":
        pytest.skip("needs a hybrid host")
    await cgroups.create("sb-one", LIMITS)
    stray = start_outside()
    try:
        (ROOT / "memory/penstock-testcg/sb-one/user/cgroup.procs").write_text(str(stray.pid))
        assert cgroups.pids("sb-one") == [stray.pid]
        await cgroups.kill("sb-one", within_s=5)
        assert stray.wait(5) == -signal.SIGKILL
    finally:
        stray.kill()
        stray.wait()


async def test_a_busy_cgroup_is_not_removed_and_the_error_names_it(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    with pytest.raises(DeadlinePassed, match="removal of cgroup sb-one"):
        await cgroups.remove("sb-one", within_s=0.1)
    assert cgroups.list_names() == {"sb-one"}
    assert sandbox.guest.poll() is None


async def test_a_removal_waits_for_the_last_process(cgroups: LinuxCgroups, sandbox: Sandbox) -> None:
    asyncio.get_running_loop().call_later(0.15, sandbox.guest.kill)
    await cgroups.remove("sb-one", within_s=5)
    assert cgroups.list_names() == set()


async def test_a_cancelled_removal_still_removes(cgroups: LinuxCgroups) -> None:
    await cgroups.create("sb-one", LIMITS)
    task = asyncio.ensure_future(cgroups.remove("sb-one", within_s=5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cgroups.list_names() == set()


async def test_a_failed_creation_leaves_nothing(cgroups: LinuxCgroups) -> None:
    with pytest.raises(OSError):
        await cgroups.create("sb-one", Limits(memory_bytes_max=-5))
    assert cgroups.list_names() == set()


async def test_the_parent_with_a_sandbox_in_it_is_not_removed(cgroups: LinuxCgroups) -> None:
    await cgroups.create("sb-one", LIMITS)
    with pytest.raises(OSError, match="busy"):
        await cgroups.close(destroy=True)
    await cgroups.remove("sb-one", within_s=5)


async def test_creation_into_the_v2_directory(cgroups: LinuxCgroups) -> None:
    """A process born by clone3 with CLONE_INTO_CGROUP is in the cgroup from its first instruction."""
    await cgroups.create("sb-one", LIMITS)
    doors = cgroups.doors("sb-one")
    if doors.unified is None:
        pytest.skip("needs cgroup v2")
    libc = ctypes.CDLL(None, use_errno=True)
    words = [0x2_0000_0000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, doors.unified]
    pid = libc.syscall(435, (ctypes.c_uint64 * 11)(*words), 88)
    if pid == 0:
        libc.pause()
        os._exit(0)
    try:
        assert cgroups.pids("sb-one") == [pid]
        await cgroups.kill("sb-one", within_s=5)
    finally:
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it is dead
        for fd in (*doors.tasks, *doors.user, doors.unified):
            os.close(fd)


# ---- hosts unlike this one: a folder stands for the hierarchy -----------------------------------------------------

V1_FILES = {
    "memory": "memory.limit_in_bytes memory.memsw.limit_in_bytes memory.use_hierarchy memory.stat",
    "cpu": "cpu.cfs_period_us cpu.cfs_quota_us cpu.shares",
    "cpuacct": "cpuacct.usage",
    "pids": "pids.max pids.current",
    "devices": "devices.list devices.deny devices.allow",
    "freezer": "freezer.state",
}
V2_FILES = (
    "cgroup.controllers cgroup.subtree_control cgroup.kill cgroup.freeze cgroup.events memory.max memory.swap.max "
    "memory.oom.group memory.current memory.stat memory.events pids.max pids.current cpu.max cpu.weight cpu.stat"
)


class FolderTree(Tree):
    """Behaves as the kernel does: control files come with a directory and do not keep it from being removed."""

    def make(self, *parts: str) -> None:
        super().make(*parts)
        self.fill(*parts)

    def fill(self, *parts: str) -> None:
        files = V1_FILES.get(Path(self.root).name, V2_FILES)
        for name in ("cgroup.procs", "tasks", *files.split()):
            Path(self.path(*parts, name)).write_text("a *:* rwm\n" if name == "devices.list" else "")

    def write(self, value: str, *parts: str) -> None:
        with open(self.path(*parts), "r+") as file:
            file.seek(0, os.SEEK_END)
            file.write(value + "\n")

    def remove(self, *parts: str) -> None:
        path = Path(self.path(*parts))
        if path.exists():
            assert not any(each.is_dir() for each in path.iterdir()), "children are removed first"
            for each in path.iterdir():
                each.unlink()
        super().remove(*parts)


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text().strip().replace("\n", " | ")
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.read_text().strip() and path.name != "devices.list"
    }


async def test_what_a_pure_v2_host_is_told(tmp_path: Path) -> None:
    FolderTree(str(tmp_path)).fill()
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids\n")
    cgroups = LinuxCgroups("fakev2", root=str(tmp_path), make_tree=FolderTree)
    assert cgroups.layout == "v2"
    await cgroups.create("sb-one", LIMITS)
    (tmp_path / "cgroup.controllers").write_text("")
    assert contents(tmp_path) == {
        "cgroup.subtree_control": "+cpu +memory +pids",
        "penstock-fakev2/cgroup.subtree_control": "+cpu +memory +pids",
        "penstock-fakev2/sb-one/cgroup.subtree_control": "+memory +pids",
        "penstock-fakev2/sb-one/cpu.max": "50000 100000",
        "penstock-fakev2/sb-one/cpu.weight": "50",
        "penstock-fakev2/sb-one/memory.max": str(160 * MIB),
        "penstock-fakev2/sb-one/memory.oom.group": "0",
        "penstock-fakev2/sb-one/memory.swap.max": "0",
        "penstock-fakev2/sb-one/pids.max": "48",
        "penstock-fakev2/sb-one/user/memory.max": str(128 * MIB),
        "penstock-fakev2/sb-one/user/memory.oom.group": "0",
        "penstock-fakev2/sb-one/user/memory.swap.max": "0",
        "penstock-fakev2/sb-one/user/pids.max": "32",
    }
    doors = cgroups.doors("sb-one")
    here = [
        os.readlink(f"/proc/self/fd/{fd}").removeprefix(f"{tmp_path}/") for fd in (doors.unified or -1, *doors.user)
    ]
    assert here == ["penstock-fakev2/sb-one/guest", "penstock-fakev2/sb-one/user/cgroup.procs"]
    assert doors.tasks == []
    for fd in (doors.unified or -1, *doors.user):
        os.close(fd)
    await cgroups.remove("sb-one", within_s=5)
    await cgroups.close(destroy=True)
    assert not (tmp_path / "penstock-fakev2").exists()


async def test_usage_on_a_pure_v2_host(tmp_path: Path) -> None:
    FolderTree(str(tmp_path)).fill()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    cgroups = LinuxCgroups("fakev2", root=str(tmp_path), make_tree=FolderTree)
    await cgroups.create("sb-one", LIMITS)
    group = tmp_path / "penstock-fakev2/sb-one"
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (group / "memory.current").write_text("1000\n")
    (group / "memory.stat").write_text("anon 600\nfile 400\n")
    (group / "memory.events").write_text("oom 2\noom_kill 2\n")
    (group / "pids.current").write_text("7\n")
    usage = cgroups.usage("sb-one")
    assert (usage.cpu_s, usage.memory_bytes, usage.memory_cache_bytes) == (1.5, 1000, 400)
    assert (usage.memory_bytes_max, usage.pids, usage.oom_kills) == (128 * MIB, 7, 2)


async def test_what_a_v1_host_is_told(tmp_path: Path) -> None:
    for name in V1_FILES:
        (tmp_path / name).mkdir()
        FolderTree(str(tmp_path / name)).fill()
    cgroups = LinuxCgroups("fakev1", root=str(tmp_path), make_tree=FolderTree)
    assert cgroups.layout == "v1"
    await cgroups.create("sb-one", LIMITS)
    assert contents(tmp_path) == {
        "cpu/penstock-fakev1/sb-one/cpu.cfs_period_us": "100000",
        "cpu/penstock-fakev1/sb-one/cpu.cfs_quota_us": "50000",
        "cpu/penstock-fakev1/sb-one/cpu.shares": "512",
        "devices/penstock-fakev1/devices.allow": " | ".join(DEVICES),
        "devices/penstock-fakev1/devices.deny": "a",
        "memory/penstock-fakev1/memory.use_hierarchy": "1",
        "memory/penstock-fakev1/sb-one/memory.limit_in_bytes": str(160 * MIB),
        "memory/penstock-fakev1/sb-one/memory.memsw.limit_in_bytes": str(160 * MIB),
        "memory/penstock-fakev1/sb-one/user/memory.limit_in_bytes": str(128 * MIB),
        "memory/penstock-fakev1/sb-one/user/memory.memsw.limit_in_bytes": str(128 * MIB),
        "pids/penstock-fakev1/sb-one/pids.max": "48",
        "pids/penstock-fakev1/sb-one/user/pids.max": "32",
    }
    doors = cgroups.doors("sb-one")
    assert doors.unified is None
    assert (len(doors.tasks), len(doors.user)) == (6, 2)
    for fd in (*doors.tasks, *doors.user):
        os.close(fd)
    await cgroups.remove("sb-one", within_s=5)
    await cgroups.close(destroy=True)


async def test_v1_alone_kills_through_its_freezer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real v1 hierarchies of a hybrid host, with v2 left out of sight: freeze, kill by pidfd, thaw, empty."""
    if not (ROOT / "freezer/tasks").exists():
        pytest.skip("needs the v1 freezer")
    real = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: "unified" not in str(path) and real(path))
    cgroups = LinuxCgroups("testv1")
    assert cgroups.layout == "v1"
    await cgroups.create("sb-one", LIMITS)
    sandbox = Sandbox(cgroups, "sb-one")
    try:
        busy = sandbox.run("import os\nfor _ in range(4): os.fork()\nwhile True: pass")
        await asyncio.sleep(0.3)
        await cgroups.freeze("sb-one", within_s=5)
        assert (ROOT / "freezer/penstock-testv1/sb-one/freezer.state").read_text() == "FROZEN\n"
        await cgroups.kill("sb-one", within_s=5)
        assert await asyncio.to_thread(busy.wait, 5) == -signal.SIGKILL
        assert cgroups.pids("sb-one") == []
        assert cgroups.usage("sb-one").cpu_s > 0.01
    finally:
        await cgroups.kill("sb-one", within_s=5)
        sandbox.close()
        await cgroups.remove("sb-one", within_s=5)
        await cgroups.close(destroy=True)
