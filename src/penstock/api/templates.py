"""Templates, as far as they are built: `base` and its alias. The rest answers 501 and says so; nothing pretends."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from penstock.api.creation import resolve_template
from penstock.api.front import CallerDep, FrontDep
from penstock.api.shapes import rfc3339
from penstock.model.errors import Unsupported

router = APIRouter(tags=["templates"])

_UNBUILT: Final[tuple[tuple[str, str, str], ...]] = (
    ("POST", "/v3/templates", "template builds"),
    ("POST", "/v2/templates", "template builds"),
    ("POST", "/templates", "template builds"),
    ("GET", "/templates/{id}/files/{hash}", "template builds"),
    ("POST", "/v2/templates/{id}/builds/{build}", "template builds"),
    ("GET", "/templates/{id}/builds/{build}/status", "template builds"),
    ("POST", "/templates/tags", "template tags"),
    ("DELETE", "/templates/tags", "template tags"),
    ("GET", "/templates/{id}/tags", "template tags"),
    ("GET", "/volumes", "volumes"),
    ("POST", "/volumes", "volumes"),
    ("GET", "/secrets", "secrets"),
    ("POST", "/secrets", "secrets"),
)


@router.get("/templates")
@router.get("/v2/templates")
async def list_templates(front: FrontDep, caller: CallerDep) -> Response:
    rows: list[dict[str, Any]] = []
    for _, template in front.templates.items():
        rows.append(
            {
                "templateID": template.id,
                "buildID": template.build,
                "names": list(template.names),
                "aliases": list(template.names),
                "public": True,
                "createdAt": rfc3339(template.created_at),
                "updatedAt": rfc3339(template.created_at),
                "buildStatus": "ready",
            }
        )
    return JSONResponse(rows)


@router.get("/templates/aliases/{alias:path}")
async def alias(front: FrontDep, caller: CallerDep, alias: str) -> Response:
    template = resolve_template(front, alias)
    return JSONResponse({"templateID": template.id, "public": True})


def _refusing(what: str) -> Any:
    async def refuse(caller: CallerDep) -> Response:
        raise Unsupported(f"{what} are not built yet")

    return refuse


for _method, _path, _what in _UNBUILT:
    router.add_api_route(_path, _refusing(_what), methods=[_method], include_in_schema=False)
