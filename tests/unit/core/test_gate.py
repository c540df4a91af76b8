from __future__ import annotations

import asyncio
import dataclasses

import pytest

from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.core.gate import DrainAbandoned, DrainPolicy, DrainResult, Gate, GateClosed, StillHeld
from penstock.core.hold import Hold

from .virtual import virtual

POLICY = DrainPolicy(grace_s=60, force_s=5)


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_a_cordon_stops_admission_and_disturbs_nobody() -> None:
    gate = Gate("node n1")
    with gate.hold("sandbox", "a") as hold:
        gate.cordon("maintenance")
        gate.cordon("a second reason does not replace the first")
        with pytest.raises(GateClosed, match="maintenance") as caught:
            gate.hold("sandbox", "b")
        assert caught.value.retry_after_s
        assert not hold.notice.is_set()
        gate.uncordon()
        gate.hold("sandbox", "b").release()
    assert gate.empty


@virtual
async def test_a_drain_gives_notice_with_an_absolute_deadline_and_ends_when_empty() -> None:
    gate = Gate("g")

    async def work(hold: Hold) -> None:
        with hold:
            await hold.notice.wait()
            assert hold.deadline == now() + 60
            assert hold.left_s == 60
            await asyncio.sleep(2)
            assert hold.left_s == 58

    async with Crew("c") as crew:
        for label in "ab":
            crew.spawn(work(gate.hold("exec", label)), name=label)
        await asyncio.sleep(1)
        assert await gate.drain(POLICY) == DrainResult(forced=(), took_s=2)
        await crew.join()
    assert gate.cordoned == "draining"
    assert gate.deadline is None


@virtual
async def test_draining_an_empty_gate_is_done_at_once() -> None:
    assert await Gate("g").drain(POLICY) == DrainResult(forced=(), took_s=0)


@virtual
async def test_force_runs_every_callback_sync_and_async_and_says_whom_it_forced() -> None:
    gate = Gate("g")
    story: list[str] = []
    stubborn = [gate.hold("exec", label) for label in ("x", "y")]
    polite = gate.hold("tunnel", "z")

    async def kill(hold: Hold) -> None:
        await asyncio.sleep(3)
        story.append(f"killed {hold.label} at {now():g}")
        hold.release()

    for hold in stubborn:
        hold.on_force(lambda: story.append("told"))
        hold.on_force(lambda hold=hold: kill(hold))  # type: ignore[misc]
    polite.on_force(lambda: story.append("never: it left in time"))
    asyncio.get_running_loop().call_later(1, polite.release)
    result = await gate.drain(POLICY)
    assert result == DrainResult(forced=("x", "y"), took_s=63)
    assert story == ["told", "told", "killed x at 63", "killed y at 63"]
    assert gate.statistics().forced_total == 2


@virtual
async def test_a_second_drain_joins_and_may_only_shorten_the_deadline() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "x")
    hold.on_force(hold.release)
    results: list[DrainResult] = []

    async def drain(grace_s: float) -> None:
        results.append(await gate.drain(DrainPolicy(grace_s=grace_s, force_s=5)))

    async with Crew("c") as crew:
        crew.spawn(drain(60), name="first")
        await asyncio.sleep(1)
        crew.spawn(drain(600), name="longer")
        await asyncio.sleep(1)
        assert hold.deadline == 60
        crew.spawn(drain(10), name="shorter")
        await asyncio.sleep(1)
        assert hold.deadline == 12
        await crew.join()
    assert now() == 12
    assert results == [DrainResult(forced=("x",), took_s=12)] * 3


@virtual
async def test_a_hold_wanted_while_draining_is_refused_even_if_the_gate_is_about_to_be_empty() -> None:
    gate = Gate("g")
    last = gate.hold("exec", "x")
    async with Crew("c") as crew:
        drain = crew.spawn(gate.drain(POLICY), name="drain")
        await asyncio.sleep(1)
        last.release()
        with pytest.raises(GateClosed, match="draining"):
            gate.hold("exec", "y")
        assert (await drain).forced == ()


