"""Which files of the machine make up the template `base`: the whitelist, as a plan of entries.

Nothing is made here. The plan of a machine with 700 packages takes about 0.3 s: one lstat per file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Final, NamedTuple

from penstock.node.linux.packages import Alternative, Database
from penstock.node.linux.skeleton import Folder, Made, Symlink, Text, skeleton

# Each line is a relation as dpkg writes it; the closure of their dependencies comes along. What for:
REQUIRED_PACKAGES: Final = (
    "base-files",  # os-release
    "bash",
    "dash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "mawk | gawk",
    "diffutils",
    "debianutils",
    # archives that agents unpack
    "tar",
    "gzip",
    "bzip2",
    "xz-utils",
    # the SDK's git helpers and git daemon; downloads; the pager git wants
    "git",
    "curl",
    "ca-certificates",
    "less",
    # code to run; perl-base for Debian's own scripts
    "python3",
    "perl-base",
    # ps, pgrep; setsid; ss; ping
    "procps",
    "util-linux",
    "hostname",
    "iproute2",
    "iputils-ping",
    "netbase",
    # tput, and the terminals a PTY names
    "ncurses-bin",
    "ncurses-base",
    # becoming root; ldconfig and C.UTF-8; time zones
    "sudo",
    "passwd",
    "login",
    "libc-bin",
    "tzdata",
)

# Taken where the machine has them; a person would miss them, no test does.
OPTIONAL_PACKAGES: Final = ("python3-pip", "python3-venv", "nano", "file", "unzip", "jq", "patch", "openssh-client")

# Package management is not in `base`: without the whole of /var/lib/dpkg and /etc it could only damage the sandbox.
_WITHOUT: Final = frozenset({"dpkg", "debconf", "init-system-helpers", "git-man", "adduser", "systemd", "udev"})

_TOPS: Final = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Pages nobody reads in a sandbox, and what only the machine's own init, kernel or package manager uses.
_SKIPPED: Final = (
    "usr/include/",
    "usr/lib/modules/",
    "usr/lib/systemd/",
    "usr/lib/sysusers.d/",
    "usr/lib/tmpfiles.d/",
    "usr/lib/udev/",
    "usr/local/",
    "usr/share/applications/",
    "usr/share/apport/",
    "usr/share/bug/",
    "usr/share/doc-base/",
    "usr/share/gitweb/",
    "usr/share/icons/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
    "usr/share/menu/",
    "usr/share/pixmaps/",
    "usr/src/",
)
_SKIPPED_NAMES: Final = frozenset({"EXTERNALLY-MANAGED"})  # `pip install` in a sandbox endangers no package manager

VERSION: Final = 1  # of what is made from the same packages; raise it to have every machine build anew


class Hosted(NamedTuple):
    """A file of the machine. Linked when its inode may be shared, else copied with `mode`, owned by root."""

    path: str
    status: os.stat_result
    mode: int
    shared: bool


Entry = Made | Hosted
Plan = dict[str, Entry]


def missing_packages(root: str = "/") -> list[str]:
    """Names to give to `apt-get install` so that `build_base` can work. Everything, where there is no dpkg."""
    try:
        database = Database.read(root)
    except FileNotFoundError:
        return [relation.split(" ")[0] for relation in REQUIRED_PACKAGES]
    return [relation.split(" ")[0] for relation in REQUIRED_PACKAGES if database.find(relation) is None]


def plan(root: str) -> Plan:
    """Every entry of the layer by path without leading slash, parents included, from the packages `root` has."""
    database = Database.read(root)
    names = database.closure((*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES), without=_WITHOUT)
    entries: Plan = {}
    for top in _TOPS[1:]:
        if os.path.islink(os.path.join(root, top)):
            entries[top] = Symlink(os.readlink(os.path.join(root, top)))
    places = _Places(root)
    for name in names:
        for listed in database.files(name):
            _add_listed(entries, places, listed)
    _add_alternatives(entries, database.alternatives())
    entries |= skeleton()
    entries |= _from_packages(database, names, places)
    for path in list(entries):
        while path := os.path.dirname(path):
            entries.setdefault(path, Folder())
    return entries


def fingerprint(entries: Plan) -> str:
    """Names this plan: equal for equal packages. Without ctime, which our own links change."""
    total = hashlib.sha256(f"base {VERSION}\n".encode())
    for path in sorted(entries):
        entry = entries[path]
        if isinstance(entry, Hosted):
            seen = entry.status
            parts: tuple[object, ...] = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, entry.mode)
        else:
            parts = (type(entry).__name__, *entry)
        total.update(repr((path, parts)).encode("utf-8", "surrogateescape"))
    return total.hexdigest()


# -- parts of a plan --------------------------------------------------------------------------------------------------


class _Places:
    """Where a listed path really lies: dpkg lists /bin/ls on a machine whose /bin is a link to usr/bin."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self._parents: dict[str, str | None] = {}

    def real(self, listed: str) -> str | None:
        """Path below root with links in its parents resolved, or None when it lies outside the whitelist."""
        parent, name = os.path.split(listed.lstrip("/"))
        if parent not in self._parents:
            self._parents[parent] = self._inside(os.path.join(self.root, parent))
        folder = self._parents[parent]
        if folder is None:
            return None
        path = f"{folder}/{name}" if folder else name
        if path.split("/", 1)[0] not in _TOPS or name in _SKIPPED_NAMES or (path + "/").startswith(_SKIPPED):
            return None
        if path.startswith("usr/share/doc/") and name != "copyright":
            return None
        return path

    def _inside(self, folder: str) -> str | None:
        real = os.path.realpath(folder)
        prefix = self.root.rstrip("/") + "/"
        if real == self.root:
            return ""
        return real[len(prefix) :] if real.startswith(prefix) else None


