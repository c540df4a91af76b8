"""Adapter of the port `Launcher`: namespaces, by a zygote.

The daemon opens what a sandbox needs (sockets, layers, cgroup files, a memory file with its orders), sends the
descriptors to the zygote, and gets a pidfd back at once and a word from the child when its guest serves. Whatever
fails or is cancelled meanwhile, the child is killed through its pidfd and its end awaited.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, TypeVar

import msgspec

from penstock.core.deadlines import within
from penstock.core.settle import settle, settled
from penstock.model.errors import LaunchFailed, LaunchInterrupted, Unavailable
from penstock.node.linux import mounts, processes
from penstock.node.linux.birth import Parcel
from penstock.node.linux.processes import PidfdProcess
from penstock.node.linux.zygote_client import Line, ZygoteClient, close_all
from penstock.node.ports import LaunchOrder

GUEST_SOCKET: Final = "guest.sock"
CONTROL_SOCKET: Final = "control.sock"
GUEST_LOG: Final = "guest.log"
_BACKLOG: Final = 512  # connections a busy guest has not accepted yet
_PACK_S: Final = 10.0  # opening local files: milliseconds, unless the disk is stuck
_HELLO_S: Final = 10.0  # a clone: 1 ms, unless hundreds are before us
_ZYGOTE_STEPS: Final = ("zygote", "clone")  # errors of the zygote itself, not of a child
_END_S: Final = 10.0  # from SIGKILL to gone

JsonObject = dict[str, Any]
T = TypeVar("T")


class CgroupDoors(msgspec.Struct, frozen=True, kw_only=True):
    """Open descriptors of one sandbox's cgroups. Whoever asked for them closes them."""

    unified: int | None = None  # the v2 directory pid 1 is born in
    tasks: list[int] = []  # v1 `tasks` files pid 1 writes itself into
    user: list[int] = []  # files the guest writes its children into: v1 `tasks`, v2 `cgroup.procs`
    guest: list[int] = []  # v1: its own `tasks` in the hierarchies of `user`, by which it comes back from a visit


