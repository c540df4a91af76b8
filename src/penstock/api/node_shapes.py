"""The bodies of the node API: E2B's `Node` and `NodeDetail` as far as they are true here, and our drains.

What a node does not report (create counters, CPU family) is left out rather than told as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StrictBool

from penstock import __version__
from penstock.api.shapes import Body, rfc3339
from penstock.model.drain import Disposition, DrainOrder, DrainPlan, DrainReport, Foreseen, Outcome, Waiting
from penstock.model.node import NodeSpec, NodeStatus, NodeWord
from penstock.model.sandbox import TERMINAL, Phase, SandboxSpec, SandboxStatus

CLUSTER_ID: Final = "00000000-0000-0000-0000-000000000000"  # E2B's id of the cluster one is in
SECONDS_MAX: Final = 30 * 86_400.0
OUTCOME_ERROR_CHARS_MAX: Final = 2_000

# E2B's words; `connecting` describes a channel that we do not have, so nobody can ask for it.
WORDS: Final[dict[str, NodeWord]] = {
    "ready": NodeWord.HEALTHY,
    "healthy": NodeWord.HEALTHY,
    "standby": NodeWord.STANDBY,
    "draining": NodeWord.DRAINING,
    "unhealthy": NodeWord.UNHEALTHY,
}
_SHOWN: Final = {NodeWord.HEALTHY: "ready"}

Seconds = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
Reason = Annotated[str, Field(max_length=500)]


class NodeStatusChange(Body):
    status: Literal["ready", "healthy", "standby", "draining", "unhealthy"]
    clusterID: Annotated[str, Field(max_length=128)] | None = None
    forceStop: StrictBool = False


class Cordon(Body):
    reason: Reason = ""


class DrainAsked(Body):
    """Seconds from now. No `hardS`: it waits for ever. No `disposition`: each sandbox's own, then the node's."""

    softS: Seconds | None = None
    hardS: Seconds | None = None
    propagationS: Seconds = 0.0
    disposition: Disposition | None = None
    reason: Reason = ""


class DrainApplied(DrainAsked):
    """Bound to a plan by its digest, or with `yes` to whatever the plan of the moment is."""

    planDigest: Annotated[str, Field(max_length=64)] | None = None
    yes: StrictBool = False
    force: StrictBool = False


class Extension(Body):
    """Seconds from now; never sooner than the present deadline."""

    softS: Seconds | None = None
    hardS: Seconds | None = None


def node(
    spec: NodeSpec, status: NodeStatus, sandboxes: Sequence[tuple[SandboxSpec, SandboxStatus | None]]
) -> dict[str, Any]:
    """One row of GET /nodes. `sandboxes` are those bound to it."""
    living = [(one, at) for one, at in sandboxes if at is not None and at.phase not in TERMINAL | {Phase.PENDING}]
    return {
        "id": status.id,
        "serviceInstanceID": status.boot_id,
        "clusterID": CLUSTER_ID,
        "version": __version__,
        "status": word(spec),
        "statusChangedAt": rfc3339(spec.changed_at or status.started_at),
        "sandboxCount": len(living),
        "sandboxStartingCount": sum(at.phase in (Phase.CREATING, Phase.STARTING) for _, at in living),
        "metrics": {
            "allocatedCPU": sum(one.limits.cpu_milli for one, _ in living) / 1000,
            "cpuCount": status.cpu_count,
            "allocatedMemoryBytes": sum(one.limits.memory_bytes_max for one, _ in living),
            "memoryTotalBytes": status.memory_bytes,
        },
        "sandboxesMax": status.sandboxes_max,
        "schedulable": spec.schedulable,
        "whyNot": spec.why_not,
        "cordoned": spec.cordoned,
        "cordonReason": spec.cordon_reason,
        "unhealthy": spec.unhealthy,
        "epoch": spec.epoch,
        "drain": drain(spec, status.drain),
    }


def word(spec: NodeSpec) -> str:
    """In E2B's words."""
    return _SHOWN.get(spec.word, spec.word.value)


