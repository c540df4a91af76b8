"""Reaching addresses: argv holds `tcp:HOST:PORT` and `udp:HOST:PORT`. UDP is done when anything comes back."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from attempt import attempt

SHORT_S = 0.6


def tcp(host, port):
    with socket.create_connection((host, port), timeout=SHORT_S) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return sock.recv(100)


def udp(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(SHORT_S)
        sock.sendto(b"hello", (host, port))
        return sock.recv(100)


def reach(target):
    protocol, rest = target.split(":", 1)
    host, port = rest.rsplit(":", 1)
    return (tcp if protocol == "tcp" else udp)(host, int(port))


with ThreadPoolExecutor(32) as threads:
    reached = {target: threads.submit(reach, target) for target in sys.argv[1:]}
for target, future in reached.items():
    attempt(target, future.result)