class _Baggage:
    """Descriptors on their way to the zygote. Closed once sent; closing twice is fine."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.luggage: dict[str, int | list[int]] = {}

    def add(self, name: str, fd: int) -> None:
        self.luggage[name] = self._position(fd)

    def append(self, name: str, fd: int) -> None:
        positions = self.luggage.setdefault(name, [])
        assert isinstance(positions, list)
        positions.append(self._position(fd))

    def close(self) -> None:
        close_all(self.fds)
        self.fds = []

    def _position(self, fd: int) -> int:
        self.fds.append(fd)
        return len(self.fds) - 1


class ZygoteLauncher:
    """Launches through the zygote that `client` reaches.

    `open_cgroups(name)` opens the doors of cgroup `name`; it and all other blocking calls run on `threads`.
    `nameserver` goes into the sandbox's resolv.conf. `rng` makes boot ids.
    """

    def __init__(
        self,
        *,
        client: ZygoteClient,
        open_cgroups: Callable[[str], CgroupDoors],
        threads: Executor,
        nameserver: str,
        rng: random.Random,
        installation: str = "",
    ) -> None:
        self._client, self._open_cgroups, self._threads = client, open_cgroups, threads
        self._installation = installation
        self._nameserver, self._rng = nameserver, rng

    async def launch(self, order: LaunchOrder, *, within_s: float) -> PidfdProcess:
        """Return when the guest serves on `<run_dir>/guest.sock`; `steps_ms` of the process says where time went.

        Raises LaunchFailed(step) with everything it made undone, or DeadlinePassed after killing what it made. If
        cancelled, the child is killed and gone before the cancellation goes on.
        """
        try:
            async with within(within_s, f"launch of {order.sandbox}"):
                return await self._launch(order)
        except BaseException:
            clearing = self._in_thread(lambda: _clear_run_dir(order.run_dir))
            await settle(clearing, within_s=_PACK_S, what=f"clearing the run directory of {order.sandbox}")
            raise

    def adopt(self, pid: int, start_ticks: int) -> PidfdProcess | None:
        """A handle on a living process, or None when (pid, start time) no longer names one."""
        return processes.adopt(pid, start_ticks)

    async def close(self) -> None:
        """Nothing to let go of: connections last one launch. The zygote and the sandboxes live on."""

    async def _launch(self, order: LaunchOrder) -> PidfdProcess:
        boot_id = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        baggage = await self._packed(order, boot_id)
        try:
            try:
                line = await self._client.connect()
            except (Unavailable, OSError) as error:
                raise LaunchInterrupted(order.sandbox, "zygote", str(error)) from error
            with line:
                try:
                    line.send({"op": "launch", "luggage": baggage.luggage}, baggage.fds)
                except (BrokenPipeError, ConnectionResetError) as error:
                    raise LaunchInterrupted(order.sandbox, "zygote", str(error)) from error
                baggage.close()  # before the child runs long: our copies would keep a dead sandbox's mounts alive
                return await self._born(order, line)
        finally:
            baggage.close()

    async def _born(self, order: LaunchOrder, line: Line) -> PidfdProcess:
        """Wait for pid 1 and for the word of its guest. Either may come first: the child can outrun its parent."""
        process, word, cancelled = await self._hello(order, line)
        try:
            if cancelled is not None:
                raise cancelled
            if word is None:
                word, fds = await line.receive()
                close_all(fds)
            if word is None or "ready" not in word:
                raise _failure(order, word, "guest", "pid 1 ended without a word")
            process.steps_ms = {str(name): float(took) for name, took in word["steps_ms"].items()}
            return process
        except BaseException:
            await settle(_end(process), within_s=_END_S, what=f"end of the half-made {order.sandbox}")
            raise

    async def _hello(
        self, order: LaunchOrder, line: Line
    ) -> tuple[PidfdProcess, JsonObject | None, asyncio.CancelledError | None]:
        """Pid 1, the child's word if that came before, and a cancellation that came meanwhile.

        Settled: a clone must not go unnoticed. If the zygote says nothing in time, closing the line makes it kill the
        child whose pid it cannot deliver.
        """
        outcome = await settled(_receive_both(line), within_s=_HELLO_S, what=f"pid 1 of {order.sandbox}")
        if outcome.error is not None:
            outcome.hand_back()
        message, fds, word = outcome.value
        if message is None or len(fds) != 1:
            close_all(fds)
            if message is None and word is None:
                raise LaunchInterrupted(order.sandbox, "zygote", "it closed the connection")
            raise _failure(order, message or word, "zygote", "it closed the connection")
        return PidfdProcess(int(message["pid"]), int(message["start_ticks"]), fds[0]), word, outcome.cancelled

    async def _packed(self, order: LaunchOrder, boot_id: str) -> _Baggage:
        packing = self._in_thread(lambda: self._pack(order, boot_id))
        outcome = await settled(packing, within_s=_PACK_S, what=f"packing for {order.sandbox}")
        if outcome.cancelled is not None and outcome.error is None:
            outcome.value.close()
        if isinstance(outcome.error, OSError) and outcome.error.errno:
            raise LaunchFailed(order.sandbox, "pack", str(outcome.error)) from outcome.error
        return outcome.hand_back()

    def _pack(self, order: LaunchOrder, boot_id: str) -> _Baggage:
        """Open everything. Blocks. Raises OSError with nothing left open."""
        baggage = _Baggage()
        try:
            folder = os.open(order.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                baggage.add("public", _listen(folder, GUEST_SOCKET))
                baggage.add("control", _listen(folder, CONTROL_SOCKET))
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                baggage.add("log", os.open(GUEST_LOG, flags, 0o600, dir_fd=folder))
            finally:
                os.close(folder)
            baggage.add("parcel", _memory_file(_parcel(order, boot_id, self._nameserver, self._installation)))
            baggage.add("disk", os.dup(order.disk.mount_fd))
            baggage.add("netns", os.dup(order.slot.netns_fd))
            baggage.add("userns", os.dup(order.slot.userns_fd))
            doors = self._open_cgroups(order.cgroup)
            for fd in doors.tasks:
                baggage.append("tasks", fd)
            for fd in doors.user:
                baggage.append("user", fd)
            for fd in doors.guest:
                baggage.append("guest", fd)
            if doors.unified is not None:
                baggage.add("unified", doors.unified)
            for path in order.layers:
                baggage.append("layers", mounts.clone_tree(path))
        except BaseException:
            baggage.close()
            raise
        return baggage

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)


def _failure(order: LaunchOrder, message: JsonObject | None, step: str, why: str) -> LaunchFailed:
    told = (message or {}).get("error")
    if told is None:
        return LaunchFailed(order.sandbox, step, why)
    return LaunchFailed(order.sandbox, str(told["step"]), str(told["why"]))


async def _receive_both(line: Line) -> tuple[JsonObject | None, list[int], JsonObject | None]:
    """(what the zygote said, its descriptors, what the child said before that)."""
    word: JsonObject | None = None
    while True:
        message, fds = await line.receive()
        if message is None or "pid" in message or word is not None:
            return message, fds, word
        word = message
        if "error" in word and word["error"].get("step") in _ZYGOTE_STEPS:
            return None, fds, word  # no child was made: nothing more will come


async def _end(process: PidfdProcess) -> None:
    """Kill it and wait until it is gone; with it goes everything in its pid namespace."""
    process.signal(signal.SIGKILL)
    await process.wait()
    process.close()


def _listen(folder: int, name: str) -> int:
    """A listening unix socket `name` in `folder`, by descriptor: a path of any length."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{name}")
        listener.listen(_BACKLOG)
        return listener.detach()
    finally:
        listener.close()


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("parcel", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _parcel(order: LaunchOrder, boot_id: str, nameserver: str, installation: str) -> bytes:
    hostname = order.guest.hostname
    parcel = Parcel(
        sandbox=order.sandbox,
        uid_base=order.slot.uid_base,
        hostname=hostname,
        boot_id=boot_id,
        mark=root_source(installation, order.sandbox),
        memory_bytes_max=order.limits.memory_bytes_max,
        etc={
            "hostname": f"{hostname}\n",
            "hosts": f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n::1 ip6-localhost ip6-loopback\n",
            "resolv.conf": f"nameserver {nameserver}\noptions timeout:3 attempts:2\n",
        },
        guest=msgspec.to_builtins(order.guest),
    )
    return msgspec.json.encode(parcel)


def root_source(installation: str, sandbox: str) -> str:
    """The source of a sandbox's root mount, as its mountinfo shows it."""
    return f"penstock-{installation}:{sandbox}"


def _clear_run_dir(run_dir: str) -> None:
    """Remove what `_pack` made. Absent is success."""
    for name in (GUEST_SOCKET, CONTROL_SOCKET, GUEST_LOG):
        try:
            os.unlink(f"{run_dir}/{name}")
        except FileNotFoundError:
            pass