def node_detail(
    spec: NodeSpec, status: NodeStatus, sandboxes: Sequence[tuple[SandboxSpec, SandboxStatus | None]]
) -> dict[str, Any]:
    """GET /nodes/{id}."""
    body = node(spec, status, sandboxes)
    body |= {
        "installation": status.installation,
        "startedAt": rfc3339(status.started_at),
        "isolation": list(status.isolation),
        "disposition": spec.disposition.value if spec.disposition is not None else None,
        "sandboxes": [
            {"sandboxID": one.id, "phase": at.phase.value, "because": at.because}
            for one, at in sandboxes
            if at is not None and at.phase not in TERMINAL
        ],
    }
    return body


def drain(spec: NodeSpec, told: DrainReport | None) -> dict[str, Any] | None:
    """The drain that is ordered, and how far it is; None when the node is not to drain."""
    if spec.drain is None:
        return None
    ours = told if told is not None and told.epoch == spec.epoch else None
    progress = report(ours) if ours is not None else {"epoch": spec.epoch, "stage": "ordered", "succeeded": None}
    return progress | order(spec.drain)


def order(asked: DrainOrder) -> dict[str, Any]:
    return {
        "reason": asked.reason,
        "by": asked.by,
        "softAt": _moment(asked.soft_at),
        "hardAt": _moment(asked.hard_at),
        "propagationS": asked.propagation_s,
        "disposition": asked.disposition.value if asked.disposition is not None else None,
        "forceNumber": asked.force_number,
        "plan": asked.plan,
    }


def report(told: DrainReport) -> dict[str, Any]:
    return {
        "node": told.node,
        "epoch": told.epoch,
        "stage": told.stage.value,
        "reason": told.reason,
        "beganAt": rfc3339(told.began_at),
        "endedAt": _moment(told.ended_at or None),
        "succeeded": told.succeeded,
        "starts": told.starts,
        "builds": told.builds,
        "live": told.live,
        "quarantined": told.quarantined,
        "waiting": [_waiting(each) for each in told.waiting],
        "fates": told.fates,
        "forcedNumber": told.forced_number,
        "forceErrors": list(told.force_errors),
    }


def receipt(told: DrainReport, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    return report(told) | {"outcomes": [outcome(each) for each in outcomes]}


def outcome(each: Outcome) -> dict[str, Any]:
    return {
        "sandboxID": each.sandbox,
        "fate": each.fate.value,
        "at": rfc3339(each.at),
        "because": each.because,
        "error": each.error[:OUTCOME_ERROR_CHARS_MAX],
    }


def plan(made: DrainPlan) -> dict[str, Any]:
    return {
        "node": made.node,
        "epoch": made.epoch,
        "digest": made.digest,
        "foreseen": [foreseen(each) for each in made.foreseen],
        "blocks": list(made.blocks),
    }


def foreseen(each: Foreseen) -> dict[str, Any]:
    return {
        "sandboxID": each.sandbox,
        "fate": each.fate.value,
        "by": _moment(each.by),
        "loses": each.loses,
        "because": each.because,
    }


def changes(before: DrainPlan, after: DrainPlan) -> list[dict[str, Any]]:
    """Whose fate is another one than in the plan before; `was` or `becomes` is None for who came or went."""
    was = {each.sandbox: each for each in before.foreseen}
    becomes = {each.sandbox: each for each in after.foreseen}
    moved = (id for id in sorted(was | becomes) if _gist(was.get(id)) != _gist(becomes.get(id)))
    return [{"sandboxID": id, "was": _fate(was.get(id)), "becomes": _fate(becomes.get(id))} for id in moved]


def _gist(each: Foreseen | None) -> tuple[str, str] | None:
    return None if each is None else (each.fate.value, each.loses)


def _fate(each: Foreseen | None) -> str | None:
    return None if each is None else each.fate.value


def _waiting(each: Waiting) -> dict[str, Any]:
    return {
        "sandboxID": each.sandbox,
        "next": each.next.value if each.next is not None else None,
        "at": _moment(each.at),
        "because": each.because,
    }


def _moment(wall_s: float | None) -> str | None:
    return None if wall_s is None else rfc3339(wall_s)
