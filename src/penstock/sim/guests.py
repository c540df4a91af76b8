"""How the sandboxes of a simulated world behave."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Final

import msgspec


class Manner(StrEnum):
    PROMPT = "prompt"  # answers within milliseconds
    SLOW = "slow"  # answers within seconds
    DEAF = "deaf"  # never answers: the launch must end by its deadline
    STILLBORN = "stillborn"  # dies before it answers
    MORTAL = "mortal"  # dies some time after it answered
    STUBBORN = "stubborn"  # ignores SIGTERM
    ESCAPED = "escaped"  # its first process is moved out of its cgroup by somebody


_ODD: Final = tuple(manner for manner in Manner if manner is not Manner.PROMPT)


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    manner: Manner
    hello_s: float  # from launch to the first answer
    lives_s: float  # from the first answer; infinity unless mortal


_PROMPT = Guest(manner=Manner.PROMPT, hello_s=0.003, lives_s=float("inf"))


class Nursery:
    """Draws the manner of each new guest. `odd` is the share that is not prompt, 0 to 1."""

    def __init__(self, rng: random.Random, *, odd: float) -> None:
        self._rng, self._odd = rng, odd

    def draw(self) -> Guest:
        if self._rng.random() >= self._odd:
            return _PROMPT
        manner = self._rng.choice(_ODD)
        hello_s = self._rng.uniform(0.5, 4.0) if manner is Manner.SLOW else self._rng.uniform(0.002, 0.02)
        lives_s = self._rng.uniform(0.1, 20.0) if manner is Manner.MORTAL else float("inf")
        return Guest(manner=manner, hello_s=hello_s, lives_s=lives_s)
