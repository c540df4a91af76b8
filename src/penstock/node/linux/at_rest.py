"""The network of an installation while no daemon runs it: to look, and to clear what is dead."""

from __future__ import annotations

import os
from typing import NoReturn

from penstock.model.errors import Unsupported
from penstock.model.sandbox import EgressRules
from penstock.node import ruleset
from penstock.node.linux import egress, links, netns
from penstock.node.linux.claims import Block, Claims
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink
from penstock.node.linux.nftables import NfTables
from penstock.node.linux.traces import NetworkTraces, read_traces
from penstock.node.ports import Slot


class NetworkAtRest:
    """Adapter of the port `Network` that lists, and clears what is dead; every other method raises Unsupported."""

    def __init__(self, *, installation: str, router_path: str, claims: Claims | None = None) -> None:
        self._installation, self._router_path = installation, router_path
        self._claims = claims or Claims()

    def traces(self) -> NetworkTraces:
        return read_traces(self._installation, self._router_path)

    def list_slots(self) -> set[int]:
        """Slots with a link in the router or an address in its firewall. Blocks for some milliseconds."""
        traces = self.traces()
        block = self._claims.block_of(self._installation)
        found = set(traces.slots)
        if block is not None:
            numbers = (block.number_at(address) for address in traces.addresses)
            found |= {number for number in numbers if number is not None}
        return found

    async def open(self) -> None:
        _refuse()

    async def create_slot(self, number: int) -> Slot:
        _refuse()

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        """What is left of a slot whose namespaces nobody here holds. Only while no daemon runs. Blocks."""
        router, block = netns.open_kept(self._router_path), self._claims.block_of(self._installation)
        if router is None:
            return
        try:
            netns.run_inside(router, lambda: _clear(number, block))
        finally:
            os.close(router)

    async def apply(self, number: int, rules: EgressRules) -> None:
        _refuse()

    def retake(self, number: int, pid: int) -> Slot:
        _refuse()

    async def close(self, *, destroy: bool) -> None:
        """Nothing to let go of."""


def _clear(number: int, block: Block | None) -> None:
    """In the router: the slot's link and everything the firewall holds for its address. Absent is success."""
    route, tables = Netlink(NETLINK_ROUTE), NfTables(ruleset.TABLE)
    try:
        links.delete_slot_links(route, [number])
        if block is not None and number < block.count:
            address = block.address(number)
            held = egress.read_back(tables).get(address)
            if held is not None:
                egress.withdraw(tables, links.link_name(number), address, held)
    finally:
        route.close()
        tables.close()


def _refuse() -> NoReturn:
    raise Unsupported("the network was opened for looking only")
