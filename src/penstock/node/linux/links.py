"""rtnetlink: the routed pair of links of each slot, and the few other things the router needs said to the kernel.

One pair per slot and no bridge: `vs<number>` in the router namespace, `eth0` in the slot's. The router's end gets an
interface index we choose, so that link and route travel in one message to the kernel.
Source: include/uapi/linux/{if_link,rtnetlink}.h.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from penstock.node.linux.absent import is_absent
from penstock.node.linux.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    attribute,
    attributes,
    nested,
)
from penstock.node.ruleset import GATEWAY, INNER_ADDRESS, INNER_PREFIX, LINK_PREFIX

INDEX_BASE: Final = 1000  # of slot 0; lo is 1 and the uplink 2
DEFAULT: Final = "0.0.0.0"  # noqa: S104 - a destination of routes
INNER_LINK: Final = "eth0"
# Each pair is a wire of its own, so all have the same two addresses, and each end knows the other's for good: nobody
# asks by ARP, and a permanent neighbour does not count against the 1,024 the kernel keeps for the whole host.
_ROUTER_MAC: Final = bytes.fromhex("0a506e000001")
_INNER_MAC: Final = bytes.fromhex("0a506e000002")
_INNER_INDEX: Final = 2
_LO_INDEX: Final = 1
_OPERSTATE_UP: Final = b"\x06"
_CARRIER_LOOKS_MAX: Final = 100
_CARRIER_LOOK_S: Final = 0.0005
_GROUP_DOOMED: Final = 0x70656E  # links of this group go in one kernel call: 23 ms for five against 105 (measured)

_SIOCGIFINDEX: Final = 0x8933
_NEW_LINK: Final = 16
_DELETE_LINK: Final = 17
_GET_LINK: Final = 18
_NEW_ADDRESS: Final = 20
_NEW_ROUTE: Final = 24
_GET_ROUTE: Final = 26
_NEW_NEIGHBOUR: Final = 28
_SET_NEIGHBOUR_TABLE: Final = 67
_GET_NSID: Final = 90
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_OPERSTATE: Final = 16
_IFLA_LINKINFO: Final = 18
_IFLA_GROUP: Final = 27
_IFLA_NET_NS_FD: Final = 28
_IFLA_LINK_NETNSID: Final = 37
_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3
_RTA_DESTINATION: Final = 1
_RTA_OUT: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PRIORITY: Final = 6
_RTA_MULTIPATH: Final = 9
_NDA_DESTINATION: Final = 1
_NDA_ADDRESS: Final = 2
_NUD_PERMANENT: Final = 0x80
_NDTA_NAME: Final = 1
_NDTA_PARAMETERS: Final = 6
_NDTPA_INDEX: Final = 1
_NDTPA_MULTICAST_PROBES: Final = 11
_RTNH_F_ONLINK: Final = 4
_SCOPE_LINK: Final = 253
_LAST_RESORT: Final = 1_000_000
_TABLE_MAIN: Final = 254
_PROTOCOL_STATIC: Final = 4
_IFF_UP: Final = 1
_LINK_HEAD: Final = struct.Struct("=BxHiII")
_ROUTE_HEAD: Final = struct.Struct("=BBBBBBBBI")
GROUP_LINK: Final = 1  # multicast mask of link news, for a socket's address


class Route(NamedTuple):
    """One IPv4 route of the main table."""

    network: str  # address of the destination; "0.0.0.0" for the default
    prefix: int
    link_index: int
    metric: int = 0  # the least wins


@dataclass(frozen=True)
class Link:
    index: int
    name: str
    mtu: int
    peer_nsid: int  # -1: the peer is in the same namespace, or there is none
    operational: bool  # it transmits


def link_name(number: int) -> str:
    return f"{LINK_PREFIX}{number}"


def slot_of(name: str) -> int | None:
    """The slot number in a link's name, or None when it is no slot's."""
    digits = name.removeprefix(LINK_PREFIX)
    return int(digits) if name.startswith(LINK_PREFIX) and digits.isdecimal() else None


def create_slot_links(router: Netlink, inner: Netlink, number: int, address: str, netns_fd: int, mtu: int) -> None:
    """Make the pair, route `address` to it, and bring the inside up. `inner` is a socket of the slot's namespace."""
    index = INDEX_BASE + number
    router.check(
        [
            new_pair(link_name(number), index, INNER_LINK, _INNER_INDEX, netns_fd, mtu, macs=(_ROUTER_MAC, _INNER_MAC)),
            new_route(address, 32, INNER_ADDRESS, index, onlink=True),
            new_neighbour(INNER_ADDRESS, _INNER_MAC, index),
        ]
    )
    inner.check(
        [
            set_up(_LO_INDEX),
            set_up(_INNER_INDEX),
            new_address(INNER_ADDRESS, INNER_PREFIX, _INNER_INDEX),
            new_route(DEFAULT, 0, GATEWAY, _INNER_INDEX),
            new_neighbour(GATEWAY, _ROUTER_MAC, _INNER_INDEX),
            ask_for_no_neighbour(_INNER_INDEX),
        ]
    )
    _await_carrier(router, index)


