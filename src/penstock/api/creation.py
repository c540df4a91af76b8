"""Creating a sandbox: check everything, reserve, commit the intent once, wait for the fact.

A repeated create with the same `Idempotency-Key` returns the same sandbox: the key and the spec are one commit, so
there is no moment in which one exists without the other.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.api import drains, egress, snapshots
from penstock.api.chronicle import line
from penstock.api.front import Caller, Front
from penstock.api.shapes import NewSandbox
from penstock.core.deadlines import DeadlinePassed
from penstock.model import keys
from penstock.model.errors import Conflict, Internal, Invalid, NoFreeSlot, NotFound, Unavailable, Unsupported
from penstock.model.event import LoggedEvent
from penstock.model.ids import NodeId, SandboxId, mint_sandbox_id
from penstock.model.sandbox import (
    TERMINAL,
    TIMEOUT_S_DEFAULT,
    KillReason,
    Limits,
    OnTimeout,
    Phase,
    SandboxSpec,
    SandboxStatus,
    StopOrder,
)
from penstock.model.snapshot import Snapshot
from penstock.model.team import TeamLimits
from penstock.model.template import Template
from penstock.store.errors import AlreadyExists, RevisionConflict
from penstock.store.store import Put

IDEMPOTENCY_S: Final = 24 * 3600.0
_IDEMPOTENCY_KEY: Final = re.compile(r"[A-Za-z0-9-]{1,255}")
_MASK: Final = re.compile(r"[\x21-\x7e]{1,255}")
_ALIASES_OF_BASE: Final = frozenset({"e2bdev/base"})


RACES_MAX: Final = 8
RACE_S: Final = 0.001  # doubles; a quarter of a second in all

Tell = Callable[[SandboxSpec, SandboxSpec], LoggedEvent]
Edit = Callable[[SandboxSpec], SandboxSpec]


async def create(front: Front, caller: Caller, asked: NewSandbox, *, idempotency_key: str | None) -> SandboxSpec:
    """A ready sandbox. Raises Invalid, NotFound (template), LimitReached, Unavailable, DeadlinePassed, Internal.

    If the caller goes away meanwhile, the sandbox stays and ends by its own timeout.
    """
    if idempotency_key is None:
        return await _ready(front, await _accept(front, caller, asked, None))
    async with front.turns.of(_key(caller, idempotency_key)):
        # One at a time per key: the second finds the record of the first, and is not counted against the limit.
        sandbox = _known(front, caller, idempotency_key, asked) or await _accept(front, caller, asked, idempotency_key)
    return await _ready(front, sandbox)


async def _accept(front: Front, caller: Caller, asked: NewSandbox, idempotency_key: str | None) -> SandboxId:
    """Check, reserve and commit. From the return on the sandbox is wanted, whatever becomes of the request."""
    spec = _spec(front, caller, asked)
    front.check_room()
    front.roster.reserve(caller.team, spec.id, sandboxes_max=front.limits_of(caller.team).sandboxes_max)
    try:
        await _commit(front, caller, spec, asked, idempotency_key)
    except (RevisionConflict, AlreadyExists):
        # Another replica was faster with the same key: its sandbox is the answer.
        front.roster.release(spec.id)
        known = _known(front, caller, idempotency_key, asked) if idempotency_key else None
        if known is None:
            raise
        return known
    except BaseException:
        front.roster.release(spec.id)
        raise
    return spec.id


def timeout_s(asked: int | None, limits: TeamLimits, *, default: float = TIMEOUT_S_DEFAULT, least: int = 1) -> float:
    """The life a caller asked for, in seconds. Raises Invalid below `least` or above the team's limit."""
    if asked is None:
        return default
    if asked < least:
        raise Invalid("timeout", f"{asked} is below {least} s")
    if asked > limits.timeout_s_max:
        raise Invalid("timeout", f"{asked} s is above the team's limit of {limits.timeout_s_max:.0f} s")
    return float(asked)


def resolve_template(front: Front, name: str) -> Template:
    """The template called `name` (id, alias, `alias:default`). Raises NotFound as the SDKs expect it."""
    alias, _, tag = name.removeprefix("default/").partition(":")
    if alias in _ALIASES_OF_BASE:
        alias = "base"
    found = front.templates.get(alias) or next(iter(front.templates.by("name", alias)), None)
    if found is None:
        raise NotFound(f"template {name!r} not found")
    if tag not in ("", "default"):
        raise NotFound(f"tag {tag!r} does not exist for template {alias!r}")
    return found


def find_template(front: Front, name: str) -> Template | None:
    """`resolve_template`, but None when there is none of that name or tag."""
    try:
        return resolve_template(front, name)
    except NotFound:
        return None


def _source(front: Front, caller: Caller, name: str) -> Template | Snapshot:
    """What it starts from. Raises NotFound."""
    template = find_template(front, name)
    if template is not None:
        return template
    return snapshots.find(front, caller.team, name) or resolve_template(front, name)


