"""`penstock node`: what it asks of the API, what a person reads, and with which code it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from penstock.cli import node
from penstock.cli.client import CallFailed
from penstock.core.errors import Kind

PLAN = {
    "node": "local",
    "epoch": 0,
    "digest": "d1",
    "foreseen": [
        {"sandboxID": "ia", "fate": "stop", "by": "2030-01-01T00:00:00Z", "loses": "memory", "because": "SIGTERM"},
        {"sandboxID": "ib", "fate": "finish", "by": None, "loses": "", "because": "its own time is over first"},
    ],
    "blocks": ["ic is in quarantine (disk is busy): the drain ends, but not as a success"],
}
REPORT = {
    "event": "report",
    "node": "local",
    "epoch": 1,
    "stage": "live",
    "succeeded": None,
    "starts": 0,
    "builds": 0,
    "live": 2,
    "quarantined": 0,
    "waiting": [{"sandboxID": "ia", "next": "term", "at": "2030-01-01T00:00:00Z", "because": "ready: well"}],
    "fates": {},
    "forceErrors": [],
}
OUTCOME = {
    "event": "outcome",
    "sandboxID": "ia",
    "fate": "stop",
    "at": "2030-01-01T00:00:00Z",
    "because": "x",
    "error": "",
}
END = REPORT | {
    "event": "end",
    "stage": "ended",
    "succeeded": True,
    "live": 0,
    "fates": {"stop": 1},
    "outcomes": [OUTCOME],
}


class Api:
    """The API as one node's operator meets it. `epoch` grows when a drain is ordered."""

    def __init__(self) -> None:
        self.draining = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.streams: list[list[dict[str, Any] | Exception]] = [[REPORT, OUTCOME, END]]
        self.resumed_from: list[str] = []
        self.force_status = 204

    def __enter__(self) -> Api:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        pass

    def call(self, method: str, path: str, *, admin: bool, json: Any = None) -> httpx.Response:
        assert admin
        what = path.removeprefix("/nodes/local")
        if method == "GET" and what == "":
            drain = {"epoch": 1} if self.draining else None
            return httpx.Response(200, json={"epoch": 1 if self.draining else 0, "drain": drain, "sandboxes": []})
        if method == "GET" and what == "/drain":
            return httpx.Response(200, json=REPORT)
        if path == "/nodes/nosuch":
            raise CallFailed("Not Found", kind=Kind.NOT_FOUND)
        if what == "/drain/plan":
            return httpx.Response(200, json=PLAN)
        self.asked.append((what, json))
        if what == "/drain":
            if json.get("planDigest", "d1") != "d1":
                raise CallFailed("the world has moved", kind=Kind.CONFLICT)
            self.draining = True
        if what == "/undrain":
            done, ending = [OUTCOME | {"fate": "park"}], ["iz"]
            body = {"epoch": 2, "status": "ready", "done": done, "spared": ["ib"], "ending": ending}
            return httpx.Response(200, json=body)
        return httpx.Response(self.force_status if what == "/drain/force" else 200, json={})

    def tail(self, path: str, *, params: Any, last_id: str, quiet_s: float) -> Iterator[tuple[str, Any]]:
        assert path == "/nodes/local/drain/events"
        self.resumed_from.append(last_id)
        for number, event in enumerate(self.streams.pop(0)):
            if isinstance(event, Exception):
                raise event
            yield str(len(self.resumed_from) * 10 + number), event


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(node, "_client", lambda data: made)
    monkeypatch.setattr("penstock.cli.drain.AGAIN_S", 0.01)
    return made


def run(*arguments: str, input: str | None = None) -> Any:
    return CliRunner().invoke(node.app, list(arguments), input=input)


def test_a_plan_is_shown_with_its_digest_and_orders_nothing(api: Api) -> None:
    ran = run("drain", "local", "--hard", "1h", "--plan")
    assert ran.exit_code == 0
    assert "ia\tstop\t2030-01-01 00:00:00\tmemory\tSIGTERM" in ran.output
    assert "ib\tfinish\topen\t-" in ran.output
    assert "note: ic is in quarantine" in ran.output
    assert "plan d1: 1 finish, 1 stop" in ran.output
    assert api.asked == []
    assert json.loads(run("drain", "local", "--plan", "--json").stdout)["digest"] == "d1"


