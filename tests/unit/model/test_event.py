"""Keys of the event log: ordered by time, never twice, whatever the clock does."""

from __future__ import annotations

import pytest

from penstock.model import keys
from penstock.model.errors import Invalid
from penstock.model.event import (
    FACTS_MAX,
    TEXT_CHARS_MAX,
    EventWriter,
    LoggedEvent,
    at_of,
    decode,
    drain_subject,
    key_bound,
    labels_of_related,
    parse_drain_subject,
)

NOW = 1_764_000_000.25


def event(at: float = NOW, **changes: object) -> LoggedEvent:
    return LoggedEvent(**{"at": at, "kind": "sandbox.ready", "subject": "ia", "actor": "node n1", **changes})  # type: ignore[arg-type]


def test_a_key_has_the_time_the_room_and_a_number() -> None:
    record = EventWriter("node", "k3f").record(event())
    assert record.key == f"{keys.EVENT}1764000000250000-node-k3f00000001"
    assert decode(record.value) == event()
    assert record.labels == {"subject": "ia"}
    assert at_of(record.key) == NOW


def test_nothing_is_overwritten_within_a_microsecond_after_a_clock_step_or_a_restart() -> None:
    first, again = EventWriter("node", "boot1"), EventWriter("node", "boot2")
    other = EventWriter("api", "boot1")
    times = [NOW, NOW, NOW + 3600, NOW, NOW - 3600, NOW]
    made = [writer.record(event(at)).key for writer in (first, again, other) for at in times]
    assert len(set(made)) == len(made)


def test_keys_of_one_writer_sort_as_they_were_told_within_a_microsecond() -> None:
    writer = EventWriter("node", "b")
    made = [writer.record(event()).key for _ in range(200)]
    assert made == sorted(made)


def test_keys_sort_by_time_and_a_bound_parts_them() -> None:
    writer = EventWriter("api", "b")
    early, late = writer.record(event(NOW - 1e-6)).key, writer.record(event(NOW)).key
    assert early < key_bound(NOW) <= late


def test_related_subjects_are_labels_that_can_be_listed_by() -> None:
    record = EventWriter("node", "b").record(event(related=("drain-n1-3", "n1")))
    assert labels_of_related("drain-n1-3").items() <= record.labels.items()


def test_texts_and_facts_are_bounded() -> None:
    long = event(because="x" * 10_000, facts={f"f{n}": "y" * 10_000 for n in range(100)})
    kept = decode(EventWriter("node", "b").record(long).value)
    assert len(kept.because) == TEXT_CHARS_MAX
    assert len(kept.facts) == FACTS_MAX
    assert max(len(text) for text in kept.facts.values()) == TEXT_CHARS_MAX


def test_a_drain_is_named_by_one_word_and_found_by_it() -> None:
    assert parse_drain_subject(drain_subject("node-7", 12)) == ("node-7", 12)
    for other in ("drain-", "drain--1", "drain-local", "drain-local-x", "ia", "local"):
        assert parse_drain_subject(other) is None, other


@pytest.mark.parametrize("key", ["event/12-node-1", "event/", "sandbox/spec/ia", "event/123456789012345x-node-1"])
def test_what_is_no_event_has_no_time(key: str) -> None:
    with pytest.raises(Invalid):
        at_of(key)
