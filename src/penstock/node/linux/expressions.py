"""The one firewall rule that the language of `nft` cannot say, packed by hand.

An ICMP error quotes the packet it is about, and a kernel finds the socket by that quotation. A slot's packets leave
under its outer address, so an error about one quotes the outer address, which the sandbox does not know: without this
rule it would not learn that its packet was too big (a stalled upload) nor that it was refused (a silent timeout). It
puts the inner address into the quotation and corrects the ICMP checksum; `nft` can write the bytes but then leaves
the checksum wrong. Source: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from penstock.node.linux.netlink import attribute, nested

_REGISTER: Final = 1  # NFT_REG_1, 16 bytes
_META_OIFNAME: Final = 7
_META_L4PROTO: Final = 16
_TRANSPORT: Final = 2  # base of a payload offset
_CHECKSUM_INET: Final = 1
_ICMP_CHECKSUM_AT: Final = 2
_QUOTED_SOURCE_AT: Final = 8 + 12  # ICMP header, then the source in the quoted IPv4 header
_CMP_EQUAL: Final = 0
_LIST_ELEMENT: Final = 1


def quote_inner(link_prefix: str, inner_address: str, icmp_type: int) -> list[bytes]:
    """oifname "<prefix>*" icmp type <type> @th,160,32 set <inner address>, and the checksum after it."""
    return [
        _meta(_META_OIFNAME),
        _equals(link_prefix.encode()),
        _meta(_META_L4PROTO),
        _equals(bytes([socket.IPPROTO_ICMP])),
        _load(0, 1),
        _equals(bytes([icmp_type])),
        _expression("immediate", _number(1, _REGISTER) + nested(2, attribute(1, socket.inet_aton(inner_address)))),
        _store(_QUOTED_SOURCE_AT, 4),
    ]


def _expression(name: str, data: bytes) -> bytes:
    return nested(_LIST_ELEMENT, attribute(1, name.encode() + b"\0"), nested(2, data))


def _meta(key: int) -> bytes:
    return _expression("meta", _number(2, key) + _number(1, _REGISTER))


def _equals(value: bytes) -> bytes:
    """A comparison of as many bytes as `value` has: of a name, its beginning."""
    return _expression("cmp", _number(1, _REGISTER) + _number(2, _CMP_EQUAL) + nested(3, attribute(1, value)))


def _load(offset: int, length: int) -> bytes:
    where = _number(2, _TRANSPORT) + _number(3, offset) + _number(4, length)
    return _expression("payload", _number(1, _REGISTER) + where)


def _store(offset: int, length: int) -> bytes:
    where = _number(2, _TRANSPORT) + _number(3, offset) + _number(4, length)
    checksum = _number(6, _CHECKSUM_INET) + _number(7, _ICMP_CHECKSUM_AT)
    return _expression("payload", _number(5, _REGISTER) + where + checksum)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))