def _await_carrier(router: Netlink, index: int) -> None:
    """Return once the router's end transmits.

    It was up before its peer, so the kernel activates its queue later, from a work queue; what is sent before is
    dropped, the answer to the slot's first ARP question included, and that costs a whole second. Asking for the link
    makes recent kernels do the work at once; on older ones this waits for it.
    """
    for _ in range(_CARRIER_LOOKS_MAX):
        link = find_link(router, index=index)
        if link is None or link.operational:
            return
        time.sleep(_CARRIER_LOOK_S)


def delete_slot_links(router: Netlink, numbers: Sequence[int]) -> None:
    """Delete the pairs of all `numbers` in one go. Absent is success. Blocks for about 20 ms (RCU), whatever the count;
    the links are gone from sight after about 1 ms."""
    marks = [
        Message(
            _NEW_LINK,
            0,
            _link(INDEX_BASE + number) + attribute(_IFLA_GROUP, struct.pack("=I", _GROUP_DOOMED)),
            link_name(number),
        )
        for number in numbers
    ]
    doom = Message(
        _DELETE_LINK,
        0,
        _LINK_HEAD.pack(0, 0, 0, 0, 0) + attribute(_IFLA_GROUP, struct.pack("=I", _GROUP_DOOMED)),
        "links of the doomed group",
    )
    for refusal in router.request([*marks, doom]):
        if refusal is not None and not is_absent(refusal):
            raise refusal


def list_links(router: Netlink) -> list[Link]:
    return [_parse_link(each) for each in router.dump(Message(_GET_LINK, 0, _link(0), "links"))]


def find_link(router: Netlink, *, name: str = "", index: int = 0) -> Link | None:
    """One link by name or by index; None when there is none."""
    body = _link(index) + (attribute(_IFLA_IFNAME, name.encode() + b"\0") if name else b"")
    try:
        return _parse_link(router.get(Message(_GET_LINK, 0, body, f"link {name or index}")))
    except OSError as error:
        if is_absent(error):
            return None
        raise


def exists(sock: socket.socket, name: str) -> bool:
    """Whether the namespace of `sock` has a link `name`. Unlike a netlink question it never waits for the lock under
    which links are made and deleted, which is held for milliseconds: this may be asked on a loop's thread."""
    try:
        fcntl.ioctl(sock, _SIOCGIFINDEX, struct.pack("16s24x", name.encode()))
    except OSError as error:
        if is_absent(error):
            return False
        raise
    return True


def delete_link(router: Netlink, name: str) -> None:
    """Delete one link, and with it its peer. Absent is success."""
    body = _link(0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    for refusal in router.request([Message(_DELETE_LINK, 0, body, f"link {name}")]):
        if refusal is not None and not is_absent(refusal):
            raise refusal


def namespace_id(router: Netlink, netns_fd: int) -> int:
    """The router's number for another namespace; -1 when it has no link into it."""
    body = struct.pack("=Bxxx", 0) + attribute(_NETNSA_FD, struct.pack("=I", netns_fd))
    for kind, value in attributes(router.get(Message(_GET_NSID, 0, body, "namespace id"))[4:]):
        if kind == _NETNSA_NSID:
            return int(struct.unpack("=i", value)[0])
    return -1


def list_routes(router: Netlink) -> list[Route]:
    """IPv4 routes of the main table; one over several links counts by its first."""
    found: list[Route] = []
    body = _ROUTE_HEAD.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    for payload in router.dump(Message(_GET_ROUTE, 0, body, "routes")):
        _, prefix, _, _, table, *_ = _ROUTE_HEAD.unpack_from(payload)
        parts = dict(attributes(payload[_ROUTE_HEAD.size :]))
        index = (
            parts.get(_RTA_OUT) or parts.get(_RTA_MULTIPATH, b"")[4:8]
        )  # struct rtnexthop: the index is its 2nd word
        if table == _TABLE_MAIN and len(index) == 4:
            network = socket.inet_ntoa(parts.get(_RTA_DESTINATION, bytes(4)))
            metric = struct.unpack("=I", parts[_RTA_PRIORITY])[0] if _RTA_PRIORITY in parts else 0
            found.append(Route(network, prefix, struct.unpack("=i", index)[0], metric))
    return found


def news_of_deletion(data: bytes) -> list[str]:
    """The names of the links that a datagram of link news says are gone."""
    names: list[str] = []
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 16:
            break
        if kind == _DELETE_LINK:
            names.append(_parse_link(data[at + 16 : at + length]).name)
        at += (length + 3) & ~3
    return names


def new_pair(
    name: str,
    index: int,
    peer: str,
    peer_index: int,
    peer_netns: int,
    mtu: int,
    *,
    macs: tuple[bytes, bytes] | None = None,
) -> Message:
    """A veth pair, `name` up here and `peer` down in `peer_netns` (IFF_UP on a peer answers ENOTCONN).

    `macs`: of `name` and of `peer`; the kernel draws them otherwise.
    """
    ours, theirs = (attribute(_IFLA_ADDRESS, mac) for mac in macs) if macs else (b"", b"")
    size = attribute(_IFLA_MTU, struct.pack("=I", mtu))
    far = _link(peer_index) + attribute(_IFLA_IFNAME, peer.encode() + b"\0") + size
    far += attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_netns)) + theirs
    info = nested(_IFLA_LINKINFO, attribute(1, b"veth"), nested(2, nested(1, far)))
    body = _link(index, up=True) + attribute(_IFLA_IFNAME, name.encode() + b"\0") + size
    body += ours + info
    return Message(_NEW_LINK, NLM_F_CREATE | NLM_F_EXCL, body, f"link {name}")


