"""A place to launch real sandboxes in: a zygote, cgroups, slots without a router, disks, a small layer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.model.sandbox import Limits
from penstock.node.linux import loops, netns
from penstock.node.linux.cgroups import LinuxCgroups
from penstock.node.linux.disks import LinuxDisks
from penstock.node.linux.launcher import ZygoteLauncher
from penstock.node.linux.processes import PidfdProcess
from penstock.node.linux.zygote_client import ZygoteClient
from penstock.node.ports import GuestConfig, LaunchOrder, Slot

HERE = Path(__file__).parent
MIB = 1 << 20
IDS_FROM = 700 << 16  # id ranges of the tests, far from anybody's
LIMITS = Limits(memory_bytes_max=256 * MIB, pids_max=256, disk_bytes_max=64 * MIB, disk_inodes_max=2_048)
_MERGED = ("bin", "sbin", "lib", "lib64")


def make_layer(path: Path) -> str:
    """A lower directory with the host's /usr hard-linked in and an /etc of its own: enough to run programs."""
    path.mkdir(parents=True)
    os.chmod(path, 0o755)
    (path / "usr").mkdir()
    for part in ("bin", "sbin", "lib64"):
        subprocess.run(["cp", "-al", f"/usr/{part}", str(path / "usr" / part)], check=True)
    for part in ("x86_64-linux-gnu", "python3.11", "sudo", "os-release"):
        if os.path.lexists(f"/usr/lib/{part}"):
            (path / "usr/lib").mkdir(exist_ok=True)
            subprocess.run(["cp", "-al", f"/usr/lib/{part}", str(path / "usr/lib" / part)], check=True)
    subprocess.run(["cp", "-al", "/usr/libexec", str(path / "usr/libexec")], check=True)
    for name in _MERGED:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), path / name)
    for name in ("etc", "root", "home/user", "var/lib", "var/tmp", "tmp"):
        (path / name).mkdir(parents=True, exist_ok=True)
    os.chmod(path / "tmp", 0o1777)
    os.chown(path / "home/user", 1000, 1000)
    for folder in ("pam.d", "security"):
        shutil.copytree(f"/etc/{folder}", path / "etc" / folder)
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n")
    (path / "etc/group").write_text("root:x:0:\ntty:x:5:\nuser:x:1000:\n")
    (path / "etc/shadow").write_text("root:*:1::::::\nuser:*:1::::::\n")
    (path / "etc/sudoers").write_text("root ALL=(ALL) ALL\nuser ALL=(ALL) NOPASSWD: ALL\n")
    os.chmod(path / "etc/sudoers", 0o440)
    (path / "etc/marker").write_text("of the layer\n")
    return str(path)


