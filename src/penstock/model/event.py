"""One line of the event log: what happened to whom, who did it, why, and until when something else is due.

The log is what `penstock why` reads, also about what ended long ago. Facts never hold a secret.
"""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.model import keys
from penstock.model.errors import Invalid

TEXT_CHARS_MAX: Final = 500  # of `because` and of each fact; what is longer is cut, with a mark
FACTS_MAX: Final = 16
RELATED_MAX: Final = 7  # with the subject as many labels as a record may carry
SUBJECT_CHARS_MAX: Final = 200
ROOMS: Final = frozenset({"api", "control", "node", "run"})
_MICROSECONDS_MAX: Final = 10**16 - 1  # 16 digits: until the year 2286


class LoggedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is dotted (`sandbox.ready`, `drain.began`, `node.undrained`); `subject` an id; `at` wall seconds.

    `related` names other subjects whose chain it belongs to (the drain of a forced sandbox, the node of a drain).
    `team` is whose it is: that team's keys may read it; empty: only the operator may.
    """

    at: float
    kind: str
    subject: str
    actor: str  # "api", "control", "node local", "operator", "key …", "expiry"
    because: str = ""
    deadline: float | None = None
    related: tuple[str, ...] = ()
    facts: dict[str, str] = {}
    team: str = ""


class EventRecord(msgspec.Struct, frozen=True):
    """What to put into the store; its key never exists there before."""

    key: str
    value: bytes
    labels: dict[str, str]


class EventWriter:
    """Names the records of one writer in one life of its process. Pure but for its count.

    Two events of the same microsecond, and those after a clock that stepped back, get keys of their own: a key ends
    with the writer's room, its `nonce` (drawn anew at each start) and the count. Keys of one writer sort as told.
    """

    def __init__(self, room: str, nonce: str) -> None:
        assert room in ROOMS, room
        assert nonce.isalnum(), nonce
        self._room, self._nonce = room, nonce
        self._count = 0

    def record(self, event: LoggedEvent) -> EventRecord:
        """The record of `event`, within the bounds above."""
        assert 0 < len(event.subject) <= SUBJECT_CHARS_MAX, event.subject
        self._count += 1
        microseconds = min(max(0, round(event.at * 1e6)), _MICROSECONDS_MAX)
        key = f"{keys.EVENT}{microseconds:016d}-{self._room}-{self._nonce}{self._count:08d}"
        return EventRecord(key, _encode(_bounded(event)), labels_of(event))


def labels_of(event: LoggedEvent) -> dict[str, str]:
    labels = {"subject": event.subject}
    for name in event.related[:RELATED_MAX]:
        labels |= labels_of_related(name)
    return labels


def labels_of_related(subject: str) -> dict[str, str]:
    """What to list by for the events that name `subject` as related: a label each, so that it is a look-up."""
    return {f"related {subject}": ""}


def key_bound(at: float) -> str:
    """The least key an event at `at` (wall seconds) can have: keys at or above it are of then or later."""
    return f"{keys.EVENT}{min(max(0, round(at * 1e6)), _MICROSECONDS_MAX):016d}"


def at_of(key: str) -> float:
    """When the event of this key happened, in wall seconds. Raises Invalid for what is no event's key."""
    digits = key.removeprefix(keys.EVENT)[:16]
    if not key.startswith(keys.EVENT) or len(digits) != 16 or not digits.isdigit():
        raise Invalid("key", f"{key!r} is not the key of an event")
    return int(digits) / 1e6


def drain_subject(node: str, epoch: int) -> str:
    """How a drain is called where one word has to name it: `penstock why drain-local-3`."""
    return f"drain-{node}-{epoch}"


def parse_drain_subject(subject: str) -> tuple[str, int] | None:
    """(node, epoch) of a drain's subject; None for any other."""
    node, dash, epoch = subject.removeprefix("drain-").rpartition("-")
    if not subject.startswith("drain-") or not dash or not node or not (epoch.isascii() and epoch.isdigit()):
        return None
    return node, int(epoch)


def cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"


def _bounded(event: LoggedEvent) -> LoggedEvent:
    fits = len(event.because) <= TEXT_CHARS_MAX and len(event.facts) <= FACTS_MAX
    if fits and all(len(text) <= TEXT_CHARS_MAX for text in event.facts.values()):
        return event
    facts = {name: cut(text) for name, text in list(event.facts.items())[:FACTS_MAX]}
    return msgspec.structs.replace(event, because=cut(event.because), facts=facts)


_encode: Final = msgspec.json.Encoder().encode
decode: Final = msgspec.json.Decoder(LoggedEvent).decode
