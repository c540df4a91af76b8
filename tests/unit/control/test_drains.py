"""The plan of a drain: total, deterministic, indifferent to the clock; and true to the ladder the node climbs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.control.drains import foresee
from penstock.model.drain import TERM_BEFORE_HARD_S, Disposition, DrainOrder, DrainPlan, Fate, Foreseen
from penstock.model.ids import BuildId, NodeId, SandboxId, SnapshotId, TeamId
from penstock.model.node import NodeSpec, drain
from penstock.model.sandbox import TERMINAL, KillReason, Limits, OnTimeout, Phase, SandboxSpec, SandboxStatus, StopOrder

NOW = 1_000_000.0
NODE = NodeId("n1")
STOP = StopOrder(reason=KillReason.REQUEST, by="somebody", at=NOW)
Pair = tuple[SandboxSpec, SandboxStatus | None]


def order(soft_s: float | None = None, hard_s: float | None = None, **changes: object) -> DrainOrder:
    made = DrainOrder(
        at=NOW,
        soft_at=None if soft_s is None else NOW + soft_s,
        hard_at=None if hard_s is None else NOW + hard_s,
    )
    return msgspec.structs.replace(made, **changes)


def sandbox(phase: Phase | None = Phase.READY, *, name: str = "ia", lives_s: float = 3600.0, **changes: object) -> Pair:
    spec = SandboxSpec(
        id=SandboxId(name),
        team=TeamId("t"),
        template="base",
        build=BuildId("b"),
        limits=Limits(),
        created_at=NOW - 60,
        end_at=NOW + lives_s,
        node=NODE,
    )
    spec = msgspec.structs.replace(spec, **changes)
    if phase is None:
        return spec, None
    return spec, SandboxStatus(id=spec.id, phase=phase, node=NODE, team=spec.team, because="the test said so")


def plan(*sandboxes: Pair, asked: DrainOrder, node: NodeSpec | None = None, may_park: bool = False) -> DrainPlan:
    return foresee(node or NodeSpec(id=NODE), asked, sandboxes, NOW, may_park=lambda spec, status: may_park)


def fate(one: Pair, asked: DrainOrder, **others: object) -> Foreseen:
    (found,) = plan(one, asked=asked, **others).foreseen  # type: ignore[arg-type]
    return found


def test_its_own_end_before_the_first_step_is_a_finish_and_loses_nothing() -> None:
    found = fate(sandbox(lives_s=50), order(60, 120))
    assert (found.fate, found.by, found.loses) == (Fate.FINISH, NOW + 50, "")


def test_after_the_soft_deadline_it_is_stopped_and_loses_what_it_holds() -> None:
    found = fate(sandbox(), order(60, 120))
    assert (found.fate, found.by) == (Fate.STOP, NOW + 120)
    assert found.loses == "memory and processes, and files not fetched"


def test_a_hard_deadline_alone_asks_ten_seconds_before_it() -> None:
    asked = order(None, 60)
    assert fate(sandbox(lives_s=60 - TERM_BEFORE_HARD_S), asked).fate is Fate.FINISH
    assert fate(sandbox(lives_s=60 - TERM_BEFORE_HARD_S + 1), asked).fate is Fate.STOP


def test_without_deadlines_everything_runs_to_its_end_and_the_plan_says_until_when() -> None:
    made = plan(sandbox(lives_s=3600), asked=order())
    assert [each.fate for each in made.foreseen] == [Fate.FINISH]
    assert made.blocks == ("no hard deadline: sandboxes may run to their own end: 1, to 1970-01-12 14:46:40 UTC",)
    assert plan(sandbox(), asked=order(None, 60)).blocks == ()


def test_no_time_to_end_is_force() -> None:
    assert fate(sandbox(), order(0, 0)).fate is Fate.FORCE
    forced = fate(sandbox(), order(600, 900, force_number=1))
    assert (forced.fate, forced.by) == (Fate.FORCE, NOW)


@pytest.mark.parametrize(
    ("call", "own", "node", "expected"),
    [
        (Disposition.STOP, Disposition.PARK, Disposition.PARK, Fate.STOP),
        (Disposition.PARK, Disposition.STOP, Disposition.STOP, Fate.PARK),
        (None, Disposition.PARK, Disposition.STOP, Fate.PARK),
        (None, Disposition.STOP, Disposition.PARK, Fate.STOP),
        (None, None, Disposition.PARK, Fate.PARK),
        (None, None, None, Fate.STOP),
    ],
)
def test_the_calls_word_holds_then_the_sandboxs_then_the_nodes(
    call: Disposition | None, own: Disposition | None, node: Disposition | None, expected: Fate
) -> None:
    found = fate(
        sandbox(on_drain=own),
        order(60, 120, disposition=call),
        node=NodeSpec(id=NODE, disposition=node),
        may_park=True,
    )
    assert found.fate is expected


def test_what_cannot_be_parked_is_stopped_and_the_plan_says_so() -> None:
    found = fate(sandbox(), order(60, 120, disposition=Disposition.PARK))
    assert found.fate is Fate.STOP
    assert "cannot be parked" in found.because


def test_a_frozen_one_loses_its_memory_whether_parked_or_stopped() -> None:
    for may_park, expected in ((True, Fate.PARK), (False, Fate.STOP)):
        found = fate(sandbox(Phase.PAUSED), order(60, 120, disposition=Disposition.PARK), may_park=may_park)
        assert found.fate is expected
        assert found.loses.startswith("the memory it is frozen with")


def test_one_that_pauses_at_its_end_has_no_end_and_one_that_parks_is_parked_by_it() -> None:
    frozen = plan(sandbox(Phase.PAUSED, frozen=True, lives_s=10), asked=order())
    assert [(each.fate, each.by) for each in frozen.foreseen] == [(Fate.FINISH, None)]
    assert frozen.blocks == ("no hard deadline: sandboxes may run to their own end: 1, and some have none",)
    assert fate(sandbox(lives_s=10, on_timeout=OnTimeout.PAUSE), order(60, 120)).fate is Fate.STOP
    parked = fate(sandbox(lives_s=10, on_timeout=OnTimeout.PARK), order(60, 120))
    assert (parked.fate, parked.by, parked.loses) == (Fate.PARK, NOW + 10, "memory and processes")
    assert fate(sandbox(park=SnapshotId("s1")), order(60, 120)).fate is Fate.PARK


@pytest.mark.parametrize("phase", [None, Phase.PENDING, Phase.BOUND])
def test_a_queued_start_is_placed_elsewhere_and_loses_nothing(phase: Phase | None) -> None:
    found = fate(sandbox(phase), order(0, 0))
    assert (found.fate, found.loses) == (Fate.SPARED, "")
    assert "elsewhere" in found.because


def test_quarantine_and_doubt_are_said_to_be_in_the_way() -> None:
    made = plan(sandbox(Phase.QUARANTINED), sandbox(Phase.UNKNOWN, name="ib"), asked=order(60, 120))
    assert [each.fate for each in made.foreseen] == [Fate.QUARANTINE, Fate.FORCE]
    assert [line.split()[0] for line in made.blocks] == ["ia", "ib"]


def test_what_is_ending_anyway_finishes() -> None:
    assert fate(sandbox(Phase.STOPPING), order(0, 0)).fate is Fate.FINISH
    assert fate(sandbox(stop=STOP), order(0, 0)).fate is Fate.FINISH


def test_what_was_asked_to_end_is_not_asked_back_by_a_later_deadline() -> None:
    begun = drain(NodeSpec(id=NODE), order(0, 60, at=NOW - 30, soft_at=NOW - 20), now=NOW - 30)
    found = fate(sandbox(Phase.DRAINING, lives_s=100), order(600, 900), node=begun)
    assert found.fate is Fate.STOP
    assert "already" in found.because


def test_sandboxes_elsewhere_and_ended_ones_are_left_out() -> None:
    elsewhere = sandbox(None, node=NodeId("n2"))
    unbound = sandbox(None, name="ib", node=None)
    assert plan(elsewhere, unbound, sandbox(Phase.STOPPED, name="ic"), asked=order(0, 0)).foreseen == ()


spans = st.none() | st.integers(0, 7200).map(float)
pairs = st.builds(
    sandbox,
    st.none() | st.sampled_from(Phase),
    lives_s=st.integers(-100, 7200).map(float),
    on_drain=st.none() | st.sampled_from(Disposition),
    stop=st.none() | st.just(STOP),
    node=st.sampled_from([None, NODE, NodeId("n2")]),
    on_timeout=st.sampled_from(OnTimeout),
)
orders = st.builds(
    order,
    spans,
    spans,
    propagation_s=st.sampled_from([0.0, 15.0]),
    disposition=st.none() | st.sampled_from(Disposition),
    force_number=st.integers(0, 1),
)


def named(found: list[Pair]) -> list[Pair]:
    """Each with an id of its own."""
    renamed: list[Pair] = []
    for number, (spec, status) in enumerate(found):
        id = SandboxId(f"i{number:03d}")
        renamed.append(
            (
                msgspec.structs.replace(spec, id=id),
                None if status is None else msgspec.structs.replace(status, id=id),
            )
        )
    return renamed


def later(pair: Pair, by_s: float) -> Pair:
    spec, status = pair
    return msgspec.structs.replace(spec, end_at=spec.end_at + by_s), status


@given(st.lists(pairs, max_size=6).map(named), orders, st.booleans())
def test_a_plan_is_total_sorted_and_the_same_for_the_same_world(
    sandboxes: list[Pair], asked: DrainOrder, parks: bool
) -> None:
    made = plan(*sandboxes, asked=asked, may_park=parks)
    assert made == plan(*reversed(sandboxes), asked=asked, may_park=parks)
    ids = [each.sandbox for each in made.foreseen]
    assert ids == sorted(set(ids))
    phases = {spec.id: status.phase if status is not None else None for spec, status in sandboxes}
    for each in made.foreseen:
        assert phases[each.sandbox] not in TERMINAL
        assert bool(each.loses) == (each.fate in (Fate.PARK, Fate.STOP, Fate.FORCE))
        if asked.hard_at is not None and each.fate in (Fate.STOP, Fate.FORCE):
            assert each.by is not None
            assert each.by <= max(asked.hard_at, asked.at + asked.propagation_s)


@given(st.lists(pairs, max_size=6).map(named), orders, st.floats(0, 1e9, allow_nan=False), st.floats(0, 1e9))
def test_the_digest_knows_nothing_of_the_clock(
    sandboxes: list[Pair], asked: DrainOrder, by_s: float, other_s: float
) -> None:
    """The same world some time later, as its ends and deadlines move with it, is the same plan."""

    def digest(by_s: float) -> str:
        moved = msgspec.structs.replace(
            asked,
            at=asked.at + by_s,
            soft_at=None if asked.soft_at is None else asked.soft_at + by_s,
            hard_at=None if asked.hard_at is None else asked.hard_at + by_s,
        )
        ages = [later(pair, by_s + 1e-3) for pair in sandboxes]  # off the ties, which floating point decides
        return foresee(NodeSpec(id=NODE), moved, ages, NOW + by_s).digest

    assert digest(by_s) == digest(other_s)


def test_the_digest_tells_another_fate_another_order_and_another_epoch_apart() -> None:
    digests = {
        plan(sandbox(), asked=order(60, 120)).digest,
        plan(sandbox(lives_s=10), asked=order(60, 120)).digest,
        plan(sandbox(), asked=order(60, 130)).digest,
        plan(sandbox(), asked=order(60, 120), node=NodeSpec(id=NODE, epoch=2)).digest,
        plan(sandbox(), sandbox(name="ib"), asked=order(60, 120)).digest,
    }
    assert len(digests) == 5
