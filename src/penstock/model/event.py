"""One line of the event log: what happened to whom, who did it, why, and until when something else is due.

The log is what `penstock why` reads, also about what ended long ago. Facts never hold a secret.
"""

from __future__ import annotations

import msgspec


class LoggedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is dotted (`sandbox.ready`, `drain.began`, `node.undrained`); `subject` an id; `at` wall seconds.

    `related` names other subjects whose chain it belongs to (the sandboxes of a drain, the node of a sandbox).
    """

    at: float
    kind: str
    subject: str
    actor: str  # "api", "control", "node local", "operator", "key …", "expiry"
    because: str = ""
    deadline: float | None = None
    related: tuple[str, ...] = ()
    facts: dict[str, str] = {}
