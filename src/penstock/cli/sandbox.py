"""`penstock sandbox …`: create, list, show, exec, shell, cp, logs, pause, resume, snapshot, kill."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Optional

import typer

from penstock.cli.show import as_json, delete_each, fails_clearly, fields, note, plain_id, table

CHUNK_BYTES: Final = 256 * 1024
CANNOT_BE_RUN: Final = 126  # as a shell ends (POSIX, 2.8.2)
NOT_THERE: Final = 127

app = typer.Typer(help="Work with sandboxes.", no_args_is_help=True)

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder of the installation.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="Sandbox id.", parser=plain_id, metavar="id")]
Ids = Annotated[list[str], typer.Argument(help="Sandbox ids.", parser=plain_id, metavar="ids")]
User = Annotated[Optional[str], typer.Option("--user", help="User inside the sandbox.")]  # noqa: UP045


def _client(data: str | None) -> Any:
    from penstock.cli.client import Client
    from penstock.cli.profile import load

    return Client(load(data))


@app.command()
@fails_clearly
def create(
    template: Annotated[str, typer.Argument(help="Template.")] = "base",
    timeout: Annotated[str, typer.Option(help="How long it lives: 90, 10m, 2h.")] = "5m",
    env: Annotated[list[str], typer.Option("--env", help="NAME=VALUE, repeatable.")] = [],  # noqa: B006
    metadata: Annotated[list[str], typer.Option("--metadata", help="KEY=VALUE, repeatable.")] = [],  # noqa: B006
    no_internet: Annotated[bool, typer.Option("--no-internet", help="Deny all egress.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="At its end it is paused, not killed.")] = False,
    to_disk: Annotated[bool, typer.Option("--to-disk", help="With --pause: its files only.")] = False,
    auto_resume: Annotated[bool, typer.Option("--auto-resume", help="With --pause: requests resume it.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Create a sandbox from a template or a snapshot, and print its id."""
    from penstock.model.units import parse_seconds

    if (to_disk or auto_resume) and not pause:
        raise typer.BadParameter("--to-disk and --auto-resume need --pause")

    body: dict[str, Any] = {
        "templateID": template,
        "timeout": int(parse_seconds(timeout, field="--timeout")),
        "envVars": _pairs(env, "--env"),
        "metadata": _pairs(metadata, "--metadata"),
    }
    if no_internet:
        body["allow_internet_access"] = False
    if pause:
        body |= {"autoPause": True, "autoPauseMemory": not to_disk, "autoResume": {"enabled": auto_resume}}
    with _client(data) as client:
        made = client.call("POST", "/v2/sandboxes", json=body).json()
    as_json(made) if json else print(made["sandboxID"])


@app.command("list")
@fails_clearly
def list_(data: Data = None, json: Json = False) -> None:
    """List sandboxes, running and paused, newest first."""
    rows: list[dict[str, Any]] = []
    with _client(data) as client:
        token = None
        while True:
            page = client.call("GET", "/v2/sandboxes", params={"nextToken": token} if token else {})
            rows += page.json()
            token = page.headers.get("X-Next-Token")
            if not token:
                break
    if json:
        as_json(rows)
        return
    table(
        ["ID", "TEMPLATE", "STATE", "STARTED", "ENDS", "METADATA"],
        [
            [
                row["sandboxID"],
                row["templateID"],
                row["state"],
                row["startedAt"][:19],
                row["endAt"][:19],
                " ".join(f"{key}={value}" for key, value in row["metadata"].items()),
            ]
            for row in rows
        ],
        empty="no sandboxes",
    )


@app.command()
@fails_clearly
def show(id: Id, data: Data = None, json: Json = False) -> None:
    """Show one sandbox."""
    with _client(data) as client:
        body = client.sandbox(id)
    body.pop("envdAccessToken", None)
    if json:
        as_json(body)
        return
    table(["FIELD", "VALUE"], list(fields(body)), empty="")


