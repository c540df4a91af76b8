"""Run a coroutine test in virtual time: it may sleep for hours, and a wait that cannot end is a named Deadlock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.sim.loop import run


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def call(*args: Any, **fixtures: Any) -> None:
        run(test(*args, **fixtures), seed=1)

    return call
