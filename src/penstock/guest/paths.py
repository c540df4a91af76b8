"""From a path as a client wrote it to a path the kernel takes, and directories on the way to it.

Rules of the protocol: empty means the default directory, `~` and `~/…` the user's home, relative is below the home,
absolute stays. `..` is left to the kernel: folding it in text gives another file wherever a symlink is in the way.
"""

from __future__ import annotations

import os
import stat
from typing import Final, Protocol

from penstock.core.errors import Kind, PenstockError

PATH_BYTES_MAX: Final = 4095  # Linux PATH_MAX without its NUL


class BadPath(PenstockError):
    """No file can be meant by this. The caller must change the path."""

    kind = Kind.INVALID
    code = "bad_path"

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Account(Protocol):
    """What is needed of a user of the sandbox."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def home(self) -> str: ...


def resolve(raw: str, home: str, default: str = "") -> str:
    """The absolute path meant by `raw`, without doubled or trailing slashes and without `.`. Raises BadPath.

    A trailing slash must go: `lstat("link/")` would follow the link, and `remove` would leave through it.
    """
    if "\0" in raw:
        raise BadPath("path contains a NUL byte")
    if not raw:
        path = default or home
    elif raw == "~" or raw.startswith("~/"):
        path = home + raw[1:]
    elif raw.startswith("~"):
        raise BadPath("the home of another user cannot be named by ~; give the absolute path")
    elif raw.startswith("/"):
        path = raw
    else:
        path = f"{home}/{raw}"
    path = "/" + "/".join(part for part in path.split("/") if part not in {"", "."})
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise BadPath("path is not valid UTF-8") from None
    if len(encoded) > PATH_BYTES_MAX:
        raise BadPath(f"path is longer than {PATH_BYTES_MAX} bytes")
    return path


def shown(text: str) -> str:
    """A name as it may stand in JSON: bytes that are not UTF-8 become U+FFFD, since clients refuse lone surrogates."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def make_directories(path: str, owner: Account) -> bool:
    """Make `path` and what is missing above it, 0755, the new ones owned by `owner`. True when `path` is new.

    Raises NotADirectoryError when something on the way is no directory, FileExistsError when `path` itself is none.
    Another maker at the same time is success.
    """
    missing: list[str] = []
    at = path
    while True:
        try:
            status = os.stat(at)
        except FileNotFoundError:
            missing.append(at)
            at = os.path.dirname(at)
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise (
                FileExistsError(17, "exists and is not a directory", at)
                if at == path
                else NotADirectoryError(20, "is not a directory", at)
            )
        break
    for folder in reversed(missing):
        try:
            os.mkdir(folder, 0o755)
        except FileExistsError:
            if not os.path.isdir(folder):  # a dangling symlink, or a file made this moment
                raise
            continue
        os.chown(folder, owner.uid, owner.gid, follow_symlinks=False)
    return bool(missing)
