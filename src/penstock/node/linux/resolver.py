"""Questions put to the host's own name servers, over UDP and TCP, by callbacks on the loop: no task, no thread.

Sockets belong to the host's network namespace, so a stub resolver on the host's loopback serves sandboxes too. An
answer counts only when it comes from the server asked (connected sockets), under the id and the question it was
asked with; ids come from the kernel's random numbers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from penstock.node.linux import dns_messages, netns
from penstock.node.linux.dns_messages import Question

PORT: Final = 53
TRIES_MAX: Final = 3  # over UDP, one server after the other
TRY_S: Final = 2.0
TCP_S: Final = 5.0
SERVERS_MAX: Final = 3  # as resolv.conf(5) has it
CHECK_S: Final = 5.0  # between looks at whether resolv.conf has changed
_READS_MAX: Final = 64  # datagrams taken in one turn of the loop

Done = Callable[[bytes | None], None]


@dataclass
class _Flight:
    query: bytes
    question: Question
    done: Done
    tries: int = 0
    server: int = 0
    timer: asyncio.TimerHandle | None = None


class Resolver:
    """Asks the servers named in `resolv_conf`. `host_fd` is another namespace to ask from (tests)."""

    def __init__(self, *, resolv_conf: str, host_fd: int | None, port: int = PORT) -> None:
        self._path, self._host_fd, self._port = resolv_conf, host_fd, port
        self._sockets: list[tuple[tuple[str, int], socket.socket]] = []
        self._flights: dict[int, _Flight] = {}
        self._streams: set[_Stream] = set()
        self._read_at = float("-inf")
        self._stamp: tuple[int, int] = (0, 0)
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._flights) + len(self._streams)

    def ask(self, query: bytes, question: Question, done: Done, *, tcp: bool) -> None:
        """Put `query` to a server; `done(answer)` follows, under the query's own id, or `done(None)` when none came
        within `TRIES_MAX * TRY_S` (TCP: `TCP_S`)."""
        self._refresh()
        if not self._sockets or self._closed or len(self._flights) >= 1 << 15:
            done(None)
        elif tcp:
            self._ask_tcp(query, question, done)
        else:
            number = self._fresh_id()
            self._flights[number] = _Flight(query, question, done)
            self._send(number)

    def close(self) -> None:
        self._closed = True
        for stream in list(self._streams):
            stream.end(None)
        for number in list(self._flights):
            self._land(number, None)
        self._drop_sockets()

    def _fresh_id(self) -> int:
        while True:
            number: int = struct.unpack("=H", os.urandom(2))[0]
            if number not in self._flights:
                return number

    def _send(self, number: int) -> None:
        flight = self._flights[number]
        if flight.tries >= TRIES_MAX or not self._sockets:
            self._land(number, None)
            return
        flight.server = flight.tries % len(self._sockets)
        flight.tries += 1
        flight.timer = asyncio.get_running_loop().call_later(TRY_S, self._send, number)
        try:
            self._sockets[flight.server][1].send(dns_messages.with_id(flight.query, number))
        except OSError:
            pass  # Safe: a refused or full socket is a lost datagram; the timer asks the next server.

    def _receive(self, server: int) -> None:
        for _ in range(_READS_MAX):
            try:
                answer = self._sockets[server][1].recv(dns_messages.MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                continue  # Safe: the server's port is closed (ICMP); the timer asks the next one.
            if len(answer) < 2:
                continue
            number = struct.unpack_from(">H", answer)[0]
            flight = self._flights.get(number)
            if flight is not None and flight.server == server and dns_messages.answers(answer, flight.question):
                self._land(number, dns_messages.with_id(answer, flight.question.id))

    def _land(self, number: int, answer: bytes | None) -> None:
        flight = self._flights.pop(number)
        if flight.timer is not None:
            flight.timer.cancel()
        flight.done(answer)

    def _ask_tcp(self, query: bytes, question: Question, done: Done) -> None:
        def ended(answer: bytes | None) -> None:
            self._streams.discard(stream)
            done(answer if answer and dns_messages.answers(answer, question) else None)

        address = self._sockets[0][0]
        stream = _Stream(self._socket(address, socket.SOCK_STREAM), address, query, ended)
        self._streams.add(stream)
        stream.start()

    def _refresh(self) -> None:
        """Follow the host when it changes its servers, at most every CHECK_S."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._read_at + CHECK_S and self._sockets:
            return
        self._read_at = loop.time()
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp == self._stamp and self._sockets:
                return
            servers = read_servers(self._path)
        except OSError:
            return  # Safe: the former servers stay; without any, every question fails with SERVFAIL.
        self._stamp = stamp
        self._drop_sockets()
        for server in servers:
            address = (server, self._port)
            try:
                made = self._socket(address, socket.SOCK_DGRAM)
                made.connect(address)
            except OSError:
                continue  # Safe: a family the host does not have; the other servers remain.
            loop.add_reader(made.fileno(), self._receive, len(self._sockets))
            self._sockets.append((address, made))

    def _socket(self, address: tuple[str, int], kind: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        if self._host_fd is not None:
            return netns.socket_inside(self._host_fd, family, kind)
        return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def _drop_sockets(self) -> None:
        loop = asyncio.get_running_loop()
        for _, each in self._sockets:
            loop.remove_reader(each.fileno())
            each.close()
        self._sockets = []


class _Stream:
    """One question over one TCP connection."""

    def __init__(self, stream: socket.socket, address: tuple[str, int], query: bytes, done: Done) -> None:
        self._socket, self._address, self._done = stream, address, done
        self._out = struct.pack(">H", len(query)) + query
        self._in = bytearray()
        self._ended = False

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TCP_S, self.end, None)
        try:
            self._socket.connect(self._address)
        except BlockingIOError:
            pass
        except OSError:
            loop.call_soon(self.end, None)
            return
        loop.add_writer(self._socket.fileno(), self._write)

    def end(self, answer: bytes | None) -> None:
        if self._ended:
            return
        self._ended = True
        loop = asyncio.get_running_loop()
        self._timer.cancel()
        loop.remove_writer(self._socket.fileno())
        loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._done(answer)

    def _write(self) -> None:
        try:
            self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            return
        except OSError:
            self.end(None)
            return
        if not self._out:
            loop = asyncio.get_running_loop()
            loop.remove_writer(self._socket.fileno())
            loop.add_reader(self._socket.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._in += data
        wanted = 2 + int.from_bytes(self._in[:2], "big")
        if len(self._in) >= 2 and len(self._in) >= wanted:
            self.end(bytes(self._in[2:wanted]))
        elif not data:
            self.end(None)


def read_servers(path: str) -> list[str]:
    """The `nameserver` addresses of a resolv.conf, at most three. A zone (`%eth0`) is kept; nonsense is skipped."""
    found: list[str] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver":
                try:
                    ipaddress.ip_address(words[1].partition("%")[0])
                except ValueError:
                    continue
                found.append(words[1])
    return found[:SERVERS_MAX]
