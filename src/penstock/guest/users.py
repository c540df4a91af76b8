"""Users and groups, read by hand from /etc/passwd and /etc/group.

NSS is forbidden here: `getpwnam` would load shared libraries of the sandbox's image into pid 1, which belongs to
nobody inside. The files are the sandbox's own and may say anything, so reading is bounded and every field checked.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import Kind, PenstockError

FILE_BYTES_MAX: Final = 1024 * 1024  # beyond, the rest is not seen
ENTRIES_MAX: Final = 10_000
GROUPS_MAX: Final = 64  # supplementary groups of one user; the kernel's own limit is 65,536
ID_MAX: Final = 2**32 - 2
NAME_CHARS_MAX: Final = 256


class UnknownUser(PenstockError):
    """No user of that name in the sandbox. The words are the ones SDK users grep for."""

    kind = Kind.UNAUTHENTICATED
    code = "unknown_user"

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"invalid username: '{name[:NAME_CHARS_MAX]}'")


@dataclass(frozen=True)
class User:
    name: str
    uid: int
    gid: int
    home: str
    shell: str


@dataclass(frozen=True)
class Group:
    name: str
    gid: int
    members: tuple[str, ...]


class Users:
    """The sandbox's accounts. Files are read again when they changed (size, inode, change time)."""

    def __init__(self, users_path: str = "/etc/passwd", groups_path: str = "/etc/group") -> None:
        self._passwd = _Table(users_path)
        self._group = _Table(groups_path)
        self._users_seen: object = None
        self._groups_seen: object = None
        self._by_name: dict[str, User] = {}
        self._by_uid: dict[int, User] = {}
        self._groups: list[Group] = []
        self._group_by_gid: dict[int, Group] = {}

    def get(self, name: str) -> User:
        """Raises UnknownUser."""
        self._load_users()
        user = self._by_name.get(name)
        if user is None:
            raise UnknownUser(name)
        return user

    def by_uid(self, uid: int) -> User | None:
        self._load_users()
        return self._by_uid.get(uid)

    def user_name(self, uid: int) -> str:
        """The name of `uid`, or the number as text."""
        user = self.by_uid(uid)
        return user.name if user else str(uid)

    def group_name(self, gid: int) -> str:
        """The name of `gid`, or the number as text."""
        self._load_groups()
        group = self._group_by_gid.get(gid)
        return group.name if group else str(gid)

    def groups_of(self, user: User) -> list[int]:
        """Group ids for setgroups: the primary one and those that list the user; at most GROUPS_MAX."""
        self._load_groups()
        gids = [user.gid]
        for group in self._groups:
            if user.name in group.members and group.gid not in gids:
                gids.append(group.gid)
        return gids[:GROUPS_MAX]

    def _load_users(self) -> None:
        version, lines = self._passwd.read()
        if version == self._users_seen:
            return
        self._users_seen = version
        self._by_name, self._by_uid = {}, {}
        for line in lines():
            user = _parse_user(line)
            if user is not None:
                self._by_name.setdefault(user.name, user)
                self._by_uid.setdefault(user.uid, user)

    def _load_groups(self) -> None:
        version, lines = self._group.read()
        if version == self._groups_seen:
            return
        self._groups_seen = version
        self._groups, self._group_by_gid = [], {}
        for line in lines():
            group = _parse_group(line)
            if group is not None:
                self._groups.append(group)
                self._group_by_gid.setdefault(group.gid, group)


class _Table:
    """One colon-separated file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> tuple[object, _Lines]:
        """(version, function that reads the lines). The version is None when the file is absent or no regular file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None, _Lines("")
        if not stat.S_ISREG(found.st_mode):  # a FIFO would block us for ever
            return None, _Lines("")
        version = (found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return version, _Lines(self._path)


class _Lines:
    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self) -> list[str]:
        if not self._path:
            return []
        try:
            # O_NONBLOCK: it may have become a FIFO since we looked.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return []
        try:
            data = os.read(fd, FILE_BYTES_MAX)
        except OSError:
            return []
        finally:
            os.close(fd)
        return data.decode("utf-8", "surrogateescape").split("\n", ENTRIES_MAX)[:ENTRIES_MAX]


def _parse_user(line: str) -> User | None:
    fields = line.split(":")
    if len(fields) != 7 or not _is_name(fields[0]):
        return None
    uid, gid = _parse_id(fields[2]), _parse_id(fields[3])
    if uid is None or gid is None or "\0" in line:
        return None
    home = fields[5] if fields[5].startswith("/") else "/"
    return User(fields[0], uid, gid, home, fields[6].strip() or "/bin/sh")


def _parse_group(line: str) -> Group | None:
    fields = line.split(":")
    if len(fields) != 4 or not _is_name(fields[0]):
        return None
    gid = _parse_id(fields[2])
    if gid is None:
        return None
    return Group(fields[0], gid, tuple(name.strip() for name in fields[3].split(",") if name.strip()))


def _is_name(text: str) -> bool:
    return 0 < len(text) <= NAME_CHARS_MAX and text[0] not in "#+-" and "/" not in text and "\0" not in text


def _parse_id(text: str) -> int | None:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        return None
    number = int(text)
    return number if number <= ID_MAX else None
