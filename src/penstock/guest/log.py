"""The sandbox's log: JSON lines on an inherited descriptor, bounded in length, rate and total.

The host stores what is written here, so a sandbox that starts processes in a loop must not fill the host's disk.
What is dropped is counted, and the count leads the next line that is written.
"""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Final

from penstock.core.clock import Clock

LINE_BYTES_MAX: Final = 2048
TEXT_CHARS_MAX: Final = 512  # of one fact
BURST_BYTES: Final = 256 * 1024
BYTES_PER_S: Final = 2048
TOTAL_BYTES_MAX: Final = 32 * 1024 * 1024  # of one sandbox's life
TRACE_FRAMES_MAX: Final = 8
_JSON: Final = json.JSONEncoder(default=str)


class Log:
    """Never raises and never waits: a line that does not fit now is dropped."""

    def __init__(self, fd: int, clock: Clock) -> None:
        self._fd, self._clock = fd, clock
        self._budget = float(BURST_BYTES)
        self._refilled_at = clock.monotonic()
        self._written = 0
        self._dropped = 0

    def move(self, fd: int) -> None:
        """Write to `fd` from now on."""
        self._fd = fd

    def say(self, event: str, *, level: str = "info", **facts: object) -> None:
        """One line: `{"ts": ..., "level": ..., "event": ..., **facts}`. Facts longer than TEXT_CHARS_MAX are cut."""
        line: dict[str, object] = {"ts": round(self._clock.wall(), 3), "level": level, "event": event}
        line |= {name: _cut(value) for name, value in facts.items()}
        if self._dropped:
            line["dropped_before"] = self._dropped
        data = _JSON.encode(line).encode("utf-8", "replace") + b"\n"
        if len(data) > LINE_BYTES_MAX:
            kept = {name: line[name] for name in ("ts", "level", "event")} | {"cut_bytes": len(data)}
            data = json.dumps(kept).encode() + b"\n"
        if not self._afford(len(data)) or not self._write(data):
            self._dropped += 1
        else:
            self._dropped = 0

    def fault(self, what: str, error: BaseException, **facts: object) -> None:
        """A bug of ours: the error's type, text and where it came from (files and lines; no source is read)."""
        self.say(
            "fault", level="error", what=what, error=type(error).__name__, why=str(error), at=where(error), **facts
        )

    def _afford(self, size: int) -> bool:
        now = self._clock.monotonic()
        self._budget = min(BURST_BYTES, self._budget + (now - self._refilled_at) * BYTES_PER_S)
        self._refilled_at = now
        if size > self._budget or self._written + size > TOTAL_BYTES_MAX:
            return False
        self._budget -= size
        self._written += size
        return True

    def _write(self, data: bytes) -> bool:
        try:
            return os.write(self._fd, data) == len(data)
        except OSError:
            # Safe: the host's disk is full or its reader gone; a sandbox must run on without a log.
            return False


def where(error: BaseException) -> str:
    """`file:line < file:line`, innermost first. Not `traceback`: that opens source files, which inside a sandbox are
    the sandbox's own."""
    frames: list[str] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(reversed(frames[-TRACE_FRAMES_MAX:]))


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > TEXT_CHARS_MAX:
        return value[: TEXT_CHARS_MAX - 1] + "…"
    return value