def test_nobody_to_ask_means_that_yes_or_a_digest_is_needed(api: Api) -> None:
    ran = run("drain", "local", "--hard", "1h")
    assert ran.exit_code == 2
    assert "--yes" in ran.output
    assert api.asked == []


def test_a_drain_is_ordered_watched_and_its_receipt_shown(api: Api) -> None:
    ran = run("drain", "local", "--soft", "10m", "--hard", "1h", "--park", "--reason", "kernel", "--yes")
    assert ran.exit_code == 0, ran.output
    order = {"softS": 600, "hardS": 3600, "disposition": "park", "reason": "kernel", "force": False, "yes": True}
    assert api.asked == [("/drain", order)]
    assert "ia\tstop" in ran.stdout
    assert "drain 1 of local succeeded: 1 stop" in ran.output


def test_a_plan_that_was_shown_is_applied_by_its_digest_and_refused_when_it_no_longer_holds(api: Api) -> None:
    assert run("drain", "local", "--digest", "d1").exit_code == 0
    api.draining = False
    ran = run("drain", "local", "--digest", "d0")
    assert ran.exit_code == 5
    assert "moved" in ran.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"succeeded": False, "quarantined": 1}, "not as a success"), ({"stage": "undone"}, "was undone")],
)
def test_it_ends_with_zero_only_when_the_drain_succeeded(api: Api, changes: dict[str, Any], words: str) -> None:
    api.streams = [[REPORT, END | changes]]
    ran = run("drain", "local", "--yes")
    assert ran.exit_code == 1
    assert words in ran.output


def test_a_node_that_drains_already_is_watched_on(api: Api) -> None:
    api.draining = True
    assert run("drain", "local").exit_code == 0
    assert api.asked == []


def test_a_watch_goes_on_where_it_was_when_the_daemon_is_restarted(api: Api) -> None:
    away = CallFailed("nobody answers", kind=Kind.UNAVAILABLE)
    api.streams = [[REPORT, OUTCOME], [away], [away], [END]]
    api.draining = True
    assert run("drain", "local").exit_code == 0
    assert api.resumed_from == ["", "11", "11", "11"]


def test_a_watch_that_is_refused_is_an_error(api: Api) -> None:
    api.draining = True
    api.streams = [[CallFailed("too many", kind=Kind.EXHAUSTED)]]
    assert run("drain", "local").exit_code == 6


def test_ctrl_c_leaves_the_drain_going_and_says_what_one_may_do(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.draining = True

    def interrupted(*_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        yield "1", REPORT
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "tail", interrupted)
    ran = run("drain", "local")
    assert ran.exit_code == 130
    assert "goes on" in ran.output
    assert "penstock node undrain local" in ran.output
    assert api.asked == []


def test_without_watching_it_ends_when_the_order_is_taken(api: Api) -> None:
    ran = run("drain", "local", "--yes", "--no-watch")
    assert ran.exit_code == 0
    assert "local drains, stage live; left: 2 sandboxes" in ran.stdout
    assert api.streams, "nothing was watched"


def test_force_and_extend_speak_of_the_drain_under_way(api: Api) -> None:
    api.draining = True
    api.force_status = 202
    ran = run("drain", "local", "--force")
    assert (ran.exit_code, "still stopping" in ran.output) == (0, True)
    assert run("drain", "local", "--extend", "30m", "--no-watch").exit_code == 0
    assert api.asked == [("/drain/force", None), ("/drain/extend", {"hardS": 1800})]


def test_undrain_says_what_had_been_done(api: Api) -> None:
    ran = run("undrain", "local")
    assert ran.exit_code == 0
    assert "ia\tpark" in ran.stdout
    assert "iz\tending" in ran.stdout
    assert "spared: 1" in ran.output


def test_an_unknown_node_and_contradictions_are_refused(api: Api) -> None:
    assert run("show", "nosuch").exit_code == 4
    assert run("drain", "local", "--park", "--stop", "--yes").exit_code == 2
    assert run("drain", "local", "--hard", "soon", "--yes").exit_code == 2
