"""Where each entity lives in the store, and by which labels it is found.

Labels are immutable for the life of a record: membership never hangs on a field that changes.
"""

from __future__ import annotations

from typing import Final

SANDBOX_SPEC: Final = "sandbox/spec/"  # + sandbox id; labels: team
SANDBOX_STATUS: Final = "sandbox/status/"  # + sandbox id; labels: team, node
NODE_SPEC: Final = "node/spec/"
NODE_STATUS: Final = "node/status/"
TEMPLATE: Final = "template/"  # + template id; labels: name
BUILD: Final = "build/"
TEAM: Final = "team/"
API_KEY: Final = "key/"  # + key id; labels: hash, team
IDEMPOTENCY: Final = "idempotency/"  # + team/key; value: the sandbox id; under a lease
SNAPSHOT: Final = "snapshot/"  # + snapshot id; labels: team, sandbox, kind
DRAIN: Final = "drain/"  # + node/epoch (zero-padded): the report; + /sandbox: an outcome; labels: node
EVENT: Final = "event/"  # + zero-padded time, room and number, so that keys sort by time; labels: subject


def drain(node: str, epoch: int) -> str:
    """The key of a drain's report. With a slash behind it, the prefix of its outcomes."""
    return f"{DRAIN}{node}/{epoch:08d}"
