"""What the front door did, as lines of the event log: put into the same commit as the change they explain."""

from __future__ import annotations

from penstock.api.front import Front
from penstock.model.event import LoggedEvent
from penstock.store.store import Put


def line(front: Front, event: LoggedEvent) -> Put:
    """The operation that writes `event`. Use it once: a key is never used twice."""
    record = front.chronicle.record(event)
    return Put(record.key, record.value, labels=record.labels, expect=0)
