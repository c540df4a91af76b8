"""Changing the network or going round it."""

import fcntl
import socket
import struct
import subprocess

from attempt import attempt, write

INDEX = socket.if_nametoindex("eth0")


def ip(words):
    ran = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    if ran.returncode:
        raise OSError(ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else "failed")
    return ran.stdout


def option(level, number, value, kind=socket.SOCK_DGRAM):
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.setsockopt(level, number, value)


def spoof(address, *options):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for level, number, value in options:
            sock.setsockopt(level, number, value)
        sock.bind((address, 0))
        return sock.sendto(b"x", ("10.200.0.1", 53))


def control(request, payload):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, request, payload)


for protocol in (1, 6, 17, 255):
    attempt(f"raw socket {protocol}", lambda protocol=protocol: socket.socket(2, socket.SOCK_RAW, protocol))
attempt("raw IPv6 socket", lambda: socket.socket(10, socket.SOCK_RAW, 58))
attempt("packet socket", lambda: socket.socket(17, socket.SOCK_RAW, 0x300))
attempt("packet socket without heads", lambda: socket.socket(17, socket.SOCK_DGRAM, 0x300))
for name, family in {"vsock": 40, "alg": 38, "xdp": 44, "bluetooth": 31, "can": 29, "tipc": 30, "rds": 21, "key": 15,
                     "smc": 43, "kcm": 41, "ax25": 3, "x25": 9, "nfc": 39, "ppp": 24}.items():  # fmt: skip
    for kind in (1, 2, 3, 5):
        attempt(f"{name} socket {kind}", lambda family=family, kind=kind: socket.socket(family, kind, 0))
for name, protocol in {"usersock": 2, "xfrm": 6, "selinux": 7, "iscsi": 8, "connector": 11, "netfilter": 12,
                       "uevent": 15, "scsi": 18, "crypto": 21}.items():  # fmt: skip
    attempt(f"netlink {name}", lambda protocol=protocol: socket.socket(16, socket.SOCK_RAW, protocol))
for words in (
    "link set eth0 down", "link set lo down", "link set eth0 mtu 9000", "link set eth0 address 02:00:00:00:00:01",
    "link add evil type dummy", "link add evil type veth", "link set eth0 netns 1", "link del eth0",
    "addr add 10.200.0.1/32 dev lo", "addr add 10.201.0.7/16 dev eth0", "addr del 10.200.0.2/30 dev eth0",
    "route add default via 10.200.0.1 metric 5", "route del default", "route add 8.8.8.8 dev lo",
    "neigh replace 10.200.0.1 lladdr 02:00:00:00:00:01 dev eth0", "rule add from all table 7",
    "tuntap add evil mode tun", "netns add evil", "xfrm state flush", "tcp_metrics flush",
):  # fmt: skip
    attempt(f"ip {words}", lambda words=words: ip(words))
address = struct.pack("=16sH2s4s8x", b"eth0", socket.AF_INET, b"", socket.inet_aton("10.200.0.1"))
attempt("address by ioctl", lambda: control(0x8916, address))
attempt("flags by ioctl", lambda: control(0x8914, struct.pack("=16sh14x", b"eth0", 0)))
attempt("mark", lambda: option(socket.SOL_SOCKET, 36, 7))
attempt("transparent proxy", lambda: option(socket.SOL_IP, 19, 1))
attempt("forced send buffer", lambda: option(socket.SOL_SOCKET, 32, 1 << 28))
attempt("forced receive buffer", lambda: option(socket.SOL_SOCKET, 33, 1 << 28))
attempt("own IP heads", lambda: option(socket.SOL_IP, 3, 1))
attempt("iptables", lambda: option(socket.SOL_IP, 64, bytes(1024), socket.SOCK_STREAM))
attempt("source of another slot", lambda: spoof("10.201.0.9"))
attempt("source of another slot, unbound", lambda: spoof("10.201.0.9", (socket.SOL_IP, 15, 1)))
attempt("source of the router", lambda: spoof("10.200.0.1", (socket.SOL_IP, 15, 1)))
attempt("loopback source", lambda: spoof("127.0.0.1"))
attempt("tun device", lambda: write("/dev/net/tun", ""))
