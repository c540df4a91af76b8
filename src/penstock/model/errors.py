"""The errors of the domain. Each class says who raises it and what its catcher should do."""

from __future__ import annotations

from typing import ClassVar

from penstock.core.errors import Kind, PenstockError

__all__ = [
    "Conflict",
    "Forbidden",
    "Internal",
    "Invalid",
    "LaunchFailed",
    "LaunchInterrupted",
    "LimitReached",
    "NoFreeSlot",
    "NotFound",
    "NotTheSlot",
    "Pinned",
    "PoolClosed",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
]


class Invalid(PenstockError):
    """Raised by whoever reads input. `field` names the offending field as the caller spelled it."""

    kind: ClassVar[Kind] = Kind.INVALID
    code: ClassVar[str] = "invalid"

    def __init__(self, field: str, why: str, *, now: str = "") -> None:
        self.field = field
        super().__init__("invalid value", which=field, why=why, now=now)

    def __str__(self) -> str:
        return f"{self.field}: {self.why}" + (f"; {self.now}" if self.now else "")


class Unauthenticated(PenstockError):
    """Raised by `api` when no known key came with the request."""

    kind: ClassVar[Kind] = Kind.UNAUTHENTICATED
    code: ClassVar[str] = "unauthenticated"


class Forbidden(PenstockError):
    """The caller is known and may not do this."""

    kind: ClassVar[Kind] = Kind.FORBIDDEN
    code: ClassVar[str] = "forbidden"


class NotFound(PenstockError):
    """No such object, or it belongs to another team (which must look the same)."""

    kind: ClassVar[Kind] = Kind.NOT_FOUND
    code: ClassVar[str] = "not_found"


class Conflict(PenstockError):
    """The object's state forbids the operation now. A controller that meets it looks again; it is no alarm."""

    kind: ClassVar[Kind] = Kind.CONFLICT
    code: ClassVar[str] = "conflict"


class NotTheSlot(Conflict):
    """Raised by `Network`: no such slot, or the process is not in it. Treat the sandbox as unknown."""

    code: ClassVar[str] = "not_the_slot"


class LimitReached(PenstockError):
    """A limit of the caller's team or of the node. `retry_after_s` is always set."""

    kind: ClassVar[Kind] = Kind.EXHAUSTED
    code: ClassVar[str] = "limit_reached"


class Unavailable(PenstockError):
    """We cannot serve this now and expect to later: draining, starting, a peer away."""

    kind: ClassVar[Kind] = Kind.UNAVAILABLE
    code: ClassVar[str] = "unavailable"


class NoFreeSlot(Unavailable):
    """Raised by `node.slots`: every slot of the node is in use. Place on another node."""

    code: ClassVar[str] = "no_free_slot"


class PoolClosed(Unavailable):
    """Raised by a pool that was closed, to takers and to givers; a giver's object has been destroyed."""

    code: ClassVar[str] = "pool_closed"


class Unsupported(PenstockError):
    """Not built yet, or this machine's kernel cannot do it. Never a silent downgrade."""

    kind: ClassVar[Kind] = Kind.UNSUPPORTED
    code: ClassVar[str] = "unsupported"


class Internal(PenstockError):
    """Something of ours broke in a way retrying will not mend."""

    code: ClassVar[str] = "internal"


class LaunchFailed(Internal):
    """Raised by a launcher. `step` is the launch step that failed, `why` the kernel's answer."""

    code: ClassVar[str] = "launch_failed"

    def __init__(self, sandbox: str, step: str, why: str) -> None:
        self.step = step
        super().__init__(f"sandbox could not be launched at step {step!r}", which=sandbox, why=why)


class LaunchInterrupted(LaunchFailed):
    """What launches (the zygote) went away under it and is being replaced. Another try finds the next one."""

    kind: ClassVar[Kind] = Kind.UNAVAILABLE
    code: ClassVar[str] = "launch_interrupted"


class Pinned(Internal):
    """A release could not be verified; what lies beneath it stays taken until `reap` succeeds."""

    code: ClassVar[str] = "pinned"
