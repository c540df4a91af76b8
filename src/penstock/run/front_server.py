"""Serves the API on a listening socket of ours, under our signals and our deadlines."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn

from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.model.errors import Unavailable

GRACE_S: Final = 5.0
BACKLOG: Final = 1024


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the daemon's: uvicorn would stop the API before the node has drained."""
        yield


class FrontServer:
    """Takes its address at construction (port 0: a free one); serves from `start` until `stop`, refuses before."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._try(lambda: self._socket.bind((host, port)), f"{host}:{port}")
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._server: _Server | None = None
        self._task: Any = None

    def _try(self, take: Callable[[], None], address: str) -> None:
        try:
            take()
        except OSError as error:
            self._socket.close()
            raise Unavailable(
                "the API cannot listen", which=address, why=str(error), now="choose another with --api"
            ) from error

    def start(self, app: Any, crew: Crew) -> None:
        """Raises Unavailable when another program listens on our address by now."""
        self._try(lambda: self._socket.listen(BACKLOG), self.url)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=620,
            timeout_graceful_shutdown=int(GRACE_S),
        )
        self._server = _Server(config)
        self._task = crew.spawn(self._server.serve(sockets=[self._socket]), name="API")

    async def stop(self) -> None:
        """Let requests in flight end, bounded; then close. Idempotent."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            async with within(GRACE_S + 5, "the end of the API"):
                await self._task
            self._server = None
        self._socket.close()
