"""The name service of the sandboxes, asked by real sockets in real slots."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.linux import netlab
from tests.linux.netlab import OTHER_SERVER, PRIVATE_SERVER, SERVER, Lab, inside, outcome, run
from tests.linux.test_network_slots import destroy, installation, open_slot

from penstock.model.sandbox import EgressRules
from penstock.node.linux import dns as dns_module
from penstock.node.linux import dns_messages, resolver
from penstock.node.linux.network import LinuxNetwork
from penstock.node.ports import Slot

pytestmark = pytest.mark.root
STUB = "127.0.0.53"  # a resolver on the host's loopback, as systemd has it
ZONE = {"good.test": SERVER, "www.good.test": SERVER, "bad.test": OTHER_SERVER, "inner.test": PRIVATE_SERVER}


def query(name: str, number: int = 7) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0\1\0\1"


class Zone:
    """The upstream: answers from ZONE; `huge.test` only over TCP; `deaf.test` never."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, message: bytes, *, tcp: bool = False) -> bytes:
        question = dns_messages.read_question(message)
        self.asked.append(question.name)
        if question.name == "deaf.test":
            return b""
        if question.name == "huge.test":
            if not tcp:
                return message[:2] + struct.pack(">HHHHH", 0x8380, 1, 0, 0, 0) + question.packed
            return self._records(message, question.packed, [f"198.51.100.{i % 250}" for i in range(300)])
        found = [ZONE[question.name]] if question.name in ZONE else []
        return self._records(message, question.packed, found)

    def _records(self, message: bytes, packed: bytes, found: list[str]) -> bytes:
        code = 0x8180 if found else 0x8183
        records = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(each) for each in found)
        return message[:2] + struct.pack(">HHHHH", code, 1, len(found), 0, 0) + packed + records


@pytest.fixture
def zone() -> Zone:
    return Zone()


@pytest.fixture
def lab(zone: Zone) -> Iterator[Lab]:
    with netlab.lab() as made:
        made.serve_udp(made.host, STUB, 53, zone.answer)
        made.serve_lengths(made.host, STUB, 53, lambda message: zone.answer(message, tcp=True))
        for address in (SERVER, OTHER_SERVER, PRIVATE_SERVER):
            made.serve_tcp(made.outside, address, 80)
        yield made


@pytest.fixture
async def network(lab: Lab, tmp_path: Path) -> AsyncIterator[LinuxNetwork]:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"search x\nnameserver nonsense\nnameserver {STUB}\n")
    made = installation(lab, tmp_path, "dns000", resolv_conf=str(resolv_conf))
    await made.open()
    try:
        yield made
    finally:
        await destroy(made)


