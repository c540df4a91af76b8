"""`penstock snapshot …`: list, delete. They are taken by `penstock sandbox snapshot`."""

from __future__ import annotations

from typing import Annotated, Any, Optional
from urllib.parse import quote

import typer

from penstock.cli.show import as_json, delete_each, fails_clearly, table

app = typer.Typer(help="Snapshots that sandboxes are created from.", no_args_is_help=True)

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder of the installation.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _client(data: str | None) -> Any:
    from penstock.cli.client import Client
    from penstock.cli.profile import load

    return Client(load(data))


@app.command("list")
@fails_clearly
def list_(
    sandbox: Annotated[Optional[str], typer.Option(help="Only those of this sandbox.")] = None,  # noqa: UP045
    name: Annotated[Optional[str], typer.Option(help="Only the one of this name or id.")] = None,  # noqa: UP045
    data: Data = None,
    json: Json = False,
) -> None:
    """List snapshots, newest first."""
    asked = {key: value for key, value in (("sandboxID", sandbox), ("name", name)) if value}
    rows: list[dict[str, Any]] = []
    with _client(data) as client:
        token = None
        while True:
            page = client.call("GET", "/snapshots", params=asked | ({"nextToken": token} if token else {}))
            rows += page.json()
            token = page.headers.get("X-Next-Token")
            if not token:
                break
    if json:
        as_json(rows)
        return
    table(
        ["ID", "SANDBOX", "TAKEN", "MIB"],
        [[row["snapshotID"], row["sandboxID"], row["createdAt"][:19], row["diskUsedBytes"] >> 20] for row in rows],
        empty="no snapshots",
    )


@app.command()
@fails_clearly
def delete(
    ids: Annotated[list[str], typer.Argument(help="Snapshot ids or names.")], data: Data = None, json: Json = False
) -> None:
    """Delete snapshots. Sandboxes made from them have their own copies."""
    with _client(data) as client:
        delete_each(
            client, ids, lambda id: f"/templates/{quote(id, safe='')}", what="snapshot", done="deleted", json=json
        )
