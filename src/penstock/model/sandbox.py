"""The Sandbox: what was asked (spec), what is (status), and the one table of its phases.

Spec and status are two records in the store, because they have two writers: the front door writes the spec (and
`control` its `node`), the node writes the status. `model.writers` says so, and a test holds them to it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from penstock.model.drain import Disposition
from penstock.model.ids import BuildId, NodeId, SandboxId, SnapshotId, TeamId

CPU_MILLI_DEFAULT: Final = 2000
CPU_MILLI_MAX: Final = 32_000
MEMORY_BYTES_DEFAULT: Final = 1024 * 1024 * 1024
MEMORY_BYTES_MIN: Final = 128 * 1024 * 1024
DISK_BYTES_DEFAULT: Final = 1024 * 1024 * 1024
DISK_INODES_DEFAULT: Final = 131_072
# Processes and threads. Every fork and exit takes the kernel's lock of each mapped file, and sandboxes share the libc
# of an image: the processes of a fork bomb queue for it, each turn waits until its process runs, and a neighbour's exec
# queues behind them all. On 2 cores a neighbour's p99 was 1.8 times the quiet one with 512, 2.8 with 1,024, 4.3 with
# 2,048; its longest wait 0.1 s, 0.7 and 1.3.
PIDS_DEFAULT: Final = 512
TIMEOUT_S_DEFAULT: Final = 15.0  # the API's default; the SDKs always send 300


class Phase(StrEnum):
    PENDING = "pending"  # wanted, no node yet
    BOUND = "bound"  # a node was chosen, it has not said yes
    CREATING = "creating"  # the node takes kernel objects, each recorded first
    STARTING = "starting"  # pid 1 runs, the guest has not answered
    READY = "ready"
    PAUSED = "paused"  # frozen, memory kept
    DRAINING = "draining"  # notice given, still serving
    STOPPING = "stopping"  # killed, release not verified
    UNWINDING = "unwinding"  # a start failed, release not verified
    QUARANTINED = "quarantined"  # a release failed; reap retries
    UNKNOWN = "unknown"  # the node cannot tell: never killed, never forgotten
    LOST = "lost"  # its node is gone
    STOPPED = "stopped"  # verified gone
    FAILED = "failed"  # never became ready; verified gone


class Event(StrEnum):
    BIND = "bind"
    REFUSE = "refuse"
    ACCEPT = "accept"
    STARTED = "started"
    GUEST_HELLO = "guest_hello"
    PAUSE = "pause"
    RESUME = "resume"
    EVICT = "evict"
    SPARE = "spare"
    EMPTY = "empty"
    DEADLINE = "deadline"
    KILL = "kill"
    DIED = "died"
    FAULT = "fault"
    CLEAN = "clean"
    GONE = "gone"
    PINNED = "pinned"
    REAPED = "reaped"
    DOUBT = "doubt"
    NODE_LOST = "node_lost"
    FOUND_READY = "found_ready"
    FOUND_GONE = "found_gone"
    CANCEL = "cancel"


# What a sandbox of a tier can do, as words of the API.
PAUSE_ON_NODE: Final = "pause-memory-on-node"  # frozen: it does not outlive the node
PAUSE_TO_DISK: Final = "pause-filesystem"
CHECKPOINT_DISK: Final = "checkpoint-filesystem"
CAPABILITIES: Final = (PAUSE_ON_NODE, PAUSE_TO_DISK, CHECKPOINT_DISK)

_P, _E = Phase, Event
_LIVE: Final = (_P.READY, _P.PAUSED, _P.DRAINING)

TRANSITIONS: Final[dict[tuple[Phase, Event], Phase]] = {
    (_P.PENDING, _E.BIND): _P.BOUND,
    (_P.PENDING, _E.CANCEL): _P.STOPPED,
    (_P.BOUND, _E.REFUSE): _P.PENDING,
    (_P.BOUND, _E.ACCEPT): _P.CREATING,
    (_P.BOUND, _E.CANCEL): _P.STOPPED,
    (_P.BOUND, _E.FAULT): _P.UNWINDING,
    (_P.BOUND, _E.NODE_LOST): _P.PENDING,
    (_P.CREATING, _E.STARTED): _P.STARTING,
    (_P.CREATING, _E.FAULT): _P.UNWINDING,
    (_P.STARTING, _E.GUEST_HELLO): _P.READY,
    (_P.STARTING, _E.FAULT): _P.UNWINDING,
    (_P.STARTING, _E.DIED): _P.UNWINDING,
    (_P.READY, _E.PAUSE): _P.PAUSED,
    (_P.PAUSED, _E.RESUME): _P.READY,
    **{(phase, _E.EVICT): _P.DRAINING for phase in (_P.READY, _P.PAUSED)},
    (_P.DRAINING, _E.SPARE): _P.READY,
    (_P.DRAINING, _E.PAUSE): _P.PAUSED,
    (_P.DRAINING, _E.EMPTY): _P.STOPPING,
    (_P.DRAINING, _E.DEADLINE): _P.STOPPING,
    **{(phase, _E.KILL): _P.STOPPING for phase in _LIVE},
    **{(phase, _E.DIED): _P.STOPPING for phase in _LIVE},
    **{(phase, _E.DOUBT): _P.UNKNOWN for phase in (_P.CREATING, _P.STARTING, *_LIVE, _P.STOPPING, _P.UNWINDING)},
    (_P.UNKNOWN, _E.FOUND_READY): _P.READY,
    (_P.UNKNOWN, _E.FOUND_GONE): _P.STOPPING,
    (_P.UNKNOWN, _E.KILL): _P.STOPPING,
    **{(phase, _E.NODE_LOST): _P.LOST for phase in (_P.CREATING, _P.STARTING, *_LIVE, _P.STOPPING, _P.UNKNOWN)},
    (_P.LOST, _E.FOUND_READY): _P.READY,
    (_P.LOST, _E.FOUND_GONE): _P.STOPPING,
    (_P.UNWINDING, _E.CLEAN): _P.FAILED,
    (_P.UNWINDING, _E.PINNED): _P.QUARANTINED,
    (_P.STOPPING, _E.GONE): _P.STOPPED,
    (_P.STOPPING, _E.PINNED): _P.QUARANTINED,
    (_P.QUARANTINED, _E.REAPED): _P.STOPPED,
}
TERMINAL: Final = frozenset({Phase.STOPPED, Phase.FAILED})
SERVING: Final = frozenset({Phase.READY, Phase.DRAINING})


class Isolation(StrEnum):
    """The tier a sandbox runs under. Stated on each sandbox, never silently lowered."""

    NAMESPACE = "namespace"


class KillReason(StrEnum):
    REQUEST = "request"
    TIMEOUT = "timeout"
    ADMIN = "admin"
    CRASHED = "crashed"
    START_FAILED = "start_failed"
    START_REFUSED = "start_refused"  # likewise, but for a cause that passes: another try may succeed
    NODE_SHUTDOWN = "node_shutdown"
    PAUSED = "paused"  # parked: it lives on as a snapshot
    REBOOT = "reboot"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel will enforce. CPU in milli-CPUs of quota, sizes in bytes."""

    cpu_milli: int = CPU_MILLI_DEFAULT
    memory_bytes_max: int = MEMORY_BYTES_DEFAULT
    pids_max: int = PIDS_DEFAULT
    disk_bytes_max: int = DISK_BYTES_DEFAULT
    disk_inodes_max: int = DISK_INODES_DEFAULT


