"""`penstock key …`: create, list, revoke."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from penstock.cli.show import as_json, fails_clearly, note, plain_id, table

app = typer.Typer(help="API keys by team.", no_args_is_help=True)

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder of the installation.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _client(data: str | None) -> Any:
    from penstock.cli.client import Client
    from penstock.cli.profile import load

    return Client(load(data))


@app.command()
@fails_clearly
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")] = "key",
    team: Annotated[Optional[str], typer.Option(help="Team the key acts for.")] = None,  # noqa: UP045
    data: Data = None,
    json: Json = False,
) -> None:
    """Make a key and print it. It is shown this once; only its hash is kept."""
    body = {"name": name} | ({"team": team} if team else {})
    with _client(data) as client:
        made = client.call("POST", "/api-keys", json=body, admin=True).json()
    if json:
        as_json(made)
        return
    print(made["key"])
    note(f"key {made['id']} of team {made['team']}: keep it, it is not shown again")


@app.command("list")
@fails_clearly
def list_(data: Data = None, json: Json = False) -> None:
    """List keys."""
    with _client(data) as client:
        rows = client.call("GET", "/api-keys", admin=True).json()
    if json:
        as_json(rows)
        return
    table(
        ["ID", "TEAM", "NAME", "KEY", "CREATED"],
        [[row["id"], row["team"], row["name"], _masked(row["mask"]), row["createdAt"][:19]] for row in rows],
        empty="no keys",
    )


@app.command()
@fails_clearly
def revoke(
    id: Annotated[str, typer.Argument(help="Key id.", parser=plain_id, metavar="id")], data: Data = None
) -> None:
    """Revoke a key; the next request with it is refused."""
    with _client(data) as client:
        client.call("DELETE", f"/api-keys/{id}", admin=True)
    print(id)


def _masked(mask: dict[str, Any]) -> str:
    return f"{mask['prefix']}{mask['maskedValuePrefix']}…{mask['maskedValueSuffix']}"
