"""The verbs of a cgroup hierarchy, which is a file system: make, write, read, list, remove."""

from __future__ import annotations

import os

from penstock.node.linux.absent import is_absent


class Tree:
    """One mounted hierarchy, or a folder that stands for one in a test. Paths are relative to `root`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def make(self, *parts: str) -> None:
        """Raises FileExistsError when it is there."""
        os.mkdir(self.path(*parts), 0o755)

    def write(self, value: str, *parts: str) -> None:
        """One write, as the kernel wants it. The error names the file and the value."""
        path = self.path(*parts)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            error.filename = path
            error.add_note(f"while writing {value!r}")
            raise

    def write_if_there(self, value: str, *parts: str) -> bool:
        """False when this kernel has no such file."""
        try:
            self.write(value, *parts)
        except FileNotFoundError:
            return False
        return True

    def read(self, *parts: str) -> str:
        with open(self.path(*parts), encoding="ascii") as file:
            return file.read()

    def open(self, flags: int, *parts: str) -> int:
        return os.open(self.path(*parts), flags | os.O_CLOEXEC)

    def exists(self, *parts: str) -> bool:
        return os.path.exists(self.path(*parts))

    def children(self, *parts: str) -> set[str]:
        """Names of the groups directly below; none when the group is absent."""
        try:
            with os.scandir(self.path(*parts)) as entries:
                return {each.name for each in entries if each.is_dir(follow_symlinks=False)}
        except OSError as error:
            if is_absent(error):
                return set()
            raise

    def remove(self, *parts: str) -> None:
        """Absent is success. Raises OSError with EBUSY while processes or children are in it."""
        try:
            os.rmdir(self.path(*parts))
        except OSError as error:
            if not is_absent(error):
                raise


def keyed(text: str) -> dict[str, int]:
    """The "name number" lines of files such as memory.stat, cgroup.events and cpu.stat."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.isdecimal():
            found[name] = int(value)
    return found


def pid_list(text: str) -> list[int]:
    return [int(each) for each in text.split()]
