"""Plans are pure: the same world, the same plan; and on the world it leads to, nothing is left to do."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.control.placement import NodeSeen, choose
from penstock.control.sandboxes import RETENTION_S, Bind, Plan, Remove, Seen, plan
from penstock.model.ids import BuildId, NodeId, SandboxId, TeamId
from penstock.model.sandbox import TERMINAL, KillReason, Limits, Phase, SandboxSpec, SandboxStatus, StopOrder

NOW = 1_000.0
A = SandboxId("ia")
STOP = StopOrder(reason=KillReason.REQUEST, by="somebody", at=NOW)


def node(name: str, **changes: object) -> NodeSeen:
    seen = NodeSeen(id=NodeId(name), why_not="", placed=0, sandboxes_max=10, memory_bytes=0)
    return msgspec.structs.replace(seen, **changes)


def spec(**changes: object) -> SandboxSpec:
    made = SandboxSpec(
        id=A,
        team=TeamId("t"),
        template="base",
        build=BuildId("b"),
        limits=Limits(),
        created_at=NOW,
        end_at=NOW + 300,
    )
    return msgspec.structs.replace(made, **changes)


def status(phase: Phase, on: str = "n1", **changes: object) -> SandboxStatus:
    made = SandboxStatus(id=A, phase=phase, node=NodeId(on), team=TeamId("t"))
    return msgspec.structs.replace(made, **changes)


def seen(spec: SandboxSpec | None, status: SandboxStatus | None = None, **changes: object) -> Seen:
    made = Seen(
        id=A,
        spec=spec,
        status=status,
        nodes=(node("n1"),),
        spec_revision=5 if spec is not None else 0,
        status_revision=6 if status is not None else 0,
    )
    return msgspec.structs.replace(made, **changes)


def refused(**changes: object) -> Seen:
    made = seen(spec(node=NodeId("n1")), status(Phase.PENDING), refusals=1, refused_at=NOW)
    return msgspec.structs.replace(made, **changes)


def test_a_new_sandbox_gets_the_fullest_node_with_room() -> None:
    nodes = (
        node("n1", placed=3),
        node("n2", placed=7),
        node("n3", placed=10),
        node("n4", placed=9, why_not="is cordoned"),
    )
    planned = plan(seen(spec(), nodes=nodes), NOW)
    assert planned.actions == (Bind(A, NodeId("n2")),)
    assert "n2 is the fullest with room" in planned.because[0]
    assert {"n3 is full (10 of 10)", "n4 is cordoned"} <= set(planned.because)


def test_without_a_node_it_waits_until_its_end_at_most_and_says_why() -> None:
    planned = plan(seen(spec(), nodes=(node("n1", why_not="is cordoned"),)), NOW)
    assert planned == Plan(wake_at=NOW + 300, because=("no node can take it", "n1 is cordoned"))
    assert plan(seen(spec(), nodes=()), NOW).because == ("no node can take it", "no node has joined")


def test_a_sandbox_larger_than_the_machine_does_not_go_there() -> None:
    big = spec(limits=Limits(memory_bytes_max=8 * 1024**3))
    nodes = (node("n1", memory_bytes=4 * 1024**3), node("n2", memory_bytes=16 * 1024**3))
    assert plan(seen(big, nodes=nodes), NOW).actions == (Bind(A, NodeId("n2")),)


def test_a_bound_sandbox_is_left_to_its_node_whatever_happens_to_the_node() -> None:
    for phase in (None, Phase.CREATING, Phase.READY, Phase.UNKNOWN, Phase.QUARANTINED, Phase.STOPPING):
        told = status(phase) if phase is not None else None
        for nodes in ((node("n1"), node("n2")), (node("n1", why_not="is cordoned"), node("n2"))):
            assert plan(seen(spec(node=NodeId("n1")), told, nodes=nodes), NOW).actions == ()


def test_bound_to_a_node_that_never_was_it_is_bound_again() -> None:
    planned = plan(seen(spec(node=NodeId("gone")), nodes=(node("n2"),)), NOW)
    assert planned.actions == (Bind(A, NodeId("n2")),)


def test_refused_it_goes_elsewhere_at_once() -> None:
    assert plan(refused(nodes=(node("n1"), node("n2"))), NOW).actions == (Bind(A, NodeId("n2")),)


def test_refused_by_the_only_node_it_asks_again_later_and_later() -> None:
    waits = []
    for refusals in range(1, 9):
        planned = plan(refused(refusals=refusals), NOW)
        assert planned.actions == ()
        assert planned.wake_at is not None
        waits.append(planned.wake_at - NOW)
        assert plan(refused(refusals=refusals), planned.wake_at).actions == (Bind(A, NodeId("n1")),)
    assert waits == [0.5, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_refusal_that_was_answered_by_asking_again_is_no_refusal() -> None:
    assert plan(refused(spec_revision=7), NOW + 60).actions == ()


def test_what_ends_before_it_ran_is_removed_or_said_by_the_node_that_refused_it() -> None:
    assert plan(seen(spec(stop=STOP)), NOW).actions == (Remove(A),)
    assert plan(seen(spec(end_at=NOW)), NOW).actions == (Remove(A),)
    over = refused(spec=spec(node=NodeId("n1"), end_at=NOW))
    assert plan(over, NOW).actions == (Bind(A, NodeId("n1")),)


@pytest.mark.parametrize("phase", sorted(TERMINAL))
def test_an_ended_sandbox_is_removed_after_a_while(phase: Phase) -> None:
    ended = seen(spec(node=NodeId("n1")), status(phase, stopped_at=NOW))
    assert plan(ended, NOW).wake_at == NOW + RETENTION_S
    assert plan(ended, NOW + RETENTION_S).actions == (Remove(A),)


def test_a_status_without_a_spec_goes_when_its_sandbox_has_ended() -> None:
    assert plan(seen(None, status(Phase.STOPPED)), NOW).actions == (Remove(A),)
    assert plan(seen(None, status(Phase.PENDING)), NOW).actions == (Remove(A),)
    assert plan(seen(None, status(Phase.READY)), NOW).actions == ()
    assert plan(seen(None), NOW).actions == ()


nodes_seen = st.lists(
    st.builds(
        NodeSeen,
        id=st.sampled_from([NodeId(f"n{number}") for number in range(4)]),
        why_not=st.sampled_from(("", "is cordoned")),
        placed=st.integers(0, 6),
        sandboxes_max=st.sampled_from([0, 1, 4, 6]),
        memory_bytes=st.sampled_from([0, 2**29, 2**33]),
    ),
    max_size=4,
    unique_by=lambda seen: seen.id,
).map(tuple)
anything = st.builds(
    lambda there, told, on, said_by, end_s, stop, stopped_s, nodes, revisions, refusals: Seen(
        id=A,
        spec=spec(node=on, end_at=NOW + end_s, stop=STOP if stop else None) if there else None,
        status=status(told, said_by, stopped_at=NOW + stopped_s) if told is not None else None,
        nodes=nodes,
        spec_revision=revisions[0] if there else 0,
        status_revision=revisions[1] if told is not None else 0,
        refusals=refusals,
        refused_at=NOW - 1,
    ),
    st.booleans(),
    st.none() | st.sampled_from(Phase),
    st.sampled_from([None, NodeId("n0"), NodeId("n1"), NodeId("gone")]),
    st.sampled_from(["n0", "n1"]),
    st.sampled_from([-10.0, 10.0, 1000.0]),
    st.booleans(),
    st.sampled_from([-1000.0, 0.0]),
    nodes_seen,
    st.permutations([5, 6]),
    st.integers(0, 12),
)


def after(before: Seen, planned: Plan) -> Seen:
    """The world the plan's own actions lead to."""
    for action in planned.actions:
        match action:
            case Bind(node=chosen):
                assert before.spec is not None
                moved = before.spec.node != chosen
                before = msgspec.structs.replace(
                    before,
                    spec=msgspec.structs.replace(before.spec, node=chosen),
                    spec_revision=9,
                    status=None if moved else before.status,
                    status_revision=0 if moved else before.status_revision,
                )
            case Remove():
                before = msgspec.structs.replace(before, spec=None, status=None, spec_revision=0, status_revision=0)
    return before


@given(anything)
def test_plans_are_pure_total_bounded_and_a_fixpoint(world: Seen) -> None:
    planned = plan(world, NOW)
    assert planned == plan(world, NOW)
    assert planned.because
    assert len(planned.actions) <= 1
    assert planned.wake_at is None or planned.wake_at > NOW
    assert plan(after(world, planned), NOW).actions == ()


@given(nodes_seen)
def test_a_choice_fits_and_says_why_for_every_other(nodes: tuple[NodeSeen, ...]) -> None:
    chosen = choose(nodes, Limits())
    fits = [
        seen.id
        for seen in nodes
        if not seen.why_not
        and (not seen.sandboxes_max or seen.placed < seen.sandboxes_max)
        and (not seen.memory_bytes or seen.memory_bytes >= Limits().memory_bytes_max)
    ]
    assert (chosen.node in fits) if fits else chosen.node is None
    assert chosen.because
