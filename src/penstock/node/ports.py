"""What the node asks of Linux, as Protocols of at most eight methods.

Each port has one real adapter (`node/linux/`) and one simulated (`sim/kernel.py`); both pass the same file in
`tests/contract/`. Promises every adapter keeps:

- names are given by the caller and carry the installation id; `list_*` returns only names of this installation;
- a release treats "absent" as success, and returns only when the absence was verified;
- nothing waits for ever: what may block takes `within_s` and raises `DeadlinePassed` naming the wait;
- a method that was cancelled has either done all of its work or none that a `list_*` would not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from penstock.model.sandbox import EgressRules, Limits


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A ready network namespace, user namespace and id range. Single-use: destroyed after its sandbox, never scrubbed.

    Descriptors are owned by the slot and closed by `Network.destroy_slot`; -1 in simulation.
    """

    number: int
    address: str  # outer IPv4 address, unique on the host
    netns_fd: int = -1
    userns_fd: int = -1
    uid_base: int = 0  # 65,536 ids from here; 0 inside maps to it


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The writable upper of one sandbox: an ext4 image of a fixed size, mounted but attached nowhere.

    Single-use, also after a failed launch: the kernel maps the ids of a mount once.
    """

    name: str
    path: str  # of the image file
    mount_fd: int = -1  # detached mount (fsmount), not yet idmapped; -1 in simulation


class CgroupUsage(msgspec.Struct, frozen=True, kw_only=True):
    cpu_s: float
    memory_bytes: int
    memory_cache_bytes: int
    memory_bytes_max: int
    pids: int
    oom_kills: int


class GuestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest is told at birth. `access_token` never appears in argv, the environment or a log."""

    sandbox_id: str
    template_id: str
    access_token: str | None
    env: dict[str, str]
    user: str
    workdir: str
    hostname: str
    cpu_count: int = 0  # what /metrics shows as the sandbox's own; 0: the machine's
    memory_bytes_total: int = 0


class LaunchOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a launcher needs to start one sandbox."""

    sandbox: str
    cgroup: str  # name given to Cgroups.create
    layers: Sequence[str]  # host directories, topmost first
    disk: Disk
    slot: Slot
    limits: Limits
    run_dir: str  # host directory of this sandbox: guest.sock, control.sock, guest.log
    guest: GuestConfig


class Process(Protocol):
    """pid 1 of a sandbox, held by a pidfd. Signals go through it only."""

    pid: int
    start_ticks: int

    @property
    def steps_ms(self) -> Mapping[str, float]:
        """Where its launch spent its time, in milliseconds; empty when adopted."""

    async def wait(self) -> int | None:
        """The wait status once it has died; None when the kernel no longer knows it. Cancellation-safe."""

    def signal(self, number: int) -> None:
        """Send a signal. A dead process is success."""

    def alive(self) -> bool: ...

    def close(self) -> None:
        """Give the descriptor back. The process is not touched."""


class Launcher(Protocol):
    """Starts sandboxes of one isolation tier."""

    async def launch(self, order: LaunchOrder, *, within_s: float) -> Process:
        """Return when the guest serves on `<run_dir>/guest.sock`.

        Raises LaunchFailed(step) with everything it made undone, or DeadlinePassed after killing what it made.
        """

    def adopt(self, pid: int, start_ticks: int) -> Process | None:
        """A handle on a living process, or None when (pid, start time) no longer names one."""

    async def close(self) -> None:
        """Let go of the launcher process. Sandboxes live on."""


class Cgroups(Protocol):
    async def create(self, name: str, limits: Limits) -> None:
        """Make `name` with limits in every hierarchy in use. Raises FileExistsError when it is there."""

    async def kill(self, name: str, *, within_s: float) -> None:
        """Thaw if needed, kill every process in it, and return when it is empty. Absent is success."""

    async def remove(self, name: str, *, within_s: float) -> None:
        """Remove it and its children, retrying EBUSY. Absent is success."""

    def list_names(self) -> set[str]: ...

    def pids(self, name: str) -> list[int]:
        """Of every process in it and below. Empty when it is absent."""

    def usage(self, name: str) -> CgroupUsage:
        """Raises FileNotFoundError when it is absent."""

    async def freeze(self, name: str, *, within_s: float) -> None:
        """Return when every process in it stands still. Raises FileNotFoundError when it is absent; so does `thaw`."""

    async def thaw(self, name: str, *, within_s: float) -> None: ...


class Network(Protocol):
    async def open(self) -> None:
        """Make or re-take the router namespace and its ruleset."""

    async def create_slot(self, number: int) -> Slot:
        """Raises FileExistsError when the kernel still shows the slot, whoever made it."""

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        """Withdraw its rules, flush its connections, close its descriptors, verify its link is gone."""

    async def apply(self, number: int, rules: EgressRules) -> None:
        """Replace the slot's egress rules, and cut live connections the new rules do not allow.

        Raises NotTheSlot or Invalid, and then nothing has changed.
        """

    def retake(self, number: int, pid: int) -> Slot:
        """The slot of a running sandbox after a restart of the daemon, from /proc/<pid>/ns.

        Raises NotTheSlot when the process lives in another one, OSError when it has died.
        """

    def list_slots(self) -> set[int]:
        """Numbers of every slot of this installation the kernel still shows (links, set elements)."""

    async def close(self, *, destroy: bool) -> None:
        """Let go of the router; with `destroy`, remove it and verify."""


class Disks(Protocol):
    """Disks of sandboxes, and images: what was kept of a disk. An image is immutable, and nobody's until it is named
    by a snapshot in the store."""

    async def create(self, name: str, limits: Limits, *, image: str | None = None) -> Disk:
        """Empty, or with the contents of `image`, which stays. Raises FileExistsError when the disk is there.

        Raises FileNotFoundError when the image is not.
        """

    async def remove(self, name: str, *, within_s: float) -> None:
        """Unlink the image and verify that no loop device holds it. Absent is success.

        Raises DeadlinePassed while a living process uses it: the image stays listed.
        """

    def list_names(self) -> set[str]: ...

    def used_bytes(self, name: str) -> int:
        """What it takes on the host's disk. Raises FileNotFoundError when it is absent."""

    async def keep(self, name: str, image: str, *, within_s: float) -> int:
        """Keep a disk that no process uses any more as `image`, verified and on the host's disk: the bytes it takes.

        The disk is left for `remove`. Idempotent: an image that is there is kept as it is. Raises FileNotFoundError
        when there is neither, DeadlinePassed while a process uses the disk, OSError with no image left.
        """

    async def copy(self, name: str, image: str, *, within_s: float) -> int:
        """Keep a copy of a disk in use, as it is at one moment in the call. Whoever writes to it waits meanwhile.

        Raises FileExistsError, FileNotFoundError, DeadlinePassed or OSError, with no image left.
        """

    def list_images(self) -> set[str]: ...

    def remove_image(self, image: str) -> None:
        """Absent is success."""


