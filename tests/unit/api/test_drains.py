"""Drains that are planned, applied, moved, taken back and watched."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Any

import pytest
from tests.unit.api.door import Door
from tests.unit.api.standin import ADMIN, ID, StandIn

from penstock.api.front import TAILS_MAX
from penstock.model.drain import DrainStage, Fate, Step, Waiting
from penstock.model.ids import SandboxId
from penstock.model.sandbox import Phase

HOUR = {"softS": 600, "hardS": 3600}


async def plan(node: StandIn, **asked: object) -> dict[str, Any]:
    reply = await node.post("/drain/plan", **asked)
    assert reply.status_code == 200, reply.text
    made: dict[str, Any] = reply.json()
    return made


def fates(made: dict[str, Any]) -> dict[str, str]:
    return {each["sandboxID"]: each["fate"] for each in made["foreseen"]}


async def test_a_plan_shows_every_fate_and_changes_nothing(node: StandIn) -> None:
    await node.place("ia", lives_s=60)
    await node.place("ib")
    await node.place("ic", Phase.QUARANTINED)
    made = await plan(node, **HOUR)
    assert fates(made) == {"ia": "finish", "ib": "stop", "ic": "quarantine"}
    assert made["blocks"][0].startswith("ic is in quarantine")
    assert (await node.get()).json()["status"] == "ready"
    assert node.events == []


async def test_an_order_bound_to_its_plan_is_applied_and_names_it(node: StandIn) -> None:
    await node.place("ia")
    made = await plan(node, **HOUR)
    reply = await node.post("/drain", planDigest=made["digest"], reason="kernel", **HOUR)
    assert reply.status_code == 200, reply.text
    block = reply.json()["drain"]
    assert (block["epoch"], block["plan"], block["reason"]) == (1, made["digest"], "kernel")
    assert (moment(block["hardAt"]) - moment(block["softAt"])) == pytest.approx(3000, abs=0.01)
    (event,) = node.events
    assert (event.kind, event.because, event.actor) == ("drain.ordered", "kernel", "operator")
    assert event.facts["plan"] == made["digest"]
    assert event.deadline == pytest.approx(moment(block["hardAt"]), abs=0.01)


async def test_when_the_world_has_moved_the_order_is_refused_with_what_changed(node: StandIn) -> None:
    await node.place("ia")
    await node.place("ib")
    made = await plan(node, **HOUR)
    await node.place("ib", Phase.STOPPED)
    await node.place("ic")
    reply = await node.post("/drain", planDigest=made["digest"], **HOUR)
    assert reply.status_code == 409
    body = reply.json()
    assert body["error_code"] == "plan_moved"
    assert body["changed"] == [
        {"sandboxID": "ib", "was": "stop", "becomes": None},
        {"sandboxID": "ic", "was": None, "becomes": "stop"},
    ]
    assert node.spec.drain is None
    again = await node.post("/drain", planDigest=body["plan"]["digest"], **HOUR)
    assert again.status_code == 200


async def test_a_plan_nobody_remembers_and_other_deadlines_are_refused_too(node: StandIn) -> None:
    reply = await node.post("/drain", planDigest="0" * 16, **HOUR)
    assert (reply.status_code, reply.json()["changed"]) == (409, None)
    made = await plan(node, **HOUR)
    assert (await node.post("/drain", planDigest=made["digest"], softS=0, hardS=0)).status_code == 409
    assert node.spec.drain is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "planDigest"),
        ({"yes": True, "softS": 10, "hardS": 5}, "softS"),
        ({"yes": True, "hardS": -1}, "hardS"),
        ({"yes": True, "hardS": 1e12}, "hardS"),
        ({"yes": True, "disposition": "burn"}, "disposition"),
    ],
)
async def test_a_bad_order_is_400_and_names_the_field(node: StandIn, body: dict[str, object], named: str) -> None:
    reply = await node.post("/drain", **body)
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["message"]
    assert node.spec.drain is None


async def test_a_second_order_moves_the_deadlines_of_the_drain_under_way(node: StandIn) -> None:
    await node.post("/drain", yes=True, reason="kernel", **HOUR)
    before = node.spec.drain
    await node.post("/drain", yes=True, softS=1, hardS=2)
    after = node.spec.drain
    assert before is not None
    assert after is not None
    assert (after.epoch, after.at, after.reason) == (before.epoch, before.at, "kernel")
    assert after.hard_at is not None
    assert before.hard_at is not None
    assert after.hard_at < before.hard_at


async def test_deadlines_are_extended_and_never_brought_nearer_by_it(node: StandIn) -> None:
    assert (await node.post("/drain/extend", hardS=60)).status_code == 409, "it does not drain"
    await node.post("/drain", yes=True, **HOUR)
    assert (await node.post("/drain/extend")).status_code == 400
    assert (await node.post("/drain/extend", hardS=60)).status_code == 409
    reply = await node.post("/drain/extend", hardS=7200)
    assert reply.status_code == 200
    order = node.spec.drain
    assert order is not None
    assert order.hard_at == pytest.approx(node.door.front.clock.wall() + 7200, abs=5)
    assert order.soft_at == pytest.approx(node.door.front.clock.wall() + 600, abs=5)
    await node.say(stage=DrainStage.ENDED, succeeded=True)
    assert (await node.post("/drain/extend", hardS=9000)).status_code == 409


async def test_an_order_with_force_is_forced_at_once(node: StandIn) -> None:
    made = await plan(node, force=True)
    assert (await node.post("/drain", force=True, planDigest=made["digest"])).status_code == 200
    assert node.attempts == 1
    node.forcing = ("ia: stuck",)
    await node.post("/undrain")
    assert (await node.post("/drain", yes=True, force=True)).status_code == 500


async def test_undrain_says_what_was_already_done(node: StandIn) -> None:
    assert (await node.post("/undrain")).status_code == 409
    await node.post("/drain", yes=True, **HOUR)
    await node.tell_fate("ia", Fate.PARK)
    await node.tell_fate("ib", Fate.SPARED)
    asked = Waiting(sandbox=SandboxId("ic"), next=Step.KILL, at=9.0)
    untouched = Waiting(sandbox=SandboxId("id"), next=Step.TERM, at=9.0)
    await node.say(waiting=(asked, untouched))
    reply = await node.post("/undrain")
    assert reply.status_code == 200
    body = reply.json()
    assert (body["epoch"], body["status"]) == (2, "ready")
    assert [(each["sandboxID"], each["fate"]) for each in body["done"]] == [("ia", "park")]
    assert (body["spared"], body["ending"]) == (["ib"], ["ic"])
    assert node.events[-1].kind == "node.undrained"
    assert (await node.post("/undrain")).status_code == 409


async def test_undrain_does_not_wait_for_ever_for_the_node(node: StandIn) -> None:
    await node.post("/drain", yes=True, **HOUR)
    node.answers = False
    assert (await node.post("/undrain")).status_code == 202
    assert node.spec.drain is None


async def test_the_receipt_is_kept_for_each_epoch(node: StandIn) -> None:
    assert (await node.get("/drain")).status_code == 404
    await node.post("/drain", yes=True, **HOUR)
    await node.tell_fate("ia", Fate.STOP)
    await node.post("/undrain")
    await node.post("/drain", yes=True)
    newest = (await node.get("/drain")).json()
    assert (newest["epoch"], newest["outcomes"], newest["order"]["hardAt"]) == (3, [], None)
    first = (await node.get("/drain?epoch=1")).json()
    assert (first["stage"], first["fates"]) == ("undone", {"stop": 1})
    assert [(each["sandboxID"], each["because"]) for each in first["outcomes"]] == [("ia", "so it went")]
    assert "order" not in first
    assert (await node.get("/drain?epoch=2")).status_code == 404


# -- the stream --


def parse(text: str) -> list[tuple[str, int | None, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            id = int(lines["id"]) if "id" in lines else None
            found.append((lines["event"], id, json.loads(lines["data"])))
    return found


async def watch(node: StandIn, **params: object) -> str:
    """The whole stream: the client of this test gets a stream when it has ended."""
    reply = await node.door.client.get(f"/nodes/{ID}/drain/events", params=params, headers=ADMIN)  # type: ignore[arg-type]
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return reply.text


async def ended(node: StandIn) -> None:
    await node.say(stage=DrainStage.ENDED, succeeded=True, ended_at=9.0)


async def test_a_drain_is_watched_until_it_has_ended(node: StandIn) -> None:
    await node.post("/drain", yes=True, **HOUR)
    watching = asyncio.ensure_future(watch(node))
    await asyncio.sleep(0.12)
    await node.tell_fate("ia", Fate.STOP)
    await ended(node)
    text = await watching
    assert ": alive\n\n" in text, "a sign of life while nothing happens"
    events = parse(text)
    assert [kind for kind, _, _ in events] == ["report", "outcome", "report", "report", "end"]
    assert events[-1][2]["outcomes"][0]["sandboxID"] == "ia"
    assert events[-1][2]["succeeded"] is True
    ids = [id for _, id, _ in events]
    assert ids == sorted(id for id in ids if id is not None)


async def test_a_cursor_resumes_without_loss_and_without_repetition(node: StandIn) -> None:
    await node.post("/drain", yes=True, **HOUR)
    for name in ("ia", "ib", "ic"):
        await node.tell_fate(name, Fate.STOP)
    await ended(node)
    whole = parse(await watch(node))
    revisions = [change.mod_revision for change in node.door.store.list(f"drain/{ID}/").records]
    cursor = sorted(revisions)[0]
    for text in (
        await watch(node, cursor=cursor),
        (await node.door.client.get(f"/nodes/{ID}/drain/events", headers={**ADMIN, "Last-Event-ID": str(cursor)})).text,
    ):
        later = parse(text)
        assert [body["sandboxID"] for kind, _, body in later if kind == "outcome"] == ["ib", "ic"]
        assert later[-1][2] == whole[-1][2]
    assert [kind for kind, _, _ in parse(await watch(node, cursor=node.door.store.revision))] == ["end"]


async def test_a_cursor_that_is_not_kept_begins_with_the_state_of_now(node: StandIn) -> None:
    await node.post("/drain", yes=True, **HOUR)
    await node.tell_fate("ia", Fate.STOP)
    await ended(node)
    events = parse(await watch(node, cursor=10**9))
    assert [kind for kind, _, _ in events] == ["report", "outcome", "end"]


async def test_an_attempt_to_force_that_is_asked_for_keeps_the_stream_open(node: StandIn) -> None:
    await node.post("/drain", yes=True, **HOUR)
    node.forcing = None
    await node.post("/drain/force")
    await node.say(stage=DrainStage.ENDED, succeeded=False, quarantined=1)
    watching = asyncio.ensure_future(watch(node))
    await asyncio.sleep(0.1)
    assert not watching.done()
    await node.end_attempt(1, ())
    assert parse(await watching)[-1][2]["succeeded"] is True


async def test_an_undone_drain_ends_its_stream_and_none_has_none(node: StandIn) -> None:
    assert (await node.get("/drain/events")).status_code == 404
    await node.post("/drain", yes=True)
    watching = asyncio.ensure_future(watch(node))
    await asyncio.sleep(0.05)
    await node.post("/undrain")
    assert parse(await watching)[-1][2]["stage"] == "undone"


async def test_streams_are_bounded_and_given_back(node: StandIn) -> None:
    front = node.door.front
    await node.post("/drain", yes=True)
    async with AsyncExitStack() as others:
        for number in range(TAILS_MAX):
            await others.enter_async_context(front.tails.enter(str(number), 0))
        assert (await node.get("/drain/events")).status_code == 429
    watches = node.door.store.statistics().watches
    leaving = asyncio.ensure_future(watch(node))
    await asyncio.sleep(0.05)
    assert front.tails.statistics().running == 1
    leaving.cancel()
    await asyncio.sleep(0.05)
    assert front.tails.statistics().running == 0
    assert node.door.store.statistics().watches == watches


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def test_a_create_that_nobody_takes_because_the_node_drains_says_so(door: Door, node: StandIn) -> None:
    door.answer = None
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert (reply.status_code, reply.json()["error_code"]) == (503, "no_free_slot")
    assert (await node.post("/drain", yes=True, reason="kernel")).status_code == 200
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert (reply.status_code, "Retry-After" in reply.headers) == (503, True)
    assert reply.json()["message"].endswith("(n1 drains (kernel))"), reply.text
    assert reply.json()["error_code"] == "unavailable"
