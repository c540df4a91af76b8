"""`penstock why`, `penstock events`, `penstock state`: what happened, who did it and why, and what was true when."""

from __future__ import annotations

import json as json_
from collections.abc import Iterator
from threading import Event
from typing import Annotated, Any, Final, Optional

import typer

from penstock.cli.show import as_json, fails_clearly, note, plain_id, table

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder (PENSTOCK_DATA).")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

QUIET_S: Final = 45.0  # the server says that it lives three times as often
RESTART_S: Final = 15.0  # a daemon may be away for this long
AGAIN_S: Final = 0.5
_UNSHOWN: Final = ("from", "to")  # facts that the kind tells already
_IN_VALUE: Final = 160  # characters of a value in a table


def _client(data: str | None) -> Any:
    from penstock.cli.client import Client
    from penstock.cli.profile import load

    return Client(load(data))


@fails_clearly
def why(
    id: Annotated[
        str,
        typer.Argument(
            help="A sandbox, a drain (drain-NODE-EPOCH), a node, a build, a key.", parser=plain_id, metavar="id"
        ),
    ],
    data: Data = None,
    json: Json = False,
) -> None:
    """Tell what happened to it, step by step, who did it and why; also when it is long gone."""
    with _client(data) as client:
        told = client.call("GET", f"/why/{id}", admin=True).json()
    if json:
        as_json(told)
        return
    if told["truncated"]:
        note(f"only the newest {len(told['events'])} lines")
    for event in told["events"]:
        print(line(event))
    for text in _present(told):
        print(text)


@fails_clearly
def events(
    since: Annotated[Optional[str], typer.Option(help="10m, an RFC 3339 time, or a revision.")] = None,  # noqa: UP045
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as things happen.")] = False,
    subject: Annotated[Optional[str], typer.Option(help="Only about this id.")] = None,  # noqa: UP045
    kind: Annotated[Optional[str], typer.Option(help="Only these: sandbox, sandbox.killed.")] = None,  # noqa: UP045
    data: Data = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; with --follow one object per line.")] = False,
) -> None:
    """Print the event log: one line per event, oldest first."""
    params = {name: text for name, text in (("since", since), ("subject", subject), ("kind", kind)) if text}
    with _client(data) as client:
        if follow:
            for event in _follow(client, params):
                print(json_.dumps(event) if json else line(event), flush=True)
            return
        told = client.call("GET", "/events", params=params, admin=True).json()
    if json:
        as_json(told)
        return
    if told["truncated"]:
        note(f"only the newest {len(told['events'])} lines: narrow it with --since, --subject or --kind")
    for event in told["events"]:
        print(line(event))


@fails_clearly
def state(
    at: Annotated[Optional[int], typer.Option(help="Revision; without it, now.")] = None,  # noqa: UP045
    prefix: Annotated[str, typer.Option(help="Only keys that begin so: sandbox/spec/, node/, event/.")] = "",
    data: Data = None,
    json: Json = False,
) -> None:
    """Print what the store held at a revision. Events are left out unless the prefix asks for them."""
    params: dict[str, Any] = {"prefix": prefix} | ({"at": at} if at is not None else {})
    with _client(data) as client:
        told = client.call("GET", "/state", params=params, admin=True).json()
    if json:
        as_json(told)
        return
    rows = [[one["key"], one["revision"], _short(one["value"])] for one in told["records"]]
    table(["KEY", "REVISION", "VALUE"], rows, empty=f"nothing under {prefix!r} at revision {told['revision']}")


def line(event: dict[str, Any]) -> str:
    """Time, subject, what, why, by whom; then what is due and the facts."""
    text = f"{_time(event['at'])}  {event['subject']}  {event['kind']}"
    if event["because"]:
        text += f": {event['because']}"
    text += f" (by {event['actor']})"
    if event["deadline"]:
        text += f" until {_time(event['deadline'])}"
    facts = " ".join(f"{name}={value}" for name, value in event["facts"].items() if value and name not in _UNSHOWN)
    return " ".join(f"{text}  {facts}".splitlines()).rstrip()


def _follow(client: Any, params: dict[str, str]) -> Iterator[dict[str, Any]]:
    """For ever: a stream that ends is taken up where it ended, so nothing is missed while a daemon is restarted.

    Raises CallFailed when nobody has answered for RESTART_S, or our place in the log is no longer kept.
    """
    from penstock.cli.client import CallFailed
    from penstock.core.errors import Kind

    last, away_s = "", 0.0
    while True:
        try:
            for id, event in client.tail("/events/stream", params=params, last_id=last, quiet_s=QUIET_S):
                away_s = 0.0
                last = id or last
                if event is not None:
                    yield event
        except CallFailed as error:
            if not last or error.kind is not Kind.UNAVAILABLE or away_s >= RESTART_S:
                raise
        if not away_s:
            note("penstock: the stream ended; waiting for the daemon to come back")
        away_s += AGAIN_S
        Event().wait(AGAIN_S)


def _present(told: dict[str, Any]) -> Iterator[str]:
    if not told["present"]:
        yield "now: nothing is left of it"
    for key, value in told["present"].items():
        yield f"now: {key}: {_now(value)}"
    for clause in told["control"]:
        yield f"control: {clause}"
    if told["holdings"]:
        yield f"its node holds for it: {_short(told['holdings'])}"


def _now(value: Any) -> str:
    """What a person asks first; --json has all of it."""
    if not isinstance(value, dict):
        return str(value)
    asked = ("phase", "stage", "fate", "because", "kill_reason", "node", "stop", "drain", "build", "revoked_at")
    known = {name: value[name] for name in asked if value.get(name)}
    return (
        " ".join(f"{name}={item if isinstance(item, str) else _short(item)}" for name, item in known.items()) or "here"
    )


def _short(value: Any) -> str:
    text = json_.dumps(value)
    return text if len(text) <= _IN_VALUE else text[: _IN_VALUE - 1] + "…"


def _time(text: str) -> str:
    """To the millisecond, in UTC."""
    return text[:23].rstrip("Z") + "Z"
