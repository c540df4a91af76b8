"""The port Network on the real kernel: what slots can reach, and what is left of them. The host is a namespace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.linux import netlab
from tests.linux.netlab import HOST, METADATA, OTHER_SERVER, PRIVATE_SERVER, SERVER, Lab, dial, inside, outcome, run

from penstock.model.errors import NotTheSlot
from penstock.model.sandbox import EgressRules
from penstock.node.linux import netns
from penstock.node.linux.claims import Claims
from penstock.node.linux.network import LinuxNetwork
from penstock.node.linux.traces import NetworkTraces, read_traces
from penstock.node.linux.uplink import AddressTaken
from penstock.node.ports import Slot

pytestmark = pytest.mark.root
OPEN = EgressRules()
CLOSED = EgressRules(internet=False)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with netlab.lab() as made:
        for address in (SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA):
            made.serve_tcp(made.outside, address, 80)
        made.serve_tcp(made.host, "0.0.0.0", 22)
        yield made


def installation(lab: Lab, folder: Path, name: str, **settings: object) -> LinuxNetwork:
    data = folder / name
    data.mkdir(exist_ok=True)
    (data / "installation").write_text(name)

    async def make_userns(uid_base: int) -> int:
        return netlab.make_userns(uid_base)

    return LinuxNetwork(
        installation=name,
        data=str(data),
        router_path=str(data / "router"),
        make_userns=make_userns,
        slots=64,
        claims=Claims(str(folder / "host"), in_use=lambda _: False),
        host_fd=lab.host,
        **settings,  # type: ignore[arg-type]
    )


async def destroy(network: LinuxNetwork) -> None:
    for number in network.list_slots():
        await network.destroy_slot(number, within_s=5)
    await network.close(destroy=True)


@pytest.fixture
async def network(lab: Lab, tmp_path: Path) -> AsyncIterator[LinuxNetwork]:
    made = installation(lab, tmp_path, "inst0a")
    await made.open()
    try:
        yield made
    finally:
        await destroy(made)


async def open_slot(network: LinuxNetwork, number: int, rules: EgressRules = OPEN) -> Slot:
    slot = await network.create_slot(number)
    await network.apply(number, rules)
    return slot


def open_files() -> set[str]:
    """What the descriptors of this process stand for; the listing's own is gone again."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


def start_inside(netns_fd: int) -> subprocess.Popen[bytes]:
    return inside(netns_fd, lambda: subprocess.Popen(["sleep", "60"]))


