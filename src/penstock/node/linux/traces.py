"""What of an installation's network the kernel shows, read without a daemon and without changing anything."""

from __future__ import annotations

import os

import msgspec

from penstock.node import ruleset
from penstock.node.linux import egress, links, netns
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink
from penstock.node.linux.nftables import NfTables, list_tables


class NetworkTraces(msgspec.Struct, frozen=True, kw_only=True):
    """Everything false and empty: nothing is left."""

    router: bool = False  # the router namespace is pinned
    uplink: str = ""  # our link on the host
    table: str = ""  # our table on the host
    slots: frozenset[int] = frozenset()  # with a link in the router
    addresses: frozenset[str] = frozenset()  # outer addresses the firewall knows

    @property
    def nothing(self) -> bool:
        return self == NetworkTraces()


def read_traces(installation: str, router_path: str, *, host_fd: int | None = None) -> NetworkTraces:
    """Blocks for some milliseconds. `host_fd` is another namespace to treat as the host's (tests)."""
    host = netns.current() if host_fd is None else os.dup(host_fd)
    router = netns.open_kept(router_path)
    try:
        link, table = netns.run_inside(host, lambda: _on_host(installation))
        slots, addresses = netns.run_inside(router, _in_router) if router is not None else (set(), set())
    finally:
        os.close(host)
        if router is not None:
            os.close(router)
    return NetworkTraces(
        router=router is not None, uplink=link, table=table, slots=frozenset(slots), addresses=frozenset(addresses)
    )


def _on_host(installation: str) -> tuple[str, str]:
    link, table = ruleset.host_link(installation), ruleset.host_table(installation)
    route = Netlink(NETLINK_ROUTE)
    try:
        found = links.find_link(route, name=link) is not None
    finally:
        route.close()
    return link if found else "", table if table in list_tables() else ""


def _in_router() -> tuple[set[int], set[str]]:
    route, tables = Netlink(NETLINK_ROUTE), NfTables(ruleset.TABLE)
    try:
        numbers = (links.slot_of(each.name) for each in links.list_links(route))
        return {number for number in numbers if number is not None}, egress.present(tables)
    finally:
        route.close()
        tables.close()
