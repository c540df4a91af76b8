"""User namespaces: ids, owner, and ceilings of their own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from penstock.node.linux import syscalls, userns

pytestmark = pytest.mark.root
BASE = 701 << 16
_NS_GET_OWNER_UID = 0xB704
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def namespace() -> Iterator[int]:
    fd = userns.create(BASE)
    yield fd
    os.close(fd)


def inside(fd: int, program: str) -> list[str]:
    """Run Python text as root of the namespace; what it prints, by words."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.close(reading)
        syscalls.setns(fd, syscalls.CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.execv("/usr/bin/python3", ["python3", "-I", "-S", "-c", program])
    os.close(writing)
    with os.fdopen(reading) as output:
        words = output.read().split()
    os.waitpid(child, 0)
    return words


def test_its_root_is_the_first_of_its_range(namespace: int) -> None:
    assert inside(namespace, "print(open('/proc/self/uid_map').read(), open('/proc/self/gid_map').read())") == [
        *("0", str(BASE), "65536"),
        *("0", str(BASE), "65536"),
    ]


def test_the_owner_is_its_own_root_so_that_nothing_is_charged_to_the_hosts(namespace: int) -> None:
    owner = ctypes.c_uint()
    assert libc.ioctl(namespace, _NS_GET_OWNER_UID, ctypes.byref(owner)) == 0
    assert owner.value == BASE


def test_no_namespace_of_any_kind_can_be_made_inside(namespace: int) -> None:
    tries = (
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
        "for kind in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x4000000, 0x8000000, 0x2000000):\n"
        "    print(l.unshare(kind), ctypes.get_errno())"
    )
    assert inside(namespace, tries) == ["-1", "28"] * 7  # ENOSPC: the ceiling, before any other check


def test_its_root_cannot_raise_the_ceilings(namespace: int) -> None:
    """It could with CAP_SYS_RESOURCE, which a sandbox does not have: see the launch tests. Here: they are set."""
    text = "print(*(open('/proc/sys/user/max_' + n).read() for n in ('user_namespaces', 'inotify_instances')))"
    assert inside(namespace, text) == ["0", "128"]


def test_taking_every_inotify_instance_leaves_the_host_and_a_neighbour_theirs(namespace: int) -> None:
    hog = (
        "import ctypes, os, time\nl = ctypes.CDLL(None, use_errno=True)\nn = 0\n"
        "while l.inotify_init1(0) >= 0: n += 1\n"
        "print(n, ctypes.get_errno(), flush=True)\n"
    )
    neighbour = userns.create(BASE + userns.IDS)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        syscalls.setns(namespace, syscalls.CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.execv("/usr/bin/python3", ["python3", "-I", "-S", "-c", hog + "time.sleep(60)"])
    try:
        assert os.read(reading, 64).split() == [b"128", b"24"]
        of_host = libc.inotify_init1(os.O_CLOEXEC)
        assert of_host >= 0
        os.close(of_host)
        assert inside(neighbour, hog) == ["128", "24"]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        for fd in (reading, writing, neighbour):
            os.close(fd)


def test_nothing_stays_when_it_cannot_be_made() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        userns.create((1 << 32) - 1)  # no such user: -1 means "leave as is", the namespace would be root's
    assert len(os.listdir("/proc/self/fd")) == before
