"""The loop that is made before a fork and opened after it."""

from __future__ import annotations

import os
import select
import signal
import socket

from penstock.guest.loop import EpollSelector, ForkedLoop

WITHIN_S = 10.0


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_it_holds_no_descriptor_until_it_is_opened_and_none_after_it_is_closed() -> None:
    before = descriptors()
    loop = ForkedLoop()
    assert descriptors() == before
    loop.open()
    assert len(descriptors()) > len(before)
    loop.close()
    assert descriptors() == before


def test_two_forks_of_one_loop_share_no_wake_up() -> None:
    """A signal to one wakes that one alone: with one self-pipe for both, either may read the other's byte."""
    loop = ForkedLoop()
    told, tell = os.pipe()
    pids = [_fork(loop, tell) for _ in range(2)]
    try:
        assert {_said(told) for _ in pids} == {b"r"}
        os.kill(pids[0], signal.SIGUSR1)
        assert _said(told) == b"s"
        assert not select.select([told], [], [], 0.2)[0], "the other one was woken, too"
        os.kill(pids[1], signal.SIGUSR1)
        assert _said(told) == b"s"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)
        loop.close()


def _fork(loop: ForkedLoop, tell: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            loop.open()
            loop.on_signal(signal.SIGUSR1, lambda: os.write(tell, b"s"))
            loop.call_soon(os.write, tell, b"r")
            loop.run_forever()
        finally:
            os._exit(1)
    return pid


def _said(fd: int) -> bytes:
    assert select.select([fd], [], [], WITHIN_S)[0]
    return os.read(fd, 1)


def test_readiness_is_told_as_by_the_standard_selector() -> None:
    selector = EpollSelector()
    selector.open()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        key = selector.register(ours, 1 | 2, "data")  # EVENT_READ | EVENT_WRITE
        assert selector.select(0) == [(key, 2)]
        theirs.send(b"x")
        assert selector.select(0) == [(key, 3)]
        key = selector.modify(ours, 1, "new")
        assert selector.get_key(ours) == key == selector.get_map()[ours.fileno()]
        assert selector.select(0) == [(key, 1)]
        ours.recv(1)
        assert selector.select(0) == []
        theirs.close()
        assert selector.select(None) == [(key, 1)]  # its end can be read
        fd = ours.fileno()
        ours.close()
        assert selector.unregister(fd) == key  # closed before: the kernel has forgotten it
    selector.close()
