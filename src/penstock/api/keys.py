"""API keys of a team. A key is shown once, at its making; the store holds its hash."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from penstock.api.chronicle import line
from penstock.api.front import Caller, CallerDep, Front, FrontDep
from penstock.api.shapes import NewKey, rfc3339
from penstock.model import keys
from penstock.model.errors import Forbidden, NotFound
from penstock.model.event import LoggedEvent
from penstock.model.ids import KeyId, TeamId, mint
from penstock.model.team import ApiKey
from penstock.store.store import Put
from penstock.wire import tokens

router = APIRouter(tags=["keys"], prefix="/api-keys")


@router.get("")
async def list_keys(front: FrontDep, caller: CallerDep) -> Response:
    """The team's keys; the operator sees those of every team."""
    found = front.keys.by("team", caller.team) if caller.key else [key for _, key in front.keys.items()]
    rows = sorted((key for key in found if not key.revoked_at), key=lambda key: key.created_at)
    return JSONResponse([_shown(key) for key in rows])


@router.post("", status_code=201)
async def create_key(front: FrontDep, caller: CallerDep, asked: NewKey) -> Response:
    if asked.team is not None and asked.team != caller.team and caller.key is not None:
        raise Forbidden("a key may only be made for one's own team")
    secret = tokens.new_key()
    key = new(front, TeamId(asked.team or caller.team), asked.name, secret)
    revision = await front.store.commit(
        [
            Put(keys.API_KEY + key.id, msgspec.json.encode(key), labels={"hash": key.hash, "team": key.team}, expect=0),
            line(front, _told(front, caller, key, "key.made")),
        ],
        by="api",
        durable=True,
    )
    await front.keys.wait_revision(revision, within_s=5)
    return JSONResponse({**_shown(key), "key": secret}, status_code=201)


@router.delete("/{key_id}", status_code=204)
async def revoke_key(front: FrontDep, caller: CallerDep, key_id: str) -> Response:
    """Takes effect before the answer: the next request with the key is refused."""
    key = front.keys.get(key_id)
    if key is None or key.revoked_at or (caller.key is not None and key.team != caller.team):
        raise NotFound("id not found")
    record = front.store.get(keys.API_KEY + key.id)
    if record is None:
        raise NotFound("id not found")
    gone = msgspec.structs.replace(key, revoked_at=front.clock.wall())
    revision = await front.store.commit(
        [
            Put(record.key, msgspec.json.encode(gone), expect=record.mod_revision),
            line(front, _told(front, caller, key, "key.revoked")),
        ],
        by="api",
        durable=True,
    )
    await front.keys.wait_revision(revision, within_s=5)
    return Response(status_code=204)


def new(front: Front, team: TeamId, name: str, secret: str) -> ApiKey:
    """The record of a key whose text is `secret`."""
    digest = tokens.hash_key(secret)
    assert digest is not None, "new_key makes well-formed keys"
    return ApiKey(
        id=KeyId(mint(front.rng, 12)),
        team=team,
        name=name,
        hash=digest,
        prefix=secret[:6],
        suffix=secret[-4:],
        created_at=front.clock.wall(),
    )


def _told(front: Front, caller: Caller, key: ApiKey, kind: str) -> LoggedEvent:
    """Of a key the log knows the id alone: neither its text nor its hash."""
    because = f"asked for by {caller.name}"
    return LoggedEvent(
        at=front.clock.wall(),
        kind=kind,
        subject=key.id,
        actor=caller.name,
        because=because,
        facts={"name": key.name, "team": key.team},
        team=key.team,
    )


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "team": key.team,
        "mask": {
            "prefix": "e2b_",
            "valueLength": 40,
            "maskedValuePrefix": key.prefix.removeprefix("e2b_"),
            "maskedValueSuffix": key.suffix,
        },
        "createdAt": rfc3339(key.created_at),
        "createdBy": None,
        "lastUsed": None,
    }
