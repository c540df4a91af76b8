"""E2B's node API: words, codes, what is sticky, what is idempotent, and what a forced stop answers."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.api.door import Door
from tests.unit.api.standin import ADMIN, ID, StandIn

from penstock.model.node import NodeWord
from penstock.model.sandbox import Phase


async def set_status(node: StandIn, status: str, **more: object) -> int:
    return (await node.post("", status=status, **more)).status_code


async def test_nodes_are_for_operators_alone(door: Door, node: StandIn) -> None:
    for method, path in (("GET", "/nodes"), ("GET", f"/nodes/{ID}"), ("POST", f"/nodes/{ID}/drain")):
        assert (await door.client.request(method, path, json={"yes": True})).status_code == 403, path
        stranger = {"X-API-Key": "", "X-Admin-Token": "wrong"}
        assert (await door.client.request(method, path, json={"yes": True}, headers=stranger)).status_code == 401, path
    assert node.spec.word is NodeWord.HEALTHY


async def test_a_node_is_shown_with_what_is_on_it(node: StandIn) -> None:
    await node.place("ia")
    await node.place("ib", Phase.STARTING)
    await node.place("ic", Phase.STOPPED)
    rows = (await node.door.client.get("/nodes", headers=ADMIN)).json()
    assert [row["id"] for row in rows] == [ID]
    row = rows[0]
    assert (row["status"], row["sandboxCount"], row["sandboxStartingCount"]) == ("ready", 2, 1)
    assert row["metrics"] == {
        "allocatedCPU": 4.0,
        "cpuCount": 2,
        "allocatedMemoryBytes": 2 * 2**30,
        "memoryTotalBytes": 2**30,
    }
    assert (row["schedulable"], row["drain"], row["epoch"]) == (True, None, 0)
    detail = (await node.get()).json()
    assert [(each["sandboxID"], each["phase"]) for each in detail["sandboxes"]] == [("ia", "ready"), ("ib", "starting")]


async def test_an_unknown_node_is_404_without_a_body(door: Door, node: StandIn) -> None:
    for reply in (
        await door.client.get("/nodes/nosuch", headers=ADMIN),
        await door.client.post("/nodes/nosuch", json={"status": "draining"}, headers=ADMIN),
    ):
        assert (reply.status_code, reply.content) == (404, b"")
    for path in ("cordon", "undrain", "drain/plan", "drain/force"):
        assert (await door.client.post(f"/nodes/nosuch/{path}", headers=ADMIN)).status_code == 404, path
    assert (await door.client.get("/nodes/UP%20PER/drain", headers=ADMIN)).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"status": "gone"},
        {"status": "connecting"},
        {"status": "standby", "forceStop": True},
        {"status": "ready", "forceStop": True},
        {"status": "draining", "forceStop": "yes"},
    ],
)
async def test_a_bad_body_is_400_and_changes_nothing(node: StandIn, body: dict[str, object]) -> None:
    reply = await node.post("", **body)
    assert reply.status_code == 400, reply.text
    assert node.spec.word is NodeWord.HEALTHY
    assert node.events == []


async def test_a_status_said_twice_changes_nothing_and_keeps_its_moment(node: StandIn) -> None:
    for status in ("standby", "unhealthy", "draining"):
        assert await set_status(node, status) == 204
        first = node.spec
        assert await set_status(node, status) == 204
        assert node.spec == first
    assert [event.kind for event in node.events] == ["node.cordoned", "node.unhealthy", "drain.ordered"]
    assert {event.subject for event in node.events} == {ID}
    assert node.events[-1].related == (f"drain-{ID}-1",)


async def test_a_drain_is_not_reversed_by_a_status_also_not_by_way_of_unhealthy(node: StandIn) -> None:
    assert await set_status(node, "draining") == 204
    for status in ("ready", "standby"):
        reply = await node.post("", status=status)
        assert reply.status_code == 409
        assert "undrain" in reply.json()["message"]
    assert await set_status(node, "unhealthy") == 204
    assert (await node.get()).json()["status"] == "unhealthy"
    assert await set_status(node, "ready") == 409
    assert await set_status(node, "draining") == 204
    assert node.spec.epoch == 1


async def test_draining_said_again_keeps_the_deadlines_of_the_order(node: StandIn) -> None:
    await node.post("/drain", yes=True, softS=60, hardS=120, reason="upgrade")
    before = node.spec
    assert await set_status(node, "draining") == 204
    assert node.spec == before


async def test_draining_is_answered_once_the_node_has_it(node: StandIn) -> None:
    assert await set_status(node, "draining") == 204
    block = (await node.get()).json()["drain"]
    assert (block["epoch"], block["stage"], block["hardAt"], block["by"]) == (1, "live", None, "operator")


async def test_a_node_that_does_not_answer_is_503_and_its_order_stands(node: StandIn) -> None:
    node.answers = False
    reply = await node.post("", status="draining")
    assert reply.status_code == 503
    assert reply.headers["Retry-After"]
    assert node.spec.word is NodeWord.DRAINING
    assert (await node.get()).json()["drain"]["stage"] == "ordered"


async def test_a_forced_stop_answers_204_when_everything_is_gone_and_again_is_a_no_op(node: StandIn) -> None:
    assert await set_status(node, "draining", forceStop=True) == 204
    assert await set_status(node, "draining", forceStop=True) == 204
    assert node.attempts == 1
    assert [event.kind for event in node.events] == ["drain.ordered", "drain.forced"]


async def test_a_forced_stop_that_takes_longer_is_202_and_those_who_ask_again_join_it(node: StandIn) -> None:
    node.forcing = None
    replies = await asyncio.gather(*(node.post("", status="draining", forceStop=True) for _ in range(3)))
    assert {reply.status_code for reply in replies} == {202}
    assert replies[0].json()["drain"]["stage"] == "forcing"
    joined = asyncio.ensure_future(node.post("/drain/force"))
    await asyncio.sleep(0.05)
    await node.end_attempt(1, ())
    assert (await joined).status_code == 204
    assert node.attempts == 1


async def test_a_forced_stop_that_failed_is_500_with_whom_and_why_and_can_be_repeated(node: StandIn) -> None:
    await node.place("ia", Phase.QUARANTINED)
    await node.place("ib", Phase.STOPPED)
    node.forcing = ("ia: disk is busy",)
    reply = await node.post("", status="draining", forceStop=True)
    assert reply.status_code == 500
    body = reply.json()
    assert (body["code"], body["remaining"], body["errors"]) == (500, ["ia"], ["ia: disk is busy"])
    assert await set_status(node, "draining", forceStop=True) == 500
    node.forcing = ()
    assert await set_status(node, "draining", forceStop=True) == 204
    assert node.attempts == 3


async def test_an_undrain_in_between_ends_the_wait_of_a_forced_stop(node: StandIn) -> None:
    node.forcing = None
    assert await set_status(node, "draining") == 204
    asked = asyncio.ensure_future(node.post("/drain/force"))
    await asyncio.sleep(0.05)
    assert (await node.post("/undrain")).status_code == 200
    reply = await asked
    assert reply.status_code == 409, "neither done nor still stopping"
    assert "undone" in reply.json()["message"]


async def test_cordon_and_uncordon(node: StandIn) -> None:
    assert (await node.post("/cordon", reason="disk is noisy")).status_code == 204
    shown = (await node.get()).json()
    assert (shown["status"], shown["schedulable"]) == ("standby", False)
    assert shown["whyNot"] == "is cordoned (disk is noisy)"
    assert (await node.post("/uncordon")).status_code == 204
    assert (await node.get()).json()["schedulable"] is True
    assert (await node.post("/drain", yes=True)).status_code == 200
    assert (await node.post("/uncordon")).status_code == 409


async def test_many_who_change_a_node_at_once_all_get_through(node: StandIn) -> None:
    words = ["standby", "ready"] * 10
    replies = await asyncio.gather(*(node.post("", status=word) for word in words))
    assert {reply.status_code for reply in replies} == {204}
    assert len(node.events) == len(words)
