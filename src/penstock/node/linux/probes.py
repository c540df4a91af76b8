"""What this machine can do, found out by doing it. Each probe names the cause and the way out of a gap.

Probes make what they need under a throwaway name and take it away again; a probe that raises is itself a finding. They
block, for milliseconds each, and need root but for the first.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from penstock.model.sandbox import Limits
from penstock.node.linux import userns
from penstock.node.linux.base import missing_packages
from penstock.node.linux.cgroups import LinuxCgroups
from penstock.node.linux.claims import UID_END, UID_FIRST
from penstock.node.linux.disks import LinuxDisks

T = TypeVar("T")

KERNEL_LEAST: Final = (5, 19)  # overlayfs over idmapped layers
NOFILE_LEAST: Final = 8_192
DISK_LEAST: Final = 2 * 1024**3
_CAPABILITIES: Final = {1: "DAC_OVERRIDE", 7: "SETUID", 12: "NET_ADMIN", 18: "SYS_CHROOT", 21: "SYS_ADMIN", 27: "MKNOD"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`ok` None: works, with something to know."""

    probe: str
    ok: bool | None
    found: str
    fix: str = ""


Probe = Callable[[Path], Finding]


def run_all(data: Path) -> list[Finding]:
    """Every probe, in an order in which a cause comes before its consequences."""
    return [_guarded(name, probe, data) for name, probe in PROBES.items()]


def _guarded(name: str, probe: Callable[[Path], Finding], data: Path) -> Finding:
    try:
        return probe(data)
    except Exception as error:
        return Finding(probe=name, ok=False, found=f"{type(error).__name__}: {error}", fix="see the message")


def _root(_: Path) -> Finding:
    mask = int(re.findall(r"CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text())[0], 16)
    lacking = [name for bit, name in _CAPABILITIES.items() if not mask >> bit & 1]
    if os.geteuid() != 0 or lacking:
        found = f"uid {os.geteuid()}" + (f", without CAP_{', CAP_'.join(lacking)}" if lacking else "")
        return Finding(probe="root", ok=False, found=found, fix="run as root, outside of an unprivileged container")
    return Finding(probe="root", ok=True, found="all capabilities that launching needs")


def _kernel(_: Path) -> Finding:
    release = platform.release()
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    least = ".".join(str(part) for part in KERNEL_LEAST)
    if version < KERNEL_LEAST:
        why = "overlayfs over idmapped layers came later"
        fix = f"install a kernel of {least} or newer (Debian 12, Ubuntu 24.04)"
        return Finding(probe="kernel", ok=False, found=f"{release}: {why}", fix=fix)
    return Finding(probe="kernel", ok=True, found=f"{release}, {platform.machine()}")


def _tools(_: Path) -> Finding:
    packages = {"nft": "nftables", "mkfs.ext4": "e2fsprogs", "mount": "mount"}
    absent = sorted({package for tool, package in packages.items() if shutil.which(tool) is None})
    if absent:
        fix = f"apt-get install {' '.join(absent)}"
        return Finding(probe="tools", ok=False, found=f"not installed: {', '.join(absent)}", fix=fix)
    return Finding(probe="tools", ok=True, found=", ".join(packages))


def _base(_: Path) -> Finding:
    absent = missing_packages()
    if absent:
        fix = f"apt-get install {' '.join(absent)}"
        return Finding(probe="template base", ok=False, found=f"packages missing: {', '.join(absent)}", fix=fix)
    return Finding(probe="template base", ok=True, found="every package it is made from is installed")


def _users(_: Path) -> Finding:
    """One user namespace with the first range of ours; its creation is what a sandbox needs."""
    most = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    if most < 1024:
        fix = "sysctl -w user.max_user_namespaces=65536 (and in /etc/sysctl.d)"
        return Finding(probe="user namespaces", ok=False, found=f"user.max_user_namespaces = {most}", fix=fix)
    os.close(userns.create(UID_END - 65_536))
    return Finding(probe="user namespaces", ok=True, found="created, 65,536 ids mapped")


def _ranges(_data: Path) -> Finding:
    """Ranges of /etc/subuid that overlap ours would let a user of the host own a sandbox's files."""
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            owner, _, rest = line.partition(":")
            first, _, count = rest.partition(":")
            if first.isdigit() and count.isdigit() and int(first) < UID_END and int(first) + int(count) > UID_FIRST:
                found = f"{file} gives {owner} ids {first}+{count}, inside ours ({UID_FIRST} to {UID_END - 1})"
                return Finding(probe="id ranges", ok=False, found=found, fix=f"move {owner}'s range below {UID_FIRST}")
    return Finding(probe="id ranges", ok=True, found=f"{UID_FIRST} to {UID_END - 1} are free")


def _cgroups(_: Path) -> Finding:
    async def work() -> str:
        name = f"doctor{os.getpid()}"
        cgroups = LinuxCgroups(name)
        await cgroups.open()
        try:
            await cgroups.create("sb-probe", Limits())
            try:
                cgroups.usage("sb-probe")
            finally:
                await cgroups.remove("sb-probe", within_s=5)
        finally:
            await cgroups.close(destroy=True)
        return cgroups.layout

    layout = _run(work)
    return Finding(probe="cgroups", ok=True, found=f"{layout}: memory, CPU and pids limits set, read and removed")


def _disks(data: Path) -> Finding:
    """A loop device, an ext4 file system, a mount that is attached nowhere."""
    where = data if data.is_dir() else Path(tempfile.gettempdir())

    async def work() -> None:
        with (
            tempfile.TemporaryDirectory(prefix="doctor-", dir=where) as folder,
            ThreadPoolExecutor(1) as threads,
        ):
            disks = LinuxDisks(folder=folder, threads=threads)
            try:
                await disks.create("probe", Limits(disk_bytes_max=64 * 1024**2, disk_inodes_max=1024))
                await disks.remove("probe", within_s=5)
            finally:
                await disks.close()

    _run(work)
    free = shutil.disk_usage(where).free
    if free < DISK_LEAST:
        fix = "free some space, or name another folder with --data"
        return Finding(probe="disks", ok=None, found=f"works, but only {free >> 20} MiB are free in {where}", fix=fix)
    return Finding(probe="disks", ok=True, found=f"loop device, ext4 and a detached mount; {free >> 30} GiB free")


def _descriptors(_data: Path) -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < NOFILE_LEAST:
        fix = "raise it: LimitNOFILE= in the unit, or ulimit -Hn before the start"
        return Finding(probe="descriptors", ok=None, found=f"hard limit {hard}: few connections at once", fix=fix)
    return Finding(probe="descriptors", ok=True, found=f"hard limit {hard}")


def _uplink(_: Path) -> Finding:
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    for route in routes:
        fields = route.split()
        if fields[1] == "00000000" and int(fields[3], 16) & 1:
            return Finding(probe="uplink", ok=True, found=f"default route over {fields[0]}")
    fix = "give the host a default route; nothing else depends on it"
    return Finding(probe="uplink", ok=None, found="no default route: sandboxes cannot leave this machine", fix=fix)


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(work())


PROBES: Final[dict[str, Probe]] = {
    "root": _root,
    "kernel": _kernel,
    "tools": _tools,
    "template base": _base,
    "user namespaces": _users,
    "id ranges": _ranges,
    "cgroups": _cgroups,
    "disks": _disks,
    "descriptors": _descriptors,
    "uplink": _uplink,
}
