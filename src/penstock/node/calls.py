"""Calls to a guest, which may be deaf, while its sandbox may have to end."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, TypeVar

from penstock.model.errors import Unavailable

if TYPE_CHECKING:
    from penstock.node.supervisor import Supervisor

T = TypeVar("T")


async def unless_ended(one: Supervisor, doing: Coroutine[None, None, T], what: str) -> T:
    """The result of a call to its guest, which may be deaf: given up at once when it must end, or has.

    Raises what the call raised; Unavailable when it was given up.
    """
    outcome: list[T | Exception] = []

    async def call() -> None:
        try:
            outcome.append(await doing)
        except Exception as error:
            outcome.append(error)

    task = one.means.crew.spawn(call(), name=f"{one.id} {what}")
    task.add_done_callback(lambda _: one.poked.set())
    while not task.done() and one.order is None and not one.died:
        one.poked.clear()
        await one.poked.wait()
    one.poked.set()  # whoever else poked meanwhile is looked at next
    if not outcome:
        task.cancel()
        raise Unavailable(f"{what} was given up", which=one.id, why="it ends")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
