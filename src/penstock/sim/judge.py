"""Judges the answers that people get from sandboxes: who may be refused what, and when.

The judge knows the machine itself (which process lives), the store as last kept, and how ingress and feed are. An
answer that is not the one asked for is right only when one of these excuses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.ingress.table import ROUTED
from penstock.sim.caller import Answer
from penstock.sim.checkers import Facts
from penstock.sim.machinery import Machinery

END_S: Final = 3.0  # from the end of a sandbox's first process to the end of every stream of it


class Moment(msgspec.Struct, frozen=True):
    """What was true when a request was sent, or answered."""

    at: float  # loop seconds
    pid: int  # of the sandbox if it serves and everybody could know it, else 0
    feed: int  # number of the unbroken connection from the ingress to the feed, 0: away
    ingress: int  # number of the ingress's life, 0: between two
    cuts: int  # connections of clients cut by the network so far


class Judge:
    """One per world. The world replaces the three functions."""

    def __init__(self, machine: Machinery, facts: Facts, blame: Callable[[str], None]) -> None:
        self._machine, self._facts, self._blame = machine, facts, blame
        self._loop = asyncio.get_running_loop()
        self.feed_now: Callable[[], int] = lambda: 0
        self.ingress_now: Callable[[], int] = lambda: 0
        self.cuts_now: Callable[[], int] = lambda: 0
        self.tight = False  # the ingress has few descriptors: it may say that it is full
        self._served: set[tuple[int, int]] = set()  # (ingress, pid) that answered once
        self._open: dict[int, tuple[int, str]] = {}  # requests under way: pid, what
        self._requests = 0
        self.verdicts: dict[str, int] = {}  # excuses given, by their words

    def moment(self, sandbox: str) -> Moment:
        status = self._facts.statuses.get(sandbox)
        serves = status is not None and status.phase in ROUTED and status.pid in self._machine.processes
        pid = status.pid if serves and status is not None else 0
        return Moment(self._loop.time(), pid, self.feed_now(), self.ingress_now(), self.cuts_now())

    def begin(self, what: str, then: Moment | None) -> int:
        """A request is on its way, None: to no sandbox. Returns what `done` wants."""
        self._requests += 1
        self._open[self._requests] = (then.pid if then is not None else 0, what)
        return self._requests

    def done(self, number: int) -> None:
        del self._open[number]

    def on_end(self, pid: int) -> None:
        """A first process has ended: whatever is open to it must end soon."""
        self._loop.call_later(END_S, self._check_end, pid, self._requests)

    def judge(
        self,
        what: str,
        sandbox: str,
        then: Moment,
        answer: Answer,
        *,
        asked_for_it: bool = False,
        aimed: bool = True,
    ) -> None:
        """An answer has come, or a reset. `asked_for_it`: trouble was provoked by the visitor or the server inside.

        Not `aimed`: it was not for the sandbox.
        """
        here = self.moment(sandbox)
        excuse = self._excuse(then, here, answer, asked_for_it)
        self._count(excuse if excuse is not None else "none")
        if excuse == "served" and aimed and then.pid and then.pid == here.pid:
            self._served.add((here.ingress, then.pid))
        elif excuse is None:
            self._blame(f"{what} of {sandbox}, which serves, got {answer}: {answer.body[:200]!r}; {then} → {here}")

    def refused(self, what: str, then: Moment) -> None:
        """Nobody listened where the ingress should."""
        if then.ingress and then.ingress == self.ingress_now():
            self._blame(f"{what}: the ingress does not listen")

    def _excuse(self, then: Moment, here: Moment, answer: Answer, asked_for_it: bool) -> str | None:
        """Why this answer is right, or None."""
        if 200 <= answer.status < 300 and answer.whole:
            return "served"
        if asked_for_it:
            return "asked for"
        if not then.pid or here.pid != then.pid:
            return "does not serve"
        if then.ingress != here.ingress or not here.ingress:
            return "the ingress went"
        if then.cuts != here.cuts and not answer.whole:
            return "cut"
        if self.tight and answer.status in (0, 503, 429):  # 0: closed between two requests to make room
            return "full"
        if answer.status in (502, 503) and _says_unknown(answer.body):
            known = (here.ingress, then.pid) in self._served
            if not known and (then.feed != here.feed or not here.feed):
                return "the feed was away"
        return None

    def _check_end(self, pid: int, until: int) -> None:
        if not self.feed_now():
            # Each request of a pipeline waits for the feed to catch up before it is answered that nobody is there.
            self._loop.call_later(END_S, self._check_end, pid, until)
            return
        for number, (of, what) in self._open.items():
            if of == pid and number <= until:
                self._blame(f"{what} is still open {END_S:g} s after the sandbox ended")

    def _count(self, word: str) -> None:
        self.verdicts[word] = self.verdicts.get(word, 0) + 1


def _says_unknown(body: bytes) -> bool:
    """Whether this is a refusal for want of a route. To HEAD it has no body."""
    return not body or b"was not found" in body or b"is starting" in body
