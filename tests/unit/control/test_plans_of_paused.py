"""What control does about sandboxes that are paused to disk, resumed from there, or killed in between."""

from __future__ import annotations

import pytest

from penstock.control.sandboxes import RESUME_FAILED_S, Drop, Plan, Remove, plan
from penstock.model.ids import NodeId, SnapshotId
from penstock.model.sandbox import KillReason, Phase
from tests.unit.control.test_plans import NOW, STOP, A, seen, spec, status

OLD, NEW = SnapshotId("s1"), SnapshotId("s2")
N1 = NodeId("n1")
PARKED = status(Phase.STOPPED, kill_reason=KillReason.PAUSED, stopped_at=NOW)


def test_parked_its_records_go_at_once_and_the_newest_snapshot_stays() -> None:
    planned = plan(seen(spec(node=N1), PARKED, paused=(OLD, NEW)), NOW)
    assert planned.actions == (Drop(OLD), Remove(A))


@pytest.mark.parametrize("ended", [PARKED, status(Phase.FAILED, stopped_at=NOW)])
def test_killed_what_it_was_paused_as_goes_before_the_word_that_it_must(ended) -> None:
    """A crash after the removal would leave a snapshot nobody wants, and the sandbox back among the paused."""
    planned = plan(seen(spec(node=N1, stop=STOP), ended, paused=(OLD, NEW)), NOW)
    assert planned.actions == (Drop(OLD), Drop(NEW), Remove(A))


def test_serving_again_it_needs_no_more_what_it_began_with() -> None:
    resumed = spec(node=N1, snapshot=OLD)
    assert plan(seen(resumed, status(Phase.READY), paused=(OLD, NEW)), NOW).actions == (Drop(OLD),)
    for phase in (Phase.CREATING, Phase.STARTING):
        assert plan(seen(resumed, status(phase), paused=(OLD,)), NOW).actions == ()


def test_a_failed_resume_leaves_it_paused_a_moment_later() -> None:
    failed = seen(spec(node=N1, snapshot=OLD), status(Phase.FAILED, stopped_at=NOW), paused=(OLD,))
    assert plan(failed, NOW).wake_at == NOW + RESUME_FAILED_S
    assert plan(failed, NOW + RESUME_FAILED_S).actions == (Remove(A),)
    assert plan(seen(None, paused=(OLD,)), NOW + 1000) == Plan(because=("nothing is known of it",))
