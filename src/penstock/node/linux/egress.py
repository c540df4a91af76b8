"""What the firewall holds for each slot, and the smallest transaction from there to what it should hold."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from penstock.node import ruleset
from penstock.node.egress_rules import Egress, Range
from penstock.node.linux.nftables import Change, Element, NfTables

LEARNED_PER_SLOT_MAX: Final = 4096  # addresses of allowed names; beyond it the oldest are forgotten
_NAME_BYTES: Final = 16  # an interface name as a key


@dataclass
class Held:
    """The elements of one slot that are in the kernel now."""

    open: bool = False
    allow: set[Range] = field(default_factory=set)
    deny: set[Range] = field(default_factory=set)
    learned: dict[int, None] = field(default_factory=dict)  # insertion order: the oldest goes first


def slot_elements(link: str, address: str) -> list[Change]:
    """What makes a slot exist for the firewall."""
    packed = socket.inet_aton(address)
    return [
        Change(ruleset.SET_OUTER, [Element(_name(link), value=packed)]),
        Change(ruleset.SET_INNER, [Element(packed)]),
    ]


def introduce(tables: NfTables, link: str, address: str) -> None:
    tables.change(slot_elements(link, address))


def withdraw(tables: NfTables, link: str, address: str, held: Held) -> None:
    """Take every element of the slot away. Absent is success.

    The link's goes first, and from then on nothing the slot sends is let through; the address goes last, so that
    `present` shows the slot until all is done.
    """
    packed = socket.inet_aton(address)
    tables.remove(ruleset.SET_OUTER, [Element(_name(link), value=packed)])
    for name in (ruleset.SET_OPEN, ruleset.SET_BUSY):
        tables.remove(name, [Element(packed)])
    tables.remove(ruleset.SET_ALLOW, [_range(packed, each) for each in held.allow], sure=True)
    tables.remove(ruleset.SET_DENY, [_range(packed, each) for each in held.deny], sure=True)
    tables.remove(ruleset.SET_LEARNED, [_pair(packed, each) for each in held.learned])
    tables.remove(ruleset.SET_INNER, [Element(packed)])


def apply(tables: NfTables, address: str, held: Held, egress: Egress, *, keep_learned: bool) -> bool:
    """Make the slot's elements those of `egress` in one transaction, and note it in `held`.

    Returns whether something that was reachable may no longer be. On failure nothing has changed.
    """
    packed = socket.inet_aton(address)
    allow, deny = set(egress.allow), set(egress.deny)
    gone, fresh = held.allow - allow, deny - held.deny
    changes = [
        _change(ruleset.SET_ALLOW, [_range(packed, each) for each in gone], add=False),
        _change(ruleset.SET_DENY, [_range(packed, each) for each in held.deny - deny], add=False),
        _change(ruleset.SET_ALLOW, [_range(packed, each) for each in allow - held.allow]),
        _change(ruleset.SET_DENY, [_range(packed, each) for each in fresh]),
    ]
    if egress.open != held.open:
        changes.append(_change(ruleset.SET_OPEN, [Element(packed)], add=egress.open))
    tables.change(each for each in changes if each.elements)
    stricter = bool(gone or fresh or (held.open and not egress.open))
    held.open, held.allow, held.deny = egress.open, allow, deny
    if not keep_learned and held.learned:
        # Outside of the transaction: one that has expired meanwhile would make the whole fail.
        tables.remove(ruleset.SET_LEARNED, [_pair(packed, each) for each in held.learned])
        held.learned.clear()
        stricter = True
    return stricter


def learn(tables: NfTables, address: str, held: Held, found: Iterable[str]) -> None:
    """Make the addresses an allowed name resolved to reachable; used ones stay, idle ones expire."""
    packed = socket.inet_aton(address)
    values = [struct.unpack(">I", socket.inet_aton(each))[0] for each in found]
    fresh = [_pair(packed, each, timeout_s=ruleset.LEARNED_S) for each in values]
    if fresh:
        tables.change([Change(ruleset.SET_LEARNED, fresh)])
    for each in values:
        held.learned.pop(each, None)
        held.learned[each] = None
    while len(held.learned) > LEARNED_PER_SLOT_MAX:
        oldest = next(iter(held.learned))
        tables.remove(ruleset.SET_LEARNED, [_pair(packed, oldest)])
        del held.learned[oldest]


def present(tables: NfTables) -> set[str]:
    """Outer addresses of the slots the firewall knows."""
    found = {socket.inet_ntoa(each.key) for each in tables.elements(ruleset.SET_INNER)}
    return found | {socket.inet_ntoa(each.value) for each in tables.elements(ruleset.SET_OUTER) if each.value}


def read_back(tables: NfTables) -> dict[str, Held]:
    """Outer address -> what the kernel holds for it, for every address in any set. For the start of a daemon."""
    held: dict[str, Held] = {}

    def of(packed: bytes) -> Held:
        return held.setdefault(socket.inet_ntoa(packed), Held())

    for each in tables.elements(ruleset.SET_OUTER):
        if each.value:
            of(each.value)
    for each in tables.elements(ruleset.SET_INNER):
        of(each.key)
    for each in tables.elements(ruleset.SET_OPEN):
        of(each.key).open = True
    for each in tables.elements(ruleset.SET_LEARNED):
        of(each.key[:4]).learned[struct.unpack(">I", each.key[4:8])[0]] = None
    for name in (ruleset.SET_ALLOW, ruleset.SET_DENY):
        for each in tables.elements(name):
            end = each.end or each.key
            span = Range(struct.unpack(">I", each.key[4:8])[0], struct.unpack(">I", end[4:8])[0])
            (of(each.key[:4]).allow if name == ruleset.SET_ALLOW else of(each.key[:4]).deny).add(span)
    return held


def _change(set_name: str, elements: list[Element], *, add: bool = True) -> Change:
    return Change(set_name, elements, add=add)


def _name(link: str) -> bytes:
    return link.encode().ljust(_NAME_BYTES, b"\0")


def _range(packed: bytes, span: Range) -> Element:
    return Element(packed + struct.pack(">I", span.first), packed + struct.pack(">I", span.last))


def _pair(packed: bytes, value: int, *, timeout_s: float | None = None) -> Element:
    return Element(packed + struct.pack(">I", value), timeout_s=timeout_s)
