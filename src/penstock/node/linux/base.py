"""The template `base`: one immutable layer made from the machine's own packages, without a download.

Refused: `debootstrap` (40 s and a network), copying the files (200 MB and seconds of disk), bind-mounting the host's
/usr (an upgrade would change running sandboxes, and everything under it would be readable). Instead a whitelist, the
files of a closure of Debian packages, is hard-linked. dpkg replaces a file by renaming a new one over it, so the link
keeps the old content for ever. /etc, /root, /home and /var of the machine are never read: see `skeleton`.

A linked file shares its inode with the machine's, hence two rules. Nothing here ever changes the mode, owner or
content of one. And what dpkg would change is copied: before it unlinks a file with set-id bits it takes them away
(chmod 0600, against old links of vulnerable programs), which would break `sudo` in every running sandbox.
What cannot be guarded against is an administrator who writes into a program in place; `verify` finds that.

Layout: `<layers>/<digest>/tree` is the lower directory, `<layers>/<digest>/manifest` one JSON line per entry, and
the digest is the SHA-256 of that file. `<layers>/base.json` remembers which plan gave which digest, so that asking
again costs one lstat per file. A layer is built beside and renamed into place; old ones are kept.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from penstock.model.errors import Internal, Unsupported
from penstock.model.template import Layer
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

_VERSION: Final = 1  # of what this module makes from the same packages; raise it to have every machine build anew
_TRIES: Final = 3  # an upgrade of the machine may run under a build
_LDCONFIG_S: Final = 30.0
_CHUNK: Final = 1 << 20

Progress = Callable[[str], None]


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


def build_base(layers_dir: str, *, progress: Progress = lambda _: None, root: str = "/") -> Layer:
    """The layer of `base` for the packages the machine has now; the same one when nothing changed. Blocks for seconds.

    Safe to call from several processes at once and to interrupt at any point: a half-made layer is swept by the next
    call. Raises Unsupported naming the missing packages, Internal when the machine's packages keep changing.
    """
    if absent := missing_packages(root):
        raise Unsupported("the template base cannot be made", why=f"missing packages: {' '.join(absent)}",
                          now=f"apt-get install {' '.join(absent)}")  # fmt: skip
    os.makedirs(layers_dir, mode=0o700, exist_ok=True)
    with _alone(layers_dir):
        for _ in range(_TRIES):
            try:
                return _build(layers_dir, progress, root)
            except FileNotFoundError as error:
                progress(f"base: {error.filename} went away, the machine's packages are changing; once more")
        raise Internal("the template base could not be made", why="the machine's packages keep changing under it",
                       now="wait for the upgrade to end")  # fmt: skip


def verify(layer: Layer) -> list[str]:
    """Compare every entry of the layer with its manifest. Returns what differs, one sentence each; reads everything."""
    try:
        with open(os.path.join(os.path.dirname(layer.path), "manifest"), "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return ["the manifest is missing"]
    problems = []
    if (digest := _digest_of(text)) != layer.digest:
        problems.append(f"the manifest has digest {digest}, not {layer.digest}")
    wanted = {row["path"]: row for row in map(json.loads, text.splitlines())}
    found = {row["path"]: row for row in _rows(layer.path)}
    problems += [f"{path} is missing" for path in sorted(wanted.keys() - found.keys())]
    problems += [f"{path} was added" for path in sorted(found.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        changed = [key for key in wanted[path] if wanted[path][key] != found[path].get(key)]
        if changed:
            problems.append(f"{path} changed its {', '.join(changed)}")
    return problems


# -- planning: which entries, from where ---------------------------------------------------------------------------


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
    return Hosted(path, status, mode, shared=not mode & 0o6000)


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


def _fingerprint(entries: Plan) -> str:
    """Names this plan: equal for equal packages. Without ctime, which our own links change."""
    total = hashlib.sha256(f"base {_VERSION}\n".encode())
    for path in sorted(entries):
        entry = entries[path]
        if isinstance(entry, Hosted):
            seen = entry.status
            parts: tuple[object, ...] = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, entry.mode)
        else:
            parts = (type(entry).__name__, *entry)
        total.update(repr((path, parts)).encode("utf-8", "surrogateescape"))
    return total.hexdigest()


# -- building: a plan becomes a directory ------------------------------------------------------------------------------


@contextmanager
def _alone(layers_dir: str) -> Iterator[None]:
    """Hold the directory's lock, and sweep what a killed build left. The lock dies with its process."""
    lock = os.open(os.path.join(layers_dir, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in os.listdir(layers_dir):
            if name.startswith(".building-"):
                shutil.rmtree(os.path.join(layers_dir, name))
        yield
    finally:
        os.close(lock)


def _build(layers_dir: str, progress: Progress, root: str) -> Layer:
    entries = plan(root)
    fingerprint = _fingerprint(entries)
    if (known := _known(layers_dir, fingerprint)) is not None:
        progress("base: unchanged")
        return known
    work = tempfile.mkdtemp(prefix=".building-", dir=layers_dir)
    try:
        tree = os.path.join(work, "tree")
        _fill(tree, entries, progress)
        _write_library_cache(tree, root)
        progress("base: digesting")
        text = b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in _rows(tree))
        _write(os.path.join(work, "manifest"), Text(text, 0o600))
        final = os.path.join(layers_dir, _digest_of(text).removeprefix("sha256:"))
        _flush(layers_dir)  # a layer that is there is whole, also after a power cut
        # A layer's parents are closed to others; the layer itself must be open to the ids of every sandbox.
        os.chmod(work, 0o755)  # noqa: S103
        if not os.path.isdir(final):
            os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # Safe: what stays is swept by the next build.
    _remember(layers_dir, fingerprint, os.path.basename(final))
    layer = _known(layers_dir, fingerprint)
    assert layer is not None
    progress(f"base: ready, {layer.files} files, {layer.bytes >> 20} MiB")
    return layer


def _fill(tree: str, entries: Plan, progress: Progress) -> None:
    os.mkdir(tree)
    os.chmod(tree, 0o755)  # noqa: S103 - the root directory of every sandbox
    linked = copied = 0
    for done, path in enumerate(sorted(entries)):
        if done % 2000 == 0:
            progress(f"base: {done} of {len(entries)} entries")
        entry, into = entries[path], os.path.join(tree, path)
        if isinstance(entry, Hosted):
            if entry.shared and _link(entry.path, into):
                linked += 1
            else:
                _copy(entry, into)
                copied += 1
        elif isinstance(entry, Folder):
            os.mkdir(into, 0o700)
            os.chown(into, entry.uid, entry.gid)
            os.chmod(into, entry.mode)
        elif isinstance(entry, Symlink):
            os.symlink(entry.target, into)
        else:
            _write(into, entry)
    progress(f"base: {linked} files linked, {copied} copied")


def _link(path: str, into: str) -> bool:
    """True when linked. Another file system, too many links, or one that has no links: copy."""
    try:
        os.link(path, into, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP}:
            return False
        raise
    return True


def _copy(entry: Hosted, into: str) -> None:
    shutil.copyfile(entry.path, into, follow_symlinks=False)
    os.chown(into, 0, 0)
    os.chmod(into, entry.mode)
    try:
        os.setxattr(into, "security.capability", os.getxattr(entry.path, "security.capability"))  # ping
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.ENOTSUP, errno.EPERM}:
            raise
    # Compiled Python is valid only for a source of this very second.
    os.utime(into, ns=(entry.status.st_mtime_ns, entry.status.st_mtime_ns))


