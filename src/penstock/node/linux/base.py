"""The template `base`: one immutable layer made from the machine's own packages, without a download.

Refused: `debootstrap` (40 s and a network), copying the files (200 MB and seconds of disk), bind-mounting the host's
/usr (an upgrade would change running sandboxes, and everything under it would be readable). Instead a whitelist, the
files of a closure of Debian packages, is hard-linked. dpkg replaces a file by renaming a new one over it, so the link
keeps the old content for ever. /etc, /root, /home and /var of the machine are never read: see `skeleton`.

A linked file shares its inode with the machine's, hence two rules. Nothing here ever changes the mode, owner or
content of one. And what dpkg would change is copied: before it unlinks a set-id or sticky file it closes the inode
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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from penstock.core.errors import Kind, PenstockError
from penstock.model.errors import Internal, Unsupported
from penstock.model.template import Layer
from penstock.node.linux.selection import REQUIRED_PACKAGES, Hosted, Plan, fingerprint, missing_packages, plan
from penstock.node.linux.skeleton import Folder, Symlink, Text

__all__ = ["REQUIRED_PACKAGES", "BuildStopped", "build_base", "missing_packages", "verify"]

_TRIES: Final = 3  # an upgrade of the machine may run under a build
_LDCONFIG_S: Final = 30.0
_LOCK_PAUSE_S: Final = 0.05

Progress = Callable[[str], None]


class BuildStopped(PenstockError):
    """Somebody set `stop`. Nothing half-made is left."""

    kind = Kind.UNAVAILABLE
    code = "build_stopped"


def build_base(
    layers_dir: str, *, progress: Progress = lambda _: None, root: str = "/", stop: threading.Event | None = None
) -> Layer:
    """The layer of `base` for the packages the machine has now; the same one when nothing changed. Blocks for seconds.

    Safe to call from several processes at once and to interrupt at any point: a half-made layer is swept by the next
    call. `stop`, set by another thread, ends it within some milliseconds and the removal of what was made. Raises
    BuildStopped, Unsupported naming the missing packages, Internal when the machine's packages keep changing.
    """
    stop = stop or threading.Event()
    if absent := missing_packages(root):
        raise Unsupported("the template base cannot be made", why=f"missing packages: {' '.join(absent)}",
                          now=f"apt-get install {' '.join(absent)}")  # fmt: skip
    os.makedirs(layers_dir, mode=0o700, exist_ok=True)
    with _alone(layers_dir, stop):
        for _ in range(_TRIES):
            try:
                return _build(layers_dir, progress, root, stop)
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


# -- building: a plan becomes a directory ------------------------------------------------------------------------------


@contextmanager
def _alone(layers_dir: str, stop: threading.Event) -> Iterator[None]:
    """Hold the directory's lock, and sweep what a killed build left. The lock dies with its process."""
    lock = os.open(os.path.join(layers_dir, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _locked(lock):
            _heed(stop)
            stop.wait(_LOCK_PAUSE_S)
        for name in os.listdir(layers_dir):
            if name.startswith(".building-"):
                shutil.rmtree(os.path.join(layers_dir, name))
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _heed(stop: threading.Event) -> None:
    if stop.is_set():
        raise BuildStopped("the build of base was stopped")


def _build(layers_dir: str, progress: Progress, root: str, stop: threading.Event) -> Layer:
    entries = plan(root)
    state = fingerprint(entries)
    if (known := _known(layers_dir, state)) is not None:
        progress("base: unchanged")
        return known
    work = tempfile.mkdtemp(prefix=".building-", dir=layers_dir)
    try:
        tree = os.path.join(work, "tree")
        _fill(tree, entries, progress, stop)
        _write_library_cache(tree, root)
        progress("base: digesting")
        rows = []
        for row in _rows(tree):
            _heed(stop)
            rows.append(json.dumps(row, sort_keys=True).encode() + b"\n")
        text = b"".join(rows)
        _write(os.path.join(work, "manifest"), Text(text, 0o600))
        final = os.path.join(layers_dir, _digest_of(text).removeprefix("sha256:"))
        _flush(layers_dir)  # a layer that is there is whole, also after a power cut
        # A layer's parents are closed to others; the layer itself must be open to the ids of every sandbox.
        os.chmod(work, 0o755)  # noqa: S103
        if not os.path.isdir(final):
            os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # Safe: what stays is swept by the next build.
    _remember(layers_dir, state, os.path.basename(final))
    layer = _known(layers_dir, state)
    assert layer is not None
    progress(f"base: ready, {layer.files} files, {layer.bytes >> 20} MiB")
    return layer


def _fill(tree: str, entries: Plan, progress: Progress, stop: threading.Event) -> None:
    os.mkdir(tree)
    os.chmod(tree, 0o755)  # noqa: S103 - the root directory of every sandbox
    linked = copied = 0
    for done, path in enumerate(sorted(entries)):
        _heed(stop)
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


def _known(layers_dir: str, state: str) -> Layer | None:
    name = _index(layers_dir).get(state)
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


def _remember(layers_dir: str, state: str, name: str) -> None:
    beside = os.path.join(layers_dir, ".building-index")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(_index(layers_dir) | {state: name}, file)
    os.replace(beside, os.path.join(layers_dir, "base.json"))
