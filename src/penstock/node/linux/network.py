"""The port `Network` on Linux: slots as namespaces behind one router namespace.

A slot's namespaces exist only as descriptors of this process and of the sandbox's processes: when the daemon dies,
pooled slots vanish by themselves. What may block runs on two threads that live in the router namespace, each with
sockets of its own; what takes microseconds (set elements, look-ups) runs on the loop's thread with sockets made there.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec

from penstock.core.deadlines import within
from penstock.core.errors import PenstockError
from penstock.core.settle import settle
from penstock.model.errors import NotTheSlot
from penstock.model.sandbox import EgressRules
from penstock.node.egress_rules import CLOSED, Egress, compile_rules
from penstock.node.linux import egress, links, netns, userns
from penstock.node.linux.claims import Block, Claims, HostFull
from penstock.node.linux.departures import Departures
from penstock.node.linux.dns import DnsProxy
from penstock.node.linux.router import Router, Wires, Workbench, build_slot
from penstock.node.linux.traces import read_traces
from penstock.node.linux.uplink import AddressTaken, Uplink, UplinkState
from penstock.node.ports import Slot

THREADS: Final = 2  # the kernel serialises changes of links anyway
OPEN_S: Final = 30.0
BLOCKS_TRIED_MAX: Final = 4
CREATE_S: Final = 10.0

_T = TypeVar("_T")


class NetworkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for `doctor`, metrics and tests."""

    uplink: str  # the host's link that leads out; "" when sandboxes cannot leave the machine
    uplink_why: str
    slots: int
    names_answered: int
    names_refused: int
    names_failed: int


@dataclass
class _Held:
    """What this process knows of one slot. `slot` is None while it is being made, or was only found in the kernel."""

    slot: Slot | None = None
    elements: egress.Held = field(default_factory=egress.Held)
    rules: Egress = CLOSED
    found: bool = False  # in the kernel, by this daemon: its rules are not known until they are applied again