def _write(into: str, text: Text) -> None:
    handle = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(text.content)
        os.fchown(handle, text.uid, text.gid)
        os.fchmod(handle, text.mode)


def _write_library_cache(tree: str, root: str) -> None:
    """etc/ld.so.cache for the layer's own libraries. Without one each start of a program searches directories."""
    ldconfig = next((p for p in ("/sbin/ldconfig.real", "/sbin/ldconfig") if os.path.exists(p)), None)
    if ldconfig is None or root != "/":
        return
    done = subprocess.run([ldconfig, "-X", "-i", "-r", tree], capture_output=True, timeout=_LDCONFIG_S, check=False)
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip()
        raise Internal("the library cache of base could not be made", why=why[-500:])
    shutil.rmtree(os.path.join(tree, "var/cache/ldconfig"), ignore_errors=True)  # names inodes of this machine


def _rows(tree: str) -> Iterator[dict[str, Any]]:
    """One row per entry of the tree, sorted by path at every level."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for name in sorted(os.listdir(os.path.join(tree, folder))):
            path = os.path.join(folder, name)
            status = os.lstat(os.path.join(tree, path))
            row: dict[str, Any] = {
                "path": path,
                "mode": stat.S_IMODE(status.st_mode),
                "uid": status.st_uid,
                "gid": status.st_gid,
            }
            if stat.S_ISDIR(status.st_mode):
                waiting.append(path)
                yield row | {"type": "directory"}
            elif stat.S_ISLNK(status.st_mode):
                yield row | {"type": "symlink", "target": os.readlink(os.path.join(tree, path))}
            else:
                digest = _digest_of_file(os.path.join(tree, path))
                yield row | {"type": "file", "size": status.st_size, "sha256": digest}


def _flush(folder: str) -> None:
    """syncfs(2), which Python lacks: one journal commit instead of a hundred by fsync."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", folder)
    finally:
        os.close(handle)


def _digest_of(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _digest_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- which plan gave which layer ---------------------------------------------------------------------------------------


def _index(layers_dir: str) -> dict[str, str]:
    try:
        with open(os.path.join(layers_dir, "base.json"), "rb") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}  # Safe: the layer is then built again and comes out the same.
    return found if isinstance(found, dict) else {}


def _known(layers_dir: str, fingerprint: str) -> Layer | None:
    name = _index(layers_dir).get(fingerprint)
    if name is None:
        return None
    home = os.path.join(layers_dir, name)
    try:
        with open(os.path.join(home, "manifest"), "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    if _digest_of(text) != f"sha256:{name}":
        raise Internal("a layer is damaged", which=home, why="its manifest does not match its name", now="remove it")
    sizes = [row["size"] for row in map(json.loads, text.splitlines()) if row["type"] == "file"]
    return Layer(digest=f"sha256:{name}", path=os.path.join(home, "tree"), bytes=sum(sizes), files=len(sizes))


def _remember(layers_dir: str, fingerprint: str, name: str) -> None:
    beside = os.path.join(layers_dir, ".building-index")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(_index(layers_dir) | {fingerprint: name}, file)
    os.replace(beside, os.path.join(layers_dir, "base.json"))