class Lab:
    """One installation of the tests. `guest` is the module whose `serve` the zygote runs."""

    def __init__(self, folder: Path, name: str, *, guest: str = "standin") -> None:
        self.folder, self.name, self._guest = folder, name, guest
        self.layer = ""
        self.cgroups = LinuxCgroups(name)
        self.threads = ThreadPoolExecutor(4)
        for part in ("run", "run/sb", "disks"):
            (folder / part).mkdir(parents=True, mode=0o700)
        self.disks = LinuxDisks(folder=str(folder / "disks"), threads=self.threads)
        self.client = ZygoteClient(str(folder / "run/zygote.sock"))
        self.launcher = ZygoteLauncher(
            client=self.client,
            open_cgroups=self.cgroups.doors,
            threads=self.threads,
            nameserver="10.201.255.254",
            rng=random.Random(7),
        )
        self.zygote: subprocess.Popen[bytes] | None = None
        self._slots = 0

    async def open(self) -> None:
        await self.cgroups.open()
        self.start_zygote()
        for _ in range(500):
            if await self.client.answers(within_s=1):
                return
            await asyncio.sleep(0.02)
        raise AssertionError((self.folder / "zygote.log").read_text())

    def start_zygote(self) -> None:
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]);"
            f"from {self._guest} import serve;"
            "from penstock.node.linux import zygote;"
            "zygote.run(zygote.listen(sys.argv[2] + '/run/zygote.sock'), serve, stepping_stone=sys.argv[2] + '/run')"
        )
        log = os.open(self.folder / "zygote.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.zygote = subprocess.Popen(
            [sys.executable, "-c", program, str(HERE), str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={"SECRET_OF_THE_HOST": "do-not-tell", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        os.close(log)

    async def close(self) -> None:
        for name in self.cgroups.list_names():
            await self.cgroups.kill(name, within_s=10)
            await self.cgroups.remove(name, within_s=10)
        await self.cgroups.close(destroy=True)
        for name in self.disks.list_names():
            await self.disks.remove(name, within_s=10)
        if self.zygote is not None:
            self.zygote.kill()
            self.zygote.wait()
        await self.disks.close()
        self.threads.shutdown()

    async def slot(self) -> Slot:
        """A namespace of its own with loopback up; no way out of it."""
        self._slots += 1
        uid_base = IDS_FROM + (self._slots << 16)
        return Slot(
            number=self._slots,
            address="192.0.2.1",
            netns_fd=new_netns(),
            userns_fd=await self.client.create_userns(uid_base),
            uid_base=uid_base,
        )

    async def order(
        self, sandbox: str, *, layers: Sequence[str] = (), limits: Limits = LIMITS, **guest: Any
    ) -> LaunchOrder:
        """All a launch needs, made. `end` undoes it."""
        cgroup = f"sb-{sandbox}"
        await self.cgroups.create(cgroup, limits)
        run_dir = self.folder / "run/sb" / sandbox
        run_dir.mkdir(mode=0o700)
        facts = {"template_id": "t", "access_token": None, "env": {}, "user": "user", "workdir": "/home/user"}
        return LaunchOrder(
            sandbox=sandbox,
            cgroup=cgroup,
            layers=list(layers) or [self.layer],
            disk=await self.disks.create(sandbox, limits),
            slot=await self.slot(),
            limits=limits,
            run_dir=str(run_dir),
            guest=GuestConfig(**{"sandbox_id": sandbox, "hostname": f"host-{sandbox}", **facts, **guest}),
        )

    async def end(self, order: LaunchOrder, process: PidfdProcess | None = None) -> None:
        await self.cgroups.kill(order.cgroup, within_s=10)
        if process is not None:
            await process.wait()
            process.close()
        await self.cgroups.remove(order.cgroup, within_s=10)
        for fd in (order.slot.netns_fd, order.slot.userns_fd):
            os.close(fd)
        await self.disks.remove(order.disk.name, within_s=10)
        shutil.rmtree(order.run_dir)

    @contextlib.asynccontextmanager
    async def sandbox(self, name: str, **wishes: Any) -> AsyncIterator[Sandbox]:
        order = await self.order(name, **wishes)
        process = None
        try:
            process = await self.launcher.launch(order, within_s=20)
            yield Sandbox(order, process)
        finally:
            await self.end(order, process)

    def traces(self) -> dict[str, list[str]]:
        """What of this installation the host still shows. Read from the kernel, not from our objects."""
        images = str(self.folder / "disks")
        zygote = self.zygote.pid if self.zygote else 0
        return {
            "loops": [path for n in loops.numbers() if (path := loops.backing(n)) and path.startswith(images)],
            "images": [entry for entry in os.listdir(images) if entry.endswith(".img")],
            "processes": [pid for pid in children_of(zygote) if zygote],
            "cgroups": sorted(self.cgroups.list_names()),
            "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if images in line],
            "run": os.listdir(self.folder / "run/sb"),
        }


class Sandbox:
    def __init__(self, order: LaunchOrder, process: PidfdProcess) -> None:
        self.order, self.process = order, process

    async def run(self, *argv: str, uid: int = 0, within_s: float = 20) -> tuple[int, str]:
        """Run a program inside, as a child of the stand-in guest: (exit status, output)."""
        return await asyncio.wait_for(asyncio.to_thread(self._ask, {"argv": argv, "uid": uid}), within_s)

    async def ok(self, *argv: str, uid: int = 0) -> str:
        status, output = await self.run(*argv, uid=uid)
        assert status == 0, output
        return output

    async def python(self, text: str, uid: int = 0) -> str:
        return (await self.ok("/usr/bin/python3", "-I", "-S", "-c", text, uid=uid)).strip()

    def get(self) -> bytes:
        return self._exchange(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")

    def _ask(self, request: dict[str, Any]) -> tuple[int, str]:
        answer = json.loads(self._exchange(b"RUN " + json.dumps(request).encode() + b"\n"))
        return answer["status"], answer["output"]

    def _exchange(self, request: bytes) -> bytes:
        folder = os.open(self.order.run_dir, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(20)
                line.connect(f"/proc/self/fd/{folder}/guest.sock")
                line.sendall(request)
                line.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: line.recv(65_536), b""))
        finally:
            os.close(folder)


def new_netns() -> int:
    made: list[int] = []

    def work() -> None:
        made.append(netns.leave_for_new())
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def children_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return []
