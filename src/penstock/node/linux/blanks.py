"""Preformatted ext4 images, one per size, from which every disk is cloned.

A clone copies what is not a hole: 60 KiB for 1 GiB, 0.2 ms, where mkfs takes 6. The image is larger than the promise
by what ext4 keeps for itself, so that a sandbox can write as many bytes, and make as many files, as its limit says.

No journal: a disk dies with its sandbox, and a journal would mean a kernel thread and a flush per commit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from typing import Final

from penstock.node.linux import loops, rootfs, syscalls
from penstock.node.linux.syscalls import MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV

LAYOUT: Final = 1  # of what lies in an image; another number, another blank
BLOCK_BYTES: Final = 4_096
_INODE_BYTES: Final = 256
_OWN_INODES: Final = 32  # the file system's, and those of the directories we put in
_SLACK_BYTES: Final = 64 * 1024
_ROUNDS_MAX: Final = 4
_MKE2FS_S: Final = 60.0
# Named one by one from nothing, so that the machine's mke2fs.conf and its version make no difference.
_FEATURES: Final = "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super2,large_file,huge_file,dir_nlink," + (
    "extra_isize,uninit_bg,64bit"
)
# noinit_itable: the tables of a fresh image are holes, hence zero; a background thread would write the zeroes out.
# nobarrier: a flush would wait for the host's own journal, for data that dies with the machine anyway.
_OPTIONS: Final[dict[str, str | None]] = {"noinit_itable": None, "nobarrier": None}


class Blanks:
    """Blanks in `folder`, made on first use. Thread-safe; blocks."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._making = threading.Lock()

    def clone(self, path: str, *, bytes_max: int, inodes_max: int) -> int:
        """Write a fresh image at `path`, which must not exist; its descriptor is the caller's. Raises OSError."""
        blank = os.open(self._blank(bytes_max, inodes_max), os.O_RDONLY | os.O_CLOEXEC)
        try:
            image = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                copy_data(blank, image)
            except BaseException:
                os.close(image)
                raise
            return image
        finally:
            os.close(blank)

    def _blank(self, bytes_max: int, inodes_max: int) -> str:
        path = f"{self._folder}/{bytes_max}-{inodes_max}-{LAYOUT}"
        if not os.path.exists(path):
            with self._making:
                if not os.path.exists(path):
                    os.makedirs(self._folder, mode=0o700, exist_ok=True)
                    _make(path, bytes_max, inodes_max)
        return path


def mount(number: int) -> int:
    """Mount the image behind loop device `number`, attached nowhere. A second mount shares the file system."""
    return syscalls.mount_detached("ext4", f"/dev/loop{number}", _OPTIONS, MOUNT_ATTR_NOATIME | MOUNT_ATTR_NODEV)


def copy_data(source: int, target: int) -> None:
    """Copy a sparse file into an empty one: what is not a hole."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: only holes from here on
        end = os.lseek(source, position, os.SEEK_HOLE)
        while position < end:
            copied = os.copy_file_range(source, target, end - position, position, position)
            if copied == 0:
                raise OSError(5, "the image shrank while it was copied")
            position += copied


def _make(path: str, bytes_max: int, inodes_max: int) -> None:
    """Format until the free space is the promised one: what ext4 keeps depends on the size in steps."""
    part = f"{path}.{os.getpid()}.part"
    size = bytes_max + inodes_max * _INODE_BYTES
    try:
        for _ in range(_ROUNDS_MAX):
            _format(part, size, inodes_max)
            surplus = _free_bytes(part) - bytes_max
            if 0 <= surplus <= max(_SLACK_BYTES, bytes_max // 1000):
                break
            size += _SLACK_BYTES // 2 - surplus
        if surplus < 0:
            raise OSError(28, f"no ext4 image gives {bytes_max} free bytes (it lacks {-surplus})", path)
        os.rename(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _format(path: str, size: int, inodes_max: int) -> None:
    with tempfile.TemporaryDirectory(prefix="penstock-blank-") as tree:
        os.mkdir(f"{tree}/work", 0o755)
        for name in ("upper", *(f"upper/{top}" for top in rootfs.TOP_LEVEL)):
            os.mkdir(f"{tree}/{name}", 0o755)
        with open(path, "wb") as file:
            file.truncate(size // BLOCK_BYTES * BLOCK_BYTES)
        command = [
            *(_mke2fs(), "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-I", str(_INODE_BYTES), "-m", "0"),
            *("-N", str(inodes_max + _OWN_INODES), "-O", _FEATURES, "-d", tree),
            *("-E", "lazy_itable_init=1,root_owner=0:0,nodiscard", path),
        ]
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_MKE2FS_S,
            check=False,
            env={"MKE2FS_CONFIG": "/dev/null", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    if ran.returncode != 0:
        raise OSError(5, f"mke2fs: {ran.stderr.strip()[-400:]}", path)


def _mke2fs() -> str:
    found = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise FileNotFoundError(2, "mke2fs is not installed; it comes with e2fsprogs", "mke2fs")
    return found


def _free_bytes(path: str) -> int:
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        number, device = loops.attach(image)
        try:
            mounted = mount(number)
        finally:
            os.close(device)
        try:
            state = os.statvfs(mounted)
            return state.f_bavail * state.f_frsize
        finally:
            os.close(mounted)
    finally:
        os.close(image)
