"""The name service of the sandboxes: listens in the router, asks the host's servers, and decides by who asks.

Every packet to any port 53 comes here (the ruleset sees to it), under the slot's outer address, which no sandbox can
forge: the source is the identity. A sandbox without internet resolves only the names it was allowed; the addresses
of allowed names become reachable before the answer leaves, so that its first packet passes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from penstock.node import ruleset
from penstock.node.egress_rules import Egress
from penstock.node.linux import dns_messages, netns
from penstock.node.linux.dns_messages import Malformed, Question
from penstock.node.linux.resolver import PORT, Resolver

ASKED_MAX: Final = 1024  # questions under way; beyond it a datagram is dropped and the sandbox asks again
ASKED_PER_SLOT_MAX: Final = 64
STREAMS_MAX: Final = 256  # TCP connections
STREAMS_PER_SLOT_MAX: Final = 8
STREAM_IDLE_S: Final = 10.0
_READS_MAX: Final = 64
_BACKLOG: Final = 64
_BUFFER_BYTES: Final = 1 << 20

Policy = Callable[[str], Egress | None]
Learn = Callable[[str, list[str]], None]


class DnsProxy:
    """`policy(outer address)` is the slot's rules, or None for nobody; `learn(outer address, found)` lets it reach what
    an allowed name resolved to. Runs on the loop of the caller."""

    def __init__(
        self, *, router_fd: int, host_fd: int | None, policy: Policy, learn: Learn, resolv_conf: str, port: int = PORT
    ) -> None:
        self._router_fd, self._policy, self._learn = router_fd, policy, learn
        self._resolver = Resolver(resolv_conf=resolv_conf, host_fd=host_fd, port=port)
        self._asked: Counter[str] = Counter()
        self._streams: dict[_Client, str] = {}
        self._server: asyncio.Server | None = None
        self.answered = self.refused = self.failed = self.dropped = 0

    async def open(self) -> None:
        """Listen. Sockets are made on a thread of their own inside the router; that takes some 100 µs."""
        self._datagrams, listener = netns.run_inside(self._router_fd, _listen)
        asyncio.get_running_loop().add_reader(self._datagrams.fileno(), self._receive)
        self._server = await asyncio.get_running_loop().create_server(lambda: _Client(self), sock=listener)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._datagrams.fileno())
        self._datagrams.close()
        if self._server is not None:
            self._server.close()
        for client in list(self._streams):
            client.abort()
        self._resolver.close()

    def admits(self, client: _Client, address: str) -> bool:
        """Whether one more TCP connection of this slot is served; then it counts until `forget`."""
        same = sum(1 for each in self._streams.values() if each == address)
        if self._policy(address) is None or same >= STREAMS_PER_SLOT_MAX or len(self._streams) >= STREAMS_MAX:
            self.dropped += 1
            return False
        self._streams[client] = address
        return True

    def forget(self, client: _Client) -> None:
        self._streams.pop(client, None)

    def judge(self, address: str, query: bytes, reply: Callable[[bytes], None], *, tcp: bool) -> None:
        """Answer `query` of the slot at `address` by `reply`, now or later, or not at all when bounds are reached."""
        rules = self._policy(address)
        if rules is None or len(query) < 12:
            self.dropped += 1
            return
        try:
            question = dns_messages.read_question(query)
        except Malformed:
            self.refused += 1
            reply(dns_messages.failure(query, dns_messages.FORMERR))
            return
        if not rules.resolves(question.name):
            self.refused += 1
            reply(dns_messages.failure(query, dns_messages.REFUSED))
            return
        if self._asked[address] >= ASKED_PER_SLOT_MAX or self._asked.total() >= ASKED_MAX:
            self.dropped += 1
            return
        self._asked[address] += 1

        def done(answer: bytes | None) -> None:
            self._conclude(address, query, question, answer, reply)

        self._resolver.ask(query, question, done, tcp=tcp)

    def _conclude(
        self, address: str, query: bytes, question: Question, answer: bytes | None, reply: Callable[[bytes], None]
    ) -> None:
        self._asked[address] -= 1
        if self._asked[address] <= 0:
            del self._asked[address]
        rules = self._policy(address)  # asked again: it may have changed, or the slot be gone
        if rules is None:
            return
        try:
            found = dns_messages.addresses(answer) if answer is not None else []
        except Malformed:
            answer = None
        if answer is None:
            self.failed += 1
            reply(dns_messages.failure(query, dns_messages.SERVFAIL))
            return
        if rules.names(question.name):
            self._learn(address, [each for each in found if rules.learns(each)])
        self.answered += 1
        reply(answer)

    def _receive(self) -> None:
        for _ in range(_READS_MAX):
            try:
                query, source = self._datagrams.recvfrom(dns_messages.UDP_BYTES_MAX)
            except OSError:
                return  # nothing more, or an error of an earlier answer: the socket stays readable for the next
            self.judge(source[0], query, partial(self._send, source), tcp=False)

    def _send(self, to: tuple[str, int], answer: bytes) -> None:
        try:
            self._datagrams.sendto(answer, to)
        except OSError:
            self.dropped += 1  # Safe: a lost datagram; the sandbox asks again.


class _Client(asyncio.Protocol):
    """One TCP connection of a sandbox: messages with a length before each, one answered at a time."""

    def __init__(self, proxy: DnsProxy) -> None:
        self._proxy = proxy
        self._buffer = bytearray()
        self._busy = False
        self._address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._address = transport.get_extra_info("peername")[0]
        self._timer = asyncio.get_running_loop().call_later(STREAM_IDLE_S, self.abort)
        if not self._proxy.admits(self, self._address):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._proxy.forget(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > 2 + dns_messages.MESSAGE_BYTES_MAX:
            self._transport.pause_reading()
        self._next()

    def abort(self) -> None:
        self._transport.abort()

    def _next(self) -> None:
        if self._busy or len(self._buffer) < 2:
            return
        end = 2 + int.from_bytes(self._buffer[:2], "big")
        if len(self._buffer) < end:
            return
        query = bytes(self._buffer[2:end])
        del self._buffer[:end]
        self._busy = True
        self._proxy.judge(self._address, query, self._reply, tcp=True)

    def _reply(self, answer: bytes) -> None:
        self._busy = False
        if self._transport.is_closing():
            return
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(STREAM_IDLE_S, self.abort)
        self._transport.write(struct.pack(">H", len(answer)) + answer)
        self._transport.resume_reading()
        asyncio.get_running_loop().call_soon(self._next)


def _listen() -> tuple[socket.socket, socket.socket]:
    where = (ruleset.GATEWAY, PORT)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        datagrams.bind(where)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except BaseException:
        datagrams.close()
        raise
    return datagrams, listener
