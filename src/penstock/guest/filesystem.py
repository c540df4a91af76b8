"""The protocol's filesystem service: Stat, MakeDir, Move, ListDir, Remove, and watching.

The guest acts as the sandbox's root, so nothing is refused for want of permission; what it makes belongs to the
calling user. Removing and moving never follow a symlink. Source: `filesystem.Filesystem` of envd 0.6.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from penstock.core.deadlines import DeadlinePassed, within
from penstock.guest import trees
from penstock.guest.entries import Entry, entry_info
from penstock.guest.exchange import Disconnected
from penstock.guest.parts import Parts
from penstock.guest.paths import make_directories, resolve, shown
from penstock.guest.rpc import Call, Events, Message, Unary
from penstock.guest.users import User
from penstock.guest.watch import Watcher, Watchers, is_network_mount
from penstock.wire.connect import Code, ConnectError

ENTRIES_MAX: Final = 50_000  # of one ListDir answer, about 20 MB of JSON; beyond it the call fails and says so
_SERVICE: Final = "/filesystem.Filesystem/"

_CODES: Final = {
    errno.ENOENT: Code.NOT_FOUND,
    errno.ENOTDIR: Code.NOT_FOUND,  # "file/x": nothing can be there
    errno.EEXIST: Code.ALREADY_EXISTS,
    errno.ELOOP: Code.FAILED_PRECONDITION,
    errno.ENOTEMPTY: Code.FAILED_PRECONDITION,
    errno.EBUSY: Code.FAILED_PRECONDITION,
    errno.EISDIR: Code.INVALID_ARGUMENT,
    errno.EINVAL: Code.INVALID_ARGUMENT,
    errno.ENAMETOOLONG: Code.INVALID_ARGUMENT,
    errno.ENOSPC: Code.RESOURCE_EXHAUSTED,
    errno.EDQUOT: Code.RESOURCE_EXHAUSTED,
    errno.EMFILE: Code.RESOURCE_EXHAUSTED,
    errno.EACCES: Code.PERMISSION_DENIED,
    errno.EPERM: Code.PERMISSION_DENIED,
    errno.EROFS: Code.PERMISSION_DENIED,
}


def register(parts: Parts) -> Filesystem:
    """Serve the service. The caller closes what is returned when the guest ends."""
    service = Filesystem(parts)
    calls: dict[str, Unary] = {
        "Stat": service.stat,
        "MakeDir": service.make_dir,
        "Move": service.move,
        "ListDir": service.list_dir,
        "Remove": service.remove,
        "CreateWatcher": service.create_watcher,
        "GetWatcherEvents": service.get_watcher_events,
        "RemoveWatcher": service.remove_watcher,
    }
    for name, call in calls.items():
        parts.rpc.unary(_SERVICE + name, _with_codes(call))
    parts.rpc.server_stream(_SERVICE + "WatchDir", service.watch_dir)
    return service


class Filesystem:
    def __init__(self, parts: Parts) -> None:
        self._settings, self._users = parts.settings, parts.users
        self.watchers = Watchers(parts.users)

    def close(self) -> None:
        self.watchers.close_all()

    # ---- calls -------------------------------------------------------------------------------------------

    async def stat(self, call: Call, message: Message) -> Message:
        return {"entry": self._entry(self._path(call, message))}

    async def make_dir(self, call: Call, message: Message) -> Message:
        user = call.user
        path = self._path(call, message, user=user)
        try:
            made = make_directories(path, user)
        except (FileExistsError, NotADirectoryError) as error:
            where = shown(str(error.filename or path))
            raise ConnectError(
                Code.INVALID_ARGUMENT, f"path already exists but it is not a directory: '{where}'"
            ) from error
        if not made:
            raise ConnectError(Code.ALREADY_EXISTS, f"directory already exists: '{shown(path)}'")
        self.watchers.flush()
        return {"entry": self._entry(path)}

    async def move(self, call: Call, message: Message) -> Message:
        user = call.user
        source = self._path(call, message, "source", user=user, removes=True)
        destination = self._path(call, message, "destination", user=user, removes=True)
        try:
            os.lstat(source)
        except (FileNotFoundError, NotADirectoryError):
            raise ConnectError(Code.NOT_FOUND, f"source '{shown(source)}' does not exist") from None
        _make_parents(destination, user)
        await trees.move(source, destination)
        self.watchers.flush()
        return {"entry": self._entry(destination)}

    async def list_dir(self, call: Call, message: Message) -> Message:
        path = self._path(call, message)
        depth = _depth(message)
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise ConnectError(Code.INVALID_ARGUMENT, f"path is not a directory: '{shown(path)}'")
        entries: list[Entry] = []
        async for found in trees.walk(path, depth):
            if len(entries) >= ENTRIES_MAX:
                why = f"'{shown(path)}' has more than {ENTRIES_MAX} entries to depth {depth}: list it in parts"
                raise ConnectError(Code.RESOURCE_EXHAUSTED, why)
            try:
                entries.append(entry_info(found, self._users))
            except OSError:
                continue  # Safe: it vanished while we walked, and the protocol passes over those.
        return {"entries": entries}

    async def remove(self, call: Call, message: Message) -> Message:
        path = self._path(call, message, removes=True)
        try:
            await trees.remove(path)
        except NotADirectoryError:
            pass  # "file/x" is absent, and absent is success
        return {}

    async def watch_dir(self, call: Call, message: Message, events: Events) -> None:
        watcher = self._open(call, message)
        try:
            await events.send({"start": {}})
            call.exchange.on_disconnect(watcher.changed.set)
            while True:
                try:
                    async with within(call.keepalive_s, "the next event of a watched directory"):
                        await watcher.changed.wait()
                except DeadlinePassed:
                    await events.send({"keepalive": {}})
                    continue
                if call.exchange.disconnected.is_set():
                    raise Disconnected
                for event in watcher.take():
                    await events.send({"filesystem": event})
        finally:
            self.watchers.close(watcher)

    async def create_watcher(self, call: Call, message: Message) -> Message:
        return {"watcherId": self.watchers.keep(self._open(call, message))}

    async def get_watcher_events(self, _call: Call, message: Message) -> Message:
        watcher_id = _watcher_id(message)
        watcher = self.watchers.get(watcher_id)
        if watcher is None:
            raise ConnectError(Code.NOT_FOUND, f"watcher '{watcher_id}' does not exist")
        return {"events": watcher.take()}

    async def remove_watcher(self, _call: Call, message: Message) -> Message:
        watcher_id = _watcher_id(message)
        if not self.watchers.remove(watcher_id):
            raise ConnectError(Code.NOT_FOUND, f"watcher '{watcher_id}' does not exist")
        return {}

    # ---- private parts -----------------------------------------------------------------------------------

    def _entry(self, path: str) -> Entry:
        return entry_info(path, self._users)

    def _path(
        self, call: Call, message: Message, field: str = "path", *, user: User | None = None, removes: bool = False
    ) -> str:
        """The absolute path in `field`. With `removes` it must name an entry of a directory, not a way to one."""
        raw = message.get(field, "")
        if not isinstance(raw, str):
            raise ConnectError(Code.INVALID_ARGUMENT, f"{field} must be a string")
        if removes and not raw:
            raise ConnectError(Code.INVALID_ARGUMENT, f"{field} is required")
        path = resolve(raw, (user or call.user).home, self._settings.workdir)
        if removes and (path == "/" or path.endswith("/..")):
            raise ConnectError(Code.INVALID_ARGUMENT, f"{field} '{shown(path)}' names no entry of a directory")
        return path

    def _open(self, call: Call, message: Message) -> Watcher:
        path = self._path(call, message)
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise ConnectError(Code.INVALID_ARGUMENT, f"path is not a directory: '{shown(path)}'")
            if not _flag(message, "allowNetworkMounts") and is_network_mount(path):
                why = f"'{shown(path)}' is on a network file system, whose changes by others are not seen"
                raise ConnectError(Code.INVALID_ARGUMENT, why)
            return self.watchers.open(
                path, recursive=_flag(message, "recursive"), include_entry=_flag(message, "includeEntry")
            )
        except OSError as error:
            raise _as_connect_error(error) from error


def _with_codes(handler: Unary) -> Unary:
    async def call_it(call: Call, message: Message) -> Message:
        try:
            return await handler(call, message)
        except OSError as error:
            raise _as_connect_error(error) from error

    return call_it


def _as_connect_error(error: OSError) -> ConnectError:
    code = _CODES.get(error.errno or 0, Code.INTERNAL)
    where = shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    if code is Code.NOT_FOUND:
        return ConnectError(code, f"path '{where}' does not exist")
    reason = error.strerror or "error"
    return ConnectError(code, f"{reason}: '{where}'" if where else reason)


def _make_parents(path: str, owner: User) -> None:
    try:
        make_directories(os.path.dirname(path), owner)
    except (FileExistsError, NotADirectoryError) as error:
        where = shown(str(error.filename or path))
        raise ConnectError(Code.INVALID_ARGUMENT, f"'{where}' is not a directory") from error


def _flag(message: Message, field: str) -> bool:
    value = message.get(field, False)
    if not isinstance(value, bool):
        raise ConnectError(Code.INVALID_ARGUMENT, f"{field} must be true or false")
    return value


def _depth(message: Message) -> int:
    value = message.get("depth", 0)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)  # proto3 JSON allows numbers as strings
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ConnectError(Code.INVALID_ARGUMENT, "depth must be a whole number from 0")
    return value or 1


def _watcher_id(message: Message) -> str:
    value = message.get("watcherId", "")
    if not isinstance(value, str):
        raise ConnectError(Code.INVALID_ARGUMENT, "watcherId must be a string")
    return shown(value[:100])
