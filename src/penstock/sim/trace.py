"""What happened in a world, line by line; equal seeds must give equal hashes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Final

TAIL_LINES: Final = 60  # shown with a failure


class Trace:
    """An append-only story. Lines are hashed as they come; only the tail is kept unless `keep_all`."""

    def __init__(self, now: Callable[[], float], *, keep_all: bool = False) -> None:
        self._now = now
        self._hash = hashlib.sha256()
        self._lines: deque[str] = deque(maxlen=None if keep_all else TAIL_LINES)
        self.length = 0

    def say(self, what: str, **facts: object) -> None:
        line = f"{self._now():12.6f} {what}" + "".join(f" {key}={value}" for key, value in facts.items())
        self._hash.update(line.encode() + b"\n")
        self._lines.append(line)
        self.length += 1

    def digest(self) -> str:
        return self._hash.hexdigest()

    def tail(self) -> str:
        return "\n".join(self._lines)