@virtual
async def test_a_nested_continuation_is_never_gated_again_and_the_drain_waits_for_it() -> None:
    gate = Gate("sandbox")
    done: list[str] = []

    async def checkpoint(hold: Hold) -> None:
        with hold:
            await asyncio.sleep(5)
            with hold.child("resume") as resume:
                assert resume.notice.is_set()
                assert resume.deadline == hold.deadline
                with resume.child("verify"):
                    hold.release()
                    await asyncio.sleep(5)
                    done.append("resumed")

    async with Crew("c") as crew:
        crew.spawn(checkpoint(gate.hold("checkpoint", "c1")), name="checkpoint")
        await asyncio.sleep(0)
        assert (await gate.drain(POLICY)).took_s == 10
    assert done == ["resumed"]


@virtual
async def test_a_continuation_is_refused_once_force_has_begun_or_its_hold_is_gone() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "x")
    refused: list[str] = []

    def forced() -> None:
        with pytest.raises(GateClosed, match="force has begun"):
            hold.child()
        refused.append("child")
        hold.release()

    hold.on_force(forced)
    await gate.drain(DrainPolicy(grace_s=0, force_s=5))
    assert refused == ["child"]
    with pytest.raises(GateClosed, match="given back"):
        hold.child()


@virtual
async def test_a_detached_task_does_not_inherit_the_hold_of_who_spawned_it() -> None:
    gate = Gate("g")
    refused: list[str] = []

    async def detached() -> None:
        try:
            gate.hold("exec", "detached")
        except GateClosed as error:
            refused.append(error.reason)

    async with Crew("c") as crew:
        with gate.hold("exec", "parent") as parent:
            gate.cordon("maintenance")
            await crew.spawn(detached(), name="detached")
            parent.child().release()  # who was handed the hold may go on
    assert refused == ["maintenance"]


@virtual
async def test_a_hold_that_outlives_force_is_named_and_the_next_drain_forces_again() -> None:
    gate = Gate("g")
    deaf = gate.hold("exec", "deaf")
    calls: list[float] = []
    deaf.on_force(lambda: calls.append(now()))
    with pytest.raises(StillHeld, match="exec deaf") as caught:
        await gate.drain(DrainPolicy(grace_s=10, force_s=5))
    assert caught.value.labels == ("deaf",)
    assert now() == 15
    assert gate.cordoned
    deaf.on_force(deaf.release)
    result = await gate.drain(DrainPolicy(grace_s=1000, force_s=5))
    assert now() == 15  # its deadline had passed: a later drain cannot move it away
    assert result.forced == ("deaf",)
    assert calls == [10, 15]


@virtual
async def test_a_failing_force_callback_does_not_keep_others_from_being_forced() -> None:
    gate = Gate("g")
    first, second = gate.hold("exec", "a"), gate.hold("exec", "b")

    def fail() -> None:
        raise OSError("EPERM")

    first.on_force(fail)
    second.on_force(second.release)
    with pytest.raises(StillHeld) as caught:
        await gate.drain(DrainPolicy(grace_s=0, force_s=5))
    assert caught.value.labels == ("a",)
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert cause.exceptions[0].__notes__ == ["while forcing exec a out of gate g"]
    first.on_force(first.release)
    with pytest.raises(ExceptionGroup, match="force of gate g"):  # empty now, but EPERM is not hushed up
        await gate.drain(DrainPolicy(grace_s=0, force_s=5))
    assert (await gate.drain(POLICY)).forced == ("a", "b")


@virtual
async def test_a_force_callback_that_hangs_is_bounded() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    hold.on_force(lambda: asyncio.sleep(1000))
    with pytest.raises(StillHeld) as caught:
        await gate.drain(DrainPolicy(grace_s=0, force_s=5))
    assert now() == 5
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert "force of exec a" in str(caught.value.__cause__.exceptions[0])


@virtual
async def test_a_callback_registered_during_force_is_called_by_it() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    asyncio.get_running_loop().call_later(12, lambda: hold.on_force(hold.release))
    assert (await gate.drain(DrainPolicy(grace_s=10, force_s=5))).took_s == 12


@virtual
async def test_a_drain_cancelled_before_force_leaves_the_gate_cordoned_and_another_caller_goes_on() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    hold.on_force(hold.release)
    async with Crew("c") as crew:
        leader = crew.spawn(gate.drain(POLICY), name="leader")
        follower = crew.spawn(gate.drain(POLICY), name="follower")
        await asyncio.sleep(1)
        leader.cancel()
        assert (await follower).forced == ("a",)
    assert now() == 60


