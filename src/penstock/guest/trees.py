"""Walking, removing and moving whole trees, in steps, so that the one thread of the guest goes on serving.

Every step is by descriptor and never follows a symlink: what a link points at is never removed or moved. Memory and
descriptors are bounded by the depth and by the widest directory on the way, not by the size of the tree.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from typing import Final

from penstock.core.errors import Kind, PenstockError
from penstock.core.settle import settle

_STEPS: Final = 256  # system calls between two looks at the event loop, about 1 ms
_COPY_BYTES: Final = 1 << 20
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
CLEAN_UP_S: Final = 60.0  # for what a move must remove at its end, also when it was cancelled
NAMES_MAX: Final = 1_000_000  # in one directory


class TreeError(PenstockError):
    kind = Kind.EXHAUSTED
    code = "tree"


class Pace:
    """Lets others run every so many steps."""

    def __init__(self, steps: int = _STEPS) -> None:
        self._steps = self._left = steps

    async def step(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._left = self._steps
            await asyncio.sleep(0)


async def walk(root: str, depth: int) -> AsyncIterator[str]:
    """Paths beneath `root` down to `depth` levels, each directory before its content, by name. Vanished ones are not.

    Raises OSError when `root` itself cannot be read, TreeError beyond NAMES_MAX names in one directory.
    """
    pace = Pace()
    levels = [iter(_sorted_names(root))]
    folders = [root.rstrip("/")]
    while levels:
        name = next(levels[-1], None)
        if name is None:
            levels.pop()
            folders.pop()
            continue
        path = f"{folders[-1]}/{name}"
        yield path
        await pace.step()
        if len(levels) < depth:
            try:
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    levels.append(iter(_sorted_names(path)))
                    folders.append(path)
            except OSError:
                continue  # Safe: it vanished while we walked, which the caller asked to pass over.


def _sorted_names(path: str) -> list[str]:
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > NAMES_MAX:
                raise TreeError("directory has too many entries", why=f"at most {NAMES_MAX}")
    names.sort()
    return names


async def remove(path: str) -> None:
    """Remove `path` and everything beneath it. Absent is success. Raises OSError; what was removed stays removed."""
    try:
        os.unlink(path)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError) as error:
        if isinstance(error, PermissionError) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise
    try:
        await _empty(path)
        os.rmdir(path)
    except FileNotFoundError:
        return


async def _empty(path: str) -> None:
    """Remove everything in the directory `path`. Holds two descriptors however deep it goes.

    Down by name with O_NOFOLLOW, up by "..", which must lead to where we came from: somebody may move the directory
    we stand in, and its new parent is not ours to empty.
    """
    pace = Pace()
    here = os.open(path, _FOLDER)
    above: list[tuple[str, tuple[int, int], list[str]]] = []  # name of the child we are in, its parent, what is left
    try:
        folders = await _unlink_files(here, pace)
        while True:
            if folders:
                name = folders.pop()
                try:
                    below = os.open(name, _FOLDER, dir_fd=here)
                except FileNotFoundError:
                    continue
                above.append((name, _identity(here), folders))
                os.close(here)
                here = below
                folders = await _unlink_files(here, pace)
                continue
            if not above:
                return
            name, parent, folders = above.pop()
            up = os.open("..", _FOLDER, dir_fd=here)
            os.close(here)
            here = up
            if _identity(here) != parent:
                raise OSError(errno.EBUSY, "a directory was moved while it was being removed", path)
            try:
                os.rmdir(name, dir_fd=here)
            except FileNotFoundError:
                pass
    finally:
        os.close(here)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


async def _unlink_files(folder: int, pace: Pace) -> list[str]:
    """Unlink all but directories in the open `folder`; the names of those are returned."""
    folders: list[str] = []
    for name in os.listdir(folder):
        await pace.step()
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except (IsADirectoryError, PermissionError):
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise
            folders.append(name)
    return folders


async def move(source: str, destination: str) -> None:
    """rename(2), also between file systems, and for a directory of a lower layer, which overlayfs refuses with EXDEV.

    Then a copy is made beside `destination`, put in its place by rename, and the source removed: at no time is
    `destination` half there. Raises OSError.
    """
    try:
        os.rename(source, destination)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    if _lies_in(destination, source):
        raise OSError(errno.EINVAL, "a directory cannot be moved into itself", destination)
    folder, name = os.path.split(destination)
    beside = os.path.join(folder, f".{name[:200]}.{os.urandom(6).hex()}")
    try:
        await _copy_tree(source, beside)
        os.rename(beside, destination)
    except BaseException:
        await settle(remove(beside), within_s=CLEAN_UP_S, what=f"the removal of the half-made copy {beside}")
        raise
    await settle(remove(source), within_s=CLEAN_UP_S, what=f"the removal of {source}, which was moved")


def _lies_in(path: str, folder: str) -> bool:
    return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(folder)}/")


async def _copy_tree(source: str, target: str) -> None:
    """Copy with modes, owners, times and xattrs; links stay links. Directory times are set after their content."""
    pace = Pace(32)
    waiting = [(source, target)]
    made: list[tuple[str, str]] = []
    while waiting:
        old, new = waiting.pop()
        await pace.step()
        status = os.lstat(old)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(new, 0o700)
            made.append((old, new))
            waiting += [(f"{old}/{name}", f"{new}/{name}") for name in os.listdir(old)]
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(old), new)
            os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
        elif stat.S_ISREG(status.st_mode):
            await _copy_file(old, new, pace)
            _copy_status(old, new)
        elif stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            os.mknod(new, status.st_mode)
            _copy_status(old, new)
        else:
            raise OSError(errno.EXDEV, "a device cannot be moved between file systems", old)
    for old, new in reversed(made):
        _copy_status(old, new)


def _copy_status(old: str, new: str) -> None:
    status = os.lstat(old)
    for name in _xattrs(old):
        os.setxattr(new, name, os.getxattr(old, name, follow_symlinks=False), follow_symlinks=False)
    os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
    os.chmod(new, stat.S_IMODE(status.st_mode))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def _xattrs(path: str) -> list[str]:
    try:
        return [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user.")]
    except OSError:
        return []  # Safe: a file system without xattrs has none to lose.


async def _copy_file(old: str, new: str, pace: Pace) -> None:
    reader = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writer = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await pour(reader, writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


async def pour(reader: int, writer: int) -> int:
    """Append what is left of one open file to another inside the kernel. Returns the bytes moved. Raises OSError."""
    total = 0
    while moved := os.sendfile(writer, reader, None, _COPY_BYTES):
        total += moved
        await asyncio.sleep(0)
    return total
