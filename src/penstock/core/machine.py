"""Run a transition table.

A machine is a plain dict `{(state, event): next state}` and these few lines. `fire` is the only way a state changes; a
pair that is not in the table is an error naming both. The tables live in `model`, beside the nouns they belong to; the
pictures in the docs are drawn from the same dict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from penstock.core.errors import Kind, PenstockError

S = TypeVar("S", bound=Hashable)
E = TypeVar("E", bound=Hashable)


class IllegalTransition(PenstockError):
    """Raised by `Machine.fire`: `event` has no meaning in `state`. The state is unchanged."""

    kind = Kind.CONFLICT
    code = "illegal_transition"

    def __init__(self, name: str, state: object, event: object) -> None:
        self.state, self.event = state, event
        super().__init__("no such transition", which=name, why=f"{_word(event)!r} while {_word(state)!r}")


class Machine(Generic[S, E]):
    """One object's state. `table` is shared and never changed."""

    def __init__(self, table: Mapping[tuple[S, E], S], state: S, *, name: str) -> None:
        self._table, self._state, self.name = table, state, name

    @property
    def state(self) -> S:
        return self._state

    def can(self, event: E) -> bool:
        return (self._state, event) in self._table

    def fire(self, event: E) -> S:
        """Change the state as the table says and return the new one. Raises IllegalTransition."""
        try:
            self._state = self._table[self._state, event]
        except KeyError:
            raise IllegalTransition(self.name, self._state, event) from None
        return self._state


def reachable(table: Mapping[tuple[S, E], S], start: S) -> list[S]:
    """Every state that some sequence of events leads to from `start`, itself first, in order of distance."""
    found: dict[S, None] = {start: None}
    queue: deque[S] = deque((start,))
    while queue:
        here = queue.popleft()
        for (state, _), following in table.items():
            if state == here and following not in found:
                found[following] = None
                queue.append(following)
    return list(found)


def draw(table: Mapping[tuple[S, E], S], *, start: S | None = None) -> str:
    """The table as a Mermaid state diagram. Stable: rows in table order; parallel arrows joined into one."""
    lines = ["stateDiagram-v2"]
    if start is not None:
        lines.append(f"    [*] --> {_word(start)}")
    arrows: dict[tuple[S, S], list[str]] = {}
    for (state, event), following in table.items():
        arrows.setdefault((state, following), []).append(_word(event))
    lines += [f"    {_word(a)} --> {_word(b)}: {', '.join(events)}" for (a, b), events in arrows.items()]
    sources = {state for state, _ in table}
    ends = dict.fromkeys(following for following in table.values() if following not in sources)
    lines += [f"    {_word(end)} --> [*]" for end in ends]
    return "\n".join(lines) + "\n"


def _word(value: object) -> str:
    return str(value.value) if isinstance(value, Enum) else str(value)
