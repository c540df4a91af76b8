"""`penstock up`: the daemon in the foreground. Says what it does, prints what the SDKs need, stops as it was told.

On a terminal stopping drains (bounded); as a service it keeps sandboxes, ingress and zygote, and the last line says
what goes on running. A second signal escalates a drain to force.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import uvloop

from penstock.run import door, leaks, logs
from penstock.run.closing import Stopped
from penstock.run.daemon import Daemon
from penstock.run.datafolder import DataFolder
from penstock.run.settings import OnStop, Settings

NEWS_MAX: Final = 1000  # lines that wait for a visitor at the door; beyond it he misses some
GC_THRESHOLDS: Final = (20_000, 20, 20)


def main(settings: Settings) -> int:
    """Run until told to stop. Exit code 0: nothing was forced, and nothing failed."""
    logs.configure(settings.log_level)
    # Four descriptors for each slot and disk, prepared or in use: a shell's usual 1,024 would end with 200 sandboxes.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return uvloop.run(_Up(settings).run())


def say(text: str) -> None:
    print(text, flush=True)


class _Up:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = DataFolder(settings.data).open()
        self._daemon = Daemon(settings, self._folder, self._say)
        self._orders: asyncio.Queue[OnStop] = asyncio.Queue()
        self._visitors: set[asyncio.Queue[str | None]] = set()  # at the door: they hear of a stop what we say of it
        self._stopped: Stopped | None = None

    async def run(self) -> int:
        self._watch_signals()
        starting = asyncio.ensure_future(self._daemon.start())
        ordered = asyncio.ensure_future(self._orders.get())
        await asyncio.wait((starting, ordered), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            say("stopping before it is ready")
            starting.cancel()
            await asyncio.wait((starting,))
            if starting.cancelled() or starting.exception() is not None:
                say("stopped before it was ready")
                return 1
        starting.result()
        _settle_heap()
        try:
            server = await door.serve(self._folder.door_socket, self._answer)
        except BaseException:
            await self._daemon.abandon()
            raise
        try:
            self._greet()
            return await self._until_stopped(ordered)
        finally:
            server.close()
            self._folder.door_socket.unlink(missing_ok=True)

    async def _until_stopped(self, ordered: asyncio.Future[OnStop]) -> int:
        failed = asyncio.ensure_future(self._daemon.failed.wait())
        await asyncio.wait((ordered, failed), return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        on_stop = ordered.result() if ordered.done() else OnStop.KEEP
        code = 0 if ordered.done() else 1
        if code:
            ordered.cancel()
            say(f"a part of the daemon failed ({self._daemon.failure}); stopping, sandboxes go on running")
        say(_intention(on_stop, self._settings))
        stopped = self._stopped = await self._daemon.stop(on_stop)
        for line in stopped.lines():
            self._say(line)
        say(_farewell(on_stop, self._settings, stopped))
        for visitor in self._visitors:
            visitor.put_nowait(None)
        await asyncio.sleep(0)  # the door's visitors, if any, are told before the loop ends
        return code or stopped.code()

    def _say(self, text: str) -> None:
        say(text)
        for visitor in self._visitors:
            if visitor.qsize() < NEWS_MAX:
                visitor.put_nowait(text)

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        on_stop = self._settings.on_stop or (OnStop.DRAIN if sys.stdin.isatty() else OnStop.KEEP)
        if self._orders.qsize() or self._daemon.stopping:
            self._say("again: forcing")
            self._daemon.escalate()
        else:
            self._orders.put_nowait(on_stop)

    async def _answer(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The back door: `{"stop": keep|drain|force}` is answered when the daemon has stopped, `{"reap": true}` when
        what is dead was removed.
        """
        if asked.get("reap"):
            yield {"note": leaks.removed(await self._daemon.reap())}
            return
        try:
            on_stop = OnStop(asked["stop"])
        except (KeyError, ValueError):
            yield {"error": f"not understood: {asked}"}
            return
        yield {"note": _intention(on_stop, self._settings)}
        visitor: asyncio.Queue[str | None] = asyncio.Queue()
        self._visitors.add(visitor)
        if self._daemon.stopping and on_stop is OnStop.FORCE:
            self._daemon.escalate()
        self._orders.put_nowait(on_stop)
        while (text := await visitor.get()) is not None:
            yield {"note": text}
        assert self._stopped is not None
        code = self._stopped.code(force_was_asked=on_stop is OnStop.FORCE)
        yield {"done": code, "note": _farewell(on_stop, self._settings, self._stopped)}

    def _greet(self) -> None:
        daemon = self._daemon
        say("")
        for name, value in (
            ("E2B_API_URL", daemon.api_url),
            ("E2B_SANDBOX_URL", daemon.ingress_url),
            ("E2B_VOLUME_API_URL", daemon.api_url),
            ("E2B_API_KEY", self._folder.api_key),
        ):
            say(f"export {name}={value}")
        say("")
        if daemon.tls_url:
            by = f", certificates by {daemon.ca_file}" if daemon.ca_file else ""
            say(f"TLS for https://<port>-<id>.{self._settings.domain} on {daemon.tls_url}{by}")
        say(f"data in {self._folder.path}; print the lines above again with: penstock env --data {self._folder.path}")
        say("ready")


def _settle_heap() -> None:
    """What the start made lives for ever, and requests make few cycles: look for some rarely, and not among that."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _intention(on_stop: OnStop, settings: Settings) -> str:
    return {
        OnStop.KEEP: "stopping the daemon; sandboxes go on running",
        OnStop.DRAIN: (
            f"draining: sandboxes have {settings.drain_s:.0f} s, then they are forced"
            if settings.drain_s
            else "draining: until every sandbox has ended by itself; a second signal forces"
        ),
        OnStop.FORCE: "forcing: sandboxes are killed now",
    }[on_stop]


def _farewell(on_stop: OnStop, settings: Settings, stopped: Stopped) -> str:
    if on_stop is OnStop.KEEP:
        return (
            "stopped. Sandboxes, ingress and zygote go on running; "
            f"end them with: penstock down --data {settings.data} --force"
        )
    if stopped.stuck or stopped.errors:
        return f"stopped, but not everything is verified gone: see penstock leaks --data {settings.data}"
    return "stopped. Nothing of this installation is running"
