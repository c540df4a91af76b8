"""From a fresh clone of the zygote to pid 1 of a sandbox, step by step.

The order is forced: what needs the host's root comes before the user namespace is entered, which comes last. Then
root inside owns none of the other namespaces, so it cannot mount, write /proc/sys or set up the network, while setuid
programs work. Every step has a name; when one fails, the launcher is told its name and the kernel's answer.

    parcel → dev → cgroups → disk → etc → layers → overlay → proc → network → sys → attach dev, run → masks → boot id
    → names → pivot → session → user namespace → ids → seccomp → capabilities → rlimits → tidy → guest
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn, Protocol

import msgspec

from penstock.node.linux import capabilities, devices, mounts, rootfs, syscalls, titles

FAILED_STATUS: Final = 70
_PARCEL_BYTES_MAX: Final = 8 << 20
_NOFILE_SOFT: Final = 65_536  # beyond 1,024 some old programs misbehave with select; servers need it more
_HIGHEST_FD: Final = 1 << 20
_MIB: Final = 1 << 20
_RUN_BYTES_MAX: Final = 64 * _MIB


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """What one child is told, in a memory file only it reads: the zygote itself never holds a sandbox's secrets."""

    sandbox: str
    uid_base: int
    hostname: str
    boot_id: str
    mark: str  # source of the root mount: whoever holds the mount namespace can be told whose it was
    memory_bytes_max: int
    etc: dict[str, str]  # name → content of files in /etc
    guest: dict[str, Any]  # the fields of GuestConfig


_PARCELS: Final = msgspec.json.Decoder(Parcel)  # built once, in the zygote


class Luggage(msgspec.Struct, frozen=True, kw_only=True):
    """The descriptors of one launch. In a request the numbers are positions among the passed descriptors."""

    parcel: int
    disk: int
    netns: int
    userns: int
    public: int  # listening sockets
    control: int
    log: int
    layers: list[int]  # detached, topmost first
    unified: int | None = None  # cgroup v2 directory to be born in
    tasks: list[int] = []  # cgroup v1 `tasks` files to join
    user: list[int] = []  # cgroup files the guest puts its children into
    guest: list[int] = []  # its own in the same hierarchies


class Serve(Protocol):
    """`penstock.guest.main.serve`, given by `run`: rooms do not import each other."""

    def __call__(
        self,
        config: dict[str, Any],
        *,
        listen_fds: dict[str, int],
        log_fd: int,
        cgroup_fds: dict[str, list[int]],
        disk_fd: int,
        ready: Callable[[], None],
    ) -> NoReturn: ...


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """What the zygote found out once, before it left the host's root."""

    filter: bytes
    masks: tuple[tuple[str, str], ...]
    last_capability: int


class Steps:
    """The name of the step that runs, and how long those before took, in milliseconds."""

    def __init__(self) -> None:
        self.current = "start"
        self.took_ms: dict[str, float] = {}
        self._since = time.monotonic()

    def begin(self, name: str) -> None:
        now = time.monotonic()
        self.took_ms[self.current] = round((now - self._since) * 1000, 3)
        self.current, self._since = name, now


def be_born(luggage: Luggage, line: socket.socket, kernel: Kernel, serve: Serve) -> NoReturn:
    """Become pid 1 of a sandbox. Tells `line` either {"ready"} or {"error"}; never returns.

    A reader that has gone (the launcher died or gave up) ends the sandbox before it began.
    """
    steps = Steps()
    try:
        steps.begin("parcel")
        size = os.fstat(luggage.parcel).st_size
        assert size <= _PARCEL_BYTES_MAX
        parcel = _PARCELS.decode(os.pread(luggage.parcel, size, 0))
        disk_fd = _assemble(parcel, luggage, kernel, steps)
        _confine(parcel, luggage, kernel, steps)
        steps.begin("tidy")
        _tidy(luggage, line, disk_fd)
        steps.begin("guest")
        serve(
            parcel.guest,
            listen_fds={"public": luggage.public, "control": luggage.control},
            log_fd=luggage.log,
            cgroup_fds={"user": luggage.user, "guest": luggage.guest},
            disk_fd=disk_fd,
            ready=lambda: _tell_ready(line, steps),
        )
    except BaseException as error:
        _tell_error(line, steps.current, error)
    finally:
        os._exit(FAILED_STATUS)