def _spec(front: Front, caller: Caller, asked: NewSandbox) -> SandboxSpec:
    _refuse_unbuilt(asked)
    source = _source(front, caller, asked.templateID)
    snapshot = source if isinstance(source, Snapshot) else None
    limits = front.limits_of(caller.team)
    seconds = timeout_s(asked.timeout, limits)
    now = front.clock.wall()
    network = asked.network
    # The v1 endpoint sends `secure: false` for an open guest; without the field a sandbox is always secured.
    secure = asked.secure is not False
    private = network is not None and network.allowPublicTraffic is False
    if private and not secure:
        raise Invalid(
            "network.allowPublicTraffic", "you cannot create a sandbox without public access unless secure is enabled"
        )
    return SandboxSpec(
        id=mint_sandbox_id(front.rng),
        team=caller.team,
        template=asked.templateID,
        build=source.spec.build if isinstance(source, Snapshot) else source.build,
        limits=snapshot.spec.limits if snapshot is not None else Limits(),
        created_at=now,
        end_at=now + seconds,
        timeout_s=seconds,
        on_timeout=_on_timeout(asked),
        auto_resume=asked.autoResume is not None and asked.autoResume.enabled,
        snapshot=snapshot.id if snapshot is not None else None,
        secure=secure,
        traffic_private=private,
        mask_request_host=_mask(network.maskRequestHost if network else None),
        metadata=asked.metadata,
        env={**(snapshot.spec.env if snapshot is not None else {}), **_environment(asked.envVars)},
        egress=egress.read(
            network.allowOut if network else None,
            network.denyOut if network else None,
            internet=asked.allow_internet_access,
            rules=network.rules if network else None,
            egress_proxy=network.egressProxy if network else None,
        ),
    )


def _refuse_unbuilt(asked: NewSandbox) -> None:
    if not asked.autoPauseMemory and not asked.autoPause:
        raise Invalid("autoPauseMemory", "needs autoPause")
    if not asked.autoPauseMemory and asked.autoResume is not None and asked.autoResume.enabled:
        raise Invalid("autoPauseMemory", "a file-system-only pause cannot be resumed by traffic")
    for field in ("mcp", "iam", "volumeMounts"):
        if getattr(asked, field):
            raise Unsupported(f"{field} is not built yet", now="leave the field out")


def _on_timeout(asked: NewSandbox) -> OnTimeout:
    if not asked.autoPause:
        return OnTimeout.KILL
    return OnTimeout.PAUSE if asked.autoPauseMemory else OnTimeout.PARK


def _environment(given: dict[str, str]) -> dict[str, str]:
    for name in given:
        if not name or "=" in name:
            raise Invalid("envVars", f"{name!r} cannot be the name of an environment variable")
    return given


def _mask(host: str | None) -> str | None:
    if host is None:
        return None
    if not _MASK.fullmatch(host) or any(c in host.replace("${PORT}", "") for c in "/\\@?#{}$"):
        raise Invalid("network.maskRequestHost", f"{host!r} is not host[:port]", now="${PORT} may stand for the port")
    return host


def _digest(asked: NewSandbox) -> str:
    return hashlib.sha256(asked.model_dump_json().encode()).hexdigest()


def _key(caller: Caller, idempotency_key: str) -> str:
    if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise Invalid("Idempotency-Key", "is not 1 to 255 characters of [A-Za-z0-9-]")
    return f"{keys.IDEMPOTENCY}{caller.team}/{idempotency_key}"


def _known(front: Front, caller: Caller, idempotency_key: str, asked: NewSandbox) -> SandboxId | None:
    record = front.store.get(_key(caller, idempotency_key))
    if record is None:
        return None
    remembered: dict[str, str] = msgspec.json.decode(record.value)
    if remembered["digest"] != _digest(asked):
        raise Conflict("this Idempotency-Key was used with another request", now="use a fresh key")
    sandbox = SandboxId(remembered["sandbox"])
    if front.store.get(keys.SANDBOX_SPEC + sandbox) is None:
        raise Conflict("the sandbox of this Idempotency-Key has ended", which=sandbox, now="use a fresh key")
    return sandbox


async def _commit(
    front: Front, caller: Caller, spec: SandboxSpec, asked: NewSandbox, idempotency_key: str | None
) -> None:
    encode = msgspec.json.encode
    puts = [Put(keys.SANDBOX_SPEC + spec.id, encode(spec), labels={"team": spec.team}, expect=0)]
    puts.append(line(front, _created(caller, spec)))
    if idempotency_key is not None:
        lease = await front.store.grant(IDEMPOTENCY_S)
        value = encode({"sandbox": spec.id, "digest": _digest(asked)})
        puts.append(Put(_key(caller, idempotency_key), value, expect=0, lease=lease))
    await front.store.commit(puts, by="api")


