"""EgressRules made into what the firewall holds: disjoint ranges of addresses, one switch, and a test on names.

Pure. The order of judgement in the firewall is allow, learned, deny, never, open; so allow wins over deny, and what
must not win (private ranges, unless the node permits them) is cut out of `allow` here.
IPv6 entries are accepted and mean nothing: no IPv6 leaves a sandbox, so denying it is true and allowing it is idle.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from penstock.model.errors import Invalid
from penstock.model.sandbox import EgressRules
from penstock.node.ruleset import NEVER

RANGES_MAX: Final = 1000  # per list; a set's insertion cost grows with what it holds
DOMAINS_MAX: Final = 1000
_LAST: Final = 2**32 - 1


class Range(NamedTuple):
    """IPv4 addresses as integers, both ends included."""

    first: int
    last: int


_EVERYTHING: Final = (Range(0, _LAST),)


class Egress(msgspec.Struct, frozen=True, kw_only=True):
    """What one slot's elements are. `open`: the internet is reachable but for `deny`."""

    open: bool
    allow: tuple[Range, ...] = ()
    deny: tuple[Range, ...] = ()
    domains: tuple[str, ...] = ()
    private: bool = False  # an allowed name may resolve to a private address

    def resolves(self, name: str) -> bool:
        """Whether the DNS proxy answers for `name` (no trailing dot, any case)."""
        return self.open or self.names(name)

    def names(self, name: str) -> bool:
        """Whether `name` is one of the allowed domains, whose addresses then become reachable."""
        lowered = name.lower()
        return any(_matches(pattern, lowered) for pattern in self.domains)

    def learns(self, address: str) -> bool:
        """Whether an address that an allowed name resolved to may be reached."""
        value = int(ipaddress.IPv4Address(address))
        return self.private or not any(each.first <= value <= each.last for each in PRIVATE)


CLOSED: Final = Egress(open=False)


def compile_rules(rules: EgressRules, *, allow_private: bool) -> Egress:
    """The elements for `rules`. Raises Invalid naming the entry that is neither an address nor a CIDR."""
    allow = _ranges(rules.allow, "allow")
    if not allow_private:
        allow = subtract(allow, PRIVATE)
    deny = _ranges(rules.deny, "deny")
    closed = not rules.internet or deny == _EVERYTHING
    if len(rules.allow_domains) > DOMAINS_MAX:
        raise Invalid("allow", f"more than {DOMAINS_MAX} domains")
    return Egress(
        open=not closed,
        allow=allow,
        deny=() if closed else deny,  # what is closed needs no further denial
        domains=tuple(dict.fromkeys(_domain(each) for each in rules.allow_domains)),
        private=allow_private,
    )


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same addresses in the fewest ranges, ascending and disjoint."""
    merged: list[Range] = []
    for each in sorted(ranges):
        if merged and each.first <= merged[-1].last + 1:
            merged[-1] = Range(merged[-1].first, max(merged[-1].last, each.last))
        else:
            merged.append(each)
    return tuple(merged)


def subtract(ranges: Iterable[Range], minus: Iterable[Range]) -> tuple[Range, ...]:
    """`ranges` without the addresses of `minus`."""
    left = list(merge(ranges))
    for cut in minus:
        pieces: list[Range] = []
        for each in left:
            if cut.last < each.first or cut.first > each.last:
                pieces.append(each)
                continue
            if each.first < cut.first:
                pieces.append(Range(each.first, cut.first - 1))
            if each.last > cut.last:
                pieces.append(Range(cut.last + 1, each.last))
        left = pieces
    return tuple(left)


def _ranges(entries: tuple[str, ...], field: str) -> tuple[Range, ...]:
    if len(entries) > RANGES_MAX:
        raise Invalid(field, f"more than {RANGES_MAX} addresses")
    found: list[Range] = []
    for entry in entries:
        try:
            network = ipaddress.ip_network(entry.strip(), strict=False)
        except ValueError:
            raise Invalid(field, f"{entry!r} is neither an address nor a CIDR") from None
        if isinstance(network, ipaddress.IPv4Network):
            found.append(Range(int(network.network_address), int(network.broadcast_address)))
    return merge(found)


def _domain(pattern: str) -> str:
    return pattern.strip().rstrip(".").lower()


def _matches(pattern: str, name: str) -> bool:
    """`*` is every name, `*.suffix` every name below the suffix (not itself), anything else only itself."""
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) > len(pattern) - 1
    return pattern in ("*", name)


PRIVATE: Final = _ranges(NEVER, "never")
