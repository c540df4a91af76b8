"""A Snapshot: what was kept of a sandbox on disk. Made by pausing to disk, or by a checkpoint of a running sandbox.

A sandbox paused to disk *is* its snapshot: once it is parked nothing of it runs, its spec and status are removed, and
a resume makes the same id anew from the snapshot. A sandbox paused in memory is frozen on its node, and no snapshot.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.model.ids import NodeId, SandboxId, SnapshotId, TeamId
from penstock.model.sandbox import SandboxSpec


class SnapshotKind(StrEnum):
    PAUSED = "paused"  # its sandbox can be resumed from it, and only that
    CHECKPOINT = "checkpoint"  # a template: any number of sandboxes start from it


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Written by the node once the image is verified on its disk. Labels: team, sandbox, kind.

    Everything acknowledged to the sandbox's clients before `durable_up_to` (wall seconds) is in it. `memory` is False
    for what this tier can do: it restarts cold, with a new boot id.
    """

    id: SnapshotId
    kind: SnapshotKind
    sandbox: SandboxId
    team: TeamId
    node: NodeId  # where its image lies
    spec: SandboxSpec  # as it was when it was taken
    created_at: float
    durable_up_to: float
    disk_bytes: int = 0  # of the image, as used on the host
    started_at: float = 0.0  # of the sandbox it was taken of
    name: str = ""  # as the caller named it; empty: by its id
    because: str = ""
    memory: bool = False