class Files(Protocol):
    """The node's own folder: records and run directories. Writes survive kill -9 of the daemon, not power loss."""

    def make_run_dir(self, sandbox: str) -> str:
        """Its path. One that is there already is kept."""

    def remove_run_dir(self, sandbox: str) -> None:
        """With all that is in it. Absent is success."""

    def list_run_dirs(self) -> set[str]: ...

    def append_record(self, sandbox: str, line: bytes) -> None:
        """Append one line to the sandbox's record, creating it. On disk (page cache) when it returns.

        A torn last line, which nobody was told of, gives way to it. Raises OSError with the record as it was.
        """

    def read_record(self, sandbox: str) -> list[bytes]:
        """Its whole lines, oldest first. Empty when it is absent."""

    def remove_record(self, sandbox: str) -> None:
        """Absent is success."""

    def list_records(self) -> set[str]: ...


class Stray(msgspec.Struct, frozen=True):
    """A process that keeps an object of this installation alive without being in one of its cgroups."""

    pid: int
    why: str  # what it pins, e.g. "netns of slot 7"


class Strays(Protocol):
    def list_strays(self) -> list[Stray]:
        """Every such process the kernel shows, by walking /proc; slow (milliseconds per thousand processes)."""


class Remnant(msgspec.Struct, frozen=True):
    """An object of this installation beside those that the other ports list."""

    kind: str  # loop, mount, namespace, element, socket, ids
    name: str
    owner: str  # the record that would account for it; "" when none can
    why: str


class Remnants(Protocol):
    def list_remnants(self) -> list[Remnant]:
        """Every one the kernel shows, owned or not; milliseconds."""

    async def remove(self, remnant: Remnant, *, within_s: float) -> None:
        """Remove what nobody uses. Absent is success; raises OSError or DeadlinePassed while somebody does."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox is told of a drain. Times are wall seconds; None: open.

    A guest ignores an epoch older than the newest it heard of, and what it was told before.
    """

    epoch: int
    reason: str = ""
    soft_by: float | None = None  # when it will be asked to end, or parked
    hard_by: float | None = None  # when it will be killed
    withdrawn: bool = False  # the drain was undone: nothing is asked of it any more


class Guests(Protocol):
    """The guests of running sandboxes, each spoken to by its run directory.

    One that has ended raises Unavailable, one that does not answer DeadlinePassed; both name the sandbox.
    """

    async def notify(self, run_dir: str, notice: Notice, *, within_s: float) -> None:
        """Return when the sandbox's programs can read it. Unavailable also when the guest could not write it down."""

    async def quiesce(self, run_dir: str, *, within_s: float) -> float:
        """Wall seconds: what the sandbox wrote before then is in its disk's image. The image itself is not synced.

        If cancelled, or past its deadline, the guest goes on with it.
        """

    async def health(self, run_dir: str, *, within_s: float) -> bool:
        """Whether the guest answers. Never raises for one that does not."""


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """The edges of one node, as `run` or `sim` chose them."""

    launcher: Launcher
    cgroups: Cgroups
    network: Network
    disks: Disks
    files: Files
    guests: Guests
    strays: Strays | None = None
    remnants: Remnants | None = None
