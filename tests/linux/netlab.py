"""A host and an outside world made of network namespaces, so that no packet of a test leaves this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from penstock.node.linux import netns

T = TypeVar("T")
HOST, OUTSIDE = "198.51.100.2", "198.51.100.1"
SERVER, OTHER_SERVER = "203.0.113.10", "203.0.113.20"
PRIVATE_SERVER, METADATA = "10.9.9.9", "169.254.169.254"


def make_netns() -> int:
    """A descriptor of a new network namespace, with lo up."""

    def work() -> int:
        fd = netns.leave_for_new()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return fd

    made: list[int] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join()
    return made[0]


def inside(fd: int, work: Callable[[], T]) -> T:
    return netns.run_inside(fd, work)


def run(fd: int, *argv: str, check: bool = True) -> str:
    """Run a program inside namespace `fd` and return what it printed."""
    done = inside(fd, lambda: subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False))
    if check and done.returncode:
        raise AssertionError(f"{argv}: {done.stderr}")
    return done.stdout


class Lab:
    """`host` has eth0 to `outside`, which holds the public, private and metadata addresses that sandboxes dial."""

    def __init__(self) -> None:
        self.host = make_netns()
        self.outside = make_netns()
        self._closers: list[Callable[[], None]] = [lambda: os.close(self.host), lambda: os.close(self.outside)]
        peer = f"/proc/{os.getpid()}/fd/{self.outside}"
        run(self.host, *f"ip link add eth0 mtu 1400 type veth peer name eth0 netns {peer}".split())
        run(self.host, "ip", "addr", "add", f"{HOST}/24", "dev", "eth0")
        run(self.host, "ip", "link", "set", "eth0", "up")
        run(self.outside, "ip", "link", "set", "eth0", "up", "mtu", "1400")
        run(self.outside, "ip", "addr", "add", f"{OUTSIDE}/24", "dev", "eth0")
        for address in (SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA):
            run(self.outside, "ip", "addr", "add", f"{address}/32", "dev", "lo")
        run(self.host, "ip", "route", "add", "default", "via", OUTSIDE)

    def close(self) -> None:
        for each in reversed(self._closers):
            each()

    def serve_tcp(self, fd: int, address: str, port: int) -> None:
        """Echo with the peer's address before: `<address> <data>`."""
        listener = inside(fd, lambda: socket.create_server((address, port)))
        self._closers.append(lambda: (listener.shutdown(socket.SHUT_RDWR), listener.close()))  # type: ignore[arg-type]

        def talk(conn: socket.socket, peer: str) -> None:
            with conn, contextlib.suppress(OSError):
                while data := conn.recv(1 << 16):
                    conn.sendall(peer.encode() + b" " + data)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, peer = listener.accept()
                    threading.Thread(target=talk, args=(conn, peer[0]), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()

    def serve_lengths(self, fd: int, address: str, port: int, answer: Callable[[bytes], bytes]) -> None:
        """Messages with two bytes of length before each, one connection at a time."""
        listener = inside(fd, lambda: socket.create_server((address, port)))
        self._closers.append(lambda: (listener.shutdown(socket.SHUT_RDWR), listener.close()))  # type: ignore[arg-type]

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _ = listener.accept()
                    with conn, contextlib.suppress(OSError), conn.makefile("rb") as file:
                        while head := file.read(2):
                            reply = answer(file.read(int.from_bytes(head, "big")))
                            conn.sendall(len(reply).to_bytes(2, "big") + reply)

        threading.Thread(target=serve, daemon=True).start()

    def serve_udp(self, fd: int, address: str, port: int, answer: Callable[[bytes], bytes]) -> None:
        sock = inside(fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        inside(fd, lambda: sock.bind((address, port)))
        sock.settimeout(30)
        self._closers.append(sock.close)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    data, peer = sock.recvfrom(65535)
                    if reply := answer(data):
                        sock.sendto(reply, peer)

        threading.Thread(target=serve, daemon=True).start()


def dial(fd: int, address: str, port: int, *, within_s: float = 1.0) -> socket.socket:
    """A TCP connection from namespace `fd`. Raises ConnectionRefusedError or TimeoutError."""
    made = inside(fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.settimeout(within_s)
    try:
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def outcome(fd: int, address: str, port: int, *, within_s: float = 0.4) -> str:
    """ "open", "refused", "unreachable" or "silent"."""
    try:
        dial(fd, address, port, within_s=within_s).close()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silent"
    except OSError:
        return "unreachable"
    return "open"


def make_userns(uid_base: int, *, count: int = 65_536) -> int:
    """A descriptor of a user namespace that maps `count` ids from `uid_base`."""
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        os.write(ready_w, b"x" if libc.unshare(0x1000_0000) == 0 else b"!")
        os.read(go_r, 1)
        os._exit(0)
    try:
        assert os.read(ready_r, 1) == b"x"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(f"0 {uid_base} {count}")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.write(go_w, b"x")
        os.waitpid(pid, 0)
        for fd in (ready_r, ready_w, go_r, go_w):
            os.close(fd)


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    made = Lab()
    try:
        yield made
    finally:
        made.close()