def set_up(index: int) -> Message:
    return Message(_NEW_LINK, 0, _link(index, up=True), f"link {index} up")


def new_address(address: str, prefix: int, index: int) -> Message:
    packed = socket.inet_aton(address)
    head = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, index)
    return Message(_NEW_ADDRESS, NLM_F_CREATE, head + attribute(2, packed) + attribute(1, packed), f"address {address}")


def new_neighbour(address: str, hardware_address: bytes, index: int) -> Message:
    """`address` has `hardware_address` on that link, for good."""
    body = struct.pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
    body += attribute(_NDA_DESTINATION, socket.inet_aton(address)) + attribute(_NDA_ADDRESS, hardware_address)
    return Message(_NEW_NEIGHBOUR, NLM_F_CREATE, body, f"neighbour {address}")


def ask_for_no_neighbour(index: int) -> Message:
    """Any neighbour but a permanent one is unreachable on that link at once, and nobody is asked about it.

    Else whoever may send a packet fills the kernel's neighbour table, which the whole host shares, with questions that
    nobody answers: 1,024 of them in 0.3 s (measured).
    """
    parameters = attribute(_NDTPA_INDEX, struct.pack("=I", index))
    parameters += attribute(_NDTPA_MULTICAST_PROBES, struct.pack("=I", 0))
    body = struct.pack("=Bxxx", socket.AF_INET) + attribute(_NDTA_NAME, b"arp_cache\0")
    return Message(_SET_NEIGHBOUR_TABLE, 0, body + nested(_NDTA_PARAMETERS, parameters), f"neighbours of link {index}")


def new_last_resort(index: int) -> Message:
    """A default route out of one link, behind every other default route."""
    body = _ROUTE_HEAD.pack(socket.AF_INET, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_LINK, 1, 0)
    body += attribute(_RTA_OUT, struct.pack("=i", index)) + attribute(_RTA_PRIORITY, struct.pack("=I", _LAST_RESORT))
    return Message(_NEW_ROUTE, NLM_F_CREATE, body, "route of last resort")


def new_route(network: str, prefix: int, gateway: str, index: int, *, onlink: bool = False) -> Message:
    flags = _RTNH_F_ONLINK if onlink else 0
    body = _ROUTE_HEAD.pack(socket.AF_INET, prefix, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, 0, 1, flags)
    if prefix:
        body += attribute(_RTA_DESTINATION, socket.inet_aton(network))
    body += attribute(_RTA_GATEWAY, socket.inet_aton(gateway)) + attribute(_RTA_OUT, struct.pack("=i", index))
    return Message(_NEW_ROUTE, NLM_F_CREATE, body, f"route to {network}/{prefix}")


def _link(index: int, *, up: bool = False) -> bytes:
    flag = _IFF_UP if up else 0
    return _LINK_HEAD.pack(socket.AF_UNSPEC, 0, index, flag, flag)


def _parse_link(payload: bytes) -> Link:
    index = _LINK_HEAD.unpack_from(payload)[2]
    parts = dict(attributes(payload[_LINK_HEAD.size :]))
    name = parts.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
    mtu = struct.unpack("=I", parts[_IFLA_MTU])[0] if _IFLA_MTU in parts else 0
    peer = struct.unpack("=i", parts[_IFLA_LINK_NETNSID])[0] if _IFLA_LINK_NETNSID in parts else -1
    return Link(index, name, mtu, peer, parts.get(_IFLA_OPERSTATE) == _OPERSTATE_UP)
