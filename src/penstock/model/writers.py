"""Which room may write which records. The store itself refuses other rooms' writes."""

from __future__ import annotations

from typing import Final

from penstock.model import keys

WRITERS: Final[dict[str, frozenset[str]]] = {
    keys.SANDBOX_SPEC: frozenset({"api", "control"}),  # control: `node`, and removal once it has ended
    keys.SANDBOX_STATUS: frozenset({"node", "control"}),  # control: only the removal
    keys.NODE_SPEC: frozenset({"api"}),
    keys.NODE_STATUS: frozenset({"node"}),
    keys.SNAPSHOT: frozenset({"node", "api", "control"}),  # api and control: only the removal
    keys.DRAIN: frozenset({"node", "control"}),  # control: only the removal
    keys.TEMPLATE: frozenset({"run", "api"}),
    keys.BUILD: frozenset({"run", "node"}),
    keys.TEAM: frozenset({"api", "run"}),
    keys.API_KEY: frozenset({"api", "run"}),
    keys.IDEMPOTENCY: frozenset({"api"}),
    keys.EVENT: frozenset({"node", "control", "api", "run"}),
}
