"""The bodies of the E2B API: requests as pydantic models (bounds included), replies as plain dictionaries.

Field names and their mixed spelling (`templateID`, `allow_internet_access`) are the protocol's.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from penstock.api import problems
from penstock.api.front import CLIENT_ID, ENVD_VERSION, Front
from penstock.api.standing import Standing, State
from penstock.model.sandbox import EgressRules, OnTimeout, SandboxSpec
from penstock.model.snapshot import Snapshot
from penstock.model.units import MIB
from penstock.wire import tokens


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _no_nul(value: Any) -> Any:
    if isinstance(value, dict) and any("\0" in f"{key}{item}" for key, item in value.items()):
        raise ValueError("a NUL byte is not allowed")
    return value


ShortText = Annotated[str, Field(max_length=512)]
Texts = Annotated[dict[ShortText, Annotated[str, Field(max_length=32_768)]], BeforeValidator(_none_is_empty)]
_PAUSE_MODES = {State.PAUSED: "full", State.PARKED: "filesystem"}  # once the pause is done
EnvVars = Annotated[Texts, BeforeValidator(_no_nul)]


class Body(BaseModel):
    """Unknown fields are ignored: newer SDKs send more than we know."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class NetworkConfig(Body):
    allowPublicTraffic: StrictBool | None = None
    allowOut: list[str] | None = None
    denyOut: list[str] | None = None
    maskRequestHost: Annotated[str, Field(max_length=255)] | None = None
    egressProxy: Any = None
    rules: Any = None


class NetworkUpdate(Body):
    allowOut: list[str] | None = None
    denyOut: list[str] | None = None
    egressProxy: Any = None
    rules: Any = None
    allow_internet_access: StrictBool | None = None


class AutoResume(Body):
    enabled: StrictBool = False


class NewSandbox(Body):
    templateID: Annotated[str, Field(min_length=1, max_length=256)]
    timeout: Annotated[int, Field(strict=True)] | None = None
    autoPause: StrictBool = False
    autoPauseMemory: StrictBool = True
    autoResume: AutoResume | None = None
    secure: StrictBool | None = None
    allow_internet_access: StrictBool | None = None
    network: NetworkConfig | None = None
    metadata: Texts = {}
    envVars: EnvVars = {}
    mcp: Any = None
    iam: Any = None
    volumeMounts: Any = None


class ConnectSandbox(Body):
    """Also that of the older /resume."""

    timeout: Annotated[int, Field(strict=True)] | None = None
    memory: StrictBool | None = None


class PauseSandbox(Body):
    """`requireHealthyGuest`: rather fail than pause one whose guest does not answer."""

    memory: StrictBool = True
    requireHealthyGuest: StrictBool = False


class NewSnapshot(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    memory: StrictBool | None = None


class SetTimeout(Body):
    timeout: Annotated[int, Field(strict=True)]


class Refresh(Body):
    duration: Annotated[int, Field(strict=True, ge=0, le=3600)] | None = None


class NewKey(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    team: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")] | None = None


def rfc3339(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def sandbox(front: Front, spec: SandboxSpec) -> dict[str, Any]:
    """The answer of create and connect. Tokens are derived, never stored."""
    body: dict[str, Any] = {
        "templateID": spec.template,
        "sandboxID": spec.id,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "domain": front.domain,
    }
    if spec.secure:
        body["envdAccessToken"] = tokens.access_token(front.seed, spec.id)
    if spec.traffic_private:
        body["trafficAccessToken"] = tokens.traffic_token(front.seed, spec.id)
    return body


def listed(standing: Standing) -> dict[str, Any]:
    """One row of a list."""
    spec = standing.spec
    body: dict[str, Any] = {
        "templateID": spec.template,
        "sandboxID": spec.id,
        "clientID": CLIENT_ID,
        "alias": spec.template,
        "startedAt": rfc3339(standing.started_at),
        "endAt": rfc3339(standing.end_at),
        "envdVersion": ENVD_VERSION,
        "cpuCount": max(1, spec.limits.cpu_milli // 1000),
        "memoryMB": spec.limits.memory_bytes_max // MIB,
        "diskSizeMB": spec.limits.disk_bytes_max // MIB,
        "metadata": spec.metadata,
        "state": "paused" if standing.paused else "running",
        "isolation": spec.isolation.value,
    }
    if standing.state in _PAUSE_MODES:
        body["pauseMode"] = _PAUSE_MODES[standing.state]
    return body


def detail(front: Front, standing: Standing) -> dict[str, Any]:
    """The answer of GET /sandboxes/{id}.

    `phase`, `because`, `capabilities` and `durableUpTo` are ours; SDKs ignore what they do not know.
    """
    spec, status, snapshot = standing.spec, standing.status, standing.snapshot
    body = listed(standing)
    body["domain"] = front.domain
    body["lifecycle"] = {
        "autoResume": spec.auto_resume,
        "onTimeout": "kill" if spec.on_timeout is OnTimeout.KILL else "pause",
    }
    body["allowInternetAccess"] = spec.egress.internet
    body["network"] = network(spec)
    if spec.secure:
        body["envdAccessToken"] = tokens.access_token(front.seed, spec.id)
    durable_up_to = 0.0
    if status is not None:
        body["phase"], because = status.phase.value, status.because
        body["capabilities"] = list(status.capabilities)
        durable_up_to = status.durable_up_to
    else:
        body["phase"], because = standing.state.value, snapshot.because if snapshot is not None else ""
    if standing.state is State.PARKED and snapshot is not None:
        durable_up_to = snapshot.durable_up_to
    body["because"] = problems.without_paths(because)
    if durable_up_to:
        body["durableUpTo"] = rfc3339(durable_up_to)
    return body


def snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as the SDKs read it, and what it holds: everything written before `durableUpTo`, no memory."""
    names, id = [], f"{snapshot.id}:default"
    if snapshot.name:
        name, _, tag = snapshot.name.partition(":")
        id = f"{snapshot.team}/{name}:{tag or 'default'}"
        names = [f"{snapshot.team}/{snapshot.name}"]
    return {
        "snapshotID": id,
        "names": names,
        "sandboxID": snapshot.sandbox,
        "createdAt": rfc3339(snapshot.created_at),
        "durableUpTo": rfc3339(snapshot.durable_up_to),
        "diskUsedBytes": snapshot.disk_bytes,
        "memory": snapshot.memory,
    }


def network(spec: SandboxSpec) -> dict[str, Any]:
    rules: EgressRules = spec.egress
    body: dict[str, Any] = {
        "allowPublicTraffic": not spec.traffic_private,
        "allowOut": [*rules.allow, *rules.allow_domains],
        "denyOut": [*rules.deny, *([] if rules.internet else ["0.0.0.0/0"])],
    }
    if spec.mask_request_host:
        body["maskRequestHost"] = spec.mask_request_host
    return body
