"""The router's way out: a pair of links to the host, and one table of ours on the host that masquerades.

Of the host nothing else changes but `forwarding` of two links, ours and the one that leads out; its own tables, routes
and `ip_forward` stay as they are (measured: forwarding per link is enough). Without a default route there is no uplink.

Refused: pasta (leaves the host alone entirely, but one more program to keep alive, and 5-8 Gbit/s instead of 15);
it is the way for a host whose own firewall drops what is forwarded.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import PenstockError
from penstock.node import ruleset
from penstock.node.linux import links, netns
from penstock.node.linux.claims import Block, Claims
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink
from penstock.node.linux.router import load_rules

MTU_DEFAULT: Final = 1500
_ROUTER_INDEX: Final = 2  # of the uplink within the router


class AddressTaken(PenstockError):
    """The host has a route of its own over the addresses of our uplink."""

    code = "address_taken"


@dataclass(frozen=True)
class UplinkState:
    """How sandboxes reach the world. `link` is the host's link that leads out; "" and a reason when there is none."""

    link: str
    why: str
    mtu: int = MTU_DEFAULT


class Uplink:
    """`host_fd` is the host's namespace. Every method blocks: call on a thread of its own."""

    def __init__(self, *, installation: str, host_fd: int, router_fd: int, block: Block, claims: Claims) -> None:
        self._installation = installation
        self._host_fd, self._router_fd = host_fd, router_fd
        self._block, self._claims = block, claims
        self._name = ruleset.host_link(installation)

    def open(self) -> UplinkState:
        """Make the pair, or find it whole. Raises AddressTaken, RulesRefused or NetlinkError."""
        with netns.Visit(self._host_fd):
            route = Netlink(NETLINK_ROUTE)
            try:
                return self._open(route)
            finally:
                route.close()

    def _open(self, host: Netlink) -> UplinkState:
        routes = links.list_routes(host)
        way_out = min((each for each in routes if each.prefix == 0), key=lambda each: each.metric, default=None)
        out = links.find_link(host, index=way_out.link_index) if way_out else None
        if out is None:
            self.remove()
            return UplinkState("", "the host has no default route")
        mtu = min(out.mtu or MTU_DEFAULT, MTU_DEFAULT)
        if not self._is_whole(host):
            links.delete_link(host, self._name)
            self._refuse_overlap(host, routes)
            self._make(host, mtu)
        self._forward(out.name)
        load_rules(ruleset.host_text(self._installation))
        return UplinkState(out.name, "", mtu)

    def remove(self) -> None:
        """Take away everything of ours on the host, and verify. Absent is success."""
        with netns.Visit(self._host_fd):
            host = Netlink(NETLINK_ROUTE)
            try:
                links.delete_link(host, self._name)
                _delete_table(ruleset.host_table(self._installation))
                with self._claims.locked():
                    link, shared = self._claims.forwarding_of(self._installation)
                    if link and not shared and not _forwards_globally():
                        netns.write_sysctl(f"ipv4/conf/{link}/forwarding", "0")
                    if link:
                        self._claims.note_forwarding(self._installation, "")
                if links.find_link(host, name=self._name) is not None:
                    raise OSError(16, "uplink could not be removed", self._name)
            finally:
                host.close()

    def _is_whole(self, host: Netlink) -> bool:
        mine = links.find_link(host, name=self._name)
        return mine is not None and mine.peer_nsid >= 0 and mine.peer_nsid == links.namespace_id(host, self._router_fd)

    def _refuse_overlap(self, host: Netlink, routes: list[links.Route]) -> None:
        ours = self._block.uplink_addresses[0]
        for each in routes:
            if each.prefix and _covers(each, ours):
                owner = links.find_link(host, index=each.link_index)
                raise AddressTaken(
                    "the network of the sandboxes is in use on this host",
                    which=ours,
                    why=f"it has a route to {each.network}/{each.prefix} by {owner.name if owner else 'a link'}",
                    now="set another network_cidr",
                )

    def _make(self, host: Netlink, mtu: int) -> None:
        ours, routers = self._block.uplink_addresses
        host.check([links.new_pair(self._name, 0, ruleset.UPLINK, _ROUTER_INDEX, self._router_fd, mtu)])
        made = links.find_link(host, name=self._name)
        assert made is not None, "the kernel accepted the link just now"
        netns.write_sysctl(f"ipv6/conf/{self._name}/disable_ipv6", "1")
        host.check([links.new_address(ours, 31, made.index)])
        with netns.Visit(self._router_fd):
            inside = Netlink(NETLINK_ROUTE)
            try:
                inside.check(
                    [
                        links.set_up(_ROUTER_INDEX),
                        links.new_address(routers, 31, _ROUTER_INDEX),
                        links.new_route(links.DEFAULT, 0, ours, _ROUTER_INDEX),
                    ]
                )
            finally:
                inside.close()

    def _forward(self, out: str) -> None:
        netns.write_sysctl(f"ipv4/conf/{self._name}/forwarding", "1")
        with self._claims.locked():
            known, _ = self._claims.forwarding_of(self._installation)
            if _read_sysctl(f"ipv4/conf/{out}/forwarding") == "0":
                # Noted first: a crash between the two leaves a note too many, and writing 0 over 0 harms nobody.
                self._claims.note_forwarding(self._installation, out)
                netns.write_sysctl(f"ipv4/conf/{out}/forwarding", "1")
            elif known != out and self._claims.another_set(out):
                self._claims.note_forwarding(self._installation, out)


def _forwards_globally() -> bool:
    return _read_sysctl("ipv4/ip_forward") == "1"


def _read_sysctl(name: str) -> str:
    with open(f"/proc/sys/net/{name}") as file:
        return file.read().strip()


def _covers(route: links.Route, address: str) -> bool:
    network = ipaddress.IPv4Network((route.network, route.prefix), strict=False)
    return ipaddress.IPv4Address(address) in network


def _delete_table(table: str) -> None:
    """Adding before deleting makes absence a success within one transaction."""
    load_rules(f"table inet {table}\ndelete table inet {table}\n")
