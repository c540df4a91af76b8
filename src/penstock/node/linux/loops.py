"""Loop devices: a file as a block device, which lets go of the file by itself when its last user closes it.

The kernel starts with eight and makes more on demand; devtmpfs makes their nodes, and where /dev is something else we
do. An idle device stays (0.1 MiB): taking one away costs the kernel 43 ms, so that is done at the end, in parallel,
and only for those that did not exist when we began.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from typing import Final

_CONTROL: Final = "/dev/loop-control"
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_REMOVE: Final = 0x4C81
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS_AUTOCLEAR: Final = 4
_MAJOR: Final = 7
_BLOCK_BYTES: Final = 4_096
_ATTEMPTS_MAX: Final = 128  # each lost to another process that took the free device before us

_taking = threading.Lock()  # from "which is free" to "it is mine", among our own threads


def attach(image_fd: int) -> tuple[int, int]:
    """Back a free loop device by `image_fd`: (number, descriptor of the device).

    The device lets go of the image when the last descriptor or mount of it is gone. Raises OSError, EBUSY when other
    processes took every device we were offered.
    """
    info = struct.pack("=5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
    request = struct.pack("=2I", image_fd, _BLOCK_BYTES) + info + bytes(64)
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS_MAX):
            with _taking:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                device = _open(number)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, request)
                    return number, device
                except OSError as error:
                    os.close(device)
                    if error.errno not in (errno.EBUSY, errno.ENXIO):
                        raise
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device stayed free long enough")


def backing(number: int) -> str | None:
    """The path of the file behind device `number` (with " (deleted)" when it has no name any more), None when idle."""
    try:
        with open(f"/sys/block/loop{number}/loop/backing_file") as file:
            return file.read().rstrip("\n")
    except OSError:
        return None  # no such device, idle, or it became so while we read


def numbers() -> list[int]:
    """Every loop device the kernel has, idle ones included."""
    return [int(name[4:]) for name in os.listdir("/sys/block") if name.startswith("loop") and name[4:].isdigit()]


def find(path: str) -> int | None:
    """The device backed by the file at `path`. Reads one small file per device that exists."""
    return next((number for number in numbers() if backing(number) == path), None)


def discard(number: int) -> None:
    """Remove an idle device. Absent is success, in use too: then it is somebody's."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EBUSY):
            raise
    finally:
        os.close(control)


def _open(number: int) -> int:
    path = f"/dev/loop{number}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    try:
        os.mknod(path, 0o060600, os.makedev(_MAJOR, number))
    except FileExistsError:
        pass
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