class EgressRules(msgspec.Struct, frozen=True, kw_only=True):
    """What may leave the sandbox. Allow wins over deny; private ranges need an explicit allow.

    `allow` and `deny` hold IPv4 addresses or CIDRs, `allow_domains` host names (`*` and `*.suffix` too).
    `internet=False` denies everything that `allow` does not name.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    allow_domains: tuple[str, ...] = ()
    internet: bool = True


class StopOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The caller's wish that the sandbox end. Written once; a second order changes nothing."""

    reason: KillReason
    by: str  # who asked: a key's id, "expiry", "operator"
    at: float  # wall seconds


class OnTimeout(StrEnum):
    """What its end (`end_at`) means."""

    KILL = "kill"
    PAUSE = "pause"  # frozen on its node: memory kept, for as long as the node lives
    PARK = "park"  # paused to disk: memory freed, restarts cold


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A wish for a snapshot of the running sandbox. Done once per id; the snapshot, or `checkpoint_failed`, answers."""

    id: SnapshotId
    name: str = ""


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. Written by `api`; `node` alone by `control`. Times are wall seconds since the epoch."""

    id: SandboxId
    team: TeamId
    template: str  # as the caller named it
    build: BuildId
    limits: Limits
    created_at: float
    end_at: float
    secure: bool = True
    traffic_private: bool = False  # allowPublicTraffic=false: user ports need the traffic token
    mask_request_host: str | None = None
    metadata: dict[str, str] = {}
    env: dict[str, str] = {}
    egress: EgressRules = EgressRules()
    isolation: Isolation = Isolation.NAMESPACE
    frozen: bool = False  # wanted paused in memory; see `wants_frozen`
    park: SnapshotId | None = None  # wanted paused to disk, as this snapshot; never taken back
    on_timeout: OnTimeout = OnTimeout.KILL
    auto_resume: bool = False  # a request to a paused sandbox resumes it
    timeout_s: float = 300.0  # as it was created with: what an auto-resume gives it
    snapshot: SnapshotId | None = None  # its disk begins as a copy of this one's
    checkpoint: Checkpoint | None = None
    on_drain: Disposition | None = None  # its template's or its creator's word; None: the node's
    node: NodeId | None = None
    stop: StopOrder | None = None


class SandboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is. Written by the node that runs the sandbox (PENDING and BOUND are implied by a spec without status)."""

    id: SandboxId
    phase: Phase
    node: NodeId
    team: TeamId
    because: str = ""  # one line a person understands: why it is in this phase
    spec_revision: int = 0  # revision of the last spec whose egress rules and expiry are in force
    kill_reason: KillReason | None = None
    pid: int = 0  # pid 1 of the sandbox, in the host's pid namespace
    start_ticks: int = 0  # field 22 of /proc/<pid>/stat; with boot_id it identifies the process for ever
    boot_id: str = ""
    slot: int = -1
    address: str = ""  # the slot's outer IPv4 address
    guest_socket: str = ""  # unix socket path of the guest protocol, on the host
    started_at: float = 0.0  # wall: the guest first answered
    stopped_at: float = 0.0
    steps_ms: dict[str, float] = {}  # the create path, step by step
    durable_up_to: float = 0.0  # wall: what was acknowledged before is on the node's disk; 0: nothing was asked to be
    checkpoint_done: SnapshotId | None = None  # the last checkpoint that was answered
    checkpoint_failed: str = ""  # why that one failed; empty: it did not
    capabilities: tuple[str, ...] = ()  # of CAPABILITIES


def wants_frozen(spec: SandboxSpec, now: float) -> bool:
    """Whether it should lie frozen: because somebody said so, or because its end has come and means that."""
    return spec.frozen or (spec.on_timeout is OnTimeout.PAUSE and spec.end_at <= now)


def wants_parked(spec: SandboxSpec, now: float) -> SnapshotId | None:
    """The snapshot it should become, if it should. One that parks at its end is named by that end.

    Frozen by somebody's wish it stays so: its end does not take the memory that the wish was about.
    """
    if spec.park is not None:
        return spec.park
    if spec.on_timeout is OnTimeout.PARK and spec.end_at <= now and not spec.frozen:
        return SnapshotId(f"{spec.id}-{int(spec.end_at * 1000)}")
    return None
