"""What there is to say about a file: the protocol's EntryInfo, and the attributes clients keep in xattrs."""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import Any, Final, Protocol

from penstock.core.errors import Kind, PenstockError
from penstock.guest.paths import shown

XATTR_PREFIX: Final = "user.e2b."
METADATA_HEADER: Final = b"x-metadata-"
METADATA_KEY_BYTES_MAX: Final = 246  # xattr names are limited to 255 bytes, prefix included
METADATA_BYTES_MAX: Final = 4096

_YEAR_10000_S: Final = 253_402_300_800  # RFC 3339 has four digits for the year
_NO_XATTRS: Final = frozenset({errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENODATA, errno.ELOOP})

Entry = dict[str, Any]


class BadMetadata(PenstockError):
    kind = Kind.INVALID
    code = "bad_metadata"


class Names(Protocol):
    """Names of ids, from the sandbox's own /etc/passwd and /etc/group; the number as text when there is none."""

    def user_name(self, uid: int) -> str: ...
    def group_name(self, gid: int) -> str: ...


def entry_info(path: str, names: Names) -> Entry:
    """EntryInfo of `path`. A symlink is described as what it leads to, with `symlinkTarget`. Raises OSError."""
    own = target = os.lstat(path)
    leads_to: str | None = None
    kind = "FILE_TYPE_UNSPECIFIED"
    if stat.S_ISLNK(own.st_mode):
        try:
            leads_to = os.path.realpath(path, strict=True)
            target = os.stat(leads_to)
            kind = file_type(target.st_mode)
        except OSError:
            leads_to = path  # dangling, or a loop: the type stays unspecified
    else:
        kind = file_type(own.st_mode)
    entry: Entry = {
        "name": shown(os.path.basename(path)) or "/",
        "type": kind,
        "path": shown(path),
        "size": str(own.st_size),
        "mode": stat.S_IMODE(target.st_mode) & 0o777,
        "permissions": permissions(own.st_mode),
        "owner": names.user_name(own.st_uid),
        "group": names.group_name(own.st_gid),
        "modifiedTime": timestamp(own.st_mtime_ns),
    }
    if leads_to is not None:
        entry["symlinkTarget"] = shown(leads_to)
    if kind == "FILE_TYPE_FILE" and (metadata := read_metadata(path)):
        entry["metadata"] = metadata
    return entry


def file_type(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "FILE_TYPE_FILE"
    if stat.S_ISDIR(mode):
        return "FILE_TYPE_DIRECTORY"
    return "FILE_TYPE_UNSPECIFIED"


def permissions(mode: int) -> str:
    """Mode as clients of this protocol know it: flag letters, or "-", then rwx three times. Source: Go's FileMode."""
    letters = "d" if stat.S_ISDIR(mode) else "L" if stat.S_ISLNK(mode) else ""
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        letters += "D"
    letters += "p" if stat.S_ISFIFO(mode) else "S" if stat.S_ISSOCK(mode) else ""
    letters += "u" if mode & stat.S_ISUID else ""
    letters += "g" if mode & stat.S_ISGID else ""
    letters += "c" if stat.S_ISCHR(mode) else ""
    letters += "t" if mode & stat.S_ISVTX else ""
    bits = "".join(letter if mode & (0o400 >> at) else "-" for at, letter in enumerate("rwxrwxrwx"))
    return (letters or "-") + bits


def timestamp(ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds, as proto3 JSON wants it; times outside years 1-9999 are moved to its edge."""
    seconds, rest = divmod(ns, 1_000_000_000)
    if not -62_135_596_800 <= seconds < _YEAR_10000_S:
        seconds, rest = (_YEAR_10000_S - 1, 0) if seconds > 0 else (-62_135_596_800, 0)
    at = time.gmtime(seconds)
    text = f"{at.tm_year:04}-{at.tm_mon:02}-{at.tm_mday:02}T{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
    return f"{text}.{rest:09}Z" if rest else f"{text}Z"


# -- metadata --------------------------------------------------------------------------------------------------


def metadata_from(fields: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The `X-Metadata-<key>` headers of an upload; the first of equal keys counts. Raises BadMetadata."""
    found: dict[str, str] = {}
    total = 0
    for name, value in fields:
        if not name.startswith(METADATA_HEADER):
            continue
        key = name[len(METADATA_HEADER) :].decode("latin-1").lower()
        text = value.decode("latin-1")
        if key in found:
            continue
        if not key or not _printable(key) or not _printable(text):
            raise BadMetadata("metadata keys and values must be printable ASCII", which=key[:80])
        if len(key) > METADATA_KEY_BYTES_MAX:
            raise BadMetadata("metadata key is too long", which=key[:80], why=f"at most {METADATA_KEY_BYTES_MAX} bytes")
        total += len(key) + len(text)
        if total > METADATA_BYTES_MAX:
            raise BadMetadata("metadata is too long", why=f"at most {METADATA_BYTES_MAX} bytes in all")
        found[key] = text
    return found


def read_metadata(path: str | int) -> dict[str, str]:
    """Metadata of a file, also what programs inside set themselves. Empty where xattrs are not supported."""
    found: dict[str, str] = {}
    try:
        for name in os.listxattr(path):
            if name.startswith(XATTR_PREFIX):
                found[shown(name[len(XATTR_PREFIX) :])] = os.getxattr(path, name).decode("utf-8", "replace")
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
    return found


def write_metadata(fd: int, metadata: dict[str, str]) -> None:
    """Make `metadata` the whole metadata of the open file: what is not in it goes. Raises OSError.

    A file system without user xattrs takes an upload without metadata.
    """
    try:
        present = [name for name in os.listxattr(fd) if name.startswith(XATTR_PREFIX)]
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
        present = []
    for name in present:
        if name[len(XATTR_PREFIX) :] not in metadata:
            os.removexattr(fd, name)
    for key, value in metadata.items():
        os.setxattr(fd, XATTR_PREFIX + key, value.encode("ascii"))


def _printable(text: str) -> bool:
    return text.isascii() and (text.isprintable() or not text)
