"""What a sandbox's programs are told about a drain: a file, and GET /notices, a line for each change.

The daemon tells by POST /notice on the control socket: `{"epoch", "reason", "soft_by", "hard_by"}`, or
`{"epoch", "withdrawn": true}` when the drain was undone. It may tell the same again, and what it told before may
arrive later: nothing happens then. `docs/guest.md` is the contract with programs.

The file is at NOTICE_PATH while a notice is in force. It is replaced as a whole, and nothing that a program put in its
way is followed. Root inside may do with it what he likes; other users cannot, since /run is root's.

The stream tells states, not events: a reader too slow for two changes hears of the second. So nothing queues.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import stat
from contextlib import suppress
from typing import Any, Final

from penstock.core.deadlines import Pulse
from penstock.guest.exchange import Exchange, HttpError
from penstock.guest.parts import Parts
from penstock.guest.settings import NOTICE_PATH
from penstock.wire.http1 import Field

BODY_BYTES_MAX: Final = 16 * 1024
REASON_CHARS_MAX: Final = 1024
READERS_MAX: Final = 64  # of /notices at once; beyond: 429
KEEPALIVE_S: Final = 30.0  # silence after which a reader gets a line that says nothing

RUN: Final = "/run"
_FOLDER, _FILE = NOTICE_PATH.removeprefix(RUN + "/").split("/")
_NEW: Final = ".notice.new"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STREAM: Final[tuple[Field, ...]] = ((b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store"))
_KEEPALIVE: Final = b'{"event": "keepalive"}\n'

Notice = dict[str, Any]


def register(parts: Parts, *, run: str | None = RUN) -> None:
    """Serve /notice and /notices. `run` is the directory that stands for /run; None: no file is written."""
    notices = Notices(run)
    try:
        notices.make_folder()  # now, so that programs can watch it before there is anything in it
    except OSError as error:
        # Safe: each notice tries again, and says what is in the way.
        parts.log.say("no folder for notices", level="warning", why=str(error))
    parts.routes.add("POST", "/notice", notices.take, guarded=False, internal=True)
    parts.routes.add("GET", "/notices", notices.tell)


class Notices:
    """The notice in force, if any, and who listens."""

    def __init__(self, run: str | None) -> None:
        self._run = run
        self._epoch = -1  # of the newest order heard of
        self._notice: Notice | None = None
        self._filed = True  # the file says what we know
        self._changes = 0
        self._changed = Pulse()
        self._readers = 0

    async def take(self, exchange: Exchange) -> None:
        """204 when programs can see it, also when they could before; 500 when the file could not be written."""
        epoch, notice = _parse(await exchange.read_body(BODY_BYTES_MAX))
        try:
            self.put(epoch, notice)
        except OSError as error:
            raise HttpError(500, f"{NOTICE_PATH} could not be changed: {error}") from error
        exchange.answer(204)

    def put(self, epoch: int, notice: Notice | None) -> None:
        """Make `notice` known; None withdraws. An epoch that is older, or was withdrawn, changes nothing.

        Raises OSError when the file could not be changed; listeners have been told, and the same call tries again.
        """
        withdrawn = self._notice is None and epoch == self._epoch
        if epoch < self._epoch or (withdrawn and notice is not None):
            return
        self._epoch = epoch
        if notice != self._notice:
            self._notice, self._filed = notice, False
            self._changes += 1
            self._changed.fire()
        if not self._filed:
            self._file()
            self._filed = True

    async def tell(self, exchange: Exchange) -> None:
        """The notice in force, then each change, until the client goes."""
        if exchange.head.method == b"HEAD":
            exchange.answer(200, _STREAM)
            return
        if self._readers >= READERS_MAX:
            raise HttpError(429, f"{READERS_MAX} clients follow /notices already")
        self._readers += 1
        try:
            await self._follow(exchange)
        finally:
            self._readers -= 1

    async def _follow(self, exchange: Exchange) -> None:
        gone, seen = exchange.disconnected, self._changes
        exchange.on_disconnect(self._changed.fire)
        stream = await exchange.start_stream(200, _STREAM, first=self._line() if self._notice is not None else b"")
        loop = asyncio.get_running_loop()

        def woken() -> bool:
            return self._changes != seen or gone.is_set()

        while not gone.is_set():
            await self._changed.wait_for(woken, until=loop.time() + KEEPALIVE_S)
            line = self._line() if self._changes != seen else _KEEPALIVE
            seen = self._changes
            await stream.write(line)

    def _line(self) -> bytes:
        if self._notice is None:
            return json.dumps({"event": "withdrawn", "epoch": self._epoch}).encode() + b"\n"
        return json.dumps({"event": "notice"} | self._notice).encode() + b"\n"

    # ---- the file ------------------------------------------------------------------------------------------

    def make_folder(self) -> None:
        """Raises OSError. One that is there already is made ours."""
        if self._run is not None:
            os.close(_open_folder(self._run))

    def _file(self) -> None:
        if self._run is None:
            return
        folder = _open_folder(self._run)
        try:
            if self._notice is None:
                with suppress(FileNotFoundError):
                    os.unlink(_FILE, dir_fd=folder)
            else:
                _replace(folder, json.dumps(self._notice).encode() + b"\n")
        finally:
            os.close(folder)


def _open_folder(run: str) -> int:
    """The folder of notices: a directory in `run` that only we may write to. Whatever else has its name gives way."""
    above = os.open(run, _DIRECTORY)
    try:
        try:
            os.mkdir(_FOLDER, 0o755, dir_fd=above)
        except FileExistsError:
            pass
        try:
            folder = os.open(_FOLDER, _DIRECTORY, dir_fd=above)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            os.unlink(_FOLDER, dir_fd=above)  # a link, or a file: never what it points to
            os.mkdir(_FOLDER, 0o755, dir_fd=above)
            folder = os.open(_FOLDER, _DIRECTORY, dir_fd=above)
    finally:
        os.close(above)
    found = os.fstat(folder)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o755:
        os.fchown(folder, os.geteuid(), os.getegid())
        os.fchmod(folder, 0o755)
    return folder


def _replace(folder: int, data: bytes) -> None:
    """Put `data` at _FILE, whole or not at all."""
    with suppress(FileNotFoundError):
        os.unlink(_NEW, dir_fd=folder)
    fd = os.open(_NEW, _CREATE, 0o644, dir_fd=folder)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(_NEW, _FILE, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=folder)
        raise
    finally:
        os.close(fd)


# ---- what the daemon says ----------------------------------------------------------------------------------------


def _parse(body: bytes) -> tuple[int, Notice | None]:
    """Epoch and notice; None when it is withdrawn. Raises HttpError(400)."""
    try:
        wish = json.loads(body)
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    if not isinstance(wish, dict):
        raise HttpError(400, "the body is not a JSON object")
    epoch, reason = wish.get("epoch"), wish.get("reason", "")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise HttpError(400, "epoch must be a number from 0")
    withdrawn = wish.get("withdrawn", False)
    if not isinstance(withdrawn, bool):
        raise HttpError(400, "withdrawn must be true or false")
    if withdrawn:
        return epoch, None
    if not isinstance(reason, str):
        raise HttpError(400, "reason must be a string")
    by = {name: _moment(wish, name) for name in ("soft_by", "hard_by")}
    return epoch, {"epoch": epoch, "reason": reason[:REASON_CHARS_MAX]} | by


def _moment(wish: dict[str, Any], name: str) -> float | None:
    """Wall seconds; None: open."""
    value = wish.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise HttpError(400, f"{name} must be seconds since 1970, or null")
    return float(value)
