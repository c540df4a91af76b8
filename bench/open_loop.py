"""Requests that leave by the clock, whether or not earlier ones were answered; and whether this process kept up.

    .venv/bin/python bench/open_loop.py PORT RATE SECONDS CORE < REQUEST

A process of its own, so that neither the interpreter lock nor a collection of another part of the bench delays it. It
sleeps between ticks of TICK_S and looks for replies: the upstream shares its core, and a loop that spins would be what
is measured. Latency counts from the tick at which a request was due, also while it waits for one of CONNECTIONS.

The load can be at fault itself. So each tick's own lateness is measured: how long after its time this process had its
core and came to it. That is no fault of the proxy; when its p99 is above LATE_MS_MAX the load did not keep up, and what
was measured says little about the proxy. A request is late by the proxy's fault when all connections wait for replies.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

TICK_S = 0.0005
LOOK_S = 0.00025  # as exact is a latency; each look costs 20 us, most of it for the timer
CONNECTIONS = 64
LATE_MS_MAX = 0.3  # of a tick, p99: what is to be judged is 1 ms
BEHIND_S_MAX = 5.0  # after the end: the load was not served
REPLY_BYTES_MAX = 65536


def measure(port: int, rate: float, seconds: float, core: int, request: bytes) -> dict[str, float]:
    """Run the load in a process of its own on `core`. Raises CalledProcessError when it was not served."""
    argv = [sys.executable, __file__, str(port), str(rate), str(seconds), str(core)]
    done = subprocess.run(argv, input=request, stdout=subprocess.PIPE, check=True, timeout=seconds + 30.0)
    return json.loads(done.stdout)


def main() -> None:
    port, rate, seconds, core = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    os.sched_setaffinity(0, {core})
    with contextlib.suppress(OSError):
        Path("/proc/self/timerslack_ns").write_text("1")  # the default is 50 us
    load = Load(port, sys.stdin.buffer.read())
    gc.freeze()
    gc.disable()
    print(json.dumps(load.run(rate, seconds)))


class Load:
    """CONNECTIONS connections, and what is on them."""

    def __init__(self, port: int, request: bytes) -> None:
        self._request = request
        self._poller = select.epoll()
        self._socks: dict[int, socket.socket] = {}
        for _ in range(CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self._socks[sock.fileno()] = sock
            self._poller.register(sock, select.EPOLLIN)
        self._free = deque(self._socks)
        self._sent: dict[int, float] = {}  # by descriptor: when its request was due
        self._waiting: deque[float] = deque()  # due, and no connection free
        self._latencies: list[float] = []

    def run(self, rate: float, seconds: float) -> dict[str, float]:
        """`rate` requests per second for `seconds`."""
        cpu_s, waited_s, began = *_scheduled_s(), time.perf_counter()
        lateness, due = self._send_all(rate, seconds)
        took_s = time.perf_counter() - began
        cpu_after_s, waited_after_s = _scheduled_s()
        cuts, late = (statistics.quantiles(values, n=1000) for values in (self._latencies, lateness))
        return {
            "p50_ms": cuts[499] * 1000,
            "p99_ms": cuts[989] * 1000,
            "p999_ms": cuts[998] * 1000,
            "due": due,
            "answered": len(self._latencies),
            "late_p50_ms": late[499] * 1000,
            "late_p99_ms": late[989] * 1000,
            "load_core_share": (cpu_after_s - cpu_s) / took_s,
            "load_wait_share": (waited_after_s - waited_s) / took_s,
            "kept_up": late[989] * 1000 <= LATE_MS_MAX,
        }

    def _send_all(self, rate: float, seconds: float) -> tuple[list[float], int]:
        """The whole load. Returns how late each tick was, and how many requests were due."""
        clock, ticks, due = time.perf_counter, int(seconds / TICK_S), 0
        lateness: list[float] = []
        began = clock() + TICK_S
        for tick in range(ticks):
            at = began + tick * TICK_S
            self._receive_until(at)
            lateness.append(clock() - at)
            count = int((tick + 1) * TICK_S * rate) - due
            due += count
            self._waiting.extend([at] * count)
            self._send()
        end = clock() + BEHIND_S_MAX
        while self._sent or self._waiting:
            if clock() > end:
                raise SystemExit("the load was not served")
            self._receive_until(clock() + TICK_S)
        return lateness, due

    def _receive_until(self, at: float) -> None:
        """Take replies until `at`, by a look each LOOK_S: to be woken by every reply would cost half of the core."""
        clock = time.perf_counter
        while (left_s := at - clock()) > 0:
            time.sleep(min(left_s, LOOK_S))
            self._receive()

    def _receive(self) -> None:
        for fd, _ in self._poller.poll(0):
            reply = self._socks[fd].recv(REPLY_BYTES_MAX)
            if not reply.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"unexpected reply {reply[:80]!r}")
            self._latencies.append(time.perf_counter() - self._sent.pop(fd))
            self._free.append(fd)
        if self._waiting:
            self._send()

    def _send(self) -> None:
        while self._waiting and self._free:
            fd = self._free.popleft()
            self._sent[fd] = self._waiting.popleft()
            self._socks[fd].send(self._request)


def _scheduled_s() -> tuple[float, float]:
    """Seconds on a core, and seconds of waiting for one."""
    running, waiting, _ = Path("/proc/self/schedstat").read_text().split()
    return int(running) / 1e9, int(waiting) / 1e9


if __name__ == "__main__":
    main()
