"""`penstock quarantine …`: releases that do not get done, and trying one again now."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from penstock.cli.show import as_json, fails_clearly, table

app = typer.Typer(help="Sandboxes that have ended and could not be verified gone.", no_args_is_help=True)

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder of the installation.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _client(data: str | None) -> Any:
    from penstock.cli.node import _client as operator

    return operator(data)


@app.command("list")
@fails_clearly
def list_(data: Data = None, json: Json = False) -> None:
    """List what is in quarantine: since when, what is pinned and by whom, retries, cause.

    Exit code 1: there is some.
    """
    with _client(data) as client:
        rows = client.call("GET", "/quarantine", admin=True).json()
    if json:
        as_json(rows)
    else:
        table(
            ["SANDBOX", "SINCE", "PINNED", "BY", "RETRIES", "NEXT", "CAUSE"],
            [
                [
                    row["sandboxID"],
                    row["since"][:19],
                    ",".join(row["pinned"]) or "-",
                    "; ".join(row["pinnedBy"]) or "-",
                    row["retries"],
                    (row["nextRetryAt"] or "now")[:19],
                    row["cause"],
                ]
                for row in rows
            ],
            empty="nothing is in quarantine",
        )
    raise SystemExit(1 if rows else 0)


@app.command()
@fails_clearly
def retry(id: Annotated[str, typer.Argument(help="The sandbox.")], data: Data = None) -> None:
    """Try its release now. Whether it succeeded, list and why tell."""
    with _client(data) as client:
        client.call("POST", f"/quarantine/{id}/retry", admin=True)
    print(id)
