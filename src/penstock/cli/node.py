"""`penstock node …`: list, show, cordon, uncordon, drain, undrain."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Optional

import typer

from penstock.cli.show import as_json, fails_clearly, fields, note, plain_id, table

app = typer.Typer(help="Nodes: what runs where, and taking machines out of service.", no_args_is_help=True)

Data = Annotated[Optional[str], typer.Option("--data", help="Data folder of the installation.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="Node id; on one machine it is 'local'.", parser=plain_id, metavar="id")]
Span = Optional[str]  # noqa: UP045  as a person types it: 90, 10m, 2h


def _client(data: str | None) -> Any:
    """As the operator. The variables of the SDKs carry no admin token: the data folder of the same daemon has it."""
    from penstock.cli.client import Client
    from penstock.cli.profile import NoInstallation, data_of, load

    profile = load(data)
    if profile.admin_token is None:
        try:
            local = load(str(data_of(data)))
        except NoInstallation:
            return Client(profile)  # the API says what is missing
        if local.api_url == profile.api_url:
            profile = local
    return Client(profile)


@app.command("list")
@fails_clearly
def list_(data: Data = None, json: Json = False) -> None:
    """List nodes."""
    with _client(data) as client:
        rows = client.call("GET", "/nodes", admin=True).json()
    if json:
        as_json(rows)
        return
    table(
        ["ID", "STATUS", "SINCE", "SANDBOXES", "STARTING", "EPOCH", "WHY"],
        [
            [
                row["id"],
                row["status"],
                row["statusChangedAt"][:19],
                f"{row['sandboxCount']}/{row['sandboxesMax']}",
                row["sandboxStartingCount"],
                row["epoch"],
                row["whyNot"] or "-",
            ]
            for row in rows
        ],
        empty="no node has joined",
    )


@app.command()
@fails_clearly
def show(id: Id, data: Data = None, json: Json = False) -> None:
    """Show one node, its drain, and what runs on it."""
    with _client(data) as client:
        body = _node(client, id)
    if json:
        as_json(body)
        return
    sandboxes = body.pop("sandboxes")
    table(["FIELD", "VALUE"], list(fields(body)), empty="")
    print()
    rows = [[one["sandboxID"], one["phase"], one["because"] or "-"] for one in sandboxes]
    table(["SANDBOX", "PHASE", "BECAUSE"], rows, empty="no sandboxes")


@app.command()
@fails_clearly
def cordon(
    id: Id,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks later.")] = "",
    data: Data = None,
) -> None:
    """Place nothing new on it; what runs there goes on."""
    with _client(data) as client:
        client.call("POST", f"/nodes/{id}/cordon", json={"reason": reason}, admin=True)
    print(id)


@app.command()
@fails_clearly
def uncordon(id: Id, data: Data = None) -> None:
    """Place sandboxes on it again. A drain is taken back by undrain instead."""
    with _client(data) as client:
        client.call("POST", f"/nodes/{id}/uncordon", admin=True)
    print(id)


@app.command()
@fails_clearly
def drain(
    id: Id,
    soft: Annotated[Span, typer.Option(help="Ask what is left to end after this long: 90, 10m, 2h.")] = None,
    hard: Annotated[Span, typer.Option(help="Kill what is left after this long. Without it: wait for ever.")] = None,
    park: Annotated[bool, typer.Option("--park", help="Pause to disk instead of stopping, where possible.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop also those who would be parked.")] = False,
    propagation: Annotated[Span, typer.Option(help="Give readers this long to learn of it first.")] = None,
    reason: Annotated[str, typer.Option(help="Why, as sandboxes and people are told.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would become of each sandbox.")] = False,
    digest: Annotated[Optional[str], typer.Option(help="Apply this plan, if it still holds.")] = None,  # noqa: UP045
    yes: Annotated[bool, typer.Option("--yes", help="Apply whatever the plan is now, unasked.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Kill what is left, now.")] = False,
    extend: Annotated[
        Span, typer.Option(help="Move the hard deadline of the drain under way: this long from now.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Wait until it has ended.")] = True,
    data: Data = None,
    json: Json = False,
) -> None:
    """Take a node out of service. Shows the plan and asks, then watches; exit code 0: it ended and nothing is in
    quarantine. On a node that drains already it watches on, or changes the drain as the options say.
    """
    asked = _asked(soft, hard, propagation, park=park, stop=stop, reason=reason)
    with _client(data) as client:
        under_way = _node(client, id)["drain"]
        if plan:
            _show_plan(client, id, asked | {"force": force}, json=json)
            return
        if extend is not None:
            _extend(client, id, extend, soft)
        elif under_way and force and not asked:
            if client.call("POST", f"/nodes/{id}/drain/force", admin=True).status_code == 202:
                note("still stopping")
        elif not under_way or asked or digest or force:
            order = asked | {"force": force} | _consent(client, id, asked | {"force": force}, digest, yes=yes)
            client.call("POST", f"/nodes/{id}/drain", json=order, admin=True)
        epoch = _node(client, id)["epoch"]
        code = _ended(client, id, epoch, json=json) if watch else _begun(client, id, json=json)
    raise SystemExit(code)


@app.command()
@fails_clearly
def undrain(id: Id, data: Data = None, json: Json = False) -> None:
    """Take a drain back; says what had been parked, stopped or asked to end by then."""
    from penstock.cli.drain import said, when

    with _client(data) as client:
        told = client.call("POST", f"/nodes/{id}/undrain", admin=True).json()
    if json:
        as_json(told)
        return
    rows = [[one["sandboxID"], one["fate"], when(one["at"]), said(one)] for one in told["done"]]
    rows += [[one, "ending", "-", "it was asked to end, and will"] for one in told["ending"]]
    table(["SANDBOX", "FATE", "AT", "BECAUSE"], rows, empty="nothing had been done to any sandbox")
    note(f"{id} is {told['status']} in epoch {told['epoch']}; spared: {len(told['spared'])}")


def _node(client: Any, id: str) -> dict[str, Any]:
    from penstock.cli.client import CallFailed
    from penstock.core.errors import Kind
    from penstock.model.errors import NotFound

    try:
        body: dict[str, Any] = client.call("GET", f"/nodes/{id}", admin=True).json()
    except CallFailed as error:
        if error.kind is not Kind.NOT_FOUND:
            raise
        raise NotFound("no such node", which=id, now="see: penstock node list") from None
    return body


def _asked(soft: Span, hard: Span, propagation: Span, *, park: bool, stop: bool, reason: str) -> dict[str, Any]:
    """The options that say what the drain is to be; empty when none was given."""
    from penstock.model.errors import Invalid
    from penstock.model.units import parse_seconds

    if park and stop:
        raise Invalid("--park, --stop", "exclude one another")
    spans = {"softS": ("--soft", soft), "hardS": ("--hard", hard), "propagationS": ("--propagation", propagation)}
    asked: dict[str, Any] = {
        name: parse_seconds(text, field=field) for name, (field, text) in spans.items() if text is not None
    }
    if park or stop:
        asked["disposition"] = "park" if park else "stop"
    return asked | ({"reason": reason} if reason else {})


def _plan(client: Any, id: str, asked: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = client.call("POST", f"/nodes/{id}/drain/plan", json=asked, admin=True).json()
    return plan


def _show_plan(client: Any, id: str, asked: dict[str, Any], *, json: bool) -> None:
    from penstock.cli.drain import show_plan

    plan = _plan(client, id, asked)
    as_json(plan) if json else show_plan(plan)


def _consent(client: Any, id: str, asked: dict[str, Any], digest: str | None, *, yes: bool) -> dict[str, Any]:
    """What binds the order: an earlier plan, anything, or the plan a person has just seen and agreed to."""
    from penstock.cli.drain import show_plan
    from penstock.model.errors import Invalid

    if digest is not None:
        return {"planDigest": digest}
    if yes:
        return {"yes": True}
    if not sys.stdin.isatty():
        raise Invalid("--yes", "is needed where nobody can be asked", now="or --digest of a plan shown by --plan")
    plan = _plan(client, id, asked)
    show_plan(plan)
    typer.confirm(f"Drain {id}?", abort=True, err=True)
    return {"planDigest": plan["digest"]}


def _extend(client: Any, id: str, hard: str, soft: Span) -> None:
    from penstock.model.units import parse_seconds

    asked = {"hardS": parse_seconds(hard, field="--extend")}
    if soft is not None:
        asked["softS"] = parse_seconds(soft, field="--soft")
    client.call("POST", f"/nodes/{id}/drain/extend", json=asked, admin=True)


def _ended(client: Any, id: str, epoch: int, *, json: bool) -> int:
    from penstock.cli.drain import exit_code, show_receipt, watch

    receipt = watch(client, id, epoch)
    as_json(receipt) if json else show_receipt(receipt)
    return exit_code(receipt)


def _begun(client: Any, id: str, *, json: bool) -> int:
    """The order is taken; whether the drain succeeds is not known yet."""
    from penstock.cli.drain import headline

    told = client.call("GET", f"/nodes/{id}/drain", admin=True).json()
    if json:
        as_json(told)
    else:
        print(headline(told))
        note(f"watch: penstock node drain {id}; take it back: penstock node undrain {id}")
    return 0
