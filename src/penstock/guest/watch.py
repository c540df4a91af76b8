"""Watching a directory: inotify's events become the protocol's, also for directories that appear later.

Refused: one inotify instance for all watchers (equal inodes share a watch and its mask, so each watcher would filter
and count for the others), and scanning on a timer. A directory made under a recursive watch is watched as soon as its
event is read; what was put into it before that is found by a scan and reported as created (and written, if it has
content), and the kernel's own event for the same creation, if it still comes, is dropped.

Nothing is lost silently. When the kernel's queue or ours is full, the watcher ends with an error that says so.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections import deque
from typing import Any, Final

from penstock.core.errors import Kind, PenstockError
from penstock.guest import inotify
from penstock.guest.entries import Names, entry_info
from penstock.guest.inotify import Inotify, Raw
from penstock.guest.paths import shown

EVENTS_MAX: Final = 8192  # per watcher, not yet taken
DIRECTORIES_MAX: Final = 8192  # per recursive watcher; the kernel keeps about 1 KiB for each
WATCHERS_MAX: Final = 100  # inotify instances of the guest; the kernel allows 128 per user by default
_ROUNDS_MAX: Final = 16  # reads of one flush, each up to 4 MiB: a busy writer cannot hold the guest

_MASK: Final = (
    inotify.IN_CREATE | inotify.IN_MOVED_TO | inotify.IN_MOVED_FROM | inotify.IN_MODIFY | inotify.IN_ATTRIB
    | inotify.IN_DELETE | inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_ONLYDIR
)  # fmt: skip
# In the order in which one kernel event that means several things is told.
_TYPES: Final = (
    (inotify.IN_CREATE | inotify.IN_MOVED_TO, "EVENT_TYPE_CREATE"),
    (inotify.IN_MOVED_FROM | inotify.IN_MOVE_SELF, "EVENT_TYPE_RENAME"),
    (inotify.IN_ATTRIB, "EVENT_TYPE_CHMOD"),
    (inotify.IN_MODIFY, "EVENT_TYPE_WRITE"),
    (inotify.IN_DELETE | inotify.IN_DELETE_SELF, "EVENT_TYPE_REMOVE"),
)
_ARRIVES: Final = inotify.IN_CREATE | inotify.IN_MOVED_TO
_LEAVES: Final = inotify.IN_DELETE | inotify.IN_MOVED_FROM

Event = dict[str, Any]


class WatchFailed(PenstockError):
    """A watcher ended, or cannot begin, because a limit was met. Make a new one and look at the directory again."""

    kind = Kind.EXHAUSTED
    code = "watch_failed"


class Watcher:
    """One watched directory and the events nobody has taken yet.

    `changed` is set when there is something to take or the watcher failed. `close` gives the kernel's objects back.
    """

    def __init__(self, root: str, *, recursive: bool, include_entry: bool, names: Names) -> None:
        """Watch the directory `root`, and what is beneath it when `recursive`. Raises OSError or WatchFailed."""
        self.root = root
        self.failed: PenstockError | None = None
        self.changed = asyncio.Event()
        self._recursive, self._include_entry, self._names = recursive, include_entry, names
        self._events: deque[Event] = deque()
        self._paths: dict[int, str] = {}  # watch -> path relative to root, "" for root
        self._watches: dict[str, int] = {}
        self._scanned: set[str] = set()  # told from a scan; the kernel may tell them once more
        self._loop = asyncio.get_running_loop()
        try:
            self._inotify = Inotify()
        except OSError as error:
            raise WatchFailed("too many watchers", why=os.strerror(error.errno or 0)) from error
        try:
            self._add("")
            if recursive:
                self._adopt_beneath("", tell=False)
        except BaseException as error:
            self._inotify.close()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise WatchFailed("too many directories to watch", why="the kernel's limit is reached") from error
            raise
        self._loop.add_reader(self._inotify.fd, self.flush)

    def take(self) -> list[Event]:
        """Everything that happened before this call, oldest first. Raises what ended the watcher."""
        self.flush()
        if self.failed is not None:
            raise self.failed
        events = list(self._events)
        self._events.clear()
        self.changed.clear()
        return events

    def flush(self) -> None:
        """Take over what the kernel has queued. Cheap when it has nothing: one read."""
        for _ in range(_ROUNDS_MAX):
            if self._inotify.fd < 0:
                return
            raws = self._inotify.read()
            if not raws:
                # Whatever the kernel knew before a scan has now been read.
                self._scanned.clear()
                return
            for raw in raws:
                self._take_over(raw)
                if self.failed is not None:
                    return

    def close(self) -> None:
        """Stop. Twice is fine."""
        if self._inotify.fd >= 0:
            self._loop.remove_reader(self._inotify.fd)
            self._inotify.close()
        self._paths.clear()
        self._watches.clear()

    # ---- kernel events -----------------------------------------------------------------------------------

    def _take_over(self, raw: Raw) -> None:
        if raw.mask & inotify.IN_Q_OVERFLOW:
            self._fail("the kernel's queue was full")
            return
        base = self._paths.get(raw.watch)
        if base is None:
            return  # of a directory that left the tree
        if raw.mask & inotify.IN_IGNORED:
            self._forget(base, raw.watch)
            return
        if not raw.name:
            if not base:  # about a subdirectory its parent's watch tells the same
                self._tell(".", raw.mask)
            return
        path = f"{base}/{raw.name}" if base else raw.name
        if raw.mask & _LEAVES:
            self._scanned.discard(path)
            if raw.mask & inotify.IN_ISDIR:
                self._drop(path)
        if raw.mask & inotify.IN_CREATE and path in self._scanned:
            self._scanned.discard(path)
            return
        self._tell(path, raw.mask)
        if raw.mask & _ARRIVES and raw.mask & inotify.IN_ISDIR and self._recursive:
            self._adopt(path)

    def _tell(self, path: str, mask: int) -> None:
        for bits, kind in _TYPES:
            if not mask & bits:
                continue
            if len(self._events) >= EVENTS_MAX:
                self._fail(f"{EVENTS_MAX} events were not taken")
                return
            event: Event = {"name": shown(path), "type": kind}
            if self._include_entry and kind not in {"EVENT_TYPE_RENAME", "EVENT_TYPE_REMOVE"}:
                try:
                    event["entry"] = entry_info(self._real(path), self._names)
                except OSError:
                    pass  # Best effort by the protocol: it is gone again, and its own event follows.
            self._events.append(event)
            self.changed.set()

    def _fail(self, why: str) -> None:
        self.failed = WatchFailed("events were lost, the watcher has ended", which=shown(self.root), why=why,
                                  now="create a new watcher and list the directory")  # fmt: skip
        self._events.clear()
        self.close()
        self.changed.set()

    # ---- the tree of watched directories --------------------------------------------------------------------

    def _real(self, path: str) -> str:
        return self.root if path in {"", "."} else os.path.join(self.root, path)

    def _add(self, path: str) -> None:
        if len(self._paths) >= DIRECTORIES_MAX:
            raise WatchFailed("too many directories to watch", which=shown(self.root), why=f"at most {DIRECTORIES_MAX}")
        mask = _MASK | (inotify.IN_DONT_FOLLOW if path else 0)
        watch = self._inotify.add(self._real(path), mask)
        known = self._paths.get(watch)
        if known is not None and known != path:
            self._watches.pop(known, None)  # the same directory under its new name
        self._paths[watch] = path
        self._watches[path] = watch

    def _adopt(self, path: str) -> None:
        """Watch a directory that arrived, and tell what is in it already."""
        try:
            self._add(path)
            self._adopt_beneath(path, tell=True)
        except WatchFailed as error:
            self._fail(error.what)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._fail("the kernel's limit of watches is reached")
            # Else it left, or became something else, and the event of that follows.

    def _adopt_beneath(self, path: str, *, tell: bool) -> None:
        waiting = [path]
        while waiting and self.failed is None:
            folder = waiting.pop()
            for name in sorted(_listing(self._real(folder))):
                inner = f"{folder}/{name}" if folder else name
                try:
                    status = os.lstat(self._real(inner))
                    if tell:
                        self._tell_found(inner, status)
                    if stat.S_ISDIR(status.st_mode):
                        self._add(inner)
                        waiting.append(inner)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        raise
                    # Else it vanished between listing and looking, which its event will tell.

    def _tell_found(self, path: str, status: os.stat_result) -> None:
        self._scanned.add(path)
        self._tell(path, inotify.IN_CREATE)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            self._tell(path, inotify.IN_MODIFY)

    def _drop(self, path: str) -> None:
        """Stop watching a directory that left, and all beneath it."""
        inside = path + "/"
        for known in [each for each in self._watches if each == path or each.startswith(inside)]:
            watch = self._watches[known]
            self._forget(known, watch)
            self._inotify.remove(watch)

    def _forget(self, path: str, watch: int) -> None:
        self._paths.pop(watch, None)
        if self._watches.get(path) == watch:
            del self._watches[path]


class Watchers:
    """Every watcher of this guest, the polled ones by id."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._all: set[Watcher] = set()
        self._polled: dict[str, Watcher] = {}

    def open(self, root: str, *, recursive: bool, include_entry: bool) -> Watcher:
        """A new watcher; give it back with `close`. Raises OSError or WatchFailed."""
        if len(self._all) >= WATCHERS_MAX:
            raise WatchFailed("too many watchers", why=f"at most {WATCHERS_MAX}", now="remove one")
        watcher = Watcher(root, recursive=recursive, include_entry=include_entry, names=self._names)
        self._all.add(watcher)
        return watcher

    def close(self, watcher: Watcher) -> None:
        watcher.close()
        self._all.discard(watcher)

    def keep(self, watcher: Watcher) -> str:
        """Keep `watcher` for polling under a new id."""
        watcher_id = "w" + os.urandom(10).hex()
        self._polled[watcher_id] = watcher
        return watcher_id

    def get(self, watcher_id: str) -> Watcher | None:
        return self._polled.get(watcher_id)

    def remove(self, watcher_id: str) -> bool:
        """False when there is no such watcher."""
        watcher = self._polled.pop(watcher_id, None)
        if watcher is None:
            return False
        self.close(watcher)
        return True

    def flush(self) -> None:
        """Let every watcher see what the kernel has queued.

        Called after the guest itself made a directory: a recursive watcher then watches it before the client's next
        request puts something into it, and tells that by events instead of by a scan.
        """
        for watcher in list(self._all):
            watcher.flush()

    def close_all(self) -> None:
        for watcher in list(self._all):
            self.close(watcher)
        self._polled.clear()


NETWORK_TYPES: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph"})


def is_network_mount(path: str) -> bool:
    """Whether `path` lies on a file system whose changes by others inotify does not see. Raises OSError.

    Source: proc_pid_mountinfo(5), fields 3 (device) and the one after " - " (type).
    """
    device = os.stat(path).st_dev
    wanted = f" {os.major(device)}:{os.minor(device)} "
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                if wanted in line:
                    kind = line.partition(" - ")[2].split(" ", 1)[0]
                    return kind in NETWORK_TYPES or kind == "fuse" or kind.startswith("fuse.")
    except FileNotFoundError:
        pass  # Safe: without /proc nobody in here can have mounted anything.
    return False


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []  # Safe: it vanished or turned into something else; its own event follows.
