"""The port `Cgroups` on Linux: v1, v2 and hybrid hosts behind one face.

On a hybrid host v1 carries the limits and v2 carries kill, freeze and events, which v1 does badly or not at all: its
freezer makes processes deaf to SIGKILL until they are thawed, and it has nothing to wait on. Making and removing
directories may wait for the kernel's RCU (up to 14 ms on an idle machine), so both run on threads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from penstock.core.deadlines import Pulse, within
from penstock.core.settle import settle
from penstock.model.errors import Unsupported
from penstock.model.sandbox import Limits
from penstock.node.linux.absent import is_absent
from penstock.node.linux.cgroup_files import Tree
from penstock.node.linux.cgroup_v1 import V1
from penstock.node.linux.cgroup_v2 import CONTROLLERS, V2, read_event
from penstock.node.linux.launcher import CgroupDoors
from penstock.node.linux.zygote_client import close_all
from penstock.node.ports import CgroupUsage

ROOT_DEFAULT: Final = "/sys/fs/cgroup"
THREADS: Final = 2
CREATE_S: Final = 10.0
_BUSY_FIRST_S: Final = 0.001  # between attempts to remove a busy directory: nothing tells when it is free
_BUSY_CAP_S: Final = 0.05
_STRAGGLER_ROUNDS_MAX: Final = 1_000
_V1_CONTROLLERS: Final = ("memory", "cpu", "cpuacct", "pids", "devices", "freezer")

_T = TypeVar("_T")


class LinuxCgroups:
    """Cgroups of one installation, below `penstock-<installation>` in every hierarchy. One event loop.

    A name is that of a directory there (`sb-<id>`).
    """

    def __init__(self, installation: str, *, root: str = ROOT_DEFAULT, make_tree: Callable[[str], Tree] = Tree) -> None:
        self._parent = f"penstock-{installation}"
        self._v1, self._v2 = detect(root, self._parent, make_tree)
        self._threads = ThreadPoolExecutor(THREADS, "cgroups")
        self._prepared = False

    @property
    def layout(self) -> str:
        """`"v1"`, `"v2"` or `"hybrid"`."""
        if self._v2 is None:
            return "v1"
        return "hybrid" if self._v1 is not None else "v2"

    async def open(self) -> None:
        """Make our directory in every hierarchy. Present is success."""
        await self._run(self._prepare, CREATE_S, "cgroups of the installation")

    async def close(self, *, destroy: bool) -> None:
        """With `destroy`, remove our directories; OSError with EBUSY when a sandbox is left in them. Idempotent."""
        if destroy:
            await self._run(self._remove_parents, CREATE_S, "end of the installation's cgroups")
            self._prepared = False

    async def create(self, name: str, limits: Limits) -> None:
        await self._run(lambda: self._create(name, limits), CREATE_S, f"cgroup {name}")

    def doors(self, name: str) -> CgroupDoors:
        """Descriptors for a launch: where pid 1 is born and writes itself, and where its children write themselves."""
        unified: int | None = None
        opened: dict[str, list[int]] = {"tasks": [], "user": [], "guest": []}
        try:
            unified = None if self._v2 is None else self._v2.directory(name)
            if self._v1 is not None:
                opened["tasks"] = self._v1.tasks(name)
                opened["user"] = self._v1.user_tasks(name)
                opened["guest"] = self._v1.guest_tasks(name)
            elif self._v2 is not None:
                opened["user"] = self._v2.user_procs(name)
        except BaseException:
            close_all([fd for fds in opened.values() for fd in fds])
            if unified is not None:
                os.close(unified)
            raise
        return CgroupDoors(unified=unified, **opened)

    async def kill(self, name: str, *, within_s: float) -> None:
        """Returns when populated is 0. If cancelled, what was killed stays killed. Raises DeadlinePassed.

        Source: kernel Documentation/admin-guide/cgroup-v2.rst, cgroup.kill (5.14).
        """
        async with within(within_s, f"end of every process in cgroup {name}"):
            try:
                if self._v2 is not None and self._v2.kills:
                    self._v2.kill(name)
                    await self._await_event(self._v2, name, "populated", 0)
                await self._kill_stragglers(name)
            except OSError as error:
                if not is_absent(error):
                    raise

    async def remove(self, name: str, *, within_s: float) -> None:
        await settle(self._remove(name, within_s), within_s=within_s + CREATE_S, what=f"removal of cgroup {name}")

    def list_names(self) -> set[str]:
        return set().union(*(side.names() for side in self._sides()))

    def pids(self, name: str) -> list[int]:
        """Empty when the cgroup is absent."""
        found: set[int] = set()
        for side in self._sides():
            try:
                found |= side.pids(name)
            except OSError as error:
                if not is_absent(error):
                    raise
        return sorted(found)

    def usage(self, name: str) -> CgroupUsage:
        """Some ten reads of small files. Raises FileNotFoundError when the cgroup is absent."""
        cpu_s = self._v2.cpu_s(name) if self._v2 is not None else None
        sides = self._sides()
        memory = next((found for side in sides if (found := side.memory(name)) is not None), (0, 0, 0, 0))
        pids = next((count for side in sides if (count := side.pids_current(name)) is not None), 0)
        if cpu_s is None and self._v1 is not None:
            cpu_s = self._v1.cpu_s(name)
        used, cache, limit, kills = memory
        return CgroupUsage(
            cpu_s=cpu_s or 0.0,
            memory_bytes=used,
            memory_cache_bytes=cache,
            memory_bytes_max=limit,
            pids=pids,
            oom_kills=kills,
        )

    async def freeze(self, name: str, *, within_s: float) -> None:
        """Returns when every process stands still. Raises DeadlinePassed: then some may, and `thaw` is due."""
        await self._set_frozen(name, True, within_s)

    async def thaw(self, name: str, *, within_s: float) -> None:
        await self._set_frozen(name, False, within_s)

    def _sides(self) -> list[V1 | V2]:
        return [side for side in (self._v2, self._v1) if side is not None]

    def _prepare(self) -> None:
        for side in self._sides():
            side.prepare()
        self._prepared = True

    def _remove_parents(self) -> None:
        for side in self._sides():
            side.remove_parent()

    def _create(self, name: str, limits: Limits) -> None:
        if not self._prepared:
            self._prepare()
        if any(side.has(name) for side in self._sides()):
            raise FileExistsError(errno.EEXIST, "cgroup exists", name)
        try:
            for side in self._sides():
                side.create(name, limits)
        except BaseException as error:
            for side in self._sides():
                try:
                    side.remove(name)
                except OSError as stuck:
                    error.add_note(f"and what was made of it could not be removed: {stuck}")
            raise

    async def _remove(self, name: str, within_s: float) -> None:
        pause_s = _BUSY_FIRST_S
        async with within(within_s, f"removal of cgroup {name}"):
            while True:
                try:
                    await self._run(lambda: self._remove_now(name), CREATE_S, f"removal of cgroup {name}")
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _BUSY_CAP_S)

    def _remove_now(self, name: str) -> None:
        for side in self._sides():
            side.remove(name)
        if any(side.has(name) for side in self._sides()):
            raise OSError(errno.EBUSY, "cgroup is still there", name)

    async def _set_frozen(self, name: str, frozen: bool, within_s: float) -> None:
        word = "freezing" if frozen else "thawing"
        async with within(within_s, f"{word} of cgroup {name}"):
            if self._v2 is not None:
                self._v2.freeze(name, frozen)
                await self._await_event(self._v2, name, "frozen", int(frozen))
                return
            assert self._v1 is not None, "a host has one or the other"
            if not self._v1.freezes:
                raise Unsupported("cannot pause", which=name, why="the host has neither cgroup v2 nor the v1 freezer")
            self._v1.freeze(name, frozen)
            while self._v1.is_frozen(name) is not frozen:
                await asyncio.sleep(_BUSY_FIRST_S)  # v1 has nothing to wait on
                self._v1.freeze(name, frozen)  # a fork in between leaves it FREEZING; asking again moves it on

    async def _await_event(self, v2: V2, name: str, event: str, value: int) -> None:
        """Return when cgroup.events says so. Waits on the descriptor; the caller bounds it."""
        fd = v2.open_events(name)
        try:
            async with _changes(fd) as changed:
                while read_event(fd, event) != value:
                    await changed()
        finally:
            os.close(fd)

    async def _kill_stragglers(self, name: str) -> None:
        """By pidfd, until nobody is left: all of them on a host without cgroup.kill, else those in v1 groups only.

        The v1 freezer holds them still meanwhile, so that a fork bomb cannot outrun the loop; they die when thawed.
        """
        for _ in range(_STRAGGLER_ROUNDS_MAX):
            living = self.pids(name)
            if not living:
                return
            freezer = self._v1 if self._v1 is not None and self._v1.freezes else None
            if freezer is not None:
                freezer.freeze(name, True)
                living = self.pids(name)
            handles = _pidfds(living, still=lambda: set(self.pids(name)))
            try:
                for handle in handles:
                    _send_kill(handle)
                if freezer is not None:
                    freezer.freeze(name, False)
                for handle in handles:
                    await _await_readable(handle)
            finally:
                for handle in handles:
                    os.close(handle)
            if not handles:
                await asyncio.sleep(_BUSY_FIRST_S)

    async def _run(self, work: Callable[[], _T], within_s: float, what: str) -> _T:
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        return await settle(future, within_s=within_s, what=what)


def detect(root: str, parent: str, make_tree: Callable[[str], Tree] = Tree) -> tuple[V1 | None, V2 | None]:
    """What is mounted below `root`: v2 alone, v1 hierarchies by the names of their folders, or both (hybrid)."""
    if os.path.exists(os.path.join(root, "cgroup.controllers")):
        tree = make_tree(root)
        missing = set(CONTROLLERS) - set(tree.read("cgroup.controllers").split())
        if missing:
            raise Unsupported("cgroup v2 lacks controllers", which=root, why=", ".join(sorted(missing)))
        return None, V2(tree, parent, controls=True)
    hierarchies: dict[str, Tree] = {}
    for name in _V1_CONTROLLERS:
        path = os.path.join(root, name)
        if os.path.exists(os.path.join(path, "tasks")):
            hierarchies[name] = make_tree(os.path.realpath(path))
    unified = os.path.join(root, "unified")
    v2 = None
    if os.path.exists(os.path.join(unified, "cgroup.controllers")):
        v2 = V2(make_tree(unified), parent, controls=False)
    missing = {"memory", "cpu", "pids"} - set(hierarchies)
    if missing:
        raise Unsupported("no cgroups for limits", which=root, why=f"not mounted: {', '.join(sorted(missing))}")
    return V1(hierarchies, parent, freezer=v2 is None), v2


@asynccontextmanager
async def _changes(fd: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Within the block, awaiting what it gives returns after the file `fd` has announced a change (POLLPRI).

    The loop watches an epoll of our own: it would itself ask for POLLIN, which these files always answer.
    """
    loop = asyncio.get_running_loop()
    watch = select.epoll()
    pulse, seen = Pulse(), [False]

    def announce() -> None:
        watch.poll(0)
        seen[0] = True
        pulse.fire()

    async def changed() -> None:
        await pulse.wait_for(lambda: seen[0], until=None)
        seen[0] = False

    try:
        watch.register(fd, select.EPOLLPRI)
        loop.add_reader(watch.fileno(), announce)
        yield changed
    finally:
        loop.remove_reader(watch.fileno())
        watch.close()


async def _await_readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    pulse, seen = Pulse(), [False]

    def announce() -> None:
        seen[0] = True
        loop.remove_reader(fd)
        pulse.fire()

    loop.add_reader(fd, announce)
    try:
        await pulse.wait_for(lambda: seen[0], until=None)
    finally:
        loop.remove_reader(fd)


def _pidfds(pids: Iterable[int], *, still: Callable[[], set[int]]) -> list[int]:
    """Handles on those of `pids` that are still in the cgroup once the handle is held: a number may be reused."""
    opened: dict[int, int] = {}
    for pid in pids:
        try:
            opened[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    members = still()
    for pid in [pid for pid in opened if pid not in members]:
        os.close(opened.pop(pid))
    return list(opened.values())


def _send_kill(handle: int) -> None:
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
