"""The firewall of the router namespace: one static text; everything that changes with sandboxes is a set element.

Every sandbox has the same inner address, so that a memory snapshot can move; the first and the last hook translate
between it and the slot's own outer address without any state, and everything between them sees outer addresses.
`deny` is judged for every packet, before any "established" is accepted (only replies skip it): a new deny cuts a
living connection at its next packet. Names live in the router namespace alone, so they carry no installation id.

Refused: a chain per sandbox (a transaction of 2.5 ms instead of an element of 7 µs), and connection marks per slot.
"""

from __future__ import annotations

import hashlib
from typing import Final

TABLE: Final = "penstock"
INNER_ADDRESS: Final = "10.200.0.2"  # of every sandbox
INNER_PREFIX: Final = 30
GATEWAY: Final = "10.200.0.1"  # the router, in every sandbox; its DNS proxy answers here
UPLINK: Final = "up0"  # the router's end of the pair to the host
LINK_PREFIX: Final = "vs"  # + slot number: the router's end of a slot's pair

CHAIN_QUOTE: Final = "quote"  # gets its rules by hand, see node.linux.expressions
SET_OUTER: Final = "outer"  # link name -> outer address: translation, and proof of who sends
SET_INNER: Final = "inner"  # outer addresses that exist
SET_OPEN: Final = "open"  # slots that may reach the internet
SET_ALLOW: Final = "allow"  # slot . destination range
SET_DENY: Final = "deny"
SET_LEARNED: Final = "learned"  # slot . address that an allowed name resolved to, with a timeout
SET_BUSY: Final = "busy"  # slots with tracked connections, counted by the kernel

LEARNED_S: Final = 1800  # of life after the last packet: a connection outlives the answer that opened it
LEARNED_MAX: Final = 65_536
CONNECTIONS_MAX: Final = 4096  # tracked at once per slot; the kernel's table is shared by the whole host
ICMP_TO_ROUTER_PER_S: Final = 20

# Ranges no sandbox reaches unless the node allows private egress: this host, private, shared, link-local (metadata),
# benchmarking, multicast, reserved. RFC 6890.
NEVER: Final = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
)

_TEXT: Final = """\
table inet {table}
delete table inet {table}
table inet {table} {{
  map outer {{ type ifname : ipv4_addr; }}
  set inner {{ type ipv4_addr; }}
  set open {{ type ipv4_addr; }}
  set allow {{ type ipv4_addr . ipv4_addr; flags interval; }}
  set deny {{ type ipv4_addr . ipv4_addr; flags interval; }}
  set learned {{ type ipv4_addr . ipv4_addr; flags dynamic, timeout; size {learned_max}; }}
  set busy {{ type ipv4_addr; flags dynamic; size 65536; }}
  set never {{ type ipv4_addr; flags interval; elements = {{ {never} }} }}

  chain arrive {{
    type filter hook prerouting priority raw - 10; policy accept;
    iifname != "{link}*" accept
    meta nfproto != ipv4 drop
    ip saddr != {inner_address} counter drop
    ip saddr set iifname map @outer
    ip saddr {inner_address} counter drop
  }}
  chain name_service {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{link}*" meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{link}*" goto from_slot
    iifname "{uplink}" oifname "{link}*" ct direction reply ct state established,related accept
    counter drop
  }}
  chain from_slot {{
    ct direction reply ct state established,related accept
    oifname != "{uplink}" counter goto refuse
    ct state invalid drop
    ct state new add @busy {{ ip saddr ct count over {connections_max} }} counter goto refuse
    tcp flags syn / syn,rst tcp option maxseg size set rt mtu
    ip saddr . ip daddr @allow accept
    ip saddr . ip daddr @learned update @learned {{ ip saddr . ip daddr timeout {learned_s}s }} accept
    ip saddr . ip daddr @deny counter goto refuse
    ip daddr @never counter goto refuse
    ip saddr @open accept
    counter goto refuse
  }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx type admin-prohibited
  }}
  chain to_router {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct direction reply ct state established,related accept
    iifname "{link}*" ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
    iifname "{link}*" ip daddr {gateway} icmp type echo-request limit rate {icmp}/second accept
    iifname "{link}*" meta l4proto tcp reject with tcp reset
    counter drop
  }}
  chain masquerade_uplink {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{uplink}" masquerade
  }}
  chain depart {{
    type filter hook postrouting priority 350; policy accept;
    oifname "{link}*" ip daddr set {inner_address}
  }}
  chain {quote} {{
    type filter hook postrouting priority 351; policy accept;
  }}
}}
"""

_HOST_TEXT: Final = """\
table inet {table}
delete table inet {table}
table inet {table} {{
  chain to_host {{
    type filter hook input priority filter - 10; policy accept;
    iifname "{link}" ct direction reply ct state established,related accept
    iifname "{link}" meta l4proto tcp reject with tcp reset
    iifname "{link}" drop
  }}
  chain towards_router {{
    type filter hook forward priority filter - 10; policy accept;
    oifname "{link}" ct direction original drop
  }}
  chain masquerade_router {{
    type nat hook postrouting priority srcnat; policy accept;
    iifname "{link}" oifname != "{link}" masquerade
  }}
}}
"""


def router_text() -> str:
    """The whole ruleset of the router namespace, replacing any former one in one transaction."""
    return _TEXT.format(
        table=TABLE,
        quote=CHAIN_QUOTE,
        link=LINK_PREFIX,
        uplink=UPLINK,
        gateway=GATEWAY,
        inner_address=INNER_ADDRESS,
        never=", ".join(NEVER),
        icmp=ICMP_TO_ROUTER_PER_S,
        learned_max=LEARNED_MAX,
        learned_s=LEARNED_S,
        connections_max=CONNECTIONS_MAX,
    )


def router_digest() -> str:
    """Names this text, so that a daemon of another version knows to load its own."""
    return hashlib.sha256(router_text().encode()).hexdigest()[:16]


def host_table(installation: str) -> str:
    return f"penstock_{installation}"


def host_link(installation: str) -> str:
    """The host's end of the uplink pair; 8 of the 15 bytes a device name may have."""
    return f"pk{installation}"


def host_text(installation: str) -> str:
    """The one table in the host's namespace: lets replies in, nothing to the host itself, and masquerades."""
    return _HOST_TEXT.format(table=host_table(installation), link=host_link(installation))
