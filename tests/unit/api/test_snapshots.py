"""Snapshots of running sandboxes: taken, named, listed, started from, deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.unit.api.door import Door
from tests.unit.api.pausingnode import PausingNode, pausing_node
from tests.unit.api.test_pausing import create, get, post, snapshots

from penstock.model import keys
from penstock.model.sandbox import SandboxSpec


@pytest.fixture
async def node(door: Door) -> AsyncIterator[PausingNode]:
    async with pausing_node(door) as opened:
        yield opened


async def take(door: Door, id: str, **fields: object) -> dict[str, object]:
    reply = await post(door, f"/sandboxes/{id}/snapshots", fields)
    assert reply.status_code == 201, reply.text
    body: dict[str, object] = reply.json()
    return body


async def test_a_snapshot_is_a_template_by_its_id_and_its_name(door: Door, node: PausingNode):
    id = await create(door, envVars={"A": "1", "B": "1"})
    plain, named = await take(door, id), await take(door, id, name="mine")
    assert str(plain["snapshotID"]).endswith(":default")
    assert plain["names"] == []
    assert (named["snapshotID"], named["names"]) == ("default/mine:default", ["default/mine"])
    assert (named["memory"], named["sandboxID"]) == (False, id)
    assert (await get(door, id))["state"] == "running"
    seen = set()
    for template in (plain["snapshotID"], "mine", "default/mine", "default/mine:default"):
        made = await create(door, templateID=template, envVars={"B": "2"})
        record = door.store.get(keys.SANDBOX_SPEC + made)
        assert record is not None
        spec = msgspec.json.decode(record.value, type=SandboxSpec)
        assert (spec.build, spec.env) == ("b1", {"A": "1", "B": "2"})
        seen.add(spec.snapshot)
        await door.client.delete(f"/sandboxes/{made}")
    assert len(seen) == 2


async def test_they_are_listed_newest_first_in_pages_and_by_name(door: Door, node: PausingNode):
    id, other = await create(door), await create(door)
    ids = [(await take(door, id))["snapshotID"] for _ in range(3)]
    named = await take(door, other, name="mine:v2")
    assert (named["snapshotID"], named["names"]) == ("default/mine:v2", ["default/mine:v2"])
    seen, token = [], ""
    while True:
        params = {"sandboxID": id, "limit": 1} | ({"nextToken": token} if token else {})
        reply = await door.client.get("/snapshots", params=params)
        seen += [each["snapshotID"] for each in reply.json()]
        token = reply.headers.get("X-Next-Token", "")
        if not token:
            break
    assert seen == ids[::-1]
    for name, found in (("mine:v2", 1), ("default/mine:v2", 1), ("mine", 0), ("stranger/mine:v2", 0)):
        assert len((await door.client.get("/snapshots", params={"name": name})).json()) == found, name
    assert len((await door.client.get("/snapshots")).json()) == 4
    assert (await door.client.get("/snapshots", params={"limit": 0})).status_code == 400


async def test_a_name_taken_again_stands_for_the_newest(door: Door, node: PausingNode):
    id = await create(door)
    await take(door, id, name="mine")
    await take(door, id, name="mine")
    assert len(snapshots(door)) == 1


async def test_deleted_it_is_gone_and_a_second_time_404(door: Door, node: PausingNode):
    id = await create(door)
    plain, _ = await take(door, id), await take(door, id, name="mine")
    for name in (str(plain["snapshotID"]).replace(":", "%3A"), "default%2Fmine%3Adefault"):
        assert (await door.client.delete(f"/templates/{name}")).status_code == 204
        assert (await door.client.delete(f"/templates/{name}")).status_code == 404
    assert snapshots(door) == []
    assert (await door.client.post("/v2/sandboxes", json={"templateID": "mine"})).status_code == 404
    assert (await door.client.delete("/templates/base")).status_code == 501


async def test_another_team_neither_sees_nor_starts_nor_deletes_it(door: Door, node: PausingNode):
    snapshot = (await take(door, await create(door), name="mine"))["snapshotID"]
    stranger = {"X-Admin-Token": "adm_x", "X-Team-ID": "stranger"}
    assert (await door.client.get("/snapshots", headers=stranger)).json() == []
    assert (await door.client.delete(f"/templates/{snapshot}", headers=stranger)).status_code == 404
    body = {"templateID": snapshot, "timeout": 60}
    assert (await door.client.post("/v2/sandboxes", json=body, headers=stranger)).status_code == 404


@pytest.mark.parametrize("name", ["base", "-x", "a/b/c", "stranger/x", "a:b:c", "a b", "x" * 64, ""])
async def test_a_bad_name_is_400_and_takes_nothing(door: Door, node: PausingNode, name: str):
    id = await create(door)
    assert (await post(door, f"/sandboxes/{id}/snapshots", {"name": name})).status_code == 400
    assert snapshots(door) == []


async def test_one_at_a_time_and_a_failure_is_told(door: Door, node: PausingNode):
    id = await create(door)
    node.step_s = 0.05
    replies = await asyncio.gather(*(post(door, f"/sandboxes/{id}/snapshots", {}) for _ in range(3)))
    assert sorted(reply.status_code for reply in replies) == [201, 409, 409]
    node.breaks = "the disk is full"
    reply = await post(door, f"/sandboxes/{id}/snapshots", {})
    assert (reply.status_code, "the disk is full" in reply.json()["message"]) == (503, True)
    await post(door, f"/sandboxes/{id}/pause", {"memory": False})
    assert (await post(door, f"/sandboxes/{id}/snapshots", {})).status_code == 409


async def test_forks_say_what_to_do_instead(door: Door, node: PausingNode):
    id = await create(door)
    reply = await post(door, f"/sandboxes/{id}/fork", {})
    assert (reply.status_code, "snapshot" in reply.json()["message"]) == (501, True)
    assert (await post(door, "/sandboxes/nobody/fork", {})).status_code == 404
