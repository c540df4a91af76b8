"""What the front door answers: codes, bodies, limits, and that nothing is half-made."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.unit.api.door import Door

from penstock.api import problems
from penstock.model import keys
from penstock.model.sandbox import KillReason, Phase
from penstock.run.floor import DiskFloor


async def create(door: Door, **fields: object) -> dict[str, str]:
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 60, **fields})
    assert reply.status_code == 201, reply.text
    made: dict[str, str] = reply.json()
    return made


def specs(door: Door) -> int:
    return len(door.store.list(keys.SANDBOX_SPEC).records)


@pytest.mark.parametrize("path", ["/sandboxes", "/v2/sandboxes"])
async def test_create_answers_201_and_what_the_sdks_need(door: Door, path: str):
    reply = await door.client.post(path, json={"templateID": "base", "timeout": 60})
    assert reply.status_code == 201
    body = reply.json()
    assert body["sandboxID"].startswith("i")
    assert body["envdAccessToken"]
    assert body["domain"] == "sbx.localhost:1"


async def test_no_key_and_a_wrong_key_are_401(door: Door):
    for headers in ({"X-API-Key": ""}, {"X-API-Key": "e2b_" + "0" * 40}, {"X-API-Key": "\x7f"}):
        reply = await door.client.get("/v2/sandboxes", headers=headers)
        assert reply.status_code == 401, headers
        assert reply.json()["code"] == 401


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"timeout": -5}, "timeout"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 10**9}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": 1.5}, "timeout"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"envVars": {"A=B": "1"}}, "envVars"),
        ({"envVars": {"A": "x\0y"}}, "envVars"),
        ({"network": {"denyOut": ["example.com"]}}, "denyOut"),
        ({"network": {"allowOut": ["example.com"]}}, "allowOut"),
        ({"network": {"allowOut": ["999.1.1.1"]}}, "allowOut"),
        ({"network": {"allowOut": ["1.1.1.1/99"]}}, "allowOut"),
        ({"network": {"allowOut": ["::1"]}}, "allowOut"),
        ({"network": {"maskRequestHost": "http://x/"}}, "maskRequestHost"),
        ({"network": {"allowPublicTraffic": False}, "secure": False}, "allowPublicTraffic"),
        ({"autoPauseMemory": False}, "autoPauseMemory"),
        ({"templateID": ""}, "templateID"),
    ],
)
async def test_bad_input_is_a_400_that_names_the_field_and_makes_nothing(door: Door, fields: dict, named: str):
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 60, **fields})
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["message"]
    assert specs(door) == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b'{"templateID":"base","x":"' + b"y" * 17_000_000 + b'"}', 413),
    ],
)
async def test_a_body_that_is_no_request(door: Door, body: bytes, status: int):
    reply = await door.client.post("/v2/sandboxes", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["code"] == status


async def test_an_unknown_template_is_404(door: Door):
    for name in ("nope", "base:nope", "../base"):
        reply = await door.client.post("/v2/sandboxes", json={"templateID": name})
        assert reply.status_code == 404, name
        assert name.partition(":")[0] in reply.json()["message"]


async def test_what_is_not_built_says_so(door: Door):
    for fields in ({"iam": {"tokens": {}}}, {"mcp": {"a": 1}}, {"volumeMounts": [{"name": "v", "path": "/v"}]}):
        reply = await door.client.post("/v2/sandboxes", json={"templateID": "base", **fields})
        assert reply.status_code == 501, fields
        assert reply.headers["Should-Retry"] == "false"
    reply = await door.client.post("/v3/templates", json={"name": "x"})
    assert reply.status_code == 501


async def test_a_repeated_create_returns_the_same_sandbox(door: Door):
    headers = {"Idempotency-Key": "once-1"}
    body = {"templateID": "base", "timeout": 60}
    replies = await asyncio.gather(*(door.client.post("/v2/sandboxes", json=body, headers=headers) for _ in range(8)))
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.json()["sandboxID"] for reply in replies}) == 1
    assert specs(door) == 1
    other = await door.client.post("/v2/sandboxes", json={**body, "timeout": 61}, headers=headers)
    assert other.status_code == 409
    bad = await door.client.post("/v2/sandboxes", json=body, headers={"Idempotency-Key": "no spaces"})
    assert bad.status_code == 400


async def test_the_teams_limit_is_429_with_its_headers_and_frees_itself(door: Door):
    made = [await create(door) for _ in range(3)]
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert reply.status_code == 429
    assert int(reply.headers["Retry-After"]) > 0
    assert reply.headers["Should-Retry"] == "false"
    assert (await door.client.delete(f"/sandboxes/{made[0]['sandboxID']}")).status_code == 204
    await create(door)


async def test_a_failed_start_is_a_500_with_a_reference_and_frees_its_place(door: Door):
    door.answer = Phase.FAILED
    for _ in range(5):
        reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
        assert reply.status_code == 500
        assert "reference" in reply.json()["message"]


async def test_a_start_that_takes_too_long_is_503_and_is_stopped(door: Door):
    door.answer = None
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert reply.status_code == 503
    assert "Retry-After" in reply.headers
    for _ in range(100):
        status = door.store.get(keys.SANDBOX_STATUS + door.started[0])
        if status is not None:
            break
        await asyncio.sleep(0.01)
    assert status is not None
    assert b"stopped" in status.value


async def test_another_teams_sandbox_does_not_exist(door: Door):
    made = await create(door)
    reply = await door.client.post("/api-keys", json={"name": "o", "team": "other"}, headers={"X-Admin-Token": "adm_x"})
    assert reply.status_code == 201
    headers = {"X-API-Key": reply.json()["key"]}
    id_ = made["sandboxID"]
    for method, path, body in (
        ("GET", f"/sandboxes/{id_}", None),
        ("DELETE", f"/sandboxes/{id_}", None),
        ("POST", f"/sandboxes/{id_}/timeout", {"timeout": 5}),
        ("POST", f"/sandboxes/{id_}/connect", {"timeout": 5}),
        ("PUT", f"/sandboxes/{id_}/network", {}),
        ("GET", f"/sandboxes/{id_}/logs", None),
        ("GET", f"/sandboxes/{id_}/metrics", None),
    ):
        other = await door.client.request(method, path, json=body, headers=headers)
        assert other.status_code == 404, path
    assert (await door.client.get("/v2/sandboxes", headers=headers)).json() == []
    assert (await door.client.get(f"/sandboxes/{id_}")).status_code == 200


async def test_a_revoked_key_is_refused_at_once(door: Door):
    made = (await door.client.post("/api-keys", json={"name": "second"})).json()
    headers = {"X-API-Key": made["key"]}
    assert (await door.client.get("/v2/sandboxes", headers=headers)).status_code == 200
    assert (await door.client.delete(f"/api-keys/{made['id']}")).status_code == 204
    assert (await door.client.get("/v2/sandboxes", headers=headers)).status_code == 401
    assert made["key"].encode() not in b"".join(r.value for r in door.store.list(keys.API_KEY).records)


async def test_timeouts_move_the_end_and_connect_never_shortens(door: Door):
    id_ = (await create(door))["sandboxID"]
    before = (await door.client.get(f"/sandboxes/{id_}")).json()["endAt"]
    assert (await door.client.post(f"/v2/sandboxes/{id_}/connect", json={"timeout": 1})).status_code == 200
    assert (await door.client.get(f"/sandboxes/{id_}")).json()["endAt"] == before
    assert (await door.client.post(f"/sandboxes/{id_}/timeout", json={"timeout": 5})).status_code == 204
    assert (await door.client.get(f"/sandboxes/{id_}")).json()["endAt"] < before
    assert (await door.client.post(f"/sandboxes/{id_}/timeout", json={"timeout": 10**7})).status_code == 400
    assert (await door.client.post(f"/sandboxes/{id_}/refreshes", json={"duration": 500})).status_code == 204
    assert (await door.client.get(f"/sandboxes/{id_}")).json()["endAt"] > before


async def test_bad_ids_are_400_and_unknown_ones_404(door: Door):
    assert (await door.client.get("/sandboxes/UPPER")).status_code == 400
    assert (await door.client.get("/sandboxes/a%2Fb")).status_code in (400, 404)
    assert (await door.client.get("/sandboxes/unknown1")).status_code == 404
    assert (await door.client.delete("/sandboxes/unknown1")).status_code == 404


async def test_lists_page_newest_first_and_filter(door: Door):
    made = [(await create(door, metadata={"n": str(n), "odd": "a b&c"}))["sandboxID"] for n in range(3)]
    seen: list[str] = []
    token = ""
    while True:
        params = {"limit": "1"} | ({"nextToken": token} if token else {})
        reply = await door.client.get("/v2/sandboxes", params=params)
        assert reply.headers["X-Total-Running"] == "3"
        seen += [row["sandboxID"] for row in reply.json()]
        token = reply.headers.get("X-Next-Token", "")
        if not token:
            break
    assert seen == made[::-1]
    # As the SDK sends it: every value encoded once more than the query itself.
    reply = await door.client.get("/v2/sandboxes?metadata=odd%3Da%252520b%252526c")
    assert len(reply.json()) == 3
    reply = await door.client.get("/v2/sandboxes", params={"metadata": "n=1"})
    assert [row["sandboxID"] for row in reply.json()] == [made[1]]
    first = (await door.client.get(f"/sandboxes/{made[1]}")).json()["startedAt"]
    reply = await door.client.get("/v2/sandboxes", params={"startedAfter": first, "order": "asc"})
    assert [row["sandboxID"] for row in reply.json()] == made[1:]
    for bad in ({"limit": "0"}, {"limit": "101"}, {"nextToken": "!"}, {"state": "asleep"}, {"startedAfter": "noon"}):
        assert (await door.client.get("/v2/sandboxes", params=bad)).status_code == 400, bad


async def test_network_rules_are_replaced_whole(door: Door):
    id_ = (await create(door, network={"allowOut": ["1.1.1.1"], "denyOut": ["0.0.0.0/0"]}))["sandboxID"]
    assert (await door.client.put(f"/sandboxes/{id_}/network", json={"denyOut": ["8.8.8.0/24"]})).status_code == 204
    shown = (await door.client.get(f"/sandboxes/{id_}")).json()["network"]
    assert (shown["allowOut"], shown["denyOut"]) == ([], ["8.8.8.0/24"])
    assert (await door.client.put(f"/sandboxes/{id_}/network", json={"denyOut": ["x"]})).status_code == 400


async def test_the_openapi_document_is_served(door: Door):
    paths = (await door.client.get("/openapi.json")).json()["paths"]
    assert "/v2/sandboxes" in paths
    assert "/v3/templates" not in paths


async def test_many_callers_changing_one_sandbox_all_succeed(door: Door):
    made = await create(door)
    path = f"/sandboxes/{made['sandboxID']}/timeout"
    replies = await asyncio.gather(*(door.client.post(path, json={"timeout": 60 + i}) for i in range(40)))
    assert {reply.status_code for reply in replies} == {204}
    assert not door.front.turns._locks


@pytest.mark.parametrize(
    ("reason", "status", "message"),
    [
        (KillReason.START_REFUSED, 503, "Failed to place sandbox: {id} (the zygote does not answer: … (No such file))"),
        (KillReason.START_FAILED, 500, "Failed to place sandbox: {id} (internal error,"),
    ],
)
async def test_a_start_that_fails_says_whether_to_come_back_and_nothing_of_this_host(
    door: Door, reason: KillReason, status: int, message: str
):
    door.answer, door.reason = Phase.FAILED, reason
    door.because = "the zygote does not answer: /var/lib/penstock/run/zygote.sock (No such file)"
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert (reply.status_code, "Retry-After" in reply.headers) == (status, status == 503)
    assert reply.json()["message"].startswith(message.format(id=door.started[-1]))
    assert "reference" in reply.json()["message"]


async def test_what_a_reference_names_is_whole_in_the_log(door: Door, monkeypatch: pytest.MonkeyPatch):
    said: list[dict[str, str]] = []
    monkeypatch.setattr(problems.log, "error", lambda _, **facts: said.append(facts))
    door.answer, door.reason, door.because = Phase.FAILED, KillReason.START_FAILED, "EIO: /secret/place/x.img"
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert said[0]["reference"] in reply.json()["message"]
    assert "/secret/place/x.img" in said[0]["error"]


async def test_a_running_sandbox_shows_nothing_of_this_host(door: Door):
    door.because = "cannot tell: /sys/fs/cgroup/pids/penstock-x/sb-y: I/O error"
    made = await create(door)
    shown = await door.client.get(f"/sandboxes/{made['sandboxID']}")
    assert shown.json()["because"] == "cannot tell: …: I/O error"


@pytest.mark.parametrize("text", ["a/b or /s", "it ended with exit 1", "https://example.com/a/b", "1/2"])
def test_what_is_no_path_is_left_alone(text: str):
    assert problems.without_paths(text) == text


async def test_no_sandbox_is_made_on_a_host_without_room(door: Door, tmp_path: Path):
    object.__setattr__(door.front, "check_room", DiskFloor(tmp_path, 1 << 50).check)
    reply = await door.client.post("/v2/sandboxes", json={"templateID": "base"})
    assert (reply.status_code, reply.json()["error_code"], reply.headers["Retry-After"]) == (
        503,
        "host_disk_full",
        "10",
    )
    assert specs(door) == 0
    object.__setattr__(door.front, "check_room", DiskFloor(tmp_path, 0).check)
    await create(door)
