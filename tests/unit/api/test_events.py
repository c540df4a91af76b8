"""The event log through the front door: what is written with each change, who may read it, and what never shows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from tests.unit.api.door import Door
from tests.unit.api.test_sandboxes import create

from penstock.api.event_log import Wanted
from penstock.api.front import Caller
from penstock.api.record_shapes import HIDDEN
from penstock.api.tail import Tail
from penstock.core.deadlines import within
from penstock.model import keys
from penstock.model.event import LoggedEvent, decode
from penstock.model.ids import KeyId, TeamId
from penstock.wire import tokens

ADMIN = {"X-Admin-Token": "adm_x"}
OPERATOR = Caller(TeamId("default"), None)


async def get(door: Door, path: str, *, code: int = 200, **params: str) -> Any:
    reply = await door.client.get(path, params=params, headers=ADMIN)
    assert reply.status_code == code, reply.text
    return reply.json()


def logged(door: Door) -> list[LoggedEvent]:
    return [decode(record.value) for record in door.store.list(keys.EVENT).records]


async def tell(door: Door, *events: LoggedEvent) -> int:
    puts = [door.front.chronicle.record(event) for event in events]
    return await door.store.put_all([(put.key, put.value, put.labels) for put in puts], by="node")


def event(kind: str = "sandbox.ready", subject: str = "ia", **changes: Any) -> LoggedEvent:
    return LoggedEvent(
        **{"at": 1.0, "kind": kind, "subject": subject, "actor": "node n1", "team": "default", **changes}
    )


async def other_key(door: Door) -> dict[str, str]:
    """Headers of a key of another team."""
    body = {"name": "other", "team": "other"}
    made = (await door.client.post("/api-keys", json=body, headers=ADMIN)).json()
    return {"X-API-Key": made["key"]}


async def test_each_change_is_in_the_log_at_the_revision_that_made_it(door: Door) -> None:
    id_ = (await create(door))["sandboxID"]
    await door.client.post(f"/sandboxes/{id_}/timeout", json={"timeout": 90})
    await door.client.put(f"/sandboxes/{id_}/network", json={"denyOut": ["8.8.8.0/24"]})
    key = (await door.client.get("/api-keys")).json()[0]["id"]
    spec = door.store.get(keys.SANDBOX_SPEC + id_)
    assert spec is not None
    await door.client.delete(f"/sandboxes/{id_}")
    told = [one for one in logged(door) if one.subject == id_]
    assert [one.kind for one in told] == [
        "sandbox.created",
        "sandbox.end_moved",
        "sandbox.network_changed",
        "sandbox.stop_ordered",
    ]
    assert {one.actor for one in told} == {f"key {key}"}
    assert {one.team for one in told} == {"default"}
    assert told[1].deadline is not None
    assert told[2].facts["deny"] == "8.8.8.0/24"
    records = door.store.list(keys.EVENT, labels={"subject": id_}).records
    made = await door.store.history(keys.SANDBOX_SPEC, 0)
    assert [record.create_revision for record in records] == [
        batch.revision for batch in made if batch.changes[0].record.key.endswith(id_)
    ]


async def test_a_change_that_changes_nothing_and_a_create_that_is_refused_leave_no_line(door: Door) -> None:
    id_ = (await create(door))["sandboxID"]
    before = len(logged(door))
    assert (await door.client.post(f"/v2/sandboxes/{id_}/connect", json={"timeout": 1})).status_code == 200
    assert (await door.client.post("/v2/sandboxes", json={"templateID": "nosuch"})).status_code == 404
    assert len(logged(door)) == before


async def test_keys_are_made_and_revoked_in_the_log(door: Door) -> None:
    made = (await door.client.post("/api-keys", json={"name": "ci"})).json()
    await door.client.delete(f"/api-keys/{made['id']}")
    found = await get(door, "/events", subject=made["id"])
    assert [one["kind"] for one in found["events"]] == ["key.made", "key.revoked"]
    assert found["events"][0]["facts"] == {"name": "ci", "team": "default"}


async def test_no_secret_is_ever_in_the_log_or_shown(door: Door) -> None:
    made = await create(door, envVars={"PASSWORD": "hunter2-value"}, metadata={"a": "b"})
    fresh = (await door.client.post("/api-keys", json={"name": "ci"})).json()["key"]
    id_ = made["sandboxID"]
    revision = door.store.revision
    await door.client.post("/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": "once"})
    await door.client.delete(f"/sandboxes/{id_}")
    secrets = [
        "hunter2-value",
        door.key,
        fresh,
        door.front.admin_token,
        tokens.access_token(door.front.seed, id_),
        tokens.traffic_token(door.front.seed, id_),
        *(hash_ for key in (door.key, fresh) if (hash_ := tokens.hash_key(key))),
        door.front.seed.decode(),
    ]
    answers = [record.value.decode() for record in door.store.list(keys.EVENT).records]
    paths = ["/events", "/state", f"/state?at={revision}", f"/why/{id_}", "/state?prefix=event/"]
    answers += [json.dumps(await get(door, path)) for path in paths]
    assert any("PASSWORD" in text for text in answers), "names of variables are no secret"
    for secret in secrets:
        assert not [text for text in answers if secret in text], secret


async def test_events_are_found_by_time_revision_subject_and_kind(door: Door) -> None:
    first = await tell(door, event(at=1_700_000_000.0), event("sandbox.killed", at=1_700_000_001.0))
    await tell(door, event("node.opened", "n1", at=1_700_000_002.0, related=("drain-n1-1",), team=""))

    async def kinds(**params: str) -> list[str]:
        return [one["kind"] for one in (await get(door, "/events", **params))["events"]]

    assert await kinds() == ["sandbox.ready", "sandbox.killed", "node.opened"]
    assert await kinds(since=str(first)) == ["node.opened"]
    assert await kinds(since="2023-11-14T22:13:21Z") == ["sandbox.killed", "node.opened"]
    assert await kinds(since="2023-11-14T23:13:21+01:00") == ["sandbox.killed", "node.opened"]
    assert await kinds(since="10m") == []
    assert await kinds(subject="ia") == ["sandbox.ready", "sandbox.killed"]
    assert await kinds(subject="drain-n1-1") == ["node.opened"]
    assert await kinds(kind="sandbox") == ["sandbox.ready", "sandbox.killed"]
    assert await kinds(kind="sandbox.killed") == ["sandbox.killed"]
    newest = await get(door, "/events", limit="2")
    assert [one["kind"] for one in newest["events"]] == ["sandbox.killed", "node.opened"]
    assert newest["truncated"] is True
    for bad in ({"since": "noon"}, {"since": "2023-11-14T22:13:21"}, {"limit": "0"}, {"limit": "1001"}):
        await get(door, "/events", code=400, **bad)


async def test_a_team_reads_of_its_own_sandboxes_only(door: Door) -> None:
    id_ = (await create(door))["sandboxID"]
    await tell(door, event("node.opened", "n1", team=""), event(subject="ib", team="other"))
    own = (await door.client.get("/events")).json()["events"]
    assert {one["subject"] for one in own} == {id_}
    other = await other_key(door)
    assert {one["subject"] for one in (await door.client.get("/events", headers=other)).json()["events"]} == {"ib"}
    assert (await door.client.get(f"/why/{id_}", headers=other)).status_code == 404
    assert (await door.client.get("/why/n1")).status_code == 404
    assert (await door.client.get(f"/why/{id_}")).status_code == 200
    assert (await door.client.get("/state")).status_code == 403
    assert (await door.client.get("/events", headers={"X-API-Key": "e2b_" + "0" * 40})).status_code == 401


async def test_why_tells_the_chain_and_what_is_true_now_and_after_the_end_the_chain(door: Door) -> None:
    id_ = (await create(door, envVars={"A": "secret-a"}))["sandboxID"]
    told = await get(door, f"/why/{id_}")
    assert [one["kind"] for one in told["events"]] == ["sandbox.created"]
    assert told["present"][keys.SANDBOX_STATUS + id_]["phase"] == "ready"
    assert told["present"][keys.SANDBOX_SPEC + id_]["env"] == {"A": HIDDEN}
    await door.client.delete(f"/sandboxes/{id_}")
    for key, room in ((keys.SANDBOX_SPEC, "control"), (keys.SANDBOX_STATUS, "control")):
        await door.store.delete(key + id_, by=room)
    told = await get(door, f"/why/{id_}")
    assert [one["kind"] for one in told["events"]] == ["sandbox.created", "sandbox.stop_ordered"]
    assert told["present"] == {}
    await get(door, "/why/inosuch", code=404)


async def test_why_of_a_drain_has_its_receipt_and_the_lines_of_its_sandboxes(door: Door) -> None:
    await door.store.put(keys.drain("n1", 2), b'{"node":"n1","epoch":2,"stage":"live"}', by="node")
    await door.store.put(keys.drain("n1", 2) + "/ia", b'{"sandbox":"ia","fate":"stop"}', by="node")
    await tell(door, event("sandbox.term", related=("drain-n1-2",)), event("drain.began", "drain-n1-2", team=""))
    told = await get(door, "/why/drain-n1-2")
    assert [one["kind"] for one in told["events"]] == ["sandbox.term", "drain.began"]
    assert [one.get("stage") or one.get("fate") for one in told["present"].values()] == ["live", "stop"]


async def test_the_state_at_a_revision_is_what_was_true_then(door: Door) -> None:
    id_ = (await create(door))["sandboxID"]
    before = door.store.revision
    await door.client.delete(f"/sandboxes/{id_}")
    then = await get(door, "/state", at=str(before), prefix=keys.SANDBOX_SPEC)
    assert [record["key"] for record in then["records"]] == [keys.SANDBOX_SPEC + id_]
    assert then["records"][0]["value"]["id"] == id_
    assert "stop" not in then["records"][0]["value"] or then["records"][0]["value"]["stop"] is None
    now = await get(door, "/state", prefix=keys.SANDBOX_SPEC)
    assert now["records"][0]["value"]["stop"]["reason"] == "request"
    assert not [one for one in (await get(door, "/state"))["records"] if one["key"].startswith(keys.EVENT)]


async def test_a_revision_that_is_not_kept_is_410_and_one_to_come_400(door: Door) -> None:
    await create(door)
    await create(door)
    await door.store.compact(door.store.revision - 1)
    gone = await get(door, "/state", at="1", code=410)
    assert gone["error_code"] == "compacted"
    assert "no longer kept" in gone["message"]
    await get(door, "/state", at=str(door.store.revision + 1), code=400)
    headers = ADMIN | {"Last-Event-ID": "1"}
    assert (await door.client.get("/events/stream", headers=headers)).status_code == 410
    for bad in ("x", "\u00b2", str(10**9)):
        reply = await door.client.get("/events/stream", headers=ADMIN | {"Last-Event-ID": bad.encode()})
        assert reply.status_code == 400, bad


class Reader:
    """Reads a tail as a client does: lines with the id they came under."""

    def __init__(self, door: Door, caller: Caller = OPERATOR, wanted: Wanted | None = None, **more: Any) -> None:
        self.going_on = True
        given = {"after": door.store.revision, "first": [], "going_on": lambda: self.going_on} | more
        self.tail = Tail(door.front, caller, wanted or Wanted(), **given)
        self.text = self.tail.text()

    async def next(self) -> tuple[str | None, list[str]]:
        """(id, kinds) of the next piece that is not just a sign of life."""
        while True:
            async with within(3, "the next piece"):
                piece = await anext(self.text)
            kinds = [line.removeprefix("event: ") for line in piece.splitlines() if line.startswith("event: ")]
            ids = [line.removeprefix("id: ") for line in piece.splitlines() if line.startswith("id: ")]
            if kinds:
                return (ids[-1] if ids else None), kinds


async def test_a_stream_shows_lines_as_they_are_written_one_id_per_revision(door: Door) -> None:
    reader = Reader(door, wanted=Wanted(kind="sandbox"))
    assert await anext(reader.text) == f"id: {door.store.revision}\n: alive\n\n"
    first = await tell(door, event(), event("sandbox.killed"), event("node.opened", "n1"))
    assert await reader.next() == (str(first), ["sandbox.ready", "sandbox.killed"])
    second = await tell(door, event("sandbox.ended"))
    assert await reader.next() == (str(second), ["sandbox.ended"])
    again = Reader(door, wanted=Wanted(kind="sandbox"), after=first)
    assert await again.next() == (str(second), ["sandbox.ended"])
    await reader.tail.aclose()
    await again.tail.aclose()


async def test_a_stream_keeps_to_what_its_caller_may_see(door: Door) -> None:
    reader = Reader(door, Caller(TeamId("other"), KeyId("k")))
    await tell(door, event())
    mine = await tell(door, event("sandbox.killed", team="other"))
    assert await reader.next() == (str(mine), ["sandbox.killed"])
    await reader.tail.aclose()


async def test_a_quiet_stream_says_that_it_lives_and_ends_when_the_daemon_stops(door: Door) -> None:
    reader = Reader(door)
    await anext(reader.text)
    assert await anext(reader.text) == ": alive\n\n"
    reader.going_on = False
    async with within(3, "the end of the stream"):
        assert [piece async for piece in reader.text] == []
    await reader.tail.aclose()


async def test_a_reader_that_does_not_keep_up_is_ended_and_comes_back_with_its_id(door: Door) -> None:
    reader = Reader(door)
    await anext(reader.text)
    for number in range(1_100):
        await tell(door, event(subject=f"i{number}"))
    seen, last = 0, None
    async with within(10, "the end of the stream"):
        async for piece in reader.text:
            seen += piece.count("event: ")
            last = piece.split("\n")[0].removeprefix("id: ")
    assert 0 < seen < 1_100
    again = Reader(door, after=int(last or 0))
    while seen < 1_100:
        _, kinds = await again.next()
        seen += len(kinds)
    assert seen == 1_100
    await again.tail.aclose()


async def test_only_so_many_follow_at_once_and_each_gives_its_place_back(door: Door, monkeypatch: Any) -> None:
    monkeypatch.setattr(door.front.tails, "_running_max", 1)
    transport: Any = door.client._transport
    app = transport.app
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/events/stream",
        "raw_path": b"/events/stream",
        "query_string": b"",
        "headers": [(b"x-admin-token", b"adm_x")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("door", 80),
        "client": ("c", 1),
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    gone, began = asyncio.Event(), asyncio.Event()
    sent: list[Any] = []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        began.set()

    watches = door.store.statistics().watches
    following = asyncio.create_task(app(scope, receive, send))
    await began.wait()
    assert sent[0]["status"] == 200
    assert door.store.statistics().watches == watches + 1
    assert (await door.client.get("/events/stream", headers=ADMIN)).status_code == 429
    gone.set()
    async with within(3, "the end of the request"):
        await following
    assert door.front.tails.statistics().running == 0
    assert door.store.statistics().watches == watches


@pytest.mark.parametrize("reasons", [("no node can take it", "n1 is full"), ()])
async def test_why_has_the_last_reasons_of_control_while_there_is_something_to_decide(
    door: Door, reasons: tuple[str, ...]
) -> None:
    class Knows:
        def why(self, sandbox: str) -> tuple[str, ...]:
            return reasons

        def explain(self, sandbox: str) -> msgspec.Struct | None:
            return event() if reasons else None

    object.__setattr__(door.front, "reasons", Knows())
    object.__setattr__(door.front, "holdings", Knows())
    id_ = (await create(door))["sandboxID"]
    told = await get(door, f"/why/{id_}")
    assert told["control"] == list(reasons)
    assert (told["holdings"] is not None) is bool(reasons)
