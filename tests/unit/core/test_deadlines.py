from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlineHeap, DeadlinePassed, Pulse, backoff_s, within
from penstock.core.errors import Kind
from penstock.sim.loop import RESOLUTION_S

from .virtual import virtual


@virtual
async def test_a_deadline_names_what_was_awaited_and_for_how_long() -> None:
    with pytest.raises(DeadlinePassed, match=r"guest hello of sb-7x \(waited 5 s\)") as caught:
        async with within(5, "guest hello of sb-7x"):
            await asyncio.Event().wait()
    assert asyncio.get_running_loop().time() == 5
    assert caught.value.kind is Kind.DEADLINE
    assert isinstance(caught.value, TimeoutError)


@virtual
async def test_a_body_that_ends_in_time_leaves_no_timer_behind() -> None:
    async with within(5, "a nap") as bound:
        await asyncio.sleep(1)
        assert bound.left_s == 4
    await asyncio.sleep(100)


@virtual
async def test_none_is_unbounded_and_zero_is_now() -> None:
    async with within(None, "for ever"):
        await asyncio.sleep(1e6)
    with pytest.raises(DeadlinePassed):
        async with within(0, "nothing"):
            await asyncio.sleep(1)
    async with within(0, "what is there already"):
        await asyncio.sleep(0)


@pytest.mark.parametrize("result_first", [True, False])
@virtual
async def test_done_wins_over_the_deadline_whichever_timer_is_older(result_first: bool) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(1_000):
        result: asyncio.Future[str] = loop.create_future()
        if result_first:
            loop.call_later(1, result.set_result, "done")
        async with within(1, "the result"):
            if not result_first:
                loop.call_later(1, result.set_result, "done")
            assert await result == "done"


async def test_done_wins_over_the_deadline_1000_times_under_load_on_the_real_loop() -> None:
    """The tie is forced: the result and the deadline come due in one pass of a loop that is busy with others."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    async def busy() -> None:
        while not stop.is_set():  # noqa: ASYNC110 - being a nuisance is its job
            await asyncio.sleep(0)

    async with Crew("load") as crew:
        for number in range(20):
            crew.spawn(busy(), name=f"busy {number}")
        for number in range(1_000):
            result: asyncio.Future[int] = loop.create_future()
            at = loop.time() + 0.0005
            loop.call_at(at, result.set_result, number)
            async with within(at - loop.time(), "the result"):
                assert await result == number
        stop.set()


@virtual
async def test_a_task_finishing_at_the_deadline_counts_as_done() -> None:
    async def work() -> str:
        await asyncio.sleep(1)
        return "done"

    async with Crew("workers") as crew:
        task = crew.spawn(work(), name="work")
        await asyncio.sleep(0)
        async with within(1, "the work"):
            assert await task == "done"


@virtual
async def test_a_task_about_to_finish_at_the_deadline_is_waited_for_too() -> None:
    """The result reaches the body through a task, hence later than the deadline although due in the same pass."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[str] = loop.create_future()

    async def relay() -> str:
        return await result

    async with Crew("relays") as crew:
        task = crew.spawn(relay(), name="relay")
        await asyncio.sleep(0)
        async with within(1, "the relay"):
            loop.call_later(1 + RESOLUTION_S / 2, result.set_result, "done")
            assert await task == "done"


@virtual
async def test_a_body_that_never_waits_is_cut_all_the_same() -> None:
    passes = 0
    with pytest.raises(DeadlinePassed):
        async with within(0, "a hot loop"):
            while True:
                await asyncio.sleep(0)
                passes += 1
    assert passes < 200


@virtual
async def test_a_cancellation_from_outside_stays_one_when_the_deadline_passes_too() -> None:
    async def wait() -> None:
        async with within(1, "never"):
            await asyncio.Event().wait()

    async with Crew("c") as crew:
        task = crew.spawn(wait(), name="waiter")
        asyncio.get_running_loop().call_later(1, task.cancel)
        await asyncio.sleep(2)
        assert task.cancelled()


