"""Pause, resume, connect and kill in all the forms a paused sandbox has; and what may go wrong in each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.unit.api.door import Door
from tests.unit.api.pausingnode import PausingNode, pausing_node

from penstock.api import pausing
from penstock.model import keys
from penstock.model.errors import NotFound
from penstock.model.event import LoggedEvent
from penstock.model.sandbox import SandboxSpec


@pytest.fixture
async def node(door: Door) -> AsyncIterator[PausingNode]:
    async with pausing_node(door) as opened:
        yield opened


async def create(door: Door, **fields: object) -> str:
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 60, **fields})
    assert reply.status_code == 201, reply.text
    id: str = reply.json()["sandboxID"]
    return id


async def post(door: Door, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    return await door.client.post(path, json=body) if body is not None else await door.client.post(path)


async def get(door: Door, id: str) -> dict[str, Any]:
    reply = await door.client.get(f"/sandboxes/{id}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def listed(door: Door, state: str) -> list[str]:
    return [row["sandboxID"] for row in (await door.client.get("/v2/sandboxes", params={"state": state})).json()]


def kinds(door: Door, id: str) -> list[str]:
    records = door.store.list(keys.EVENT, {"subject": id}).records
    return [msgspec.json.decode(each.value, type=LoggedEvent).kind for each in records]


def snapshots(door: Door) -> list[str]:
    return [each.key.removeprefix(keys.SNAPSHOT) for each in door.store.list(keys.SNAPSHOT).records]


async def until(check: Any, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# ---- in memory


@pytest.mark.parametrize("body", [None, {}, {"memory": True}, {"requireHealthyGuest": True}])
async def test_paused_in_memory_it_is_shown_so_and_connect_resumes_it(door: Door, node: PausingNode, body: Any):
    id = await create(door)
    assert (await post(door, f"/sandboxes/{id}/pause", body)).status_code == 204
    shown = await get(door, id)
    assert (shown["state"], shown["phase"], shown["pauseMode"]) == ("paused", "paused", "full")
    assert "pause-memory-on-node" in shown["capabilities"]
    assert shown["durableUpTo"].endswith("Z")
    assert await listed(door, "paused") == [id]
    assert await listed(door, "running") == []
    resumed = await post(door, f"/v2/sandboxes/{id}/connect", {"timeout": 100})
    assert resumed.status_code == 201
    assert resumed.json()["sandboxID"] == id
    assert resumed.json()["envdAccessToken"]
    assert await listed(door, "running") == [id]
    assert node.starts == {id: 1}, "the same life went on"
    events = kinds(door, id)
    assert events.index("sandbox.pause_ordered") < events.index("sandbox.resume_ordered")


async def test_pausing_a_paused_one_is_409_and_an_unknown_one_404(door: Door, node: PausingNode):
    id = await create(door)
    for memory in (True, False):
        await post(door, f"/sandboxes/{id}/pause", {"memory": memory})
        for again in (True, False):
            assert (await post(door, f"/sandboxes/{id}/pause", {"memory": again})).status_code == 409
        assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201
    assert (await post(door, "/sandboxes/nobody/pause", {})).status_code == 404
    await door.client.delete(f"/sandboxes/{id}")
    assert (await post(door, f"/sandboxes/{id}/pause", {})).status_code == 404


@pytest.mark.parametrize("memory", [True, False])
async def test_pauses_at_once_are_one_pause_that_all_join(door: Door, node: PausingNode, memory: bool):
    node.step_s = 0.05
    id = await create(door)
    replies = await asyncio.gather(*(post(door, f"/sandboxes/{id}/pause", {"memory": memory}) for _ in range(5)))
    assert [reply.status_code for reply in replies] == [204] * 5
    assert node.frozen == 1
    assert kinds(door, id).count("sandbox.pause_ordered") == 1


@pytest.mark.parametrize("memory", [True, False])
async def test_resumes_at_once_are_one_resume_that_all_join(door: Door, node: PausingNode, memory: bool):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": memory})
    node.step_s = 0.05
    replies = await asyncio.gather(*(post(door, f"/sandboxes/{id}/connect", {"timeout": 60}) for _ in range(5)))
    assert [reply.status_code for reply in replies] == [201] * 5
    assert node.starts[id] == (1 if memory else 2)
    assert kinds(door, id).count("sandbox.resume_ordered") == 1
    await until(lambda: not snapshots(door))


async def test_a_connect_in_the_middle_of_a_pause_waits_and_resumes(door: Door, node: PausingNode):
    id = await create(door)
    for memory in (True, False):
        node.step_s = 0.05
        paused = asyncio.ensure_future(post(door, f"/sandboxes/{id}/pause", {"memory": memory}))
        await asyncio.sleep(0.02)
        assert (await get(door, id))["state"] == "paused"
        assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201
        await paused
        assert (await get(door, id))["state"] == "running"


async def test_connect_to_a_running_one_only_extends(door: Door, node: PausingNode):
    id = await create(door, timeout=300)
    before = (await get(door, id))["endAt"]
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 5})).status_code == 200
    assert (await get(door, id))["endAt"] == before
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 900})).status_code == 200
    assert (await get(door, id))["endAt"] > before


async def test_resume_is_409_for_a_running_one_and_201_for_a_paused_one(door: Door, node: PausingNode):
    id = await create(door)
    assert (await post(door, f"/sandboxes/{id}/resume", {})).status_code == 409
    assert (await post(door, "/sandboxes/nobody/resume", {})).status_code == 404
    await post(door, f"/sandboxes/{id}/pause", {})
    assert (await post(door, f"/sandboxes/{id}/resume")).status_code == 201
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 10**9})).status_code == 400


@pytest.mark.parametrize("memory", [True, False])
async def test_what_needs_a_running_sandbox_is_409_for_a_paused_one(door: Door, node: PausingNode, memory: bool):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": memory})
    assert (await post(door, f"/sandboxes/{id}/timeout", {"timeout": 5})).status_code == 409
    assert (await post(door, f"/sandboxes/{id}/refreshes", {})).status_code == 409
    assert (await door.client.put(f"/sandboxes/{id}/network", json={})).status_code == 409
    assert (await post(door, f"/sandboxes/{id}/timeout", {"timeout": "x"})).status_code == 400


async def test_its_end_does_not_come_while_it_is_being_paused(door: Door, node: PausingNode):
    id = await create(door, timeout=1)
    node.step_s = 1.2
    assert (await post(door, f"/sandboxes/{id}/pause", {})).status_code == 204
    assert (await get(door, id))["state"] == "paused"


async def test_one_that_cannot_be_frozen_runs_on_and_the_caller_is_told(
    door: Door, node: PausingNode, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pausing, "PAUSED_WITHIN_S", 0.1)
    id = await create(door)
    node.stuck = True
    reply = await post(door, f"/sandboxes/{id}/pause", {})
    assert reply.status_code == 503
    assert reply.headers["Retry-After"]
    node.stuck = False
    await asyncio.sleep(0.05)
    assert (await get(door, id))["state"] == "running"


@pytest.mark.parametrize("body", [{"requireHealthyGuest": True}, {"memory": False}])
async def test_a_deaf_guest_is_not_paused_where_that_would_lose_something(door: Door, node: PausingNode, body: Any):
    id = await create(door)
    node.deaf = True
    assert (await post(door, f"/sandboxes/{id}/pause", body)).status_code == 503
    await until(lambda: node.thawed == 1)
    assert (await get(door, id))["state"] == "running"
    assert snapshots(door) == []
    assert (await post(door, f"/sandboxes/{id}/pause", {})).status_code == 204, "its memory keeps all of it"


# ---- on disk


async def test_paused_to_disk_it_is_its_snapshot_and_resumes_as_the_same_id(door: Door, node: PausingNode):
    id = await create(door, metadata={"a": "b"}, envVars={"X": "1"})
    assert (await post(door, f"/sandboxes/{id}/pause", {"memory": False})).status_code == 204
    shown = await get(door, id)
    assert (shown["state"], shown["pauseMode"], shown["metadata"]) == ("paused", "filesystem", {"a": "b"})
    assert await listed(door, "paused") == [id]
    await until(lambda: door.store.get(keys.SANDBOX_SPEC + id) is None)
    assert (await get(door, id))["state"] == "paused"
    assert await listed(door, "paused,running") == [id]
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201
    assert (await get(door, id))["state"] == "running"
    assert await listed(door, "paused") == []
    record = door.store.get(keys.SANDBOX_SPEC + id)
    assert record is not None
    spec = msgspec.json.decode(record.value, type=SandboxSpec)
    assert (spec.snapshot is not None, spec.env, spec.park, spec.frozen) == (True, {"X": "1"}, None, False)
    await until(lambda: not snapshots(door))


async def test_a_frozen_one_reboots_from_its_disk_when_memory_is_not_wanted(door: Door, node: PausingNode):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {})
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60, "memory": False})).status_code == 201
    assert node.starts == {id: 2}


async def test_no_room_leaves_it_paused_and_says_when_to_come_back(door: Door, node: PausingNode):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": False})
    await node.cordon()
    reply = await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
    assert "the test said so" in reply.json()["message"]
    assert (await get(door, id))["state"] == "paused"
    assert len(snapshots(door)) == 1
    await node.cordon(cordoned=False)
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201


async def test_a_resume_no_node_takes_up_is_taken_back_and_is_no_kill(door: Door, node: PausingNode):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": False})
    gone = door.store.get(keys.NODE_STATUS + "n1")
    assert gone is not None
    await door.store.delete(gone.key, by="node")
    reply = await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})
    assert reply.status_code == 503
    assert door.store.get(keys.SANDBOX_SPEC + id) is None
    assert (await get(door, id))["state"] == "paused"
    assert len(snapshots(door)) == 1


async def test_a_resume_that_fails_leaves_it_paused(door: Door, node: PausingNode):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": False})
    node.refuses = True
    reply = await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})
    assert (reply.status_code, "no descriptor" in reply.json()["message"]) == (503, True)
    assert (await get(door, id))["state"] == "paused"
    node.refuses = False
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201


async def test_one_on_disk_counts_for_no_limit_and_its_resume_does(door: Door, node: PausingNode):
    parked = await create(door)
    await post(door, f"/sandboxes/{parked}/pause", {"memory": False})
    others = [await create(door) for _ in range(3)]
    reply = await post(door, f"/sandboxes/{parked}/connect", {"timeout": 60})
    assert (reply.status_code, reply.headers["Should-Retry"]) == (429, "false")
    assert (await get(door, parked))["state"] == "paused"
    await door.client.delete(f"/sandboxes/{others[0]}")
    assert (await post(door, f"/sandboxes/{parked}/connect", {"timeout": 60})).status_code == 201


# ---- ends


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("memory", [True, False])
async def test_a_kill_ends_it_in_every_form(door: Door, node: PausingNode, memory: bool, wait: bool):
    id = await create(door)
    node.step_s = 0.0 if wait else 0.05
    pausing_now = asyncio.ensure_future(post(door, f"/sandboxes/{id}/pause", {"memory": memory}))
    await (pausing_now if wait else asyncio.sleep(0.07 if not memory else 0.02))
    assert (await door.client.delete(f"/sandboxes/{id}")).status_code == 204
    assert (await door.client.get(f"/sandboxes/{id}")).status_code == 404
    assert (await door.client.delete(f"/sandboxes/{id}")).status_code == 404
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 404
    await pausing_now
    await until(lambda: not snapshots(door))
    assert await listed(door, "paused,running") == []
    assert "sandbox.stop_ordered" in kinds(door, id)


async def test_another_team_sees_nothing_of_a_paused_one(door: Door, node: PausingNode):
    id = await create(door)
    await post(door, f"/sandboxes/{id}/pause", {"memory": False})
    stranger = {"X-Admin-Token": "adm_x", "X-Team-ID": "stranger", "X-API-Key": ""}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/connect"), ("POST", "/pause"), ("POST", "/snapshots")):
        reply = await door.client.request(method, f"/sandboxes/{id}{path}", headers=stranger)
        assert reply.status_code == 404, (method, path, reply.text)
    assert (await door.client.get("/v2/sandboxes", headers=stranger)).json() == []
    assert len(snapshots(door)) == 1


# ---- what its end means


async def test_auto_pause_pauses_at_the_end_and_says_so(door: Door, node: PausingNode):
    id = await create(door, timeout=1, autoPause=True)
    assert (await get(door, id))["lifecycle"] == {"autoResume": False, "onTimeout": "pause"}
    await until(lambda: node.frozen == 1)
    assert (await get(door, id))["pauseMode"] == "full"
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201
    assert (await get(door, id))["state"] == "running"


async def test_auto_pause_to_disk(door: Door, node: PausingNode):
    id = await create(door, timeout=1, autoPause=True, autoPauseMemory=False)
    await until(lambda: snapshots(door) != [])
    await asyncio.sleep(0.05)
    assert (await get(door, id))["pauseMode"] == "filesystem"
    assert (await post(door, f"/sandboxes/{id}/connect", {"timeout": 60})).status_code == 201


async def test_one_frozen_by_hand_does_not_lose_its_memory_at_its_end(
    door: Door, node: PausingNode, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pausing, "PAUSED_WITHIN_S", 0.5)
    id = await create(door, timeout=1, autoPause=True, autoPauseMemory=False)
    await post(door, f"/sandboxes/{id}/pause", {})
    await asyncio.sleep(1.2)
    assert (await get(door, id))["pauseMode"] == "full"
    assert snapshots(door) == []


@pytest.mark.parametrize(
    "fields",
    [{"autoPauseMemory": False}, {"autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}}],
)
async def test_what_cannot_go_together_is_400(door: Door, node: PausingNode, fields: dict[str, Any]):
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 60, **fields})
    assert reply.status_code == 400


async def test_traffic_resumes_only_what_was_created_so_and_has_its_memory(door: Door, node: PausingNode):
    plain = await create(door)
    awaited = await create(door, timeout=50, autoPause=True, autoResume={"enabled": True})
    for id in (plain, awaited):
        await post(door, f"/sandboxes/{id}/pause", {})
    with pytest.raises(NotFound):
        await pausing.for_traffic(door.front, plain)
    with pytest.raises(NotFound):
        await pausing.for_traffic(door.front, "nobody")
    await asyncio.gather(*(pausing.for_traffic(door.front, awaited) for _ in range(20)))
    assert (await get(door, awaited))["state"] == "running"
    assert node.thawed == 1
    await pausing.for_traffic(door.front, awaited)  # runs: nothing to do, and its end does not move
    assert kinds(door, awaited).count("sandbox.end_moved") == 0
    await post(door, f"/sandboxes/{awaited}/pause", {"memory": False})
    with pytest.raises(NotFound):
        await pausing.for_traffic(door.front, awaited)
    assert (await get(door, awaited))["state"] == "paused"