def ask_blocking(slot: Slot, message: bytes, server: str, within_s: float) -> bytes:
    with inside(slot.netns_fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(within_s)
        sock.connect((server, 53))
        sock.send(message)
        return sock.recv(4096)


async def ask(slot: Slot, name: str, *, server: str = "10.200.0.1", within_s: float = 5) -> bytes:
    return await asyncio.to_thread(ask_blocking, slot, query(name), server, within_s)


def code(answer: bytes) -> int:
    return answer[3] & 0xF


async def test_a_name_is_resolved_by_the_hosts_resolver(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    answer = await ask(slot, "good.test")
    assert answer[:2] == query("good.test")[:2]
    assert dns_messages.addresses(answer) == [SERVER]
    assert code(await ask(slot, "none.test")) == 3


async def test_a_hard_wired_name_server_gets_the_proxy_too(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    assert dns_messages.addresses(await ask(slot, "good.test", server="8.8.8.8")) == [SERVER]


async def test_without_internet_only_allowed_names_resolve(network: LinuxNetwork, zone: Zone) -> None:
    slot = await open_slot(network, 0, EgressRules(internet=False, allow_domains=("good.test",)))
    assert dns_messages.addresses(await ask(slot, "GOOD.test")) == [SERVER]
    assert code(await ask(slot, "bad.test")) == dns_messages.REFUSED
    assert code(await ask(slot, "www.good.test")) == dns_messages.REFUSED
    assert zone.asked == ["good.test"], "a refused name must not leave the machine: it may carry secrets"


async def test_an_allowed_name_becomes_reachable_and_nothing_else(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0, EgressRules(internet=False, allow_domains=("*.good.test",)))
    other = await open_slot(network, 1, EgressRules(internet=False))
    assert outcome(slot.netns_fd, SERVER, 80) == "refused"
    await ask(slot, "www.good.test")
    assert outcome(slot.netns_fd, SERVER, 80) == "open"
    assert outcome(slot.netns_fd, OTHER_SERVER, 80) == "refused"
    assert outcome(other.netns_fd, SERVER, 80) == "refused"
    text = run(network.router_fd, "nft", "list", "set", "inet", "penstock", "learned")
    assert f"{slot.address} . {SERVER} timeout 30m expires 29m" in text


async def test_a_name_that_points_inside_opens_nothing(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0, EgressRules(internet=False, allow_domains=("*",)))
    assert dns_messages.addresses(await ask(slot, "inner.test")) == [PRIVATE_SERVER]
    assert outcome(slot.netns_fd, PRIVATE_SERVER, 80) == "refused"


async def test_withdrawing_a_name_cuts_what_it_had_opened(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0, EgressRules(internet=False, allow_domains=("good.test",)))
    await ask(slot, "good.test")
    with netlab.dial(slot.netns_fd, SERVER, 80) as conn:
        conn.sendall(b"1")
        conn.recv(100)
        await network.apply(0, EgressRules(internet=False, allow_domains=("bad.test",)))
        with pytest.raises(ConnectionResetError):
            conn.sendall(b"2")
            conn.recv(100)
    assert outcome(slot.netns_fd, SERVER, 80) == "refused"
    await network.destroy_slot(0, within_s=5)
    assert slot.address not in run(network.router_fd, "nft", "list", "ruleset")


async def test_long_answers_come_over_tcp(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    assert dns_messages.is_truncated(await ask(slot, "huge.test"))

    def stream() -> list[bytes]:
        with netlab.dial(slot.netns_fd, "10.200.0.1", 53, within_s=5) as conn:
            both = [query("huge.test", 1), query("good.test", 2)]
            conn.sendall(b"".join(struct.pack(">H", len(each)) + each for each in both))
            file = conn.makefile("rb")
            return [file.read(int.from_bytes(file.read(2), "big")) for _ in both]

    long, short = await asyncio.to_thread(stream)
    assert len(dns_messages.addresses(long)) == 300
    assert (short[:2], dns_messages.addresses(short)) == (b"\0\2", [SERVER])


async def test_nonsense_gets_an_error_and_the_service_lives_on(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    answer = await asyncio.to_thread(ask_blocking, slot, b"\0\1" + bytes(10), "10.200.0.1", 5)
    assert code(answer) == dns_messages.FORMERR
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(ask_blocking, slot, b"x", "10.200.0.1", 0.2)
    assert dns_messages.addresses(await ask(slot, "good.test")) == [SERVER]


async def test_a_deaf_resolver_is_answered_for(network: LinuxNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "TRY_S", 0.1)
    slot = await open_slot(network, 0)
    assert code(await ask(slot, "deaf.test")) == dns_messages.SERVFAIL
    assert network.statistics().names_failed == 1


async def test_one_slots_flood_leaves_another_its_names(network: LinuxNetwork, zone: Zone) -> None:
    slot, other = await open_slot(network, 0), await open_slot(network, 1)
    with inside(slot.netns_fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.connect(("10.200.0.1", 53))
        for number in range(500):
            sock.send(query("deaf.test", number))
        began = time.monotonic()
        assert dns_messages.addresses(await ask(other, "good.test")) == [SERVER]
        assert time.monotonic() - began < 1
    assert zone.asked.count("deaf.test") <= dns_module.ASKED_PER_SLOT_MAX


async def test_the_hosts_change_of_resolver_is_followed(
    network: LinuxNetwork, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "CHECK_S", 0)
    slot = await open_slot(network, 0)
    await ask(slot, "good.test")
    second = Zone()
    lab.serve_udp(lab.host, "127.0.0.54", 53, second.answer)
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.54\n")
    await ask(slot, "good.test")
    assert second.asked == ["good.test"]
