"""The root of the one error tree.

Every error of ours says *what* failed, for *which* object, *why*, and what to do *now*; and it carries a closed
`Kind`, the only thing the edges look at: `api` maps it to an HTTP status, the guest to a Connect code, the CLI to an
exit code. The root lives in `core` because every room raises errors and `guest` may import nothing above `core`;
the errors of the domain live in `model.errors`.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Kind(Enum):
    """Who must act, in one word. Closed: edges match on it exhaustively."""

    INVALID = "invalid"  # the caller sent something wrong: change the request
    UNAUTHENTICATED = "unauthenticated"  # no credential, or one that is not known
    FORBIDDEN = "forbidden"  # known caller, not allowed
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"  # the object is in a state that forbids it: look again
    EXHAUSTED = "exhausted"  # a limit of the caller: wait or raise the limit
    UNAVAILABLE = "unavailable"  # ours, and passing: retry after a while
    UNSUPPORTED = "unsupported"  # not built, or not possible on this machine
    DEADLINE = "deadline"  # a named wait did not end in time
    INTERNAL = "internal"  # ours, and not passing: an operator must look


class PenstockError(Exception):
    """Root of every error raised on purpose by Penstock.

    `what` is one clause ("sandbox cannot be paused"), `which` the id or path, `why` the cause, `now` the way out.
    `retry_after_s` is set when waiting helps. `str(error)` is safe to show to a caller: never put a secret in it.
    """

    kind: ClassVar[Kind] = Kind.INTERNAL
    code: ClassVar[str] = "internal"

    def __init__(
        self, what: str, *, which: str = "", why: str = "", now: str = "", retry_after_s: float | None = None
    ) -> None:
        self.what, self.which, self.why, self.now = what, which, why, now
        self.retry_after_s = retry_after_s
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.what}: {self.which}" if self.which else self.what
        if self.why:
            text += f" ({self.why})"
        if self.now:
            text += f"; {self.now}"
        return text
