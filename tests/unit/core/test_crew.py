from __future__ import annotations

import asyncio
import contextvars

import pytest

from penstock.core.crew import Crew, CrewClosed
from penstock.core.deadlines import DeadlinePassed, within
from penstock.core.settle import settle

from .virtual import virtual


@virtual
async def test_the_end_of_the_body_cancels_in_reverse_order_and_waits() -> None:
    story: list[str] = []

    async def serve(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            story.append(f"{name} told")
            await asyncio.sleep(1)
            story.append(f"{name} ended")

    async with Crew("c") as crew:
        for name in ("a", "b", "c"):
            crew.spawn(serve(name), name=name)
        await asyncio.sleep(0)
        assert crew.names() == ("a", "b", "c")
    assert story == ["c told", "b told", "a told", "c ended", "b ended", "a ended"]
    assert crew.names() == ()


@virtual
async def test_one_failing_task_cancels_the_crew_and_the_body_and_is_raised_with_its_name() -> None:
    ended: list[str] = []

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("serve")

    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError("bad")

    with pytest.raises(ExceptionGroup) as caught:
        async with Crew("node") as crew:
            crew.spawn(serve(), name="serve")
            crew.spawn(fail(), name="fail")
            await asyncio.Event().wait()
    (error,) = caught.value.exceptions
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["in task 'fail' of crew node"]
    assert ended == ["serve"]
    await asyncio.sleep(1)  # the body's cancellation does not follow us out


@virtual
async def test_two_failures_are_both_in_the_group_and_the_body_s_own_error_too() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("while ending") from None

    async def fail() -> None:
        raise ValueError("first")

    with pytest.raises(ExceptionGroup) as caught:
        async with Crew("c") as crew:
            crew.spawn(fail_when_cancelled(), name="a")
            await asyncio.sleep(0)
            crew.spawn(fail(), name="b")
            try:
                await asyncio.Event().wait()
            finally:
                raise KeyError("body")
    assert [str(error) for error in caught.value.exceptions] == ["'body'", "first", "while ending"]


@virtual
async def test_a_body_that_settles_while_a_task_fails_gets_no_stray_cancellation_afterwards() -> None:
    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError("task")

    async def slow_and_bad() -> None:
        await asyncio.sleep(5)
        raise OSError("body")

    with pytest.raises(ExceptionGroup) as caught:
        async with Crew("c") as crew:
            crew.spawn(fail(), name="a")
            await settle(slow_and_bad(), within_s=60, what="an undo")
    assert [str(error) for error in caught.value.exceptions] == ["body", "task"]
    await asyncio.sleep(1)


@virtual
async def test_a_body_s_error_alone_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with Crew("c") as crew:
            crew.spawn(asyncio.sleep(1000), name="sleeper")
            raise KeyError("body")
    assert asyncio.get_running_loop().time() == 0


@virtual
async def test_with_on_error_the_crew_goes_on() -> None:
    failures: list[tuple[str, str]] = []

    async def fail(text: str) -> None:
        raise ValueError(text)

    async with Crew("c", on_error=lambda name, error: failures.append((name, str(error)))) as crew:
        sleeper = crew.spawn(asyncio.sleep(5, "slept"), name="sleeper")
        crew.spawn(fail("one"), name="a")
        crew.spawn(fail("two"), name="b")
        assert await sleeper == "slept"
    assert failures == [("a", "one"), ("b", "two")]


@virtual
async def test_a_task_that_ignores_its_cancellation_is_named() -> None:
    async def deaf() -> None:
        for _ in range(100):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    with pytest.raises(ExceptionGroup) as caught:
        async with Crew("c", stop_s=10) as crew:
            crew.spawn(deaf(), name="the deaf one")
            await asyncio.sleep(0)
    (error,) = caught.value.exceptions
    assert isinstance(error, DeadlinePassed)
    assert "the deaf one" in str(error)
    assert asyncio.get_running_loop().time() == 10


@virtual
async def test_cancelling_the_owner_while_it_waits_for_its_tasks_still_waits_then_goes_on() -> None:
    story: list[str] = []

    async def slow_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(5)
            story.append("child ended")

    async def owner() -> None:
        async with Crew("inner") as crew:
            crew.spawn(slow_end(), name="slow")
            await asyncio.sleep(1)
        story.append("never: the cancellation goes on here")

    async with Crew("outer") as crew:
        task = crew.spawn(owner(), name="owner")
        await asyncio.sleep(2)
        task.cancel()
        task.cancel()
        await asyncio.sleep(2)
        assert not task.done()
        await asyncio.sleep(8)
        assert task.cancelled()
    assert story == ["child ended"]


@virtual
async def test_spawning_on_an_ended_crew_is_refused_and_starts_nothing() -> None:
    async with Crew("c") as crew:
        pass
    started: list[int] = []

    async def work() -> None:
        started.append(1)

    with pytest.raises(CrewClosed, match="late in c"):
        crew.spawn(work(), name="late")
    assert started == []


@virtual
async def test_a_task_sees_the_context_of_its_crew_not_of_who_spawned_it() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def look() -> None:
        seen.append(request.get())

    request.set("the daemon")
    async with Crew("c") as crew:
        request.set("request 17")
        await crew.spawn(look(), name="detached")
    assert seen == ["the daemon"]


@virtual
async def test_cancel_all_ends_the_tasks_and_leaves_the_crew_open() -> None:
    async with Crew("c") as crew:
        crew.spawn(asyncio.sleep(1000), name="a")
        crew.spawn(asyncio.sleep(1000), name="b")
        await crew.cancel_all()
        assert crew.names() == ()
        await crew.cancel_all()
        assert await crew.spawn(asyncio.sleep(1, "still open"), name="c") == "still open"


@virtual
async def test_join_waits_for_the_tasks() -> None:
    async with Crew("c") as crew:
        crew.spawn(asyncio.sleep(3), name="a")
        async with within(10, "the end of the tasks"):
            await crew.join()
        assert asyncio.get_running_loop().time() == 3
