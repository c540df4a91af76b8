"""Serves a source to other processes of this machine over a unix socket. Only the prefixes it was given.

And takes up demands, if it was given somebody who meets them: the one way by which a reader asks for something.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.crew import Crew, CrewClosed
from penstock.core.deadlines import DeadlinePassed, within
from penstock.core.errors import PenstockError
from penstock.feed.frames import (
    PAGE_BYTES,
    Demand,
    End,
    Event,
    FromReader,
    Granted,
    Link,
    Page,
    Refusal,
    Started,
    Watch,
    address,
)
from penstock.feed.frames import List as ListRequest
from penstock.feed.source import Source, Watching
from penstock.model.errors import Forbidden, Invalid, Unavailable
from penstock.model.records import Compacted, Record

READERS_MAX: Final = 64  # connections; one per view of another process
REQUEST_S: Final = 10.0  # for a new connection to say what it wants
DEMAND_S: Final = 60.0  # for a demand to be met
SEND_S: Final = 10.0  # for a reader to take what it was sent; then it is cut, and comes back
CLOSE_S: Final = 1.0
BUFFER_BYTES: Final = 1024 * 1024  # sent and not taken, per reader

_decoder = msgspec.msgpack.Decoder(FromReader)


class FeedServer:
    """`serve` it in a crew; the connections are tasks of that crew. `meet` returns once a sandbox runs, or raises."""

    def __init__(
        self,
        source: Source,
        path: Path,
        *,
        prefixes: Sequence[str],
        send_s: float = SEND_S,
        meet: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._source, self._path, self._prefixes, self._send_s = source, path, tuple(prefixes), send_s
        self._meet = meet
        self._links: dict[Link, None] = {}
        self.cut = 0  # readers that did not take what they were sent

    async def serve(self, crew: Crew) -> asyncio.Server:
        """Listen. A socket file left behind by a dead process is replaced. The server closes with the crew."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        with address(self._path) as name:
            server = await asyncio.start_unix_server(partial(self.accept, crew), name)
        os.chmod(self._path, 0o600)
        crew.spawn(self._until_stopped(server), name=f"feed server {self._path.name}")
        return server

    def accept(self, crew: Crew, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, however it was made, by a task of `crew`."""
        link = Link(reader, writer)
        if len(self._links) >= READERS_MAX:
            link.abort()
            return
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._links[link] = None
        answer = self._answer(link)
        try:
            crew.spawn(answer, name="feed reader")
        except CrewClosed:
            answer.close()
            self._drop(link)

    async def _until_stopped(self, server: asyncio.Server) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            for link in list(self._links):
                self._drop(link)

    def _drop(self, link: Link) -> None:
        self._links.pop(link, None)
        link.abort()

    async def _answer(self, link: Link) -> None:
        """One connection, from its request to its end. What a reader does wrong ends its connection, nothing else."""
        try:
            async with within(REQUEST_S, "request of a feed reader"):
                request = await link.receive(_decoder)
            if isinstance(request, ListRequest):
                await self._list(link, request.prefix)
            elif isinstance(request, Watch):
                await self._watch(link, request.prefix, request.after_revision)
            elif isinstance(request, Demand):
                await self._demand(link, request.sandbox)
        except OSError:
            pass  # the reader is gone, or too slow (DeadlinePassed is one): it comes back by itself
        except PenstockError as error:
            await self._refuse(link, error)
        finally:
            self._drop(link)

    async def _refuse(self, link: Link, error: PenstockError) -> None:
        with contextlib.suppress(OSError):  # gone already: then there is nobody to tell
            link.put(_refusal(error))
            await link.close(within_s=CLOSE_S)

    async def _demand(self, link: Link, sandbox: str) -> None:
        """Met to its end, also when whoever demanded it hangs up: others may wait for the same."""
        if self._meet is None:
            raise Forbidden("feed takes up no demands", which=sandbox)
        try:
            async with within(DEMAND_S, f"sandbox {sandbox} to run"):
                await self._meet(sandbox)
        except DeadlinePassed as late:
            raise Unavailable("sandbox does not run yet", which=sandbox, retry_after_s=1.0) from late
        link.put(Granted())
        await link.close(within_s=self._send_s)

    async def _list(self, link: Link, prefix: str) -> None:
        self._check(prefix)
        listing = await self._source.list(prefix)
        page: list[Record] = []
        size_bytes = 0
        for record in listing.records:
            page.append(record)
            size_bytes += len(record.value)
            if size_bytes >= PAGE_BYTES:
                await self._send(link, Page(tuple(page)))
                page, size_bytes = [], 0
        link.put(Page(tuple(page)))
        await self._send(link, End(listing.revision))
        await link.close(within_s=self._send_s)

    async def _watch(self, link: Link, prefix: str, after_revision: int) -> None:
        self._check(prefix)
        watch = self._source.watch(prefix, after_revision)
        try:
            link.put(Started())
            async with Crew(f"feed reader of {prefix}") as crew:
                crew.spawn(self._wants(link, watch), name="wants")
                async for batch in watch:
                    await self._send(link, Event(batch))
        finally:
            await watch.aclose()

    async def _wants(self, link: Link, watch: Watching) -> None:
        """Until the reader hangs up, which ends the watch."""
        try:
            while (message := await link.receive(_decoder)) is not None:
                if isinstance(message, ListRequest | Watch | Demand):
                    raise Invalid("request", "a connection carries one request")
                watch.want(message.revision)
        except (OSError, PenstockError):
            pass  # the watch ends below, and the connection with it
        await watch.aclose()

    async def _send(self, link: Link, message: Page | End | Event) -> None:
        link.put(message)
        try:
            async with within(self._send_s, "a feed reader to take what it was sent"):
                await link.flush()
        except TimeoutError:
            self.cut += 1
            raise

    def _check(self, prefix: str) -> None:
        if not prefix.startswith(self._prefixes):
            raise Forbidden("feed does not serve this", which=prefix)


def _refusal(error: PenstockError) -> Refusal:
    if isinstance(error, Compacted):
        return Refusal(error.code, str(error), error.asked, error.compacted, error.revision)
    return Refusal(error.code, str(error))