def _assemble(parcel: Parcel, luggage: Luggage, kernel: Kernel, steps: Steps) -> int:
    """Everything that needs the host's root: cgroups and the tree at NEW_ROOT. Returns `rootfs.open_disk()`."""
    owner = parcel.uid_base
    steps.begin("dev")
    rootfs.act_as_owner(owner)
    dev = devices.make(owner)
    steps.begin("cgroups")
    # `tasks`, not `cgroup.procs`: moving oneself alone skips the kernel's global thread-group lock (0.1 against 10 ms).
    for fd in luggage.tasks:
        os.write(fd, b"0")
    syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    steps.begin("disk")
    rootfs.attach_disk(luggage.disk, luggage.userns)
    steps.begin("etc")
    rootfs.write_etc(parcel.etc)
    disk_fd = rootfs.open_disk()
    steps.begin("layers")
    rootfs.attach_layers(luggage.layers, luggage.userns)
    steps.begin("overlay")
    mounts.overlay(len(luggage.layers), parcel.mark)
    root = rootfs.open_root()
    steps.begin("proc")
    mounts.attach(mounts.proc(), root, "proc")
    steps.begin("network")
    syscalls.setns(luggage.netns, syscalls.CLONE_NEWNET)
    steps.begin("sys")
    mounts.attach(mounts.sysfs(), root, "sys")
    steps.begin("attach")
    rootfs.attach_devices(dev, root, owner=owner, memory_bytes=parcel.memory_bytes_max)
    rootfs.attach_run(root, owner=owner, size_bytes=min(parcel.memory_bytes_max // 4, _RUN_BYTES_MAX))
    steps.begin("masks")
    rootfs.mask(kernel.masks)
    steps.begin("boot_id")
    rootfs.give_boot_id(parcel.boot_id)
    os.close(root)
    return disk_fd


def _confine(parcel: Parcel, luggage: Luggage, kernel: Kernel, steps: Steps) -> None:
    """Leave the host: root directory, user namespace, capabilities. There is no way back after any of these."""
    steps.begin("names")
    syscalls.sethostname(parcel.hostname)
    titles.set_title("penstock-guest")
    steps.begin("pivot")
    mounts.leave_old_root(mounts.NEW_ROOT)
    steps.begin("session")
    os.setsid()
    steps.begin("userns")
    syscalls.setns(luggage.userns, syscalls.CLONE_NEWUSER)
    steps.begin("ids")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.set_fs_ids(0, 0)
    steps.begin("seccomp")
    syscalls.install_seccomp(kernel.filter)
    steps.begin("capabilities")
    capabilities.drop_all_but_kept(kernel.last_capability)
    steps.begin("rlimits")
    _set_rlimits()


def _set_rlimits() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _NOFILE_SOFT if hard == resource.RLIM_INFINITY else min(hard, _NOFILE_SOFT)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # 1 byte, not 0: with 0 the kernel would still start the host's core_pattern program, as the host's root.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def _tidy(luggage: Luggage, line: socket.socket, disk_fd: int) -> None:
    """Close every descriptor that the guest was not given; stdin is /dev/null, what it prints goes to its log."""
    os.umask(0o022)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    os.dup2(luggage.log, 1)
    os.dup2(luggage.log, 2)
    cgroups = (*luggage.user, *luggage.guest)
    kept = sorted({0, 1, 2, line.fileno(), luggage.public, luggage.control, luggage.log, disk_fd, *cgroups})
    for low, high in zip(kept, [*kept[1:], _HIGHEST_FD], strict=True):
        os.closerange(low + 1, high)


def _tell_ready(line: socket.socket, steps: Steps) -> None:
    """Raises BrokenPipeError when nobody waits for this sandbox any more: then it must not begin."""
    steps.begin("ready")
    line.setblocking(True)
    line.send(json.dumps({"ready": True, "steps_ms": steps.took_ms}).encode())
    line.close()


def _tell_error(line: socket.socket, step: str, error: BaseException) -> None:
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    try:
        line.setblocking(True)
        line.send(
            json.dumps({"error": {"step": step, "errno": number, "why": f"{type(error).__name__}: {error}"}}).encode()
        )
    except OSError:
        pass  # nobody listens: the exit is the message
