"""The words of a node: one table, sticky drains, epochs that only grow."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from penstock.model.drain import Disposition, DrainOrder
from penstock.model.errors import Conflict
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec, NodeWord, drain, override, undrain

NEW = NodeSpec(id=NodeId("n"))


def spec_in(word: NodeWord, *, drained: bool = False) -> NodeSpec:
    spec = drain(NEW, DrainOrder(at=1.0), now=1.0) if drained or word is NodeWord.DRAINING else NEW
    return override(spec, word, now=2.0)


@pytest.mark.parametrize(("before", "wanted"), itertools.product(NodeWord, NodeWord), ids=lambda word: word.value)
def test_a_status_is_taken_as_said_unless_it_would_take_a_drain_back(before: NodeWord, wanted: NodeWord) -> None:
    spec = spec_in(before)
    if before is NodeWord.DRAINING and wanted in (NodeWord.HEALTHY, NodeWord.STANDBY):
        with pytest.raises(Conflict, match="undrain"):
            override(spec, wanted, now=3.0)
    elif wanted is NodeWord.DRAINING:
        assert drain(spec, DrainOrder(at=3.0), now=3.0).word is wanted
    else:
        assert override(spec, wanted, now=3.0).word is wanted


@pytest.mark.parametrize("wanted", [NodeWord.HEALTHY, NodeWord.STANDBY])
def test_unhealthy_is_no_way_out_of_a_drain(wanted: NodeWord) -> None:
    spec = spec_in(NodeWord.UNHEALTHY, drained=True)
    with pytest.raises(Conflict):
        override(spec, wanted, now=3.0)
    assert override(spec, NodeWord.DRAINING, now=3.0).drain == spec.drain


def test_saying_the_same_again_changes_nothing() -> None:
    for word in NodeWord:
        spec = spec_in(word)
        assert override(spec, word, now=99.0) is spec
    draining = spec_in(NodeWord.DRAINING)
    assert drain(draining, DrainOrder(at=50.0), now=50.0) is draining


def test_a_second_order_keeps_epoch_and_beginning_and_never_takes_force_away() -> None:
    first = drain(NEW, DrainOrder(at=1.0, reason="upgrade", hard_at=100.0), now=1.0)
    forced = drain(first, DrainOrder(at=5.0, hard_at=50.0, force_number=1), now=5.0)
    later = drain(forced, DrainOrder(at=9.0, hard_at=200.0), now=9.0)
    assert later.drain is not None
    assert (later.drain.epoch, later.drain.at, later.drain.reason) == (1, 1.0, "upgrade")
    assert (later.drain.hard_at, later.drain.force_number) == (200.0, 1)
    assert later.changed_at == 1.0


def test_undrain_opens_a_new_epoch_and_keeps_a_cordon() -> None:
    spec = drain(override(NEW, NodeWord.STANDBY, now=1.0), DrainOrder(at=2.0), now=2.0)
    undone = undrain(spec, now=3.0)
    assert (undone.epoch, undone.drain, undone.word) == (2, None, NodeWord.STANDBY)
    with pytest.raises(Conflict, match="does not drain"):
        undrain(undone, now=4.0)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=NodeSpec) == spec


def test_a_draining_node_takes_nothing_whatever_else_it_is() -> None:
    for word in NodeWord:
        assert spec_in(word).schedulable is (word is NodeWord.HEALTHY)
        assert bool(spec_in(word).why_not) is (word is not NodeWord.HEALTHY)
    assert msgspec.structs.replace(NEW, disposition=Disposition.PARK).schedulable
