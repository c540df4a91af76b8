"""`penstock`: everything a person can do, each command with `--json` where it prints a result.

Start-up is bounded (200 ms): this module imports typer alone; each command imports what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from penstock import __version__
from penstock.cli import key, node, quarantine, sandbox, snapshot, why
from penstock.cli.show import as_json, fails_clearly, note

app = typer.Typer(
    help="Isolated sandboxes that never leak, never lose work and never drop a request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(key.app, name="key")
app.add_typer(node.app, name="node")
app.add_typer(quarantine.app, name="quarantine")

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder (PENSTOCK_DATA).")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@fails_clearly
def up(
    data: Data = None,
    api: Annotated[Optional[str], typer.Option(help="HOST:PORT of the API.")] = None,  # noqa: UP045
    ingress: Annotated[Optional[str], typer.Option(help="HOST:PORT of the ingress.")] = None,  # noqa: UP045
    tls: Annotated[Optional[str], typer.Option(help="HOST:PORT of the ingress's TLS listener.")] = None,  # noqa: UP045
    domain: Annotated[Optional[str], typer.Option(help="Domain of sandbox host names.")] = None,  # noqa: UP045
    on_stop: Annotated[Optional[str], typer.Option(help="keep, drain or force.")] = None,  # noqa: UP045
    config: Annotated[Optional[str], typer.Option(help="Settings file (TOML).")] = None,  # noqa: UP045
) -> None:
    """Run everything on this machine; prints what the SDKs need and says when it is ready."""
    from penstock.run import settings
    from penstock.run.up import main as run_up

    given = {"data": data, "api": api, "ingress": ingress, "tls": tls, "domain": domain, "on_stop": on_stop}
    raise SystemExit(run_up(settings.load(given, config=config)))


@app.command()
@fails_clearly
def down(
    data: Data = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave sandboxes, ingress and zygote running.")] = False,
    drain: Annotated[bool, typer.Option("--drain", help="Let sandboxes end, bounded (default).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Kill sandboxes at once.")] = False,
) -> None:
    """Stop a running installation and wait until it has stopped.

    Exit code 0: nothing failed, and nothing was forced unless --force asked for it; 1 otherwise.
    """
    from penstock.cli.profile import data_of
    from penstock.model.errors import Invalid
    from penstock.run.down import main as run_down

    if keep + drain + force > 1:
        raise Invalid("--keep, --drain, --force", "exclude one another")
    mode = "keep" if keep else "force" if force else "drain"
    raise SystemExit(run_down(data_of(data), mode, progress=note))


@app.command()
@fails_clearly
def env(data: Data = None, json: Json = False) -> None:
    """Print what the SDKs need: eval "$(penstock env --data DIR)"."""
    from penstock.cli.profile import load

    profile = load(str(data) if data else None)
    values = {
        "E2B_API_URL": profile.api_url,
        "E2B_SANDBOX_URL": profile.sandbox_url,
        "E2B_VOLUME_API_URL": profile.api_url,
        "E2B_API_KEY": profile.api_key,
    }
    if json:
        as_json(values)
        return
    for name, value in values.items():
        print(f"export {name}={value}")


@app.command()
@fails_clearly
def doctor(data: Data = None, json: Json = False) -> None:
    """Probe what this machine can do, by doing it; names cause and fix for each gap."""
    from penstock.cli.doctor import main as run_doctor
    from penstock.cli.profile import data_of

    raise SystemExit(run_doctor(data_of(data), json=json))


@app.command()
@fails_clearly
def leaks(
    data: Data = None,
    json: Json = False,
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is provably ours and dead.")] = False,
) -> None:
    """Compare the kernel with the records, daemon or no daemon. Exit code 0: nothing leaked, or nothing is left."""
    from penstock.cli.leaks import main as run_leaks
    from penstock.cli.profile import data_of

    raise SystemExit(run_leaks(data_of(data), json=json, fix=fix))


for verb in (why.why, why.events, why.state):
    app.command()(verb)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
