"""What a spec wants at a given moment: to run, to lie frozen, to become a snapshot."""

from __future__ import annotations

import pytest

from penstock.model.ids import SnapshotId
from penstock.model.sandbox import OnTimeout, wants_frozen, wants_parked
from tests.unit.control.test_plans import spec

END = spec().end_at
S1 = SnapshotId("s1")


@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        ({}, "run", "run"),
        ({"frozen": True}, "freeze", "freeze"),
        ({"on_timeout": OnTimeout.PAUSE}, "run", "freeze"),
        ({"on_timeout": OnTimeout.PARK}, "run", "park"),
        ({"on_timeout": OnTimeout.PARK, "frozen": True}, "freeze", "freeze"),  # memory somebody wanted kept
        ({"park": S1}, "park", "park"),
        ({"park": S1, "frozen": True}, "park", "park"),
    ],
)
def test_what_it_wants_before_and_after_its_end(fields: dict[str, object], before: str, after: str) -> None:
    wanted = spec(**fields)
    for now, what in ((END - 1, before), (END, after)):
        parked, frozen = wants_parked(wanted, now), wants_frozen(wanted, now)
        assert ("park" if parked is not None else "freeze" if frozen else "run") == what


def test_one_that_parks_at_its_end_has_one_name_for_it() -> None:
    wanted = spec(on_timeout=OnTimeout.PARK)
    assert wants_parked(wanted, END) == wants_parked(wanted, END + 100)
    assert wants_parked(spec(park=S1), END) == S1