async def test_a_slot_reaches_the_internet_under_the_hosts_address(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    with dial(slot.netns_fd, SERVER, 80) as conn:
        conn.sendall(b"hello")
        assert conn.recv(100) == f"{HOST} hello".encode()


async def test_a_new_slot_reaches_nothing_until_its_rules_are_applied(network: LinuxNetwork) -> None:
    slot = await network.create_slot(0)
    assert outcome(slot.netns_fd, SERVER, 80) == "refused"


async def test_every_slot_has_the_same_inner_address_and_an_own_outer_one(network: LinuxNetwork) -> None:
    slots = [await open_slot(network, number) for number in range(2)]
    inner = [run(slot.netns_fd, "ip", "-4", "-br", "addr", "show", "eth0").split()[2] for slot in slots]
    assert inner == ["10.200.0.2/30"] * 2
    assert slots[0].address != slots[1].address
    both = [dial(slot.netns_fd, SERVER, 80) for slot in slots]
    for conn in both:
        conn.sendall(b"x")
    assert [conn.recv(100) for conn in both] == [f"{HOST} x".encode()] * 2
    for conn in both:
        conn.close()


async def test_slots_reach_neither_each_other_nor_host_nor_router(network: LinuxNetwork, lab: Lab) -> None:
    slot, other = await open_slot(network, 0), await open_slot(network, 1)
    lab.serve_tcp(other.netns_fd, "0.0.0.0", 8080)
    uplink_host, uplink_router = network.block.uplink_addresses
    lab.serve_tcp(network.router_fd, "0.0.0.0", 2222)
    found = {
        (address, port): outcome(slot.netns_fd, address, port)
        for address, port in [
            (other.address, 8080),
            (HOST, 22),
            (uplink_host, 22),
            (uplink_router, 2222),
            ("10.200.0.1", 2222),
        ]
    }
    assert set(found.values()) <= {"refused", "silent"}, found
    assert outcome(lab.outside, HOST, 22) == "open"  # it is served, only not for sandboxes


async def test_private_and_metadata_addresses_are_refused_at_once(network: LinuxNetwork, lab: Lab) -> None:
    slot = await open_slot(network, 0)
    for address in (PRIVATE_SERVER, METADATA):
        assert outcome(lab.host, address, 80) == "open"
        assert outcome(slot.netns_fd, address, 80) == "refused"


async def test_allowing_a_private_address_needs_the_nodes_permission(lab: Lab, tmp_path: Path) -> None:
    rules = EgressRules(internet=False, allow=(PRIVATE_SERVER, SERVER))
    for permitted in (False, True):
        network = installation(lab, tmp_path, f"priv0{permitted:d}", allow_private_egress=permitted)
        await network.open()
        try:
            slot = await open_slot(network, 0, rules)
            assert outcome(slot.netns_fd, PRIVATE_SERVER, 80) == ("open" if permitted else "refused")
            assert outcome(slot.netns_fd, SERVER, 80) == "open"
            assert outcome(slot.netns_fd, METADATA, 80) == "refused"
        finally:
            await destroy(network)


async def test_allow_wins_over_deny(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0, EgressRules(deny=("203.0.113.0/24",), allow=(SERVER,)))
    assert outcome(slot.netns_fd, SERVER, 80) == "open"
    assert outcome(slot.netns_fd, OTHER_SERVER, 80) == "refused"


async def test_rules_are_replaced_as_a_whole(network: LinuxNetwork) -> None:
    slot = await network.create_slot(0)
    for rules, expected in [
        (EgressRules(deny=("0.0.0.0/0",)), ("refused", "refused")),
        (EgressRules(deny=(SERVER,)), ("refused", "open")),
        (EgressRules(deny=(OTHER_SERVER, "203.0.113.0/28")), ("refused", "refused")),
        (EgressRules(deny=("203.0.113.0/24",), allow=("203.0.113.0/28",)), ("open", "refused")),
        (EgressRules(internet=False, allow=(f"{OTHER_SERVER}/32", OTHER_SERVER)), ("refused", "open")),
        (EgressRules(), ("open", "open")),
    ]:
        await network.apply(0, rules)
        assert (outcome(slot.netns_fd, SERVER, 80), outcome(slot.netns_fd, OTHER_SERVER, 80)) == expected, rules


async def test_a_new_denial_cuts_a_living_connection_at_once(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    with dial(slot.netns_fd, SERVER, 80) as conn, dial(slot.netns_fd, OTHER_SERVER, 80) as spared:
        for each in (conn, spared):
            each.sendall(b"1")
            assert each.recv(100).endswith(b" 1")
        await network.apply(0, EgressRules(deny=(SERVER,)))
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            conn.sendall(b"2")
            conn.recv(100)
        assert time.monotonic() - began < 0.2
        spared.sendall(b"3")
        assert spared.recv(100).endswith(b" 3")


async def test_other_slots_rules_are_not_touched(network: LinuxNetwork) -> None:
    slot, other = await open_slot(network, 0), await open_slot(network, 1)
    await network.apply(0, CLOSED)
    assert outcome(slot.netns_fd, SERVER, 80) == "refused"
    assert outcome(other.netns_fd, SERVER, 80) == "open"


async def test_a_spoofed_source_is_dropped(network: LinuxNetwork, lab: Lab) -> None:
    slot, other = await open_slot(network, 0), await open_slot(network, 1)
    heard: list[bytes] = []
    lab.serve_udp(lab.outside, SERVER, 5000, lambda data: heard.append(data) or b"ok")  # type: ignore[func-returns-value]

    def send(source: str) -> None:
        # Root of the host inside the slot, so more than any sandbox may do.
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            payload = source.encode()
            udp = struct.pack(">HHHH", 4000, 5000, 8 + len(payload), 0) + payload
            head = struct.pack(
                ">BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(SERVER)
            )
            raw.sendto(head + udp, (SERVER, 0))

    for source in (other.address, slot.address, "203.0.113.77", "10.200.0.2"):
        inside(slot.netns_fd, lambda source=source: send(source))  # type: ignore[misc]
    deadline = time.monotonic() + 2
    while not heard and time.monotonic() < deadline:  # noqa: ASYNC110 - the server is a thread
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert heard == [b"10.200.0.2"]


async def test_nothing_from_outside_comes_in(network: LinuxNetwork, lab: Lab) -> None:
    slot = await open_slot(network, 0)
    lab.serve_tcp(slot.netns_fd, "0.0.0.0", 8080)
    router = network.block.uplink_addresses[1]
    run(lab.outside, "ip", "route", "add", f"{slot.address}/32", "via", HOST)
    run(lab.outside, "ip", "route", "add", f"{router}/32", "via", HOST)
    run(lab.host, "ip", "route", "add", f"{slot.address}/32", "via", router)
    assert outcome(lab.outside, slot.address, 8080) != "open"
    assert outcome(lab.host, slot.address, 8080) != "open"
    assert outcome(lab.outside, router, 53) != "open"


async def as_sandbox_root(slot: Slot, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program as root of the slot's user namespace inside its network namespace."""
    enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{slot.netns_fd}"]
    enter += [f"--user=/proc/{os.getpid()}/fd/{slot.userns_fd}", "--"]
    return await asyncio.to_thread(
        lambda: subprocess.run([*enter, *argv], capture_output=True, text=True, timeout=20, check=False)
    )


async def test_the_sandboxs_root_binds_port_80_and_pings(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    bind = (
        "import socket\nfor f, a in ((2, '0.0.0.0'), (10, '::1')):\n s = socket.socket(f); s.bind((a, 80)); s.listen()"
    )
    done = await as_sandbox_root(slot, "/usr/bin/python3", "-c", bind)
    assert done.returncode == 0, done.stderr
    ping = (
        "import socket; s = socket.socket(2, 2, 1); s.settimeout(2)\n"
        "for a in ('10.200.0.1', '203.0.113.10'): s.sendto(b'\\x08\\0\\0\\0\\0\\0\\0\\1', (a, 0)); s.recv(99)"
    )
    done = await as_sandbox_root(slot, "/usr/bin/python3", "-c", ping)
    assert done.returncode == 0, done.stderr


async def test_the_sandboxs_root_cannot_reconfigure(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    for argv in (
        ["ip", "link", "set", "lo", "down"],
        ["ip", "addr", "add", "10.9.9.9/32", "dev", "eth0"],
        ["ip", "route", "del", "default"],
        ["nft", "add", "table", "inet", "mine"],
        ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"],
        ["/usr/bin/python3", "-c", "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)"],
        ["/usr/bin/python3", "-c", "import socket; socket.socket(2, socket.SOCK_RAW, socket.IPPROTO_RAW)"],
    ):
        assert (await as_sandbox_root(slot, *argv)).returncode != 0, argv
    assert outcome(slot.netns_fd, SERVER, 80) == "open"


async def test_ipv6_exists_on_loopback_only(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    addresses = run(slot.netns_fd, "ip", "-6", "-o", "addr").split("\n")
    assert [line.split()[1:4] for line in addresses if line] == [["lo", "inet6", "::1/128"]]


async def test_large_answers_pass_a_host_with_a_smaller_mtu(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    assert "mtu 1400" in run(slot.netns_fd, "ip", "link", "show", "eth0")
    blob = os.urandom(1 << 20)
    with dial(slot.netns_fd, SERVER, 80, within_s=5) as conn:
        await asyncio.to_thread(conn.sendall, blob[:60_000])
        received = b""
        while len(received) < 60_000:
            received += await asyncio.to_thread(conn.recv, 1 << 16)
    assert received.replace(f"{HOST} ".encode(), b"") == blob[:60_000]


def udp_error(fd: int, address: str, size: int = 10, *, probe: bool = False) -> int:
    """The errno the sandbox's kernel reports for a datagram to `address`; 0 when none comes within half a second."""
    with inside(fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        if probe:
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: don't fragment
        sock.settimeout(0.5)
        sock.connect((address, 9))
        try:
            sock.send(bytes(size))
            sock.recv(10)
        except TimeoutError:
            return 0
        except OSError as error:
            return error.errno or 0
    return 0


async def test_a_refused_datagram_is_reported_to_its_sender(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    assert udp_error(slot.netns_fd, METADATA) == errno.EHOSTUNREACH  # administratively prohibited
    assert udp_error(slot.netns_fd, SERVER) == errno.ECONNREFUSED  # by the server itself: nobody listens


async def test_a_sandbox_learns_that_its_packet_was_too_big(network: LinuxNetwork, lab: Lab) -> None:
    slot = await open_slot(network, 0)
    run(lab.host, "ip", "link", "set", "eth0", "mtu", "1300")  # smaller than what the slot was made for
    assert udp_error(slot.netns_fd, SERVER, 1350, probe=True) == errno.EMSGSIZE
    assert "mtu 1300" in run(slot.netns_fd, "ip", "route", "get", SERVER)


async def test_a_destroyed_slot_leaves_nothing(network: LinuxNetwork) -> None:
    await network.create_slot(3)  # another one stays
    before = (run(network.router_fd, "nft", "list", "ruleset"), run(network.router_fd, "ip", "-br", "link"))
    slot = await open_slot(network, 0, EgressRules(deny=("8.8.8.0/24",), allow=("9.9.9.9",)))
    with dial(slot.netns_fd, SERVER, 80) as conn:
        conn.sendall(b"x")
        conn.recv(10)
    assert slot.address in run(network.router_fd, "nft", "list", "ruleset")
    assert network.list_slots() == {0, 3}
    namespaces = {os.readlink(f"/proc/self/fd/{fd}") for fd in (slot.netns_fd, slot.userns_fd)}
    assert namespaces <= open_files()
    await network.destroy_slot(0, within_s=5)
    after = (run(network.router_fd, "nft", "list", "ruleset"), run(network.router_fd, "ip", "-br", "link"))
    assert _without_counters(after) == _without_counters(before)
    assert slot.address not in run(network.router_fd, "cat", "/proc/net/nf_conntrack", check=False)
    assert network.list_slots() == {3}
    assert namespaces.isdisjoint(open_files())
    await network.destroy_slot(0, within_s=5)  # absent is success
    again = await network.create_slot(0)
    assert outcome(again.netns_fd, SERVER, 80) == "refused"


def _without_counters(texts: tuple[str, str]) -> list[str]:
    lines = "\n".join(texts).splitlines()
    return [line.split("counter packets")[0] for line in lines if "ct count" not in line and "elements" not in line]


async def test_a_slot_with_a_process_still_in_it_is_destroyed_all_the_same(network: LinuxNetwork) -> None:
    slot = await open_slot(network, 0)
    holder = inside(slot.netns_fd, lambda: subprocess.Popen(["sleep", "60"]))
    try:
        began = time.monotonic()
        await network.destroy_slot(0, within_s=5)
        assert time.monotonic() - began < 1
        assert "vs0" not in run(network.router_fd, "ip", "-br", "link")
    finally:
        holder.kill()
        holder.wait()


async def test_a_hundred_slots_are_made_and_destroyed_at_once(lab: Lab, tmp_path: Path) -> None:
    network = installation(lab, tmp_path, "many00")
    await network.open()
    try:
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(network.create_slot(number)) for number in range(60)]
        assert network.list_slots() == set(range(60))
        assert len({task.result().address for task in made}) == 60
        async with asyncio.TaskGroup() as group:
            for number in range(60):
                group.create_task(network.destroy_slot(number, within_s=10))
        assert network.list_slots() == set()
        assert "vs" not in run(network.router_fd, "ip", "-br", "link")
    finally:
        await destroy(network)


async def test_a_number_in_use_is_refused(network: LinuxNetwork) -> None:
    await network.create_slot(0)
    with pytest.raises(FileExistsError):
        await network.create_slot(0)
    assert network.list_slots() == {0}


async def test_a_failed_user_namespace_leaves_no_slot(lab: Lab, tmp_path: Path) -> None:
    network = installation(lab, tmp_path, "fail00")

    async def refuse(uid_base: int) -> int:
        raise OSError(28, "no more user namespaces")

    network._make_userns = refuse
    await network.open()
    try:
        with pytest.raises(OSError, match="no more"):
            await network.create_slot(0)
        assert network.list_slots() == set()
    finally:
        await destroy(network)


async def test_a_restarted_daemon_takes_a_running_slot_again(lab: Lab, tmp_path: Path) -> None:
    first = installation(lab, tmp_path, "again0")
    await first.open()
    slot = await open_slot(first, 5, EgressRules(deny=(OTHER_SERVER,)))
    await open_slot(first, 6)  # pooled: nobody lives in it
    sandbox = inside(slot.netns_fd, lambda: subprocess.Popen(["sleep", "60"]))
    conn = dial(slot.netns_fd, SERVER, 80)
    await first.close(destroy=False)
    second = installation(lab, tmp_path, "again0")
    await second.open()
    try:
        assert second.list_slots() == {5, 6}
        with pytest.raises(FileExistsError):
            await second.create_slot(6)
        await second.destroy_slot(6, within_s=5)
        with pytest.raises(NotTheSlot):
            second.retake(6, sandbox.pid)
        with pytest.raises(NotTheSlot):
            second.retake(5, os.getpid())
        with pytest.raises(NotTheSlot, match="ids"):
            second.retake(5, sandbox.pid)  # in the slot, but not under its ids
        sandbox.kill()
        sandbox.wait()
        sandbox = _sandbox_process(slot, second.block.uid_base(5), first_netns=conn)
        taken = second.retake(5, sandbox.pid)
        assert (taken.number, taken.address, taken.uid_base) == (5, slot.address, second.block.uid_base(5))
        assert second.retake(5, sandbox.pid) == taken
        conn.sendall(b"still")
        assert conn.recv(100).endswith(b" still")
        await second.apply(5, EgressRules(deny=(OTHER_SERVER,)))
        conn.sendall(b"here")
        assert conn.recv(100).endswith(b" here")
        assert outcome(taken.netns_fd, OTHER_SERVER, 80) == "refused"
    finally:
        conn.close()
        sandbox.kill()
        sandbox.wait()
        await destroy(second)


def _sandbox_process(slot: Slot, uid_base: int, *, first_netns: socket.socket) -> subprocess.Popen[bytes]:
    """A process in the network namespace that `first_netns` (a socket) keeps alive, under the ids of the slot."""
    userns = netlab.make_userns(uid_base)
    fd = netns_of(first_netns)
    try:
        argv = ["nsenter", f"--user=/proc/self/fd/{userns}", "sleep", "60"]
        process = inside(fd, lambda: subprocess.Popen(argv, pass_fds=[userns]))
        deadline = time.monotonic() + 5
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()[:6] and time.monotonic() < deadline:
            time.sleep(0.005)
        return process
    finally:
        os.close(userns)
        os.close(fd)


def netns_of(sock: socket.socket) -> int:
    import fcntl

    return fcntl.ioctl(sock.fileno(), 0x894C)  # SIOCGSKNS


async def test_closing_for_good_leaves_the_host_as_it_was(lab: Lab, tmp_path: Path) -> None:
    def state() -> tuple[str, ...]:
        sysctls = run(lab.host, "sh", "-c", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding")
        rules, links = run(lab.host, "nft", "list", "ruleset"), run(lab.host, "ip", "-br", "link")
        return sysctls, rules, links, run(lab.host, "ip", "route"), Path("/proc/self/mountinfo").read_text()

    before = state()
    network = installation(lab, tmp_path, "gone00")
    await network.open()
    await open_slot(network, 0)
    during = state()
    assert during[0].split("\n")[0] == "0", "ip_forward of the host must stay off"
    assert "penstock_gone00" in during[1]
    assert "pkgone00" in during[2]
    await network.close(destroy=True)
    await network.close(destroy=True)
    assert state() == before
    assert not (tmp_path / "gone00" / "router").exists()
    assert not (tmp_path / "host").exists(), "the last claim takes its folder with it"


async def test_traces_are_read_with_the_daemon_away(lab: Lab, tmp_path: Path) -> None:
    path = str(tmp_path / "trace0" / "router")

    def traces() -> NetworkTraces:
        return read_traces("trace0", path, host_fd=lab.host)

    assert traces().nothing
    network = installation(lab, tmp_path, "trace0")
    await network.open()
    slot = await open_slot(network, 7)
    holder = start_inside(slot.netns_fd)
    await network.close(destroy=False)
    try:
        found = traces()
        assert (found.router, found.uplink, found.table) == (True, "pktrace0", "penstock_trace0")
        assert (found.slots, found.addresses) == ({7}, {slot.address})
        looking = installation(lab, tmp_path, "trace0")
        assert looking.list_slots() == {7}
        assert installation(lab, tmp_path, "other0").list_slots() == set()
        assert read_traces("others", path + "x", host_fd=lab.host).nothing
    finally:
        holder.kill()
        holder.wait()
        again = installation(lab, tmp_path, "trace0")
        await again.open()
        await destroy(again)
    assert traces().nothing


async def test_a_failed_opening_leaves_the_host_as_it_was(lab: Lab, tmp_path: Path) -> None:
    run(lab.host, "ip", "route", "add", "10.201.252.0/24", "via", netlab.OUTSIDE)
    network = installation(lab, tmp_path, "clash0")
    with pytest.raises(AddressTaken, match="in use on this host"):
        await network.open()
    assert read_traces("clash0", str(tmp_path / "clash0" / "router"), host_fd=lab.host).nothing
    await network.close(destroy=True)


async def test_a_block_the_host_has_a_route_into_is_passed_over(lab: Lab, tmp_path: Path) -> None:
    """Another installation is being made or removed at this moment, and no claim says so (any more)."""
    run(lab.host, "ip", "route", "add", "10.201.252.0/31", "via", netlab.OUTSIDE)
    run(lab.host, "ip", "route", "add", "10.201.252.2/31", "via", netlab.OUTSIDE)
    network = installation(lab, tmp_path, "third0")
    await network.open()
    try:
        assert network.block.uplink_addresses == ("10.201.252.4", "10.201.252.5")
        slot = await open_slot(network, 0)
        assert slot.address == "10.201.8.1"
    finally:
        await destroy(network)
    again = installation(lab, tmp_path, "third0")
    run(lab.host, "ip", "route", "del", "10.201.252.0/31")
    await again.open()
    assert again.block.uplink_addresses == ("10.201.252.0", "10.201.252.1")
    await destroy(again)


async def test_a_host_without_a_default_route_gets_no_uplink(lab: Lab, tmp_path: Path) -> None:
    run(lab.host, "ip", "route", "del", "default")
    network = installation(lab, tmp_path, "alone0")
    await network.open()
    try:
        assert network.statistics().uplink == ""
        assert network.statistics().uplink_why == "the host has no default route"
        assert "pkalone0" not in run(lab.host, "ip", "-br", "link")
        slot = await open_slot(network, 0)
        assert outcome(slot.netns_fd, SERVER, 80) == "refused"
    finally:
        await destroy(network)


async def test_two_installations_live_side_by_side(lab: Lab, tmp_path: Path) -> None:
    one, two = installation(lab, tmp_path, "first0"), installation(lab, tmp_path, "second")
    await one.open()
    await two.open()
    try:
        mine, other = await open_slot(one, 0), await open_slot(two, 0)
        assert mine.address != other.address
        assert abs(mine.uid_base - other.uid_base) >= 65_536
        assert outcome(mine.netns_fd, SERVER, 80) == outcome(other.netns_fd, SERVER, 80) == "open"
        lab.serve_tcp(other.netns_fd, "0.0.0.0", 8080)
        assert outcome(mine.netns_fd, other.address, 8080) != "open"
        with dial(other.netns_fd, SERVER, 80) as conn:
            await destroy(one)
            conn.sendall(b"on")
            assert conn.recv(100).endswith(b" on")
        assert outcome(other.netns_fd, SERVER, 80) == "open"
        assert two.list_slots() == {0}
    finally:
        await one.close(destroy=True)
        await destroy(two)


async def test_a_killed_daemons_pooled_slots_vanish_and_its_router_stays(lab: Lab, tmp_path: Path) -> None:
    ready_r, ready_w = os.pipe()
    pid = os.fork()
    if pid == 0:

        async def live() -> None:
            network = installation(lab, tmp_path, "killed")
            await network.open()
            await open_slot(network, 0)
            os.write(ready_w, b"x")
            await asyncio.sleep(60)

        try:
            asyncio.run(live())
        finally:
            os._exit(1)
    os.close(ready_w)
    assert os.read(ready_r, 1) == b"x"
    os.close(ready_r)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # noqa: ASYNC222 - it is dead
    network = installation(lab, tmp_path, "killed")
    await network.open()
    try:
        for _ in range(200):
            if "vs0" not in run(network.router_fd, "ip", "-br", "link"):
                break
            await asyncio.sleep(0.01)
        assert "vs0" not in run(network.router_fd, "ip", "-br", "link")
        assert network.list_slots() == {0}, "its elements are still there"
        await network.destroy_slot(0, within_s=5)
        assert network.list_slots() == set()
        slot = await open_slot(network, 0)
        assert outcome(slot.netns_fd, SERVER, 80) == "open"
    finally:
        await destroy(network)


def test_a_plain_file_where_the_router_was_is_no_router(tmp_path: Path) -> None:
    path = tmp_path / "router"
    path.write_text("")
    assert netns.open_kept(str(path)) is None
    netns.release(str(path))
    assert not path.exists()
    netns.release(str(path))