class LinuxNetwork:
    """`router_path` is the file that pins the router. `make_userns(uid_base)` returns a descriptor of a user namespace
    that maps 65,536 ids from there; the slot owns it. `host_fd` is another namespace to treat as the host's (tests).

    Numbers run from 0 to `slots - 1`. All methods belong to one event loop.
    """

    def __init__(
        self,
        *,
        installation: str,
        data: str,
        router_path: str,
        make_userns: Callable[[int], Awaitable[int]],
        slots: int,
        claims: Claims | None = None,
        network: str = "10.201.0.0/16",
        uplink: bool = True,
        allow_private_egress: bool = False,
        host_fd: int | None = None,
        resolv_conf: str = "/etc/resolv.conf",
    ) -> None:
        self._installation, self._data, self._slots, self._cidr = installation, data, slots, network
        self._make_userns, self._claims = make_userns, claims or Claims()
        self._wants_uplink, self._allow_private = uplink, allow_private_egress
        self._foreign_host_fd, self._resolv_conf = host_fd, resolv_conf
        self._router = Router(router_path)
        self._bench = Workbench()
        self._threads: ThreadPoolExecutor | None = None
        self._held: dict[int, _Held] = {}
        self._numbers: dict[str, int] = {}  # by outer address
        self._uplink_state = UplinkState("", "not opened")

    @property
    def block(self) -> Block:
        """The ranges of this installation. After `open`."""
        return self._block

    @property
    def router_fd(self) -> int:
        """The router's namespace, for sockets that must be made there. After `open`."""
        return self._router.fd

    async def open(self) -> None:
        assert self._threads is None, "the network was opened twice"
        self._host_fd = netns.current() if self._foreign_host_fd is None else os.dup(self._foreign_host_fd)
        opener = ThreadPoolExecutor(1, "network-open")
        try:
            await self._run_on(opener, self._open_router, OPEN_S, "router namespace")
        except BaseException:
            opener.submit(self._abandon).result()
            raise
        finally:
            opener.shutdown(wait=False)
        self._threads = ThreadPoolExecutor(THREADS, "network", initializer=lambda: self._bench.enter(self._router.fd))
        self._read_back()
        self._departures.open()
        await self._dns.open()

    def _abandon(self) -> None:
        """After a failed `open`: a router found stays, since sandboxes may live behind it; one just made goes."""
        if self._router.made:
            self._uplink().remove()
            self._router.destroy()
        self._router.close()
        os.close(self._host_fd)

    def _open_router(self) -> None:
        """Everything of `open` that may block, on a thread that may stray."""
        self._claim_block(())
        self._router.open()
        if self._wants_uplink:
            self._open_uplink()
        else:
            self._uplink().remove()
            self._uplink_state = UplinkState("", "switched off in the settings")
        netns.enter(self._router.fd)
        self._wires = Wires.open()
        self._departures = Departures()
        self._dns = DnsProxy(
            router_fd=self._router.fd,
            host_fd=self._host_fd if self._foreign_host_fd is not None else None,
            policy=self._policy,
            learn=self._learn,
            resolv_conf=self._resolv_conf,
        )

    def _claim_block(self, avoid: Sequence[Block]) -> None:
        self._block = self._claims.claim_block(
            self._installation, data=self._data, slots=self._slots, network=self._cidr, avoid=avoid
        )

    def _open_uplink(self) -> None:
        """Another block when the host has a route into ours: a claim keeps out those who claim, and nobody else.

        Such are an installation whose data folder was removed, one with another `network_cidr`, or one being removed
        at this moment. A router that was found stays where it is: sandboxes may live behind it.
        """
        refused: list[Block] = []
        while True:
            try:
                self._uplink_state = self._uplink().open()
                return
            except AddressTaken:
                refused.append(self._block)
                if not self._router.made or len(refused) >= BLOCKS_TRIED_MAX:
                    raise
                try:
                    self._claim_block(refused)
                except HostFull:
                    pass  # Safe: nothing else is free, and what stands in the way is the better word.
                else:
                    continue
                raise

    async def create_slot(self, number: int) -> Slot:
        """About 1 ms beside the user namespace. If cancelled or failed, nothing is left that this process holds."""
        assert number in self._block.numbers, f"slot {number} is outside of this installation's block"
        if number in self._held:  # made, being made, or left in the kernel by an earlier daemon: destroy it first
            raise FileExistsError(errno.EEXIST, "network slot exists", links.link_name(number))
        held = self._held[number] = _Held()
        userns_fd = -1
        try:
            userns_fd = await self._make_userns(self._block.uid_base(number))
            return await settle(self._build(number, userns_fd, held), within_s=CREATE_S, what=f"network slot {number}")
        except BaseException:
            if held.slot is None:
                self._held.pop(number, None)
                if userns_fd >= 0:
                    os.close(userns_fd)
            raise

    async def _build(self, number: int, userns_fd: int, held: _Held) -> Slot:
        address = self._block.address(number)

        def work() -> int:
            wires = self._bench.wires
            assert wires is not None
            fd = build_slot(wires, self._router.fd, number, address, self._uplink_state.mtu)
            try:
                egress.introduce(wires.tables, links.link_name(number), address)
            except BaseException:
                os.close(fd)
                raise
            return fd

        building = self._pool().submit(work)
        try:
            netns_fd = await asyncio.wrap_future(building)
        except asyncio.CancelledError:
            building.add_done_callback(_close_late)  # only after CREATE_S: nobody waits for this namespace any more
            raise
        held.slot = Slot(
            number=number,
            address=address,
            netns_fd=netns_fd,
            userns_fd=userns_fd,
            uid_base=self._block.uid_base(number),
        )
        self._numbers[address] = number
        return held.slot

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        """In this order: nothing of it is let through, its connections are forgotten, its namespace is let go, and its
        link is seen to be gone. Absent is success. If cancelled, it still finishes. Raises DeadlinePassed."""
        await settle(
            self._destroy(number, within_s), within_s=within_s + CREATE_S, what=f"end of network slot {number}"
        )

    async def _destroy(self, number: int, within_s: float) -> None:
        held = self._held.get(number) or _Held()
        address = self._block.address(number)
        async with within(within_s, f"end of link {links.link_name(number)}"):
            await self._run(lambda: self._withdraw(number, address, held))
            slot, held.slot = held.slot, None
            held.elements, held.rules = egress.Held(), CLOSED
            if slot is not None:
                os.close(slot.netns_fd)
                os.close(slot.userns_fd)
            await self._departures.gone(number)
        self._held.pop(number, None)
        self._numbers.pop(address, None)

    def _withdraw(self, number: int, address: str, held: _Held) -> None:
        wires = self._bench.wires
        assert wires is not None
        egress.withdraw(wires.tables, links.link_name(number), address, held.elements)
        wires.tables.flush_connections(address)

    async def apply(self, number: int, rules: EgressRules) -> None:
        """One transaction of some microseconds; then the connections that lost their right are forgotten.

        Raises Invalid or NotTheSlot, and then nothing has changed. A coroutine by the port's shape: it never waits.
        """
        held = self._held.get(number)
        if held is None or held.slot is None:
            raise NotTheSlot("no such network slot", which=str(number))
        compiled = compile_rules(rules, allow_private=self._allow_private)
        keep_learned = held.found or compiled.domains == held.rules.domains
        address = held.slot.address
        stricter = egress.apply(self._wires.tables, address, held.elements, compiled, keep_learned=keep_learned)
        held.rules, held.found = compiled, False
        if stricter:
            self._wires.tables.flush_connections(address)

    def retake(self, number: int, pid: int) -> Slot:
        """Some 100 µs. The caller has made sure that `pid` is the process it means, and applies its rules again.

        Raises NotTheSlot when the process lives in another network namespace than that of slot `number`, or under other
        ids; OSError when it has died.
        """
        if number not in self._block.numbers:
            raise NotTheSlot("no slot of this installation", which=str(number))
        held = self._held.get(number) or _Held(found=True)
        if held.slot is not None:
            return held.slot
        address, uid_base = self._block.address(number), self._block.uid_base(number)
        netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        userns_fd = -1
        try:
            userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            link = links.find_link(self._wires.route, name=links.link_name(number))
            nsid = links.namespace_id(self._wires.route, netns_fd)
            if link is None or nsid < 0 or link.peer_nsid != nsid:
                raise NotTheSlot("the process is not in its network slot", which=str(number), why=f"pid {pid}")
            if userns.base_of(pid) != uid_base:
                raise NotTheSlot("the process runs under other ids", which=str(number), why=f"pid {pid}")
            egress.introduce(self._wires.tables, links.link_name(number), address)
        except BaseException:
            os.close(netns_fd)
            if userns_fd >= 0:
                os.close(userns_fd)
            raise
        held.slot = Slot(number=number, address=address, netns_fd=netns_fd, userns_fd=userns_fd, uid_base=uid_base)
        self._held[number] = held
        self._numbers[address] = number
        return held.slot

    def list_slots(self) -> set[int]:
        """Links and elements; a few milliseconds at a thousand slots. Works before `open` too, only looking."""
        if self._threads is None:
            return self._list_unopened()
        numbers = (links.slot_of(each.name) for each in links.list_links(self._wires.route))
        found = {number for number in numbers if number is not None}
        for address in egress.present(self._wires.tables):
            number = self._block.number_at(address)
            if number is not None:
                found.add(number)
        return found

    def _list_unopened(self) -> set[int]:
        traces = read_traces(self._installation, self._router.path, host_fd=self._foreign_host_fd)
        block = self._claims.block_of(self._installation)
        known = (block.number_at(address) for address in traces.addresses) if block is not None else ()
        return set(traces.slots) | {number for number in known if number is not None}

    async def close(self, *, destroy: bool) -> None:
        """Idempotent. With `destroy`, whatever slots are left lose their links with the router. Verified."""
        if self._threads is None:
            return
        threads, self._threads = self._threads, None
        self._dns.close()
        self._departures.close()
        self._wires.close()
        for held in self._held.values():
            if held.slot is not None:
                os.close(held.slot.netns_fd)
                os.close(held.slot.userns_fd)
        self._held.clear()
        self._numbers.clear()
        closer = ThreadPoolExecutor(1, "network-close")
        try:
            await self._run_on(closer, lambda: self._close_blocking(threads, destroy), OPEN_S, "end of the router")
        finally:
            closer.shutdown(wait=False)

    def _close_blocking(self, threads: ThreadPoolExecutor, destroy: bool) -> None:
        self._departures.join()
        threads.shutdown(wait=True)  # threads live in the router: they pin it
        if destroy:
            self._uplink().remove()
            self._router.destroy()
            self._claims.release(self._installation)
        self._router.close()
        os.close(self._host_fd)

    def statistics(self) -> NetworkStatistics:
        return NetworkStatistics(
            uplink=self._uplink_state.link,
            uplink_why=self._uplink_state.why,
            slots=len(self._numbers),
            names_answered=self._dns.answered,
            names_refused=self._dns.refused,
            names_failed=self._dns.failed,
        )

    def _uplink(self) -> Uplink:
        return Uplink(
            installation=self._installation,
            host_fd=self._host_fd,
            router_fd=self._router.fd,
            block=self._block,
            claims=self._claims,
        )

    def _read_back(self) -> None:
        """After a restart: what the firewall still holds of the slots an earlier daemon made."""
        for address, elements in egress.read_back(self._wires.tables).items():
            number = self._block.number_at(address)
            if number is not None:
                self._held[number] = _Held(elements=elements, found=True)

    def _policy(self, address: str) -> Egress | None:
        number = self._numbers.get(address)
        return None if number is None else self._held[number].rules

    def _learn(self, address: str, found: list[str]) -> None:
        number = self._numbers.get(address)
        if number is not None:
            egress.learn(self._wires.tables, address, self._held[number].elements, found)

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            raise PenstockError("the network is closed", which=self._installation)
        return self._threads

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool(), work)

    async def _run_on(self, pool: ThreadPoolExecutor, work: Callable[[], _T], within_s: float, what: str) -> _T:
        return await settle(asyncio.get_running_loop().run_in_executor(pool, work), within_s=within_s, what=what)


def _close_late(building: Future[int]) -> None:
    if not building.cancelled() and building.exception() is None:
        os.close(building.result())
