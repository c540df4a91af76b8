"""A launched sandbox, seen from inside and from the host."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.linux.launchlab import IDS_FROM, Lab, Sandbox, children_of, make_layer

from penstock.node.linux import blanks, loops, processes

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("launch")
    made = Lab(folder, "tlaunch")
    made.layer = make_layer(folder / "layer")
    try:
        await made.open()
        yield made
    finally:
        await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def inside(lab: Lab) -> AsyncIterator[Sandbox]:
    async with lab.sandbox("inside") as sandbox:
        yield sandbox


async def test_the_guest_serves_on_its_socket(inside: Sandbox) -> None:
    assert inside.get().startswith(b"HTTP/1.1 204")
    assert stat.S_ISSOCK(os.stat(f"{inside.order.run_dir}/control.sock").st_mode)
    assert inside.process.alive() and inside.process.steps_ms["overlay"] > 0


async def test_root_inside_is_an_unprivileged_user_of_the_host(inside: Sandbox) -> None:
    assert await inside.ok("/usr/bin/id") == "uid=0(root) gid=0(root) groups=0(root)\n"
    status = read(f"/proc/{inside.process.pid}/status").splitlines()
    base = str(inside.order.slot.uid_base)
    assert inside.order.slot.uid_base >= IDS_FROM
    assert [line.split()[1:] for line in status if line.startswith(("Uid:", "Gid:"))] == [[base] * 4] * 2


async def test_it_is_pid_1_of_its_own_namespaces(inside: Sandbox) -> None:
    for kind in ("mnt", "pid", "ipc", "uts", "cgroup", "user", "net"):
        assert os.readlink(f"/proc/{inside.process.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    seen = await inside.python("import os; print(*[p for p in os.listdir('/proc') if p.isdigit()])")
    assert max(int(pid) for pid in seen.split()) < 200  # no process of the host
    assert processes.start_ticks(inside.process.pid) == inside.process.start_ticks


async def test_files_have_canonical_owners_on_disk(inside: Sandbox) -> None:
    await inside.ok("/bin/bash", "-c", "echo 1 >/made-by-root; echo 2 >>/etc/marker; mkdir -m 700 /d")
    await inside.ok("/bin/bash", "-c", "echo 3 >/home/user/made", uid=1000)
    await inside.ok(
        "/bin/bash", "-c", "mv /made-by-root /d/moved; chown 1000:5 /d; ln /etc/marker /hard; rm /etc/group"
    )
    names = {"d/moved": (0, 0), "etc/marker": (0, 0), "home/user/made": (1000, 1000), "home/user": (1000, 1000)}
    for name, owner in {**names, "d": (1000, 5), "hard": (0, 0)}.items():
        info = _on_disk(inside, name)
        assert (info.st_uid, info.st_gid) == owner, name
    assert read(f"{inside.order.layers[0]}/etc/marker") == "of the layer\n"


def read(path: str) -> str:
    return Path(path).read_text()


def _on_disk(sandbox: Sandbox, name: str) -> os.stat_result:
    """What the image says, by a second mount of it that maps no ids."""
    number = loops.find(sandbox.order.disk.path)
    assert number is not None
    raw = blanks.mount(number)
    try:
        return os.stat(f"upper/{name}", dir_fd=raw, follow_symlinks=False)
    finally:
        os.close(raw)


REFUSED = {
    "a mount": "l.mount(b'x', b'/home', b'tmpfs', 0, None)",
    "an unmount": "l.umount2(b'/proc', 2)",
    "a bind mount": "l.mount(b'/etc', b'/home', None, 4096, None)",
    "a new user namespace": "l.unshare(0x10000000)",
    "a new mount namespace": "l.unshare(0x20000)",
    "a host name": "l.sethostname(b'x', 1)",
    "the mount API": "l.syscall(430, b'tmpfs', 0)",
    "bpf": "l.syscall(321, 0, 0, 0)",
    "perf": "l.syscall(298, 0, 0, 0, 0, 0)",
    "userfaultfd": "l.syscall(323, 0)",
    "a module": "l.syscall(175, 0, 0, 0)",
    "a reboot": "l.reboot(0x1234567)",
    "tracing pid 1": "l.ptrace(16, 1, 0, 0)",
    "another namespace": "l.setns(os.open('/proc/self/ns/net', 0), 0)",
    "a node": "l.mknod(b'/tmp/n', 0o20666, 0x103)",
    "the clock": "l.clock_settime(0, bytes(16))",
    "the root's jail": "l.pivot_root(b'/', b'/')",
    "a handle to any file": "l.syscall(304, 3, b'0' * 32, 0)",
    "the kernel's log": "l.klogctl(3, b'0' * 64, 64)",
}


@pytest.mark.parametrize("what", REFUSED)
async def test_refused_to_root_inside(inside: Sandbox, what: str) -> None:
    program = f"import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nprint({REFUSED[what]}, ctypes.get_errno())"
    assert await inside.python(program) == "-1 1"


async def test_features_of_the_kernel_that_look_absent(inside: Sandbox) -> None:
    program = (
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
        "for n in (425, 426, 427, 435, 248, 249, 250, 1 | 0x40000000):\n"
        "    l.syscall(n, 0, 0, 0); print(ctypes.get_errno())\n"
        "for family in (38, 40): print(l.socket(family, 1, 0), ctypes.get_errno())"
    )
    assert await inside.python(program) == "\n".join(["38"] * 8 + ["-1 97"] * 2)


async def test_the_network_is_not_its_own_to_change(inside: Sandbox) -> None:
    status, output = await inside.run("/usr/bin/python3", "-c", "import socket; socket.socket(17, 3)")
    assert status != 0 and "Operation not permitted" in output
    assert "not permitted" in (await inside.run("/sbin/ip", "link", "set", "lo", "down"))[1]
    assert (await inside.run("/bin/sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"))[0] != 0


async def test_no_kernel_setting_can_be_written(inside: Sandbox) -> None:
    program = (
        "import os\nopened = []\n"
        "for top in ('/proc/sys', '/sys', '/proc/1', '/proc/irq', '/proc/fs'):\n"
        "  for where, _, names in os.walk(top):\n"
        "    for name in names:\n"
        "      path = os.path.join(where, name)\n"
        "      try: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)); opened.append(path)\n"
        "      except OSError: pass\n"
        "print(*opened)"
    )
    opened = {path for path in (await inside.python(program)).split() if not path.startswith("/proc/1/")}
    assert opened <= {"/proc/sys/kernel/ns_last_pid"}  # anybody may open it; writing asks for a capability
    assert (await inside.run("/bin/sh", "-c", "echo 9 >/proc/sys/kernel/ns_last_pid"))[0] != 0
    assert (await inside.run("/bin/sh", "-c", "echo 9 >/proc/sys/user/max_user_namespaces"))[0] != 0


async def test_nothing_of_the_host_is_in_sight(inside: Sandbox, lab: Lab) -> None:
    assert "root:*:1" in await inside.ok("/bin/cat", "/etc/shadow")
    told = await inside.ok("/bin/cat", "/proc/1/cmdline", "/proc/1/comm", "/proc/self/mountinfo", "/proc/1/cgroup")
    assert str(lab.folder) not in told and "penstock-guest" in told and "sb-inside" not in told
    assert (await inside.run("/bin/cat", "/proc/1/environ"))[0] != 0
    assert (await inside.run("/bin/ls", "/proc/1/fd/"))[0] != 0
    assert await inside.ok("/bin/sh", "-c", "cat /proc/partitions /proc/diskstats /proc/keys; ls /sys/firmware") == ""
    assert (await inside.run("/bin/sh", "-c", "cat /sys/block/loop*/loop/backing_file"))[0] != 0
    environment = read(f"/proc/{inside.process.pid}/environ")
    assert "do-not-tell" not in environment


async def test_pid_1_keeps_only_what_it_was_given(inside: Sandbox) -> None:
    links = {
        fd: os.readlink(f"/proc/{inside.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{inside.process.pid}/fd")
    }
    kinds = sorted(link.split(":")[0] for link in links.values())
    groups = [link for link in kinds if "tasks" in link or "cgroup" in link]
    logs = [link for link in kinds if link.endswith("guest.log")]
    rest = [link for link in kinds if link not in groups and link not in logs]
    assert rest == ["/", "/dev/null", "socket", "socket"]  # the first is the disk, which it can sync by it


async def test_sudo_gives_the_sandboxes_own_root(inside: Sandbox) -> None:
    assert await inside.ok("/usr/bin/sudo", "-n", "/usr/bin/id", "-u", uid=1000) == "0\n"
    assert (await inside.run("/usr/bin/sudo", "-n", "/bin/mount", "-t", "tmpfs", "x", "/home", uid=1000))[0] != 0


async def test_user_attributes_work_and_trusted_ones_do_not(inside: Sandbox) -> None:
    program = (
        "import os\nopen('/tmp/x', 'w').close()\nos.setxattr('/tmp/x', 'user.a', b'1')\n"
        "os.setxattr('/etc/passwd', 'user.a', b'2')\nprint(os.getxattr('/etc/passwd', 'user.a'))\n"
        "try: os.setxattr('/tmp/x', 'trusted.a', b'1')\nexcept PermissionError: print('refused')"
    )
    assert await inside.python(program) == "b'2'\nrefused"


async def test_devices_terminals_and_shared_memory_work(inside: Sandbox) -> None:
    program = (
        "import os, pty, stat\nm, s = pty.openpty(); print(os.ttyname(s), os.stat(os.ttyname(s)).st_uid)\n"
        "print(len(os.read(os.open('/dev/urandom', 0), 8)), os.read(os.open('/dev/zero', 0), 1))\n"
        "open('/dev/null', 'w').write('x'); open('/dev/shm/x', 'w').write('x')\n"
        "print(os.statvfs('/dev/shm').f_frsize * os.statvfs('/dev/shm').f_blocks >> 20)\n"
        "print(*sorted(os.listdir('/dev')))"
    )
    assert (await inside.python(program, uid=1000)).splitlines() == [
        "/dev/pts/0 1000",
        "8 b'\\x00'",
        "128",
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero",
    ]


async def test_names_are_its_own(inside: Sandbox) -> None:
    said = await inside.ok(
        "/bin/sh", "-c", "hostname; cat /etc/hostname; getent hosts host-inside; cat /etc/resolv.conf"
    )
    assert said.split()[:4] == ["host-inside", "host-inside", "127.0.1.1", "host-inside"]
    assert "nameserver 10.201.255.254" in said


async def test_every_sandbox_has_a_boot_id_of_its_own(inside: Sandbox, lab: Lab) -> None:
    path = "/proc/sys/kernel/random/boot_id"
    async with lab.sandbox("second") as second:
        ids = {await inside.ok("/bin/cat", path), await second.ok("/bin/cat", path), read(path)}
    assert len(ids) == 3 and all(len(each.strip()) == 36 for each in ids)
    assert (await inside.run("/bin/sh", "-c", f"echo x >{path}"))[0] != 0


async def test_a_crash_never_starts_the_hosts_core_program(inside: Sandbox) -> None:
    limits = read(f"/proc/{inside.process.pid}/limits")
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["1", "1"]]


async def test_root_inside_cannot_drain_what_all_sandboxes_share(inside: Sandbox, lab: Lab) -> None:
    hog = (
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nn = 0\n"
        "while l.inotify_init1(0) >= 0: n += 1\nprint(n, ctypes.get_errno())"
    )
    async with lab.sandbox("neighbour") as neighbour:
        assert await inside.python(hog) == "128 24"
        assert await neighbour.python(hog) == "128 24"


async def test_an_image_with_nothing_in_it_is_served_too(lab: Lab, tmp_path: Path) -> None:
    """No interpreter, no libc, no /etc: whatever the guest needs, it brought along."""
    (tmp_path / "empty").mkdir()
    async with lab.sandbox("bare", layers=[str(tmp_path / "empty")]) as sandbox:
        assert sandbox.get().startswith(b"HTTP/1.1 204")


async def test_an_image_cannot_redirect_the_mounts_of_its_birth(lab: Lab, tmp_path: Path) -> None:
    layer = tmp_path / "evil"
    layer.mkdir()
    for name in ("proc", "sys", "dev", "run", "etc"):
        os.symlink("/tmp" if name != "etc" else "/proc", layer / name)
    async with lab.sandbox("evil", layers=[str(layer), lab.layer]) as sandbox:
        assert " / overlay " in await sandbox.ok("/bin/cat", "/proc/mounts")
        assert "host-evil" in await sandbox.ok("/bin/cat", "/etc/hostname")


async def test_the_topmost_layer_wins(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "top/etc").mkdir(parents=True)
    (tmp_path / "top/etc/marker").write_text("on top\n")
    async with lab.sandbox("layers", layers=[str(tmp_path / "top"), lab.layer]) as sandbox:
        assert await sandbox.ok("/bin/cat", "/etc/marker", "/etc/passwd") != ""
        assert (await sandbox.ok("/bin/cat", "/etc/marker")) == "on top\n"


async def test_the_disk_is_as_large_as_its_limit(lab: Lab) -> None:
    async with lab.sandbox("full") as sandbox:
        program = (
            "import os\nn = 0\ntry:\n f = open('/tmp/big', 'wb', 0)\n while True: n += f.write(bytes(1 << 18))\n"
            "except OSError as e: print(n >> 20, e.errno)"
        )
        assert await sandbox.python(program) in ("63 28", "64 28")


async def test_a_path_of_any_length_will_do_for_the_data_folder(lab: Lab) -> None:
    order = await lab.order("longpath" + "x" * 60, hostname="h")
    assert len(order.run_dir) > 107
    process = await lab.launcher.launch(order, within_s=20)
    try:
        assert Sandbox(order, process).get().startswith(b"HTTP/1.1 204")
    finally:
        await lab.end(order, process)


async def test_fifty_at_once(lab: Lab) -> None:
    async def one(number: int) -> bytes:
        async with lab.sandbox(f"many{number}") as sandbox:
            return await asyncio.to_thread(sandbox.get)

    answers = [asyncio.ensure_future(one(number)) for number in range(50)]
    assert [(await each)[:12] for each in answers] == [b"HTTP/1.1 204"] * 50


async def test_after_the_end_nothing_is_left(lab: Lab, inside: Sandbox) -> None:
    assert await lab.client.answers(within_s=5)
    traces = lab.traces()
    assert traces == {
        "loops": [f"{lab.folder}/disks/inside.img"],
        "images": ["inside.img"],
        "processes": [str(inside.process.pid)],
        "cgroups": ["sb-inside"],
        "mounts": [],
        "run": ["inside"],
    }


async def test_a_dead_zygote_takes_nobody_along(lab: Lab) -> None:
    """Last in this file: it replaces the zygote."""
    order = await lab.order("survivor")
    process = await lab.launcher.launch(order, within_s=20)
    assert lab.zygote is not None
    assert str(process.pid) in children_of(lab.zygote.pid)
    lab.zygote.kill()
    lab.zygote.wait()
    assert Sandbox(order, process).get().startswith(b"HTTP/1.1 204")
    adopted = lab.launcher.adopt(process.pid, process.start_ticks)
    assert adopted is not None and adopted.alive()
    assert lab.launcher.adopt(process.pid, process.start_ticks + 1) is None
    await lab.open()  # a new zygote under the old name
    waiting = asyncio.ensure_future(adopted.wait())
    adopted.signal(15)
    assert await asyncio.wait_for(waiting, 10) in (0, None)
    adopted.close()
    await lab.end(order, process)
    async with lab.sandbox("afterwards") as sandbox:
        assert sandbox.get().startswith(b"HTTP/1.1 204")


async def test_the_socket_is_for_root_only(lab: Lab) -> None:
    assert stat.S_IMODE(os.stat(lab.folder / "run/zygote.sock").st_mode) == 0o700
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(str(lab.folder / "run/zygote.sock"))
        line.send(b"not json")
        assert b"error" in line.recv(4096)