@virtual
async def test_a_late_error_of_the_body_is_kept_and_no_stray_cancellation_follows() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with within(1, "a body with an error of its own"):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("mine") from None
    await asyncio.sleep(1)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@virtual
async def test_nested_deadlines_raise_the_one_that_passed() -> None:
    with pytest.raises(DeadlinePassed, match="outer"):
        async with within(1, "outer"), within(2, "inner"):
            await asyncio.sleep(10)
    with pytest.raises(DeadlinePassed, match="outer"):
        async with within(1, "outer"), within(1, "inner"):
            await asyncio.sleep(10)


async def test_the_private_name_that_within_reads_is_still_there() -> None:
    """`Task._fut_waiter` is the only private asyncio name in core. Gone? Then rewrite `deadlines.is_about_to_run`."""
    waited_for: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await waited_for

    async with Crew("c") as crew:
        task = crew.spawn(wait(), name="waiter")
        await asyncio.sleep(0)
        assert task._fut_waiter is waited_for  # type: ignore[attr-defined]
        waited_for.set_result(None)
        await asyncio.sleep(0)
        assert task.done()


@virtual
async def test_a_pulse_wakes_everybody_and_answers_done_at_the_deadline() -> None:
    pulse, state = Pulse(), {"open": False}
    loop = asyncio.get_running_loop()
    assert not await pulse.wait_for(lambda: state["open"], until=loop.time() + 1)

    def open_silently() -> None:
        state["open"] = True

    loop.call_later(1, open_silently)  # no pulse: only the deadline wakes the waiter, and it looks
    assert await pulse.wait_for(lambda: state["open"], until=loop.time() + 1)


@given(attempt=st.integers(1, 2_000), seed=st.integers(0, 100))
def test_backoff_doubles_and_never_exceeds_its_cap(attempt: int, seed: int) -> None:
    wait_s = backoff_s(attempt, base_s=0.1, cap_s=30, rng=random.Random(seed))
    full_s = min(30, 0.1 * 2 ** min(attempt - 1, 20))
    assert full_s / 2 <= wait_s <= full_s


def test_a_heap_pops_what_is_due_in_order_and_moves_keys() -> None:
    heap: DeadlineHeap[str] = DeadlineHeap()
    for key, at in (("a", 3.0), ("b", 1.0), ("c", 1.0), ("d", 9.0)):
        heap.push(key, at)
    heap.push("a", 0.5)
    heap.remove("d")
    heap.remove("never there")
    assert heap.next_at() == 0.5
    assert heap.pop_due(1.0) == ["a", "b", "c"]
    assert heap.next_at() is None
    assert len(heap) == 0


def test_a_coalescing_heap_wakes_once_for_a_window() -> None:
    heap: DeadlineHeap[int] = DeadlineHeap(coalesce_s=1.0)
    for key in range(200):
        heap.push(key, 10 + key / 400)
    heap.push(-1, 12.0)
    at = heap.next_at()
    assert at == 10 + 199 / 400
    assert heap.pop_due(at) == list(range(200))
    assert heap.next_at() == 12.0


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20))))
def test_a_heap_agrees_with_a_dict(pushes: list[tuple[int, int]]) -> None:
    heap: DeadlineHeap[int] = DeadlineHeap()
    model: dict[int, float] = {}
    for key, at in pushes:
        heap.push(key, float(at))
        model[key] = float(at)
        assert heap.next_at() == min(model.values())
    assert sorted(heap.pop_due(10)) == sorted(key for key, at in model.items() if at <= 10)
    assert len(heap) == sum(at > 10 for at in model.values())


def test_a_heap_whose_keys_move_for_ever_stays_small() -> None:
    heap: DeadlineHeap[str] = DeadlineHeap()
    for at in range(10_000):
        heap.push("renewed lease", float(at))
    assert len(heap._heap) < 100
