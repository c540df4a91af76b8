"""The ladder of a drain, rung by rung, and what names a plan."""

from __future__ import annotations

import pytest

from penstock.model.drain import Disposition, DrainOrder, Fate, Foreseen, Rung, Step, digest, ladder
from penstock.model.ids import NodeId, SandboxId

STOP, PARK = Disposition.STOP, Disposition.PARK


@pytest.mark.parametrize(
    ("order", "disposition", "may_park", "expected"),
    [
        (DrainOrder(at=100.0), STOP, False, [("notice", 100)]),
        (DrainOrder(at=100.0, soft_at=130.0), STOP, True, [("notice", 100), ("term", 130)]),
        (DrainOrder(at=100.0, soft_at=130.0), PARK, True, [("notice", 100), ("park", 130)]),
        (DrainOrder(at=100.0, soft_at=130.0), PARK, False, [("notice", 100), ("term", 130)]),
        (DrainOrder(at=100.0, hard_at=160.0), STOP, False, [("notice", 100), ("term", 150), ("kill", 160)]),
        (
            DrainOrder(at=100.0, soft_at=120.0, hard_at=160.0),
            PARK,
            True,
            [("notice", 100), ("park", 120), ("term", 150), ("kill", 160)],
        ),
        # A soft deadline too late to leave 10 s for SIGTERM gives way to it.
        (
            DrainOrder(at=100.0, soft_at=158.0, hard_at=160.0),
            STOP,
            False,
            [("notice", 100), ("term", 150), ("kill", 160)],
        ),
        # Less than 10 s in all: SIGTERM at once.
        (DrainOrder(at=100.0, hard_at=104.0), STOP, False, [("notice", 100), ("term", 100), ("kill", 104)]),
        # Readers get their time to learn of it before anybody is asked to leave.
        (
            DrainOrder(at=100.0, soft_at=101.0, hard_at=140.0, propagation_s=5.0),
            STOP,
            False,
            [("notice", 105), ("term", 105), ("kill", 140)],
        ),
    ],
)
def test_the_rungs_of_a_sandbox(
    order: DrainOrder, disposition: Disposition, may_park: bool, expected: list[tuple[str, float]]
) -> None:
    assert ladder(order, disposition, may_park=may_park) == tuple(Rung(Step(step), float(at)) for step, at in expected)


def test_a_plan_is_named_by_its_fates_and_its_order_not_by_the_clock() -> None:
    def name(at: float, *, fate: Fate = Fate.STOP, soft_s: float = 30.0) -> str:
        foreseen = [Foreseen(sandbox=SandboxId("s"), fate=fate, by=at + soft_s)]
        return digest(NodeId("n"), 3, DrainOrder(at=at, soft_at=at + soft_s), foreseen)

    assert name(1.0) == name(900.0)
    assert name(1.0) != name(1.0, fate=Fate.FINISH)
    assert name(1.0) != name(1.0, soft_s=31.0)
