"""The data folder of one installation: its identity, its secrets, its paths.

Everything Penstock keeps lies below this folder (mode 0700). `installation` names every kernel object, so that two
installations on one host never touch each other's. The folder is locked while a daemon runs on it.
"""

from __future__ import annotations

import fcntl
import os
import random
import secrets
from pathlib import Path
from typing import Final

from penstock.core.errors import Kind, PenstockError
from penstock.model.ids import mint_installation_id
from penstock.node.linux.claims import Claims
from penstock.run import children

FORMAT: Final = "1"  # of the folder's layout; an older daemon refuses a newer folder


class FolderInUse(PenstockError):
    """Another daemon runs on this folder. The message names its pid."""

    kind = Kind.CONFLICT
    code = "folder_in_use"


class FolderUnusable(PenstockError):
    """The folder cannot be used: not ours, a newer format, or no permission."""

    code = "folder_unusable"


class NotAnInstallation(PenstockError):
    """There is nothing at this path that Penstock made, or not enough of it to know its kernel objects by name."""

    kind = Kind.NOT_FOUND
    code = "not_an_installation"


class DataFolder:
    """Opens (and on first use makes) the folder at `path`. Takes no lock until `lock()`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.run = self.path / "run"
        self.zygote_socket = self.run / "zygote.sock"
        self.feed_socket = self.run / "feed.sock"
        self.door_socket = self.run / "daemon.sock"
        self.daemon_file = self.run / "daemon.json"
        self.zygote_file = self.run / "zygote.json"
        self.ingress_file = self.run / "ingress.json"
        self.zygote_log = self.run / "zygote.log"
        self.ingress_log = self.run / "ingress.log"
        self.router = self.run / "router"
        self.store = self.path / "store.db"
        self.layers = self.path / "layers"
        self.disks = self.path / "disks"
        self.tls = self.path / "tls"
        self._lock_fd = -1

    @property
    def exists(self) -> bool:
        return (self.path / "installation").exists()

    @property
    def in_use(self) -> bool:
        """Whether an earlier daemon left something running: a sandbox (by its record), the ingress or the zygote."""
        return self.zygote() is not None or self.ingress() is not None or any((self.path / "records").iterdir())

    def zygote(self) -> children.Child | None:
        """The living zygote of this folder, also when somebody removed its pid file."""
        return children.find("zygote", self.zygote_file) or children.search("zygote", self.zygote_log)

    def ingress(self) -> children.Child | None:
        """Likewise the ingress."""
        return children.find("ingress", self.ingress_file) or children.search("ingress", self.ingress_log)

    def require(self) -> DataFolder:
        """For those who look after an installation, and make none. Raises NotAnInstallation naming what is missing."""
        if self.exists:
            return self
        known = Claims().installation_at(str(self.path))
        if known is not None:
            raise NotAnInstallation(
                "the data folder does not say any more whose it is",
                which=str(self.path),
                why="its file `installation` is missing",
                now=f"this host knows it as {known}: write that word into {self.path}/installation",
            )
        raise NotAnInstallation(
            "no installation",
            which=str(self.path),
            why="the folder has no file `installation`" if self.path.is_dir() else "no such folder",
            now="name its folder with --data",
        )

    def open(self) -> DataFolder:
        """Make what is missing. Raises FolderUnusable when it cannot be made, is not ours or of another format."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FolderUnusable("data folder cannot be made", which=str(self.path), why=str(error)) from error
        try:
            return self._open()
        except OSError as error:
            raise FolderUnusable(
                "data folder cannot be used", which=str(self.path), why=str(error), now="name another with --data"
            ) from error

    def _open(self) -> DataFolder:
        if not self.exists and any(p.name != "penstock.toml" for p in self.path.iterdir()):
            raise FolderUnusable(
                "folder is not empty and not a data folder of Penstock",
                which=str(self.path),
                now="name another with --data",
            )
        self.path.chmod(0o700)  # also where somebody else made it: settings came first, or a package
        found = self._once("format", FORMAT)
        if found != FORMAT:
            raise FolderUnusable(
                "data folder has another format",
                which=str(self.path),
                why=f"format {found}, this version reads {FORMAT}",
                now="run the version that wrote it",
            )
        self._once("installation", mint_installation_id(random.SystemRandom()))
        self._once("seed", secrets.token_hex(32))
        self._once("api-key", "e2b_" + secrets.token_hex(20))
        self._once("admin-token", "adm_" + secrets.token_hex(20))
        for folder in (self.run, self.layers, self.disks, self.path / "records", self.run / "sb"):
            folder.mkdir(mode=0o700, exist_ok=True)
        return self

    @property
    def installation(self) -> str:
        return self._read("installation")

    @property
    def seed(self) -> bytes:
        """Seed of every sandbox's tokens. Never leaves root's processes on this machine."""
        return bytes.fromhex(self._read("seed"))

    @property
    def api_key(self) -> str:
        """The first key, kept for `penstock env` (mode 0600); the store holds only its hash."""
        return self._read("api-key")

    @property
    def admin_token(self) -> str:
        return self._read("admin-token")

    def lock(self, *, exclusive: bool = True) -> None:
        """Hold the folder for this process until it ends. Raises FolderInUse naming the holder."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode().strip()
            os.close(fd)
            raise FolderInUse(
                "another daemon runs on this data folder",
                which=str(self.path),
                why=f"pid {holder}",
                now=f"stop it with: penstock down --data {self.path}",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd

    def unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _read(self, name: str) -> str:
        return (self.path / name).read_text().strip()

    def _once(self, name: str, value: str) -> str:
        """The content of file `name`, written with `value` if absent: atomically, and never rewritten."""
        path = self.path / name
        if not path.exists():
            part = self.path / f".{name}.{os.getpid()}"
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(value + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(part, path)  # link, not rename: the first of two racing starters wins
            except FileExistsError:
                pass
            finally:
                part.unlink()
        return self._read(name)
