"""The router namespace: one per installation, pinned by a bind mount, holding the firewall and one link per slot.

The pin appears only after the ruleset was loaded, so a pinned router always filters. It outlives the daemon: links,
rules and connections go on while nobody attends, except for the DNS proxy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.core.errors import PenstockError
from penstock.node import ruleset
from penstock.node.linux import expressions, links, netns
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink
from penstock.node.linux.nftables import NfTables

_LO_INDEX: Final = 1
_NFT_S: Final = 20.0
_ICMP_ERRORS: Final = (3, 11)  # destination unreachable (too big, refused), time exceeded

# Within the router: it forwards, and believes no source address less for the way it came (the inner address of every
# slot is the same, so reverse-path filtering would refuse all of them; the ruleset proves the sender instead).
_ROUTER_SYSCTLS: Final = (
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
)
# Within a slot: its root binds any port and pings; IPv6 exists on lo alone, for those who dial ::1.
_SLOT_SYSCTLS: Final = (
    ("ipv4/ip_unprivileged_port_start", "0"),
    ("ipv4/ping_group_range", "0 2147483647"),
    # What a ping socket has received is charged to nobody: 1,500 of them that pinged themselves held 480 MiB.
    # So echo replies (bit 0) count like the errors already in this mask, few per second. Per namespace since 6.11.
    ("ipv4/icmp_ratemask", "6169"),
    ("ipv4/icmp_msgs_per_sec", "20"),
    ("ipv4/icmp_msgs_burst", "20"),
    ("ipv6/conf/default/disable_ipv6", "1"),
)


class RulesRefused(PenstockError):
    """The `nft` program did not take our ruleset: not installed, or the kernel lacks an expression."""

    code = "rules_refused"


@dataclass(frozen=True)
class Wires:
    """Sockets of one namespace, for one thread at a time."""

    route: Netlink
    tables: NfTables

    @classmethod
    def open(cls) -> Wires:
        route = Netlink(NETLINK_ROUTE)
        return cls(route, NfTables(ruleset.TABLE))

    def close(self) -> None:
        self.route.close()
        self.tables.close()


class Router:
    """Holds the descriptor of the router namespace. `path` is the file that pins it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.made = False  # by this call of `open`, rather than found

    def open(self) -> None:
        """Take the pinned router again, or make one. Blocks for some milliseconds: call it on a thread of its own."""
        found = netns.open_kept(self.path)
        if found is None:
            netns.release(self.path)  # a plain file left by a reboot
            found = self._make()
        elif self._digest() != ruleset.router_digest():
            netns.enter(found)
            self._load()  # drops every element: slots are closed until their rules are applied
        self.fd = found

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def destroy(self) -> None:
        """Unpin it. The namespace ends with its last descriptor; its links and rules with it."""
        self.close()
        netns.release(self.path)
        Path(self.path + ".rules").unlink(missing_ok=True)

    def _make(self) -> int:
        fd = netns.leave_for_new()
        try:
            for name, value in _ROUTER_SYSCTLS:
                netns.write_sysctl(name, value)
            route = Netlink(NETLINK_ROUTE)
            try:
                route.check(
                    [
                        links.set_up(_LO_INDEX),
                        links.new_address(ruleset.GATEWAY, 32, _LO_INDEX),
                        # Without an uplink packets still get as far as the ruleset, which refuses them at once.
                        links.new_last_resort(_LO_INDEX),
                    ]
                )
            finally:
                route.close()
            self._load()
            netns.keep(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        self.made = True
        return fd

    def _load(self) -> None:
        load_rules(ruleset.router_text())
        tables = NfTables(ruleset.TABLE)
        try:
            for icmp_type in _ICMP_ERRORS:
                rule = expressions.quote_inner(ruleset.LINK_PREFIX, ruleset.INNER_ADDRESS, icmp_type)
                tables.add_rule(ruleset.CHAIN_QUOTE, rule, "rule for quoted packets")
        finally:
            tables.close()
        Path(self.path + ".rules").write_text(ruleset.router_digest() + "\n")

    def _digest(self) -> str:
        try:
            return Path(self.path + ".rules").read_text().strip()
        except OSError:
            return ""


def load_rules(text: str) -> None:
    """`nft -f -` in the calling thread's namespace. Raises RulesRefused. 2.5 ms, so only at the start."""
    program = shutil.which("nft", path=os.defpath + ":/usr/sbin:/sbin")
    if program is None:
        raise RulesRefused("the nft program is missing", which="nftables", now="install the package nftables")
    try:
        done = subprocess.run(  # a fork inherits this thread's namespace
            [program, "-f", "-"], input=text.encode(), capture_output=True, timeout=_NFT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as bad:
        raise RulesRefused("the nft program failed", which=program, why=str(bad)) from bad
    if done.returncode != 0:
        raise RulesRefused("the kernel refused the ruleset", why=done.stderr.decode(errors="replace")[:2000].strip())


class Workbench(threading.local):
    """What each worker thread keeps: it lives in the router namespace and owns sockets of it."""

    wires: Wires | None = None

    def enter(self, router_fd: int) -> None:
        """Run once on each worker thread."""
        netns.enter(router_fd)
        self.wires = Wires.open()

    def leave(self) -> None:
        if self.wires is not None:
            self.wires.close()
            self.wires = None


def build_slot(wires: Wires, router_fd: int, number: int, address: str, mtu: int) -> int:
    """On a thread that lives in the router: make the slot's namespace and its links. Returns its descriptor.

    About 1 ms: namespace 0.4, pair and route 0.3, settings and inside 0.2. On failure the descriptor is closed, and
    with it the namespace and any link into it.
    """
    fd = netns.leave_for_new()
    try:
        try:
            inner = Netlink(NETLINK_ROUTE)
            for name, value in _SLOT_SYSCTLS:
                netns.write_sysctl(name, value)
        finally:
            netns.enter(router_fd)
        try:
            links.create_slot_links(wires.route, inner, number, address, fd, mtu)
        finally:
            inner.close()
    except BaseException:
        os.close(fd)
        raise
    return fd