def _created(caller: Caller, spec: SandboxSpec) -> LoggedEvent:
    return LoggedEvent(
        at=spec.created_at,
        kind="sandbox.created",
        subject=spec.id,
        actor=caller.name,
        because=f"from template {spec.template}",
        deadline=spec.end_at,
        facts={"build": spec.build} | ({"snapshot": spec.snapshot} if spec.snapshot is not None else {}),
        team=spec.team,
    )


def _settled(status: SandboxStatus | None) -> bool:
    """Ready, or never to be: a start whose undo is quarantined has failed for its caller too."""
    ended = TERMINAL | {Phase.QUARANTINED}
    return status is not None and (status.phase is Phase.READY or status.phase in ended)


async def _ready(front: Front, sandbox: SandboxId) -> SandboxSpec:
    try:
        status = await _outcome(front, sandbox)
    except DeadlinePassed:
        await order_stop(front, sandbox, KillReason.START_FAILED, by="api: not ready in time")
        raise Unavailable("Failed to place sandbox: it was not ready in time", which=sandbox, retry_after_s=5) from None
    spec = front.roster.specs.get(sandbox)
    if status is not None and status.phase is Phase.READY and spec is not None:
        return spec
    why = status.because if status is not None else "it is gone"
    if status is not None and status.kill_reason in (KillReason.START_REFUSED, KillReason.NODE_SHUTDOWN):
        raise Unavailable("Failed to place sandbox", which=sandbox, why=why, retry_after_s=1)
    raise Internal("Failed to place sandbox", which=sandbox, why=why)


async def _outcome(front: Front, sandbox: SandboxId) -> SandboxStatus | None:
    """The status in which its start ended. Raises NoFreeSlot or Unavailable when no node took it, DeadlinePassed."""
    statuses, room_s = front.roster.statuses, min(front.room_s, front.ready_s)
    try:
        return await statuses.wait_for(sandbox, _settled, within_s=room_s)
    except DeadlinePassed:
        spec = front.roster.specs.get(sandbox)
        if spec is None:
            raise
    if spec.node is not None:
        return await statuses.wait_for(sandbox, _settled, within_s=front.ready_s - room_s)
    await order_stop(front, sandbox, KillReason.START_FAILED, by="api: no room")
    raise _no_room(front)


def _no_room(front: Front) -> Unavailable:
    """What to tell whom no node took: that they are full, or that none may take any (then nobody's end helps)."""
    nodes = [drains.read(front, NodeId(id))[0] for id in sorted(front.nodes.ids())]
    if nodes and not any(node.schedulable for node in nodes):
        why = "; ".join(f"{node.id} {node.why_not}" for node in nodes)
        return Unavailable("no node takes sandboxes now", why=why, retry_after_s=front.room_s)
    return NoFreeSlot("no room for another sandbox", now="retry when one has ended", retry_after_s=front.room_s)


async def order_stop(front: Front, sandbox: SandboxId, reason: KillReason, *, by: str) -> bool:
    """Write the stop order once. False when the sandbox is gone already."""

    def told(_: SandboxSpec, spec: SandboxSpec) -> LoggedEvent:
        return LoggedEvent(
            at=front.clock.wall(),
            kind="sandbox.stop_ordered",
            subject=sandbox,
            actor=by,
            because=f"stopped by {by}",
            facts={"reason": reason.value},
            team=spec.team,
        )

    return await change(front, sandbox, lambda spec: _stopped(front, spec, reason, by), tell=told) is not None


def _stopped(front: Front, spec: SandboxSpec, reason: KillReason, by: str) -> SandboxSpec:
    if spec.stop is not None:
        return spec
    return msgspec.structs.replace(spec, stop=StopOrder(reason=reason, by=by, at=front.clock.wall()))


async def change(front: Front, sandbox: SandboxId, edit: Edit, *, tell: Tell) -> int | None:
    """Apply `edit(spec) -> spec` under compare-and-swap. Returns the revision, None when the sandbox is gone.

    `tell(before, after)` is the change as a line of the event log, written in the same commit.

    One at a time per sandbox, so that callers never lose to each other, however many they are. Against others it is
    bounded: eight lost races in a row raise Conflict; each loss means that somebody else made progress. A race is lost
    before what won it can be read: so there is a pause after each.
    """
    async with front.turns.of(keys.SANDBOX_SPEC + sandbox):
        for lost in range(RACES_MAX):
            record = front.store.get(keys.SANDBOX_SPEC + sandbox)
            if record is None:
                return None
            before = msgspec.json.decode(record.value, type=SandboxSpec)
            after = edit(before)
            if after == before:
                return record.mod_revision
            try:
                changed = Put(record.key, msgspec.json.encode(after), labels=None, expect=record.mod_revision)
                return await front.store.commit([changed, line(front, tell(before, after))], by="api")
            except RevisionConflict:
                await asyncio.sleep(RACE_S * 2**lost)
    raise Conflict("the sandbox is being changed by others", which=sandbox, now="try again")
