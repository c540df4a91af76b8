"""What happened, as data: one bus that the log, the metrics, the web page and a simulation's trace all read.

An event is a kind ("sandbox.ready"), a subject (an id) and facts. The bus keeps the last `keep_max`; sinks see every
one, in order, at the moment it is emitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from penstock.core.clock import Clock

KEEP_MAX: Final = 10_000  # events remembered; older ones are dropped


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts from 1 without gaps, `at` is wall seconds, `after_s` the loop's clock."""

    number: int
    at: float
    after_s: float
    kind: str
    subject: str
    facts: Mapping[str, object]

    def __str__(self) -> str:
        return " ".join((self.kind, self.subject, *(f"{key}={value}" for key, value in self.facts.items()))).rstrip()


@dataclass(frozen=True, slots=True)
class EventsStatistics:
    emitted: int
    kept: int
    sinks: int
    sink_errors: int


class Events:
    """The bus. Not thread-safe: one loop. Never put a secret in a fact: facts are logged."""

    def __init__(self, clock: Clock, *, keep_max: int = KEEP_MAX) -> None:
        self._clock = clock
        self._kept: deque[Event] = deque(maxlen=keep_max)
        self._sinks: dict[int, Callable[[Event], object]] = {}
        self._sinks_ever = 0
        self._emitted = 0
        self._sink_errors = 0
        self.last_sink_error: Exception | None = None

    def emit(self, kind: str, subject: str = "", /, **facts: object) -> Event:
        """Remember an event and show it to every sink, in order of subscription."""
        self._emitted += 1
        event = Event(
            self._emitted, self._clock.wall(), self._clock.monotonic(), kind, subject, MappingProxyType(facts)
        )
        self._kept.append(event)
        for sink in tuple(self._sinks.values()):
            try:
                sink(event)
            except Exception as error:
                # Safe: the event is kept and the failure counted; whoever emits must not fail because a log is full.
                self._sink_errors += 1
                self.last_sink_error = error
        return event

    def subscribe(self, sink: Callable[[Event], object]) -> Callable[[], None]:
        """Show every later event to `sink`. Returns the function that ends it (calling it twice is fine)."""
        self._sinks_ever += 1
        number = self._sinks_ever
        self._sinks[number] = sink
        return lambda: _forget(self._sinks, number)

    def recent(self, *, subject: str | None = None, kind: str | None = None) -> list[Event]:
        """The kept events, oldest first. Walks all that are kept."""
        return [
            event
            for event in self._kept
            if (subject is None or event.subject == subject) and (kind is None or event.kind == kind)
        ]

    def statistics(self) -> EventsStatistics:
        return EventsStatistics(self._emitted, len(self._kept), len(self._sinks), self._sink_errors)


def _forget(sinks: dict[int, Callable[[Event], object]], number: int) -> None:
    sinks.pop(number, None)
