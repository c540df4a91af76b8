"""What can be seen of a sandbox: metrics and logs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from penstock.api.front import CallerDep, FrontDep
from penstock.api.sandboxes import sandbox_id
from penstock.api.shapes import rfc3339
from penstock.model.errors import Invalid
from penstock.model.ids import SandboxId
from penstock.model.observed import LogLine, Sample

router = APIRouter(tags=["observe"])

_LEVELS = ("debug", "info", "warn", "error")
METRICS_IDS_MAX = 100


@router.get("/sandboxes/metrics")
async def metrics_of_many(front: FrontDep, caller: CallerDep, sandbox_ids: str) -> Response:
    """The latest sample of each named sandbox (at most 100); the unknown are left out."""
    ids = [part for part in sandbox_ids.split(",") if part]
    if len(ids) > METRICS_IDS_MAX:
        raise Invalid("sandbox_ids", f"{len(ids)} ids are more than {METRICS_IDS_MAX}")
    found: dict[str, Any] = {}
    for text in ids:
        spec = front.roster.specs.get(text)
        if spec is not None and spec.team == caller.team:
            samples = front.measurements.samples(spec.id, start=0, end=front.clock.wall())
            if samples:
                found[text] = _metric(samples[-1])
    return JSONResponse({"sandboxes": found})


@router.get("/sandboxes/{id}/metrics")
async def metrics(
    front: FrontDep, caller: CallerDep, id: str, start: int | None = None, end: int | None = None
) -> Response:
    spec = front.roster.require(caller.team, sandbox_id(id))
    now = front.clock.wall()
    first, last = float(start or 0), float(end) if end is not None else now
    if first > last:
        raise Invalid("start", "is after end")
    return JSONResponse([_metric(s) for s in front.measurements.samples(spec.id, start=first, end=last + 1)])


@router.get("/sandboxes/{id}/logs")
async def logs_v1(
    front: FrontDep,
    caller: CallerDep,
    id: str,
    start: int | None = None,
    limit: Annotated[int, Query(ge=0, le=1000)] = 1000,
) -> Response:
    """Oldest first. `start` in milliseconds since the epoch."""
    lines = _lines(front, caller, id)
    if start is not None:
        lines = [line for line in lines if line.at * 1000 >= start]
    lines = lines[:limit]
    return JSONResponse(
        {
            "logs": [{"timestamp": rfc3339(line.at), "line": line.message} for line in lines],
            "logEntries": [_entry(line) for line in lines],
        }
    )


@router.get("/v2/sandboxes/{id}/logs")
async def logs_v2(
    front: FrontDep,
    caller: CallerDep,
    id: str,
    cursor: int | None = None,
    limit: Annotated[int, Query(ge=0, le=1000)] = 1000,
    direction: str = "backward",
    level: str | None = None,
    search: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """`cursor` in milliseconds: backward shows what came before it, newest first; forward what came after."""
    if direction not in ("backward", "forward"):
        raise Invalid("direction", f"{direction!r} is neither backward nor forward")
    if level is not None and level not in _LEVELS:
        raise Invalid("level", f"{level!r} is not one of {', '.join(_LEVELS)}")
    lines = _lines(front, caller, id)
    if level is not None:
        lines = [line for line in lines if _LEVELS.index(line.level) >= _LEVELS.index(level)]
    if search:
        lines = [line for line in lines if search in line.message]
    if direction == "backward":
        lines = [line for line in reversed(lines) if cursor is None or line.at * 1000 <= cursor]
    else:
        lines = [line for line in lines if cursor is None or line.at * 1000 >= cursor]
    return JSONResponse({"logs": [_entry(line) for line in lines[:limit]]})


def _lines(front: FrontDep, caller: CallerDep, id: str) -> list[LogLine]:
    spec = front.roster.require(caller.team, sandbox_id(id))
    return front.measurements.log_lines(SandboxId(spec.id), count_max=1000)


def _entry(line: LogLine) -> dict[str, Any]:
    return {"timestamp": rfc3339(line.at), "message": line.message, "level": line.level, "fields": line.fields}


def _metric(sample: Sample) -> dict[str, Any]:
    return {
        "timestamp": rfc3339(sample.at),
        "timestampUnix": int(sample.at),
        "cpuCount": sample.cpu_count,
        "cpuUsedPct": round(sample.cpu_used_pct, 2),
        "memUsed": sample.memory_used,
        "memTotal": sample.memory_total,
        "memCache": sample.memory_cache,
        "diskUsed": sample.disk_used,
        "diskTotal": sample.disk_total,
    }