@virtual
async def test_a_drain_cancelled_during_force_finishes_the_force_first() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    killed: list[float] = []

    async def kill() -> None:
        await asyncio.sleep(3)
        killed.append(now())
        hold.release()

    hold.on_force(kill)
    async with Crew("c") as crew:
        leader = crew.spawn(gate.drain(DrainPolicy(grace_s=0, force_s=10)), name="leader")
        await asyncio.sleep(1)
        assert gate.statistics().forcing
        follower = crew.spawn(gate.drain(POLICY), name="follower")
        leader.cancel()
        await asyncio.sleep(1)
        leader.cancel()
        assert (await follower).forced == ("a",)
        await asyncio.sleep(0)
        assert leader.cancelled()
    assert killed == [3]


@virtual
async def test_followers_share_the_outcome_of_one_force() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    calls: list[float] = []
    hold.on_force(lambda: calls.append(now()))
    outcomes: list[str] = []

    async def drain() -> None:
        try:
            await gate.drain(DrainPolicy(grace_s=10, force_s=5))
        except StillHeld as error:
            outcomes.append(str(error))

    async with Crew("c") as crew:
        for name in "abc":
            crew.spawn(drain(), name=name)
        await crew.join()
    assert calls == [10]
    assert len(outcomes) == 3
    assert len(set(outcomes)) == 1


@virtual
async def test_uncordoning_abandons_a_drain_and_withdraws_notice() -> None:
    gate = Gate("g")
    hold = gate.hold("exec", "a")
    async with Crew("c", on_error=lambda _name, _error: None) as crew:
        drain = crew.spawn(gate.drain(POLICY), name="drain")
        await asyncio.sleep(1)
        assert hold.notice.is_set()
        gate.uncordon()
        assert not hold.notice.is_set()
        assert hold.deadline is None
        with pytest.raises(DrainAbandoned):
            await drain
    gate.hold("exec", "b").release()


@virtual
async def test_statistics_are_a_frozen_snapshot() -> None:
    gate = Gate("g")
    gate.hold("exec", "a")
    gate.hold("tunnel", "b").release()
    before = gate.statistics()
    gate.cordon("why")
    with pytest.raises(GateClosed):
        gate.hold("exec", "c")
    after = gate.statistics()
    assert before.held == (("exec", 1),)
    assert (before.admitted_total, before.refused_total, before.cordoned) == (2, 0, None)
    assert (after.refused_total, after.cordoned) == (1, "why")
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.name = "x"  # type: ignore[misc]


@virtual
async def test_empty_at_the_deadline_is_empty_not_forced() -> None:
    """1,000 ties between the last hold's leaving and the deadline: never a force."""
    for _ in range(1_000):
        gate = Gate("g")
        hold = gate.hold("exec", "a")
        hold.on_force(lambda: pytest.fail("forced"))
        asyncio.get_running_loop().call_later(10, hold.release)
        async with within(100, "the drain"):
            assert (await gate.drain(DrainPolicy(grace_s=10, force_s=5))).forced == ()


@virtual
async def test_one_kind_is_forced_out_and_the_others_do_not_notice() -> None:
    gate = Gate("node n1")
    gate.cordon("it stops")
    sandbox = gate.readmit("sandbox", "s")
    sandbox.on_force(lambda: pytest.fail("nobody forces it"))
    builds = [gate.readmit("build", label) for label in "ab"]
    for build in builds:
        build.on_force(build.release)
    await gate.expel("build", within_s=5)
    assert gate.held() == [sandbox]
    assert all(build.notice.is_set() for build in builds)
    assert not sandbox.notice.is_set()


@virtual
async def test_one_kind_that_does_not_leave_is_named_within_the_bound() -> None:
    gate = Gate("node n1")
    stays, goes = gate.readmit("build", "stays"), gate.readmit("build", "goes")
    stays.on_force(lambda: asyncio.sleep(60))
    goes.on_force(goes.release)
    began = now()
    with pytest.raises(StillHeld) as left:
        await gate.expel("build", within_s=5)
    assert left.value.labels == ("stays",)
    assert now() - began <= 15
