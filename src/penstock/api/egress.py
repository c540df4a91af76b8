"""Reading a caller's network rules: every entry is checked here, so that the node only ever sees good ones."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from penstock.model.errors import Invalid, Unsupported
from penstock.model.sandbox import EgressRules

ENTRIES_MAX: Final = 256  # per list; the cost of a packet's look-up grows with the set
_DOMAIN: Final = re.compile(r"(\*|(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)")
ALL_TRAFFIC: Final = "0.0.0.0/0"


def read(
    allow_out: Sequence[str] | None,
    deny_out: Sequence[str] | None,
    *,
    internet: bool | None,
    rules: object = None,
    egress_proxy: object = None,
) -> EgressRules:
    """Rules from the fields of the API. Raises Invalid naming the entry, Unsupported for what is not built.

    A domain in `allowOut` makes sense only when all else is denied (e2b 2.3), hence it needs `0.0.0.0/0` in `denyOut`.
    """
    if rules:
        raise Unsupported("network.rules (header transforms) are not built yet", now="leave the field out")
    if egress_proxy:
        raise Unsupported("network.egressProxy is not built yet", now="leave the field out")
    allow, domains = _split_allowed(allow_out or ())
    deny = tuple(_cidr(entry, "network.denyOut") for entry in _bounded(deny_out or (), "network.denyOut"))
    closed = internet is False or ALL_TRAFFIC in deny
    if domains and not closed:
        raise Invalid(
            "network.allowOut",
            "domain names need all other traffic to be denied",
            now=f"add {ALL_TRAFFIC!r} to network.denyOut",
        )
    rest = tuple(entry for entry in deny if entry != ALL_TRAFFIC)
    return EgressRules(allow=allow, deny=rest, allow_domains=domains, internet=not closed)


def _split_allowed(entries: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    addresses: list[str] = []
    domains: list[str] = []
    for entry in _bounded(entries, "network.allowOut"):
        if _looks_like_address(entry):
            addresses.append(_cidr(entry, "network.allowOut"))
            continue
        domain = entry.lower().rstrip(".")
        if len(domain) > 253 or not _DOMAIN.fullmatch(domain):
            raise Invalid("network.allowOut", f"{entry!r} is neither an IPv4 address, a CIDR nor a domain")
        domains.append(domain)
    return tuple(dict.fromkeys(addresses)), tuple(dict.fromkeys(domains))


def _bounded(entries: Sequence[str], field: str) -> Sequence[str]:
    if len(entries) > ENTRIES_MAX:
        raise Invalid(field, f"{len(entries)} entries are more than {ENTRIES_MAX}")
    return entries


def _looks_like_address(entry: str) -> bool:
    return "/" in entry or ":" in entry or bool(re.fullmatch(r"[\d.]+", entry))


def _cidr(entry: str, field: str) -> str:
    """The entry in its shortest exact form: `10.0.0.1/8` becomes `10.0.0.0/8`, `1.1.1.1/32` becomes `1.1.1.1`."""
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        raise Invalid(field, f"{entry!r} is not an IPv4 address or CIDR") from None
    if network.version != 4:
        raise Invalid(field, f"{entry!r} is IPv6", now="sandboxes reach the outside by IPv4 only")
    if int(network.network_address) == 0 and network.prefixlen != 0:
        raise Invalid(field, f"{entry!r} is the unspecified address", now=f"use {ALL_TRAFFIC!r} for everything")
    return str(network.network_address) if network.prefixlen == 32 else str(network)
