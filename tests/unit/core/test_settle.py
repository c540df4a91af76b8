from __future__ import annotations

import asyncio
import gc
import warnings

import pytest

from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed, within
from penstock.core.settle import CANCEL_S, Interrupted, settle

from .virtual import virtual


class Work:
    """A slow piece of work that remembers how far it came."""

    def __init__(self, seconds: float = 10, error: Exception | None = None) -> None:
        self.seconds, self.error, self.ended = seconds, error, False

    async def __call__(self) -> str:
        await asyncio.sleep(self.seconds)
        self.ended = True
        if self.error is not None:
            raise self.error
        return "done"


@virtual
async def test_a_result_passes_through() -> None:
    assert await settle(Work()(), within_s=60, what="work") == "done"


@virtual
async def test_any_number_of_cancellations_neither_stops_the_work_nor_is_lost() -> None:
    work = Work()
    async with Crew("c") as crew:
        task = crew.spawn(settle(work(), within_s=60, what="work"), name="caller")
        for _ in range(3):
            await asyncio.sleep(1)
            task.cancel()
        await asyncio.sleep(6)
        assert not task.done()
        await asyncio.sleep(2)
        assert work.ended
        assert task.cancelled()


@virtual
async def test_an_error_beside_a_cancellation_is_raised_and_the_cancellation_strikes_next() -> None:
    story: list[str] = []

    async def caller() -> None:
        try:
            await settle(Work(error=ValueError("busy"))(), within_s=60, what="work")
        except ValueError as error:
            story.append(f"{error}: {error.__notes__[0]}")
        story.append("went on")
        await asyncio.sleep(1)
        story.append("never reached")

    async with Crew("c") as crew:
        task = crew.spawn(caller(), name="caller")
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.sleep(20)
        assert task.cancelled()
    assert story == ["busy: its caller was cancelled meanwhile; the cancellation follows", "went on"]


@virtual
async def test_the_deadline_cancels_the_work_and_names_it() -> None:
    work = Work()
    with pytest.raises(DeadlinePassed, match="unmount of sb-1"):
        await settle(work(), within_s=3, what="unmount of sb-1")
    assert not work.ended
    assert asyncio.get_running_loop().time() == 3


@virtual
async def test_a_result_that_is_there_at_the_deadline_is_returned() -> None:
    for _ in range(1_000):
        assert await settle(Work(seconds=3)(), within_s=3, what="work") == "done"


@virtual
async def test_work_deaf_to_its_cancellation_is_given_up_and_said_so() -> None:
    async def deaf() -> None:
        for _ in range(100):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    with pytest.raises(DeadlinePassed, match="ignores its cancellation"):
        await settle(deaf(), within_s=3, what="work")
    assert asyncio.get_running_loop().time() == 3 + CANCEL_S


@virtual
async def test_an_error_raised_in_answer_to_the_deadline_is_the_cause() -> None:
    async def cleans_up_badly() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise OSError("EBUSY") from None

    with pytest.raises(DeadlinePassed) as caught:
        await settle(cleans_up_badly(), within_s=3, what="work")
    assert str(caught.value.__cause__) == "EBUSY"


@virtual
async def test_work_cancelled_by_a_third_party_does_not_look_like_our_own_cancellation() -> None:
    async with Crew("c") as crew:
        work = crew.spawn(Work()(), name="work")
        asyncio.get_running_loop().call_later(1, work.cancel)
        with pytest.raises(Interrupted):
            await settle(work, within_s=60, what="work")


@virtual
async def test_an_outer_deadline_is_handed_back_after_the_work_as_a_deadline() -> None:
    work = Work()
    with pytest.raises(DeadlinePassed, match="the whole"):
        async with within(1, "the whole"):
            await settle(work(), within_s=60, what="work")
    assert work.ended
    await asyncio.sleep(1)  # no stray cancellation


@virtual
async def test_an_outer_deadline_beside_an_error_leaves_no_stray_cancellation() -> None:
    with pytest.raises(ValueError, match="busy"):
        async with within(1, "the whole"):
            await settle(Work(error=ValueError("busy"))(), within_s=60, what="work")
    await asyncio.sleep(1)


class Killed(BaseException):
    """The end of the program, as a simulation plays it."""


@virtual
async def test_the_end_of_the_program_goes_straight_through() -> None:
    async def dies() -> None:
        raise Killed

    with pytest.raises(Killed):
        await settle(dies(), within_s=60, what="work")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_work_that_is_cancelled_before_its_first_step_is_closed() -> None:
    """As at the end of a world, or of a loop: every task is cancelled, also the one that was made a moment ago."""
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    async def main() -> None:
        settling = asyncio.ensure_future(settle(work(), within_s=1, what="it"))
        before = asyncio.all_tasks()
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - before:
            task.cancel()
        with pytest.raises(Interrupted):
            await settling

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
        gc.collect()
    assert begun == []
