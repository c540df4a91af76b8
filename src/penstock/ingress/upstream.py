"""The far end of an exchange: one connection to a server inside a sandbox.

It carries one exchange at a time. A response's head is judged before a byte of it goes out; the body is sent on as it
arrives. Between exchanges it waits in the pool, where anything the server says, or its hanging up, discards it: bytes
nobody asked for must never be read as the answer to the next request.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final

from penstock.ingress import framing
from penstock.ingress.framing import Body
from penstock.ingress.heads import Answered, response_bytes
from penstock.ingress.pipe import Pipe
from penstock.wire.http1 import HEAD_BYTES_MAX, BadRequest, Framing

if TYPE_CHECKING:
    from penstock.ingress.client import Client
    from penstock.ingress.hub import Hub

INTERIM_MAX: Final = 64  # 1xx heads before the final one


class _Stage(Enum):
    IDLE = "idle"  # in the pool, or new
    HEAD = "head"  # the response's head is to come
    BODY = "body"
    TUNNEL = "tunnel"  # another protocol since 101
    LOST = "lost"


_IDLE, _HEAD, _BODY, _TUNNEL, _LOST = _Stage.IDLE, _Stage.HEAD, _Stage.BODY, _Stage.TUNNEL, _Stage.LOST
Key = tuple[str, int]  # sandbox id and port


class Upstream(Pipe):
    """Made by a dialler, owned by the client it serves or by the pool."""

    __slots__ = (
        "_answered",
        "_body",
        "_early",
        "_held",
        "_interims",
        "client",
        "finished",
        "hub",
        "idle_since",
        "key",
        "reused",
        "stage",
    )

    def __init__(self, hub: Hub, key: Key) -> None:
        super().__init__()
        self.hub, self.key = hub, key
        self.client: Client | None = None
        self.stage = _IDLE
        self.reused = False  # it has served before
        self.finished = False  # the server will send no more
        self.idle_since = 0.0
        self._body: Body | None = None
        self._answered: Answered | None = None
        self._held = bytearray()  # an unfinished head
        self._early = b""  # said by a server that was not asked yet
        self._interims = 0

    # ---- what its owner does

    def begin(self, client: Client) -> None:
        """Serve `client`'s request: the caller writes it next, then calls `hear_out`."""
        assert self.client is None and (self.stage is _IDLE or not self.reused), self.stage
        self.client = client
        self.stage = _HEAD

    def hear_out(self) -> None:
        """What a new server said, or that it hung up, before it was asked: its answer, as to a request it refuses.

        A guest with too many connections does so, and may be faster than we are.
        """
        early, self._early = self._early, b""
        if early:
            self.data_received(early)
        if self.client is not None and self.transport.is_closing():
            self.connection_lost(None)

    def abandon(self) -> None:
        """Whoever asked is gone. The server learns it at once, by a reset where there is one."""
        self.client = None
        self.stage = _LOST
        self.reset()

    @property
    def untouched(self) -> bool:
        """Not one byte of an answer has come."""
        return self.stage is _HEAD and not self._held and not self._interims

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connected(transport)
        self.hub.upstreams[self] = None

    def data_received(self, data: bytes) -> None:
        client = self.client
        if client is None:
            if not self.reused and self.stage is _IDLE and len(self._early) + len(data) <= HEAD_BYTES_MAX:
                self._early += data  # nobody else was ever served by it, so it can only mean who comes next
                return
            self.hub.pool.forget(self)
            self.abandon()
            return
        try:
            if self.stage is _BODY:
                assert self._body is not None
                out, rest = self._body.feed(data)
                if out:
                    client.send(out)
                if rest is not None:
                    self._end(rest)
            elif self.stage is _HEAD:
                self._read_head(client, data)
            elif self.stage is _TUNNEL:
                client.send(data)
        except BadRequest as bad:
            self.abandon()
            client.upstream_broke(bad.why)

    def eof_received(self) -> bool:
        self.finished = True
        if self.stage is _TUNNEL and self.client is not None:
            return self.client.peer_finished()
        return False  # closes the transport; `connection_lost` judges what it means

    def connection_lost(self, exc: Exception | None) -> None:
        self.hub.upstreams.pop(self, None)
        client, stage = self.client, self.stage
        if client is None:
            self.hub.pool.forget(self)
        elif stage is _BODY and self._body is framing.UNTIL_CLOSE and exc is None:
            self.client = None
            client.answered()
        elif stage is _TUNNEL and exc is None:
            self.client = None
            client.tunnel_ended()
        else:
            untouched, self.client = self.untouched, None
            client.upstream_lost(self, untouched=untouched)
        self.stage = _LOST

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.client is not None:
            self.client.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.client is not None:
            self.client.upstream_drained()

    # ---- private parts

    def _read_head(self, client: Client, data: bytes) -> None:
        if self._held:
            start = max(0, len(self._held) - 3)
            self._held += data
            end = self._held.find(b"\r\n\r\n", start)
            data = bytes(self._held) if end >= 0 else b""
        else:
            end = data.find(b"\r\n\r\n")
            self._held += data if end < 0 else b""
        if end < 0:
            if len(self._held) >= HEAD_BYTES_MAX:
                raise BadRequest(502, "the response's head is too long")
            return
        self._held.clear()
        end += 4
        raw, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
        assert client.asked is not None
        answered = self.hub.heads.answered(raw, to_head=client.asked.to_head)
        if answered.head.status >= 200:
            self._start_final(client, answered, rest)
        else:
            self._take_interim(client, answered, rest)

    def _start_final(self, client: Client, answered: Answered, rest: bytes) -> None:
        head, asked = answered.head, client.asked
        assert asked is not None
        old = asked.minor == 0
        plain = old and head.framing is Framing.CHUNKED
        keep = client.may_keep() and head.framing is not Framing.UNTIL_CLOSE and not plain
        if old:
            connection = b"keep-alive" if keep else b"close"
            out = response_bytes(head, connection=connection, chunked=not plain)
        else:
            out = answered.keep if keep else answered.close
        body = framing.of_response(head, encode=not plain)
        self._answered = answered
        client.begin_answer(answered.result, keep=keep)
        if body is None:
            client.send(out)
            self._end(rest)
            return
        self.stage, self._body = _BODY, body
        part, left = body.feed(rest) if rest else (b"", None)
        client.send(out + part if part else out)
        if left is not None:
            self._end(left)

    def _take_interim(self, client: Client, answered: Answered, rest: bytes) -> None:
        status = answered.head.status
        self._interims += 1
        asked = client.asked
        assert asked is not None
        if status == 101:
            if asked.upgrade is None:
                raise BadRequest(502, "it switched protocols without being asked")
            self.stage = _TUNNEL
            client.begin_tunnel(answered.keep)
            if rest:
                client.send(rest)
            return
        if self._interims > INTERIM_MAX:
            raise BadRequest(502, "it sent interim responses without end")
        if asked.minor:  # HTTP/1.0 knows none (RFC 9110 15.2)
            client.send(answered.keep)
        if rest:
            self._read_head(client, rest)

    def _end(self, rest: bytes) -> None:
        """The response is complete. Back to the pool, if both sides are at a clean boundary."""
        client, answered = self.client, self._answered
        assert client is not None and answered is not None
        complete, clean = client.request_complete, not rest and answered.head.keep_alive and not self.write_paused
        self.client, self._body, self._answered, self._interims = None, None, None, 0
        self.stage = _IDLE
        if clean and complete and not client.finished:
            self.reused = True
            self.resume_reading()
            self.hub.pool.give(self)
        else:
            self.stage = _LOST
            if complete:
                self.transport.close()
            else:
                self.reset()
        client.answered()