@app.command("exec", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@fails_clearly
def exec_(
    context: typer.Context,
    id: Id,
    cwd: Annotated[Optional[str], typer.Option(help="Working folder.")] = None,  # noqa: UP045
    env: Annotated[list[str], typer.Option("--env", help="NAME=VALUE, repeatable.")] = [],  # noqa: B006
    user: User = None,
    data: Data = None,
) -> None:
    """Run a command: penstock sandbox exec ID -- ls -la. Its exit code is ours (128 and the number of a signal that
    ended it, 127 when there is no such command); Ctrl-C kills it, and so does a reader of our output that goes away.
    """
    argv = context.args
    if not argv:
        raise typer.BadParameter("name a command after --")
    message: dict[str, Any] = {"process": {"cmd": argv[0], "args": argv[1:], "envs": _pairs(env, "--env")}}
    if cwd:
        message["process"]["cwd"] = cwd
    piped = not sys.stdin.isatty()
    message["stdin"] = piped
    with _client(data) as client:
        raise SystemExit(_run(client, client.sandbox(id), message, user, piped=piped))


@app.command()
@fails_clearly
def shell(id: Id, user: User = None, data: Data = None) -> None:
    """Open an interactive shell."""
    from penstock.cli.terminal import interactive

    with _client(data) as client:
        raise SystemExit(interactive(client, client.sandbox(id), user))


@app.command()
@fails_clearly
def cp(
    source: Annotated[str, typer.Argument(help="FILE or ID:PATH.")],
    target: Annotated[str, typer.Argument(help="FILE or ID:PATH.")],
    user: User = None,
    data: Data = None,
) -> None:
    """Copy a file into or out of a sandbox; `-` is standard input or output."""
    inward, outward = _place(target), _place(source)
    if (inward is None) == (outward is None):
        raise typer.BadParameter("exactly one side must be ID:PATH")
    with _client(data) as client:
        if inward is not None:
            name = Path(source).name
            path = inward[1] + name if inward[1].endswith("/") else inward[1]
            with sys.stdin.buffer if source == "-" else Path(source).open("rb") as file:
                client.upload(client.sandbox(inward[0]), path, _chunks(file), user)
        else:
            assert outward is not None
            box = client.sandbox(outward[0])
            place = Path(target) / Path(outward[1]).name if Path(target).is_dir() else Path(target)
            chunks = client.download(box, outward[1], user)
            first = next(chunks, b"")  # a refusal comes here, before an existing file is emptied
            with sys.stdout.buffer if target == "-" else place.open("wb") as file:
                file.write(first)
                for chunk in chunks:
                    file.write(chunk)


@app.command()
@fails_clearly
def logs(
    id: Id,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 200,
    data: Data = None,
    json: Json = False,
) -> None:
    """Print the newest log lines of a sandbox."""
    params = {"limit": limit, "direction": "backward"}
    with _client(data) as client:
        entries = client.call("GET", f"/v2/sandboxes/{id}/logs", params=params).json()["logs"]
    entries.reverse()
    if json:
        as_json(entries)
        return
    for entry in entries:
        facts = " ".join(f"{key}={value}" for key, value in entry["fields"].items())
        print(f"{entry['timestamp'][:23]} {entry['level']:5} {entry['message']} {facts}".rstrip())


@app.command()
@fails_clearly
def pause(
    ids: Ids,
    to_disk: Annotated[bool, typer.Option("--to-disk", help="Keep its files only: memory is freed.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Pause sandboxes: memory and all on their node, or their files on its disk."""
    with _client(data) as client:
        for id in ids:
            client.call("POST", f"/sandboxes/{id}/pause", json={"memory": not to_disk})
            if not json:
                print(id)
    if json:
        as_json({"paused": ids, "memory": not to_disk})


@app.command()
@fails_clearly
def resume(
    id: Id,
    timeout: Annotated[str, typer.Option(help="How long it lives from now: 90, 10m, 2h.")] = "5m",
    reboot: Annotated[bool, typer.Option("--reboot", help="Leave its memory: start anew from its disk.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Resume a paused sandbox; one that runs only lives longer."""
    from penstock.model.units import parse_seconds

    body: dict[str, Any] = {"timeout": int(parse_seconds(timeout, field="--timeout"))}
    if reboot:
        body["memory"] = False
    with _client(data) as client:
        answer = client.call("POST", f"/v2/sandboxes/{id}/connect", json=body)
    if json:
        as_json({"sandboxID": answer.json()["sandboxID"], "resumed": answer.status_code == 201})
        return
    print(answer.json()["sandboxID"])
    if answer.status_code != 201:
        note("it was running")


@app.command()
@fails_clearly
def snapshot(
    id: Id,
    name: Annotated[Optional[str], typer.Option(help="A name to create sandboxes by; may have a :tag.")] = None,  # noqa: UP045
    data: Data = None,
    json: Json = False,
) -> None:
    """Copy a sandbox's files while it runs, and print what to create others from."""
    with _client(data) as client:
        made = client.call("POST", f"/sandboxes/{id}/snapshots", json={"name": name} if name else {}).json()
    as_json(made) if json else print(made["snapshotID"])


@app.command()
@fails_clearly
def kill(ids: Ids, data: Data = None, json: Json = False) -> None:
    """Kill sandboxes; returns when they are verified gone."""
    with _client(data) as client:
        delete_each(client, ids, lambda id: f"/sandboxes/{id}", what="sandbox", done="killed", json=json)


def _run(client: Any, box: dict[str, Any], message: dict[str, Any], user: str | None, *, piped: bool) -> int:
    from penstock.cli.client import CommandRefused
    from penstock.cli.terminal import exit_code
    from penstock.core.errors import Kind

    pid = 0
    try:
        for event in client.start(box, message, user):
            if "start" in event:
                pid = event["start"]["pid"]
                if piped:
                    _feed(client, box, pid, user)
            elif "data" in event:
                _print(event["data"])
            elif "end" in event:
                return exit_code(event["end"])
    except CommandRefused as refused:
        command = message["process"]["cmd"]
        if pid or refused.kind not in (Kind.NOT_FOUND, Kind.FORBIDDEN):
            raise
        if refused.kind is Kind.FORBIDDEN:
            note(f"penstock: {refused}")
            return CANNOT_BE_RUN
        note(f"penstock: {command}: {'No such file or directory' if '/' in command else 'command not found'}")
        return NOT_THERE
    except (KeyboardInterrupt, BrokenPipeError):
        if pid:
            selector = {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}
            client.unary(box, "process.Process/SendSignal", selector, user)
        raise
    return 1


def _feed(client: Any, box: dict[str, Any], pid: int, user: str | None) -> None:
    """Send our standard input to the process, then close its own. On a thread: output must flow meanwhile."""
    import os
    import threading

    from penstock.core.errors import PenstockError

    stdin = sys.stdin.fileno()  # read below `sys.stdin`, whose lock a thread at its end would hold for ever

    def pump() -> None:
        try:
            while chunk := os.read(stdin, CHUNK_BYTES):
                text = base64.b64encode(chunk).decode()
                message = {"process": {"pid": pid}, "input": {"stdin": text}}
                client.unary(box, "process.Process/SendInput", message, user)
            client.unary(box, "process.Process/CloseStdin", {"process": {"pid": pid}}, user)
        except PenstockError:
            pass  # Safe: the process no longer reads, as with a pipe; its end is told by its own event.

    threading.Thread(target=pump, daemon=True).start()


def _print(data: dict[str, str]) -> None:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr), ("pty", sys.stdout)):
        if data.get(name):
            stream.buffer.write(base64.b64decode(data[name]))
            stream.flush()


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _place(text: str) -> tuple[str, str] | None:
    """`ID:PATH` → (id, path); None for a local name."""
    id, colon, path = text.partition(":")
    return (id, path) if colon and path and "/" not in id else None


def _pairs(given: list[str], field: str) -> dict[str, str]:
    from penstock.model.errors import Invalid

    pairs: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise Invalid(field, f"{text!r} is not NAME=VALUE")
        pairs[key] = value
    return pairs
