"""Closing: last opened first, each bounded, all of them whatever happens; and what a stopping daemon says meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from penstock.model.drain import DrainReport, DrainStage, Step, Waiting
from penstock.model.ids import NodeId, SandboxId
from penstock.run import progress
from penstock.run.closing import Closers, Stopped, describe


def closers(*closes: object) -> tuple[Closers[str], list[str]]:
    made: Closers[str] = Closers()
    ran: list[str] = []
    for number, what in enumerate(closes):

        async def close(how: str, number: int = number, what: object = what) -> None:
            if isinstance(what, float):
                await asyncio.sleep(what)
            if isinstance(what, Exception):
                raise what
            ran.append(f"{number} {how}")

        made.add(f"part {number}", close, within_s=0.2)
    return made, ran


async def test_every_closer_runs_last_opened_first_whatever_another_raised_or_how_late_it_was():
    made, ran = closers(None, 60.0, ValueError("broke"), None)
    errors = await made.run("drain")
    assert ran == ["3 drain", "0 drain"]
    assert [type(error).__name__ for error in errors] == ["ValueError", "DeadlinePassed"]
    assert describe(errors[0]) == "while closing the part 2: broke"
    assert await made.run("drain") == [], "a second close finds nothing to do"


async def test_every_closer_runs_although_whoever_waits_is_cancelled_and_then_the_cancellation_strikes():
    made, ran = closers(None, 0.1, None)

    async def stop() -> None:
        await made.run("force")
        await asyncio.sleep(60)

    stopping = asyncio.ensure_future(stop())
    await asyncio.sleep(0.02)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(stopping, 5)
    assert ran == ["2 force", "1 force", "0 force"]


def test_the_exit_code_is_0_only_if_nothing_failed_and_nothing_was_forced_unasked():
    assert Stopped().code() == 0
    forced = Stopped(forced=("ia: killed",))
    assert (forced.code(), forced.code(force_was_asked=True)) == (1, 0)
    stuck = Stopped(stuck=("ia: EBUSY",))
    assert (stuck.code(), stuck.code(force_was_asked=True)) == (1, 1)
    assert Stopped(errors=("e",)).code(force_was_asked=True) == 1


def test_errors_of_nested_groups_are_joined_in_one_line():
    inner = ValueError("busy")
    inner.add_note("while leaving network")
    group = ExceptionGroup("node closed with errors", [inner, OSError(5, "I/O error")])
    group.add_note("while closing the node")
    assert describe(group) == "while closing the node: while leaving network: busy; [Errno 5] I/O error"


def test_progress_says_how_many_who_and_why():
    waiting = [
        Waiting(sandbox=SandboxId(f"i{n}"), next=Step.KILL, at=130.0, because="draining: asked") for n in range(7)
    ]
    report = DrainReport(
        node=NodeId("n"),
        epoch=1,
        stage=DrainStage.LIVE,
        began_at=100.0,
        starts=1,
        live=7,
        quarantined=1,
        waiting=tuple(waiting),
    )
    told = progress.line(report, 104.0)
    assert told.startswith("draining for 4 s: 1 start, 7 sandboxes left; i0 draining: asked, kill in 26 s; i1 ")
    assert told.endswith("; and 2 more; 1 in quarantine, not waited for")
