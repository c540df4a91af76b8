"""A source in another process. It reconnects by itself, and resumes where its reader was.

While the other side is away nothing fails: a listing waits, a watch is silent and says `connected` False. A watch whose
revision is not kept any more, or whose store was replaced, raises Compacted, and its view lists again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.deadlines import Rng, backoff_s, within
from penstock.feed.frames import (
    BrokenFrame,
    Demand,
    End,
    Event,
    FromServer,
    Granted,
    Link,
    Page,
    Refusal,
    Started,
    Want,
    Watch,
    address,
)
from penstock.feed.frames import List as ListRequest
from penstock.model.errors import Forbidden, Unavailable
from penstock.model.records import Batch, Compacted, Listing, Record

CONNECT_S: Final = 5.0
ANSWER_S: Final = 30.0  # between two messages of a listing
RETRY_BASE_S: Final = 0.02
RETRY_CAP_S: Final = 1.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_decoder = msgspec.msgpack.Decoder(FromServer)


async def open_unix(path: Path) -> Streams:
    """Raises OSError."""
    with address(path) as name:
        return await asyncio.open_unix_connection(name)


class RemoteSource:
    """`path` is the socket of a `FeedServer`. One connection per listing or watch, made by `connect`."""

    def __init__(self, path: Path, *, rng: Rng, connect: Callable[[Path], Awaitable[Streams]] = open_unix) -> None:
        self._path, self._rng, self._connect = path, rng, connect

    async def list(self, prefix: str) -> Listing:
        """Waits until the other side answers: bound it. Raises Forbidden when it does not serve `prefix`."""
        failures = 0
        while True:
            try:
                return await self._list(prefix)
            except (OSError, Unavailable):
                failures += 1
            await asyncio.sleep(self.retry_s(failures))

    def watch(self, prefix: str, after_revision: int) -> RemoteWatch:
        return RemoteWatch(self, prefix, after_revision)

    async def demand(self, sandbox: str) -> str:
        """Ask that a sandbox run. Empty once it does; else the code of the error that says why it does not.

        Asked again when the connection breaks, which changes nothing: bound it.
        """
        failures = 0
        while True:
            try:
                return await self._demand(sandbox)
            except (OSError, BrokenFrame):
                failures += 1
            await asyncio.sleep(self.retry_s(failures))

    async def _demand(self, sandbox: str) -> str:
        link = await self.dial(Demand(sandbox))
        try:
            message = await link.receive(_decoder)
        finally:
            link.abort()
        if isinstance(message, Granted):
            return ""
        if isinstance(message, Refusal):
            return message.code
        raise BrokenFrame("demand broke off", which=sandbox)

    async def dial(self, request: ListRequest | Watch | Demand) -> Link:
        """Raises OSError."""
        async with within(CONNECT_S, f"connection to {self._path.name}"):
            reader, writer = await self._connect(self._path)
        link = Link(reader, writer)
        link.put(request)
        return link

    def retry_s(self, failures: int) -> float:
        return backoff_s(failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng)

    async def _list(self, prefix: str) -> Listing:
        link = await self.dial(ListRequest(prefix))
        records: list[Record] = []
        try:
            while True:
                async with within(ANSWER_S, f"listing of {prefix}"):
                    message = await link.receive(_decoder)
                if isinstance(message, Page):
                    records.extend(message.records)
                elif isinstance(message, End):
                    return Listing(message.revision, tuple(records))
                elif isinstance(message, Refusal):
                    raise _raised(message)
                else:
                    raise BrokenFrame("listing broke off", which=prefix)
        finally:
            link.abort()


class RemoteWatch:
    """One reader. Errors: Compacted, Forbidden, Unavailable (closed)."""

    def __init__(self, source: RemoteSource, prefix: str, after_revision: int) -> None:
        self._source, self._prefix = source, prefix
        self.revision = after_revision  # everything up to here was handed out
        self._link: Link | None = None
        self._wanted = 0
        self._failures = 0
        self._closed = False
        self.connected = False

    def __aiter__(self) -> RemoteWatch:
        return self

    async def __anext__(self) -> Batch:
        """The next revision, however often the connection breaks meanwhile. Cancellation loses nothing."""
        while not self._closed:
            try:
                batch = await self._next()
            except (OSError, Unavailable):
                self._hang_up()
                self._failures += 1
                await asyncio.sleep(self._source.retry_s(self._failures))
                continue
            except BaseException:
                self._hang_up()
                raise
            if batch is not None:
                return batch
        raise Unavailable("watch was closed", which=self._prefix)

    def want(self, revision: int) -> None:
        """See `feed.source.Watching`. Asked again after a reconnection."""
        self._wanted = min(self._wanted or revision, revision)
        if self._link is not None:
            self._link.put(Want(self._wanted))

    async def aclose(self) -> None:
        self._closed = True
        self._hang_up()

    async def _next(self) -> Batch | None:
        """The next batch; None when what came was something else."""
        if self._link is None:
            self._link = await self._source.dial(Watch(self._prefix, self.revision))
            if self._wanted:
                self._link.put(Want(self._wanted))
        message = await self._link.receive(_decoder)
        if isinstance(message, Started):
            self.connected, self._failures = True, 0
            return None
        if isinstance(message, Refusal):
            raise _raised(message)
        if not isinstance(message, Event):
            raise BrokenFrame("watch broke off", which=self._prefix)
        self.revision = message.batch.revision
        if self._wanted <= self.revision:
            self._wanted = 0
        return message.batch

    def _hang_up(self) -> None:
        self.connected = False
        if self._link is not None:
            self._link.abort()
            self._link = None


def _raised(refusal: Refusal) -> Compacted | Forbidden | Unavailable:
    if refusal.code == Compacted.code:
        return Compacted(refusal.asked, compacted=refusal.compacted, revision=refusal.revision)
    if refusal.code == Forbidden.code:
        return Forbidden("feed refused", why=refusal.why)
    return Unavailable("feed broke off", why=refusal.why, retry_after_s=RETRY_CAP_S)
