"""Waiting for a slot's link to be gone, without looking again and again.

A slot is destroyed by closing its namespace; the kernel then takes the links away and tells us on a socket, 1.2 ms
later when it is quiet, 60 ms when it is clearing others away or a TCP connection is still saying goodbye (measured).
After `PATIENCE_S` the links are deleted by name instead: they are gone 1 ms later, but the deleting thread is held for
some 20 ms, so it is a thread of its own that deletes all that were asked for meanwhile at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from penstock.core.deadlines import Pulse
from penstock.node.linux import links
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink

PATIENCE_S: Final = 0.003
_NEWS_BYTES: Final = 1 << 16


class Departures:
    """Made on a thread that is inside the router's namespace; used on one event loop from `open` to `close`."""

    def __init__(self) -> None:
        self._news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        self._news.setblocking(False)
        self._news.bind((0, links.GROUP_LINK))
        self._looks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._route = Netlink(NETLINK_ROUTE)
        self._waiting: dict[int, Pulse] = {}  # by slot
        self._doomed: deque[int] = deque()
        self._deleter = ThreadPoolExecutor(1, "network-delete")

    def open(self) -> None:
        asyncio.get_running_loop().add_reader(self._news.fileno(), self._read_news)

    def close(self) -> None:
        """No `gone` may be waiting. Call `join` afterwards, where blocking is fine."""
        asyncio.get_running_loop().remove_reader(self._news.fileno())
        self._news.close()
        self._looks.close()

    def join(self) -> None:
        """Wait for the last deletion, some 20 ms."""
        self._deleter.shutdown(wait=True)
        self._route.close()

    async def gone(self, number: int) -> None:
        """Return when the link of slot `number` does not exist. The caller bounds the wait."""
        news = self._waiting.setdefault(number, Pulse())

        def is_gone() -> bool:
            return not links.exists(self._looks, links.link_name(number))

        try:
            if not await news.wait_for(is_gone, until=asyncio.get_running_loop().time() + PATIENCE_S):
                self._doomed.append(number)
                self._deleter.submit(self._delete_doomed)
                await news.wait_for(is_gone, until=None)
        finally:
            self._waiting.pop(number, None)

    def _delete_doomed(self) -> None:
        """On the deleting thread: every link asked for by now, in one call; the next takes the later ones."""
        doomed: set[int] = set()
        while self._doomed:
            doomed.add(self._doomed.popleft())
        if doomed:
            links.delete_slot_links(self._route, sorted(doomed))

    def _read_news(self) -> None:
        try:
            while True:
                for name in links.news_of_deletion(self._news.recv(_NEWS_BYTES)):
                    number = links.slot_of(name)
                    if number is not None and number in self._waiting:
                        self._waiting[number].fire()
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: news was lost, so everybody looks for himself
            for pulse in self._waiting.values():
                pulse.fire()