def _add_listed(entries: Plan, places: _Places, listed: str) -> None:
    path = places.real(listed)
    if path is None or path in entries:
        return
    entry = _entry_of(os.path.join(places.root, path))
    if entry is None or (isinstance(entry, Folder) and path.startswith("usr/share/doc/")):
        return
    entries[path] = entry
    # dpkg does not list what Python compiled at installation. Without it each start of python3 compiles anew, since
    # `user` may not write there: 21 ms against 9 ms.
    if path.endswith(".py") and isinstance(entry, Hosted):
        _add_compiled(entries, places, path)


def _add_compiled(entries: Plan, places: _Places, source: str) -> None:
    folder, name = os.path.split(source)
    version = next((part[6:] for part in folder.split("/") if part.startswith("python3.")), None)
    tags = [f"cpython-{version.replace('.', '')}"] if version else _tags(places)
    for tag in tags:
        path = f"{folder}/__pycache__/{name[:-3]}.{tag}.pyc"
        entry = _entry_of(os.path.join(places.root, path))
        if isinstance(entry, Hosted):
            entries[path] = entry


def _tags(places: _Places) -> list[str]:
    """Cache tags of the machine's own Pythons, for dist-packages that serve several versions."""
    try:
        names = os.listdir(os.path.join(places.root, "usr/lib"))
    except FileNotFoundError:
        return []
    return sorted(f"cpython-{name[6:].replace('.', '')}" for name in names if name.startswith("python3."))


def _entry_of(path: str) -> Entry | None:
    """How the file of the machine enters the layer; None when it must not, or is not there."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(status.st_mode):
        return Folder()
    if stat.S_ISLNK(status.st_mode):
        return Symlink(os.readlink(path))
    mode = stat.S_IMODE(status.st_mode)
    # Neither device nodes, nor what the machine does not let everybody read: somebody had a reason.
    if not stat.S_ISREG(status.st_mode) or not mode & 0o004:
        return None
    if status.st_uid != 0 or status.st_gid != 0:
        # The machine's other groups mean nothing inside; such programs (chage, ssh-agent) also work without set-gid.
        return Hosted(path, status, mode & 0o755, shared=False)
    return Hosted(path, status, mode, shared=not mode & 0o7000)


def _add_alternatives(entries: Plan, alternatives: list[Alternative]) -> None:
    """awk, pager, which…: links no package lists. The best choice the layer has, not the administrator's."""
    for alternative in alternatives:
        master = next(iter(alternative.links.values()))
        fitting = [each for each in alternative.choices if _in_layer(entries, each.targets.get(master, ""))]
        if not fitting:
            continue
        best = max(fitting, key=lambda each: (each.priority, each.targets[master]))
        for name, link in alternative.links.items():
            target = best.targets.get(link, "")
            path = _through_tops(entries, link)
            if _in_layer(entries, target) and path not in entries:
                entries[path] = Symlink(f"/etc/alternatives/{name}")
                entries[f"etc/alternatives/{name}"] = Symlink(target)


def _through_tops(entries: Plan, path: str) -> str:
    top, _, rest = path.lstrip("/").partition("/")
    link = entries.get(top)
    return f"{link.target.lstrip('/')}/{rest}" if isinstance(link, Symlink) else f"{top}/{rest}"


def _in_layer(entries: Plan, target: str) -> bool:
    return _through_tops(entries, target) in entries


def _from_packages(database: Database, names: list[str], places: _Places) -> dict[str, Made]:
    """What is written from public data of packages: certificates, library paths, the list of what is installed."""
    certificates = b""
    for listed in sorted(database.files("ca-certificates")):
        if listed.startswith("/usr/share/ca-certificates/") and listed.endswith(".crt"):
            with open(os.path.join(places.root, listed[1:]), "rb") as file:
                certificates += file.read().rstrip() + b"\n"
    libraries = [
        name[len("usr/lib/") :] for name in (places.real("/usr/lib/" + each) for each in _triplets(places)) if name
    ]
    lines = "".join(f"/usr/local/lib/{each}\n/lib/{each}\n/usr/lib/{each}\n" for each in libraries)
    status = "".join(
        f"Package: {name}\nStatus: install ok installed\nArchitecture: {package.architecture}\n"
        f"Version: {package.version}\nMaintainer: none\nDescription: part of the template base\n\n"
        for name in names
        for package in (database.packages[name],)
    )
    version = database.packages["base-files"].version if "base-files" in database.packages else ""
    return {
        "etc/ssl/certs/ca-certificates.crt": Text(certificates),
        "etc/ld.so.conf.d/libraries.conf": Text(f"/usr/local/lib\n{lines}".encode()),
        "etc/debian_version": Text(version.split("+")[0].encode() + b"\n"),
        "var/lib/dpkg/status": Text(status.encode()),
    }


def _triplets(places: _Places) -> list[str]:
    try:
        names = os.listdir(os.path.join(places.root, "usr/lib"))
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.endswith(("-linux-gnu", "-linux-gnueabihf")))
