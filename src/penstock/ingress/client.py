"""The near end of an exchange: what becomes of a client's requests, one after the other.

The end of a client's sending is handed on as such: the server in the sandbox learns at once that nobody will say more,
and decides itself whether that is a disconnect. A connection that broke is cut on the other side too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from penstock.core.breaker import BreakerFull
from penstock.core.deadlines import DeadlinePassed
from penstock.ingress import decide, framing, pages
from penstock.ingress.connection import HELD_BYTES_MAX, Connection, Stage
from penstock.ingress.decide import Own, Signed
from penstock.ingress.dial import NoDescriptor, PortClosed, SandboxGone
from penstock.ingress.heads import Asked, mask, request_bytes
from penstock.ingress.pages import Refusal
from penstock.ingress.table import Route
from penstock.ingress.waking import may_wake
from penstock.wire.http1 import BadRequest
from penstock.wire.routing import GUEST_PORT, Target

if TYPE_CHECKING:
    from penstock.ingress.hub import Hub
    from penstock.ingress.upstream import Upstream

_HEAD, _BODY, _ANSWER = Stage.HEAD, Stage.BODY, Stage.ANSWER
_TUNNEL, _LINGER, _CLOSED = Stage.TUNNEL, Stage.LINGER, Stage.CLOSED


class Client(Connection):
    """Made by the listener for each connection."""

    __slots__ = ("_begun", "_dialling", "_forward", "_retried", "route", "target", "upstream")

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self.target: Target | None = None
        self.route: Route | None = None
        self.upstream: Upstream | None = None
        self._forward = b""  # the request's head, as sent on
        self._begun = False  # the final response's head has gone out
        self._retried = False
        self._dialling: asyncio.Task[Any] | None = None

    # ---- what the transport tells

    def eof_received(self) -> bool:
        """The client sends no more. True keeps our side open, for what is still to be answered."""
        self._finished = True
        stage, upstream = self.stage, self.upstream
        if not self.transport.can_write_eof() or stage is _HEAD or stage is _LINGER or stage is _CLOSED:
            return False
        if stage is _BODY:
            return upstream is None  # what is held may complete the body; else the request was cut short
        if stage is _TUNNEL and (upstream is None or upstream.finished):
            return False
        if not self._held:  # pipelined requests go out first
            self._hand_on_eof()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.upstream is not None:
            self.upstream.pause_reading()

    def resume_writing(self) -> None:
        if self.upstream is not None:
            self.upstream.resume_reading()
        super().resume_writing()

    # ---- what its upstream tells

    def begin_answer(self, result: str, *, keep: bool) -> None:
        """The final response's head goes out now."""
        self._begun, self._keep = True, keep
        self.hub.tally.requests[result] += 1

    def begin_tunnel(self, head: bytes) -> None:
        """The server agreed to another protocol: from here on, bytes."""
        self._begun, self.stage = True, _TUNNEL
        self.hub.tally.requests["upgraded"] += 1
        self.send(head)
        if self._held and self.upstream is not None:
            self.upstream.transport.write(bytes(self._held))
            self._held.clear()
        self.upstream_drained()
        if self._finished:
            self._hand_on_eof()

    def answered(self) -> None:
        """The response has gone out whole; the upstream is no longer ours."""
        self.upstream = None
        self._leave_sandbox()
        self._next(close=not self._keep)

    def upstream_drained(self) -> None:
        if len(self._held) <= HELD_BYTES_MAX and (self.upstream is None or not self.upstream.write_paused):
            self.resume_reading()

    def upstream_broke(self, why: str) -> None:
        """The server said something that is no HTTP. Its connection is gone."""
        self.upstream = None
        if self._begun:
            self._cut()
        else:
            self._refuse(pages.upstream_failed(self._sandbox(), why))

    def upstream_lost(self, upstream: Upstream, *, untouched: bool) -> None:
        """The connection ended in the middle of the exchange."""
        assert self.asked is not None and self.target is not None
        self.upstream = None
        if self._begun:
            self._cut()
        elif untouched and upstream.reused and self.asked.replayable and not self._retried and self.route is not None:
            # The server closed a kept connection while our request was on its way; it has read none of it, or may read
            # it twice without harm.
            self._retried = True
            self.hub.tally.retries += 1
            self._dial(self.route)
        elif self.target.port == GUEST_PORT:
            # The guest is pid 1: it hangs up in the middle of a request only by dying.
            self._refuse(pages.sandbox_not_found(self._sandbox()))
        else:
            self._refuse(pages.upstream_failed(self._sandbox(), "it hung up without an answer"))

    def peer_finished(self) -> bool:
        """Tunnel: the server will send no more. Returns whether our sending to it may go on."""
        if self._finished or not self.transport.can_write_eof():
            self.transport.close()
            return False
        self.transport.write_eof()
        return True

    def tunnel_ended(self) -> None:
        self.upstream = None
        self.transport.close()

    # ---- what the hub tells

    def sandbox_ended(self) -> None:
        """The sandbox is gone: say so if nothing was said yet, else cut the stream."""
        if self._begun:
            self._let_go()
            self._cut()
        else:
            self._refuse(pages.sandbox_not_found(self._sandbox()))

    def sandbox_paused(self, since: float) -> None:
        """It stands still. A request that went in after `since` (loop seconds) wakes it, or is taken back."""
        if self._begun or self._heard < since or self.asked is None or self.target is None or self.route is None:
            return
        if self.route.auto_resume:
            self.hub.waker.nudge(self.route.sandbox)
        elif self.asked.replayable:
            self._refuse(pages.sandbox_not_found(self._sandbox()))

    # ---- requests

    def _take(self, data: bytes) -> None:
        if self.upstream is None or self.stage is _ANSWER:
            self._hold(data)
        elif self.stage is _BODY:
            self._read_body(data)
        else:
            self.upstream.transport.write(data)

    def _start(self, asked: Asked, rest: bytes) -> None:
        self.hub.idle.pop(self, None)
        self.asked = asked
        self._begun = self._retried = False
        self.upstream = self.route = self.target = None
        self._body = None if asked.bodiless else framing.of_request(asked.head)
        self.stage = _ANSWER if self._body is None else _BODY
        if rest:
            self._hold(rest)
        aim = asked.aim
        kind = type(aim)
        if kind is Target:
            assert isinstance(aim, Target)
            choice = decide.choose(aim, asked.head, self.hub.table, self.hub.tokens.traffic)
            if type(choice) is Route and choice.serving:
                self._forward_to(choice, aim)
            elif isinstance(choice, Refusal) and choice.cause != "not_found":
                self._refuse(choice)
            else:
                self._spawn(self._look_again(aim), "look again")
        elif isinstance(aim, Refusal):
            self._refuse(aim)
        elif isinstance(aim, Own):
            self._answer_own(aim)
        else:
            assert isinstance(aim, Signed)
            self._spawn(self._find_signed(aim), "signed URL")

    async def _look_again(self, target: Target) -> None:
        """Before a sandbox is said to be unknown or asleep, the table hears all that was true when the request came.

        Who creates or resumes a sandbox is answered by the API; its first request may be here before the feed's news.
        One that sleeps all the same is woken, if this request may do that.
        """
        await self.hub.catch_up()
        await self._decide(target)

    async def _decide(self, target: Target) -> None:
        """By the table of now, and by that of later when the sandbox has to be woken first."""
        hub, choice = self.hub, self._choose_again(target)
        if isinstance(choice, Route) and not choice.serving:
            assert self.asked is not None
            refusal = may_wake(target, self.asked.head, choice, hub.tokens.access, hub.wall())
            if refusal is None:
                refusal = await hub.waker.wake(target.sandbox)
            choice = refusal or self._choose_again(target)
        self._dialling = None
        if isinstance(choice, Refusal):
            self._refuse(choice)
        elif choice is not None and choice.serving:
            self._forward_to(choice, target)
        elif choice is not None:
            self._refuse(pages.still_changing(target.sandbox))

    def _choose_again(self, target: Target) -> Route | Refusal | None:
        """By the table of now; None: the client has gone."""
        if self.stage is _CLOSED or self.asked is None:
            return None
        return decide.choose(target, self.asked.head, self.hub.table, self.hub.tokens.traffic)

    def _forward_to(self, route: Route, target: Target) -> None:
        asked, hub = self.asked, self.hub
        assert asked is not None
        self.route, self.target = route, target
        if not hub.enter(route.sandbox, self):
            self._refuse(pages.too_many_connections(route.sandbox, hub.per_sandbox_max))
            return
        self._forward = asked.forward
        if route.mask_host is not None and target.port != GUEST_PORT:
            try:
                self._mask(route.mask_host, target.port)
            except BadRequest as bad:
                self._refuse(pages.bad_request(bad.status, bad.why))
                return
        upstream = hub.pool.take(route, target.port, replayable=asked.replayable)
        if upstream is None:
            self._dial(route)
        else:
            self._send_on(upstream)

    def _mask(self, pattern: str, port: int) -> None:
        assert self.asked is not None
        head = self.asked.head
        upgrade, host = self.asked.upgrade is not None, mask(pattern, port)
        self._forward = request_bytes(head, upgrade=upgrade, host=host, forwarded_host=head.header(b"host"))

    def _dial(self, route: Route) -> None:
        assert self.target is not None
        self._spawn(self._dial_and_send(route, self.target), f"dial {route.sandbox}")

    def _spawn(self, doing: Coroutine[Any, Any, None], name: str) -> None:
        self._dialling = self.hub.spawn(self._or_cut(doing), name=name)

    async def _or_cut(self, doing: Coroutine[Any, Any, None]) -> None:
        """A bug of ours cuts the connection: nobody may wait for an answer that nobody will give."""
        try:
            await doing
        except Exception:
            if self.stage is not _CLOSED:
                self._let_go()
                self._cut()
            raise

    async def _dial_and_send(self, route: Route, target: Target) -> None:
        try:
            upstream = await self.hub.pool.dial(route, target.port)
        except PortClosed:
            refusal = pages.port_closed(route.sandbox, target.port)
        except SandboxGone:
            refusal = pages.sandbox_not_found(route.sandbox)
        except NoDescriptor:
            refusal = pages.full()
        else:
            self._dialling = None
            if self.stage is _CLOSED or self.route is not route:
                upstream.transport.close()
            else:
                self._send_on(upstream)
            return
        self._dialling = None
        if self.stage is not _CLOSED:
            self._refuse(refusal)

    def _send_on(self, upstream: Upstream) -> None:
        """The request's head goes out, with what is here of its body."""
        self.upstream = upstream
        upstream.begin(self)
        if self.write_paused:
            upstream.pause_reading()
        if (
            not upstream.transport.is_closing()
        ):  # a new one may have hung up already, and uvloop raises for a write then
            upstream.transport.write(self._forward)
            if self._body is not None and self._held:
                data = bytes(self._held)
                self._held.clear()
                self._read_body(data)
                if self.upstream is not None:
                    self.upstream_drained()
        if not upstream.reused:
            upstream.hear_out()
        if self._finished:
            self._finish_early()

    def _finish_early(self) -> None:
        """The client ended its sending while we dialled."""
        if self.stage is _BODY:
            self._let_go()
            self.stage = _CLOSED
            self.transport.close()
        elif self.stage is _ANSWER and not self._held:
            self._hand_on_eof()

    def _read_body(self, data: bytes) -> None:
        assert self._body is not None and self.upstream is not None
        try:
            out, rest = self._body.feed(data)
        except BadRequest as bad:
            self._let_go()
            if self._begun:
                self._cut()
            else:
                self._refuse(pages.bad_request(bad.status, bad.why), close=True)
            return
        if out:
            self.upstream.transport.write(out)
        if rest is not None:
            self._body = None
            self.stage = _ANSWER
            if rest:
                self._hold(rest)

    async def _find_signed(self, signed: Signed) -> None:
        await self.hub.catch_up()
        try:
            route = await self.hub.signed.find(signed)
        except (BreakerFull, DeadlinePassed):
            self._dialling = None
            self._refuse(Refusal(status=429, message="too many signed URLs at once", retry_after_s=1, cause="limit"))
            return
        if route is not None:
            await self._decide(Target(route.sandbox, GUEST_PORT))
            return
        self._dialling = None
        if self.stage is not _CLOSED:
            self._refuse(pages.bad_request(401, "invalid signature"))

    def _answer_own(self, own: Own) -> None:
        assert self.asked is not None
        if own is Own.HEALTH:
            kind, body = "application/json", b'{"status":"ok"}'
        else:
            kind, body = "text/plain; version=0.0.4; charset=utf-8", self.hub.expose()
        close = not self._may_keep_own()
        reply = pages.respond(200, kind, body, bodiless=self.asked.to_head, close=close)
        self._answer_self(reply, cause="own", close=close)

    # ---- endings

    def _cut(self) -> None:
        self._leave_sandbox()
        self.stage = _CLOSED
        self.hub.tally.resets += 1
        self.hub.tally.requests["reset"] += 1
        self.reset()

    def _let_go(self) -> None:
        """Whatever is under way for this client ends now."""
        if self._dialling is not None:
            # Not when the task itself calls: it ends by returning.
            if self._dialling is not asyncio.current_task():
                self._dialling.cancel()
            self._dialling = None
        if self.upstream is not None:
            upstream, self.upstream = self.upstream, None
            upstream.abandon()
        self._leave_sandbox()

    def _leave_sandbox(self) -> None:
        if self.route is not None:
            self.hub.exit(self.route.sandbox, self)
            self.route = None

    def _hand_on_eof(self) -> None:
        upstream = self.upstream
        if upstream is not None and not upstream.transport.is_closing() and upstream.transport.can_write_eof():
            upstream.transport.write_eof()

    def _sandbox(self) -> str:
        return self.target.sandbox if self.target is not None else ""
